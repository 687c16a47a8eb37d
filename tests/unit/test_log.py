"""Standard error: lines for people, or one JSON object per line whoever prints."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.cli.command import Interrupted, run
from splatshard.jobs.cli.log import configure, log, log_format, log_to_stderr, structured
from splatshard.jobs.cli.text import say
from splatshard.pipeline.data import ImageDataset
from splatshard.schemas.errors import StorageError
from tests.make import jpeg, write_tar
from tests.web import served

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def text_afterwards(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> Iterator[None]:
    monkeypatch.delenv("SPLATSHARD_DEBUG", raising=False)
    with log_to_stderr():
        yield


def events(capsys: Capsys) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_people_see_the_message_and_no_details(capsys: Capsys) -> None:
    log("retry", "shard 3 again", level="warning", trace="a trace\n", shard="3", kind="oom")
    log("shard_done", "shard 3 done", detail=True, shard="3")
    assert capsys.readouterr().err == "shard 3 again\n"


def test_people_who_debug_see_details_and_traces(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    log("retry", "shard 3 again", trace="a trace\n", shard="3")
    log("shard_done", "shard 3 done", detail=True)
    assert capsys.readouterr().err == "a trace\nshard 3 again\nshard 3 done\n"


def test_json_has_every_event_with_its_fields(capsys: Capsys) -> None:
    configure("json")
    assert structured()
    message = 'a "quoted"\nmessage, é'
    log("retry", message, level="warning", trace="a trace\n", shard="3", uid=None)
    log("shard_done", "shard 3 done", detail=True, counts={"ok": 2})
    retry, done = events(capsys)
    assert datetime.fromisoformat(retry.pop("time")).utcoffset() == timedelta(0)
    assert retry == {
        "level": "warning",
        "event": "retry",
        "message": message,
        "shard": "3",
        "trace": "a trace\n",
    }
    assert (done["event"], done["level"], done["counts"]) == ("shard_done", "info", {"ok": 2})


def test_what_others_print_becomes_json_too(capsys: Capsys) -> None:
    configure("json")
    print("in", "parts", file=sys.stderr)
    print("two\n\nlines", file=sys.stderr)
    sys.stderr.write("no end")
    configure("text")
    print("text again", file=sys.stderr)
    *lines, last = capsys.readouterr().err.splitlines()
    found = [(e["event"], e["message"]) for e in map(json.loads, lines)]
    assert found == [("output", m) for m in ("in parts", "two", "lines", "no end")]
    assert last == "text again"


def test_secrets_are_struck_out(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush/+1")
    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    secret = "hush/+1 at https://me:pw@host/"
    log("retry", secret, trace=secret)
    configure("json")
    log("retry", secret, trace=secret, error=secret)
    print(secret, file=sys.stderr)
    err = capsys.readouterr().err
    assert "hush" not in err
    assert "pw" not in err
    assert "***" in err


def test_json_ends_with_the_job(capsys: Capsys) -> None:
    def body() -> int:
        configure("json")
        say("four shards")
        raise StorageError("disk full")

    assert run(body) == 1
    assert not structured()
    note, error = events(capsys)
    assert (note["event"], note["message"]) == ("note", "four shards")
    assert (error["event"], error["level"]) == ("error", "error")
    assert error["message"] == "splatshard: error: disk full"


def test_an_interruption_is_an_event(capsys: Capsys) -> None:
    def body() -> int:
        configure("json")
        raise Interrupted(143, "terminated")

    assert run(body) == 143
    (event,) = events(capsys)
    assert (event["event"], event["message"]) == ("interrupted", "splatshard: terminated")


def test_a_trace_is_a_field(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> int:
        configure("json")
        raise ValueError("a bug")

    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    assert run(body) == 1
    (event,) = events(capsys)
    assert "ValueError: a bug" in event["trace"]


# What others say, through `logging` and `warnings`


def test_records_of_others_are_written_as_they_were_without_a_handler(capsys: Capsys) -> None:
    logger = logging.getLogger("splatshard.pipeline.some.module")
    logger.info("not shown")
    logger.warning("%d shards at %s", 2, "https://me:pw@host/")
    try:
        raise ValueError("a bug")
    except ValueError:
        logger.exception("it failed")
    first, second, *trace = capsys.readouterr().err.splitlines()
    assert (first, second) == ("2 shards at https://***@host/", "it failed")
    assert (trace[0], trace[-1]) == ("Traceback (most recent call last):", "ValueError: a bug")


def test_records_of_others_are_events(capsys: Capsys) -> None:
    configure("json")
    logging.getLogger("splatshard.pipeline.some.module").warning("at %s", "https://me:pw@host/")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # in this context, too
        warnings.warn("old https://me:pw@host/", DeprecationWarning, stacklevel=1)
    logging.getLogger("other").critical("worse than an error")
    ours, warning, critical = events(capsys)
    assert ours.pop("time")
    assert ours == {
        "level": "warning",
        "event": "log",
        "message": "at https://***@host/",
        "logger": "splatshard.pipeline.some.module",
    }
    assert (warning["logger"], warning["level"]) == ("py.warnings", "warning")
    assert "DeprecationWarning: old https://***@host/" in warning["message"]
    assert (critical["logger"], critical["level"]) == ("other", "error")


def test_a_job_leaves_logging_as_it_was() -> None:
    root, before = logging.getLogger(), warnings.showwarning
    with log_to_stderr():
        pass
    assert any(type(handler).__name__ == "StderrHandler" for handler in root.handlers)  # fixture's
    handlers = list(root.handlers)

    def body() -> int:
        configure("json")
        assert log_format() == "json"
        return 0

    assert run(body) == 0
    assert (root.handlers, warnings.showwarning, log_format()) == (handlers, before, "text")


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_is_gone_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    say("nobody reads this")


@pytest.fixture
def signed_url(tmp_path: Path) -> Iterator[str]:
    """A tar on the web, behind a signature, with an image that does not decode."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("1.jpg", b"\xff\xd8 broken")])
    with served(tmp_path) as address:
        yield f"{address}/a.tar?jwt=hunter2"


def read_images(url: str) -> int:
    """Warns that a sample of `url` does not decode."""
    assert len(list(ImageDataset(url, batch_size=2, image_size=32, shuffle=False))) == 1
    return 0


WORKER = """
import sys, warnings
from splatshard.jobs.driver.worker import FitActor
from tests.unit.test_log import read_images
url, log_format = sys.argv[1:]
FitActor({}, None, log_format)
read_images(url)
warnings.warn(url)
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_warning_of_the_pipeline_hides_signatures(
    log_format: Any, signed_url: str, capsys: Capsys
) -> None:
    """In the driver, and in a worker."""

    def body() -> int:
        configure(log_format)
        return read_images(signed_url)

    assert run(body) == 0
    command = [sys.executable, "-c", WORKER, signed_url, log_format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = signed_url.replace("jwt=hunter2", "***")
    for err, loggers in (
        (capsys.readouterr().err, ["splatshard.pipeline.data.images"]),
        (done.stderr, ["splatshard.pipeline.data.images", "py.warnings"]),
    ):
        assert "hunter2" not in err
        assert f"{shown} sample 1 does not decode" in err
        assert err.count(shown) == len(loggers)
        if log_format == "json":
            assert [json.loads(line)["logger"] for line in err.splitlines()] == loggers
