"""Secrets in addresses and options: struck out wherever something is written down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.evaluate import name_of
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.errors import storage_errors
from splatshard.pipeline.storage.options import (
    is_redacted,
    redact,
    redact_src,
    redact_url,
    redact_urls,
)
from splatshard.pipeline.train import checkpoint
from splatshard.schemas.errors import StorageError
from splatshard.schemas.model import EncoderConfig, ModelConfig
from splatshard.schemas.train import DataConfig, OptimConfig, TrainConfig
from tests.unit.test_storage import s3_error


@pytest.fixture(autouse=True)
def no_options() -> Iterator[None]:
    yield
    fs.use_options({})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:hunter2@host:80/x y", "https://***@host:80/x y"),
        ("https://token@host/x", "https://***@host/x"),
        ("ftp://me:hunter2@host/x", "ftp://***@host/x"),
        ("abfs://box@account.net/x", "abfs://box@account.net/x"),
        ("hf://datasets/me/it@main/x", "hf://datasets/me/it@main/x"),
        ("s3://b/a@b:c", "s3://b/a@b:c"),
        ("no https://h/x?X-Amz-Credential=a&X-Amz-Signature=b, sir", "no https://h/x?*** sir"),
        ("https://h/x?a=b&sig=c#d", "https://h/x?***"),
        ("URL('https://h/x?access_token=c')", "URL('https://h/x?***')"),
        ("https://h/x?versionId=7&part=3", "https://h/x?***"),
        ("HTTPS://Me@h/x?Authorization=Bearer", "HTTPS://***@h/x?***"),
        ("ftp://ME:hunter2@h/x?a", "ftp://***@h/x?a"),
        ("https://h/x?jwt=a, http://i/y?hdnts=exp~acl=/*~hmac=f", "https://h/x?*** http://i/y?***"),
        ("https://h/o'neil.tar?p='a'b", "https://h/o'neil.tar?***"),
        ("https://h/my file.tar?policy=a", "https://h/my file.tar?***"),
        ("https://h/x?a=1::https://i/y?b=2::/z", "https://h/x?***::https://i/y?***::/z"),
        ("https://h/x?a=b::c", "https://h/x?***"),
        (
            "Max retries exceeded with url: /x.tar?jwt=c (Caused",
            "Max retries exceeded with url: /x.tar?*** (Caused",
        ),
        ("why https://h/x? it is\nin?side", "why https://h/x? it is\nin?side"),
        ("s3://b/{0..9}.tar?versionId=7", "s3://b/{0..9}.tar?versionId=7"),
        ("/data/img?token*.tar", "/data/img?token*.tar"),
    ],
)
def test_secrets_in_urls(text: str, wanted: str) -> None:
    assert redact(text) == wanted
    assert redact(wanted) == wanted
    assert redact_urls(text) == wanted


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://h/a b.tar?sig=a b 'c'\"<d>", "https://h/a b.tar?***"),
        ("HTTP://me:hunter2@h/a.tar?jwt", "HTTP://***@h/a.tar?***"),
        ("https://h/a.tar?", "https://h/a.tar?***"),
        ("s3://me:hunter2@b/a.tar?versionId=7", "s3://***@b/a.tar?versionId=7"),
        ("s3://b/img?/{0..9}.tar", "s3://b/img?/{0..9}.tar"),
        ("/data/what?.tar", "/data/what?.tar"),
    ],
)
def test_addresses_without_secrets(url: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a.tar")  # a secret that is also a name
    assert redact_url(url) == wanted
    assert redact_url(wanted) == wanted
    assert is_redacted(wanted) == ("***" in wanted)
    assert redact_src(f"{url}::in/b.tar") == f"{wanted}::in/b.tar"


def test_secrets_of_the_options_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoG")
    options: dict[str, Any] = {"key": "AKIA1", "secret": "hunter2", "endpoint_url": "http://host"}
    options["client_kwargs"] = {"aws_secret_access_key": "hunter3", "region_name": "moon-1"}
    options["gs"] = {"token": {"private_key": "BEGIN", "project": "mine"}}
    options["https"] = {
        "headers": {"X-Guest": "Bearer hunter4"},
        "client_kwargs": {"cookies": {"a": "hunter5"}},
    }
    fs.use_options(options)
    text = redact(
        "AKIA1 hunter2 hunter3 BEGIN wJalr FwoG Bearer hunter4 hunter5 http://host moon-1"
    )
    assert text == "*** *** *** *** *** *** *** *** http://host moon-1"
    with (
        pytest.raises(StorageError, match=r"^cannot write s3://b/x: SignatureDoesNotMatch not \*"),
        storage_errors("s3://b/x"),
    ):
        raise s3_error("SignatureDoesNotMatch", 403, "not AKIA1")


def test_a_checkpoint_keeps_no_query(tmp_path: Path) -> None:
    """A run that goes on may be given its sources anew, so it is no other configuration."""
    src = "https://me:hunter2@h/splats?jwt=hunter3::s3://b/splats"
    config = TrainConfig(
        stage="classify",
        dst=str(tmp_path),
        model=ModelConfig(encoder=EncoderConfig(), num_classes=2),
        data=DataConfig(src=src),
        optim=OptimConfig(steps=1),
    )
    url = checkpoint.save(config.dst, 1, {}, None, {}, config, {"data": "x"}, keep=1)
    text = (Path(url) / "config.json").read_text()
    assert "hunter" not in text
    assert "https://***@h/splats?***::s3://b/splats" in text
    checkpoint.refuse_changes(checkpoint.read_checkpoint(url), config)


def test_an_evaluation_is_not_named_by_a_query() -> None:
    assert name_of("https://h/cars/test?jwt=hunter2") == "cars/test"
