"""What a process of Ray Train shows: its log is ours; neither that nor its errors have secrets."""

from __future__ import annotations

import io
import json
import logging
import traceback
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from splatshard.jobs.cli.log import log_to_stderr
from splatshard.jobs.driver import ray_train
from splatshard.pipeline.storage import fs
from splatshard.pipeline.train import loop
from splatshard.schemas.errors import UnavailableError, UsageError
from tests.unit.train_steps import config_of

SECRETS = "hunter2 at https://me:hunter3@h/splats?jwt=hunter4"
SHOWN = "*** at https://***@h/splats?***"


@pytest.fixture
def theirs() -> Iterator[io.StringIO]:
    """What the handler writes that Ray Train has given the root logger."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers = list(root.handlers)
    with log_to_stderr():
        root.addHandler(logging.StreamHandler(stream))
        yield stream
    root.handlers[:] = handlers
    fs.use_options({})


def run_worker(monkeypatch: pytest.MonkeyPatch, train: Any, log_format: str = "text") -> None:
    """`train_worker` as Ray Train calls it, with `train` in place of training."""
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(ray_train.ray, "get", lambda value: value)
    orders = SimpleNamespace(
        given=SimpleNamespace(
            remote=lambda: (config_of("classify", device="cpu"), {"secret": "hunter2"})
        ),
        look=SimpleNamespace(remote=lambda: 15),
    )
    queue = SimpleNamespace(put=lambda record: None)
    ray_train.train_worker({"queue": queue, "orders": orders, "log_format": log_format})


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_worker_logs_has_no_secrets(
    log_format: str,
    theirs: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(*_: Any) -> None:
        logging.getLogger("splatshard.pipeline.data.images").warning("seen: %s", SECRETS)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(False)
            logging.captureWarnings(True)  # in this context, too
            warnings.warn(f"warned: {SECRETS}", stacklevel=1)

    run_worker(monkeypatch, train, log_format)
    err = capsys.readouterr().err
    assert "hunter" not in err
    messages = (
        [json.loads(e)["message"] for e in err.splitlines()] if log_format == "json" else [err]
    )
    assert f"seen: {SHOWN}" in messages[0]
    assert f"warned: {SHOWN}" in messages[-1]
    assert theirs.getvalue() == ""


@pytest.mark.parametrize("kind", [UsageError, UnavailableError, ValueError])
def test_what_a_worker_raises_has_no_secrets(
    kind: type[Exception], theirs: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train logs the whole traceback, with the errors that led to this one. Ours stay what they
    are: which kind it is decides whether all processes start again."""

    def train(*_: Any) -> None:
        try:
            raise OSError(SECRETS)
        except OSError as e:
            raise kind(f"failed: {SECRETS}") from e

    wanted = RuntimeError if kind is ValueError else kind
    with pytest.raises(wanted, match="failed: ") as raised:
        run_worker(monkeypatch, train)
    text = "".join(traceback.format_exception(raised.value))
    assert SHOWN in text
    assert "hunter" not in text
    assert type(raised.value) is wanted


def test_errors_without_secrets_stay_as_they_are(
    theirs: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("a bug")

    def train(*_: Any) -> None:
        raise error

    with pytest.raises(ValueError, match="a bug") as raised:
        run_worker(monkeypatch, train)
    assert raised.value is error
