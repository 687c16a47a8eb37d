"""S3 that refuses or ignores conditions: the remedy is named, secrets are seen nowhere."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from splatshard.pipeline.shards.commit import (
    check_destination,
    mark_failed,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.source.read import read
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SourceError, StorageError, UnavailableError, UsageError
from tests.integration.s3.faulty import OTHER_JOB, SECRET, Server, assert_one_shard, commit_shard
from tests.rows import config_of, make_ref

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("how", ["deaf", "NotImplemented"])
def test_a_store_without_conditions(
    server: Server, dst: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda request: how if request.conditional else ""
    check_destination(dst)
    assert f"{dst} ignores conditional writes" in caplog.text
    assert "only one at a time" in caplog.text
    first = commit_shard(dst)
    assert commit_shard(dst, f"{OTHER_JOB}1") == first
    with pytest.raises(StorageError, match="another job"):
        commit_shard(dst, f"{OTHER_JOB}2", config_of("webdataset"))
    second = commit_shard(dst, f"{OTHER_JOB}3", config_of("webdataset"), first)
    assert assert_one_shard(server, dst) == second


# Errors and secrets


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDenied", "check what the credentials may do"),
        ("InvalidAccessKeyId", "the access key is unknown: set AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "the secret key is wrong"),
        ("ExpiredToken", "have expired: renew them"),
        ("RequestTimeTooSkewed", "clock is wrong: set it"),
        ("NoSuchBucket", "no such bucket: create it"),
    ],
)
def test_refusals_name_the_remedy(server: Server, dst: str, code: str, remedy: str) -> None:
    server.fault = lambda _: code
    with pytest.raises(StorageError, match=rf"cannot write {dst}/\S+: {code}.*{remedy}.*again"):
        check_destination(dst)
    with pytest.raises(StorageError, match=f"cannot read {dst}: {code}.*{remedy}"):
        read_markers(dst)
    with pytest.raises(SourceError, match=rf"cannot read {dst}/\S+: {code}.*{remedy}"):
        list_shards(f"{dst}/{{0..9}}.tar")
    with (
        pytest.raises(SourceError, match=f"cannot open {dst}/a: {code}.*{remedy}"),
        fs.open_read(f"{dst}/a"),
    ):
        pass
    server.fault = lambda request: "AccessDenied" if request.method == "HEAD" else ""
    with pytest.raises(SourceError, match="403 Forbidden; check the credentials"):
        fs.stat(f"{dst}/a")


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_troubles_that_pass_are_unavailable(server: Server, dst: str, code: str) -> None:
    ref = dataclasses.replace(make_ref(), urls=(f"{dst}/a.tar",))
    server.fault = lambda _: code
    calls: list[Callable[[], object]] = [
        lambda: check_destination(dst),
        lambda: list_shards(f"{dst}/{{0..9}}.tar"),
        lambda: list_shards(f"{dst}/*.tar"),
        lambda: list_shards(dst),
        lambda: fs.exists(f"{dst}/a"),
        lambda: list(read(ref, hashlib.sha256())),
        lambda: commit_shard(dst),
        lambda: mark_failed(dst, make_ref(), config_of(), SourceError("cut")),
        lambda: fs.write_bytes(f"{dst}/_progress.json", b"{}"),
    ]
    for call in calls:
        with pytest.raises(UnavailableError, match="store does not answer as it should"):
            call()


def test_a_missing_bucket_is_said(server: Server) -> None:
    src = "s3://there-is-no-such-bucket/in"
    for pattern in (f"{src}/{{0..9}}.tar", f"{src}/*.tar", src):
        with pytest.raises((SourceError, UsageError), match=r"no such bucket|matches nothing"):
            list_shards(pattern)
    with pytest.raises(StorageError, match="no such bucket"):
        check_destination(src)
    with pytest.raises(StorageError, match="no such bucket"):
        read_markers(src)


def test_an_endpoint_that_nobody_listens_at(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from the environment, and an option goes over it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fs.use_options({})
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        check_destination(dst)
    fs.use_options({"endpoint_url": server.endpoint})
    check_destination(dst)
    fs.use_options({"s3": {"endpoint_url": "http://127.0.0.1:9"}})
    with pytest.raises(UnavailableError):
        fs.stat(f"{dst}/_probe")


def test_without_credentials(
    server: Server, dst: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fs.use_options({})
    with pytest.raises(StorageError, match=r"credentials.*AWS_ACCESS_KEY_ID.*anon"):
        check_destination(dst)
    with pytest.raises(SourceError, match=r"credentials.*AWS_ACCESS_KEY_ID.*anon"):
        fs.stat(f"{dst}/a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    fs.use_options({})
    with pytest.raises(UsageError, match="nobody"):
        check_destination(dst)
    monkeypatch.delenv("AWS_PROFILE")
    fs.use_options({"key": "access", "secret": "another secret"})
    check_destination(dst)


def test_options_that_the_driver_does_not_know(server: Server, dst: str) -> None:
    fs.use_options({"secrt": SECRET})
    with pytest.raises(UsageError, match=r"--storage-options.*secrt") as caught:
        check_destination(dst)
    assert SECRET not in str(caught.value)


def test_secrets_are_seen_nowhere(
    server: Server, dst: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG", "pipeline")
    fs.use_options({"key": "access-never-seen", "secret": f"{SECRET}-2"})
    texts = []
    for code in ("SignatureDoesNotMatch", "AccessDenied", "InternalError"):
        server.fault = lambda _, code=code: f"{code}"
        for call in (check_destination, read_markers, list_shards):
            with pytest.raises((StorageError, SourceError, UnavailableError)) as caught:
                call(dst)
            texts.append(str(caught.value))
    server.fault = lambda _: ""
    secret = f"cannot read it with access-never-seen and {SECRET}-2 or {SECRET}"
    mark_failed(dst, make_ref(), config_of(), SourceError(secret))
    commit_shard(dst, config=config_of("webdataset"))
    texts += [fs.read_bytes(f"{dst}/{n}").decode() for n in server.names(dst) if "json" in n]
    assert len(texts) == 10
    for text in (*texts, caplog.text):
        assert "never" not in text, text
