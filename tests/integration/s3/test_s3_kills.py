"""Commits to S3 whose answers are lost, that are killed at any request, whose uploads break."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.shards.commit import (
    clean_attempts,
    clean_staging,
    mark_failed,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import atomic, fs
from splatshard.schemas.errors import SourceError, UnavailableError
from splatshard.schemas.shard import ShardManifest
from tests.integration.s3.faulty import (
    JOB,
    OTHER_JOB,
    Request,
    Server,
    assert_one_shard,
    commit_shard,
)
from tests.rows import config_of, make_ref

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("stale", [False, True])
def test_the_lost_answer_of_a_marker_is_recognised(
    server: Server, dst: str, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore repeats the write and is refused by its own first attempt."""
    old = commit_shard(dst, config=config_of("webdataset")) if stale else None
    atomic.keeps_conditions(dst)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    fs.use_options({})
    lost: list[Request] = []

    def lose(request: Request) -> str:
        if request.method == "PUT" and request.key.endswith("00000000.json"):
            lost.append(request)
            return "lost" if len(lost) == 1 else ""
        return ""

    server.fault = lose
    manifest = commit_shard(dst, f"{OTHER_JOB}1", replaces=old)
    assert len(lost) == 2 + stale  # a refused etag is offered once more, without its quotes
    assert assert_one_shard(server, dst) == manifest


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_a_kill_at_any_request(server: Server, dst: str, done: bool, stale: bool) -> None:
    """From some request on nothing arrives any more; that one is done or not."""
    old: ShardManifest | None = None
    for step in itertools.count():
        here = f"{dst}/{step}"
        if stale:
            old = commit_shard(here, f"{OTHER_JOB}1", config_of("webdataset"))
            mark_failed(here, make_ref(), config_of(), SourceError("cut"))
        atomic.keeps_conditions(here)
        left = itertools.count(step, -1)

        def die(_: Request, left: Iterator[int] = left) -> str:
            now = next(left)
            return "" if now > 0 else "lost" if now == 0 and done else "InternalError"

        server.fault = die
        try:
            commit_shard(here, f"{JOB}1", replaces=old)
            killed = False
        except UnavailableError:
            killed = True
        server.fault = lambda _: ""
        found = read_markers(here).get("00000000")
        if isinstance(found, ShardManifest):  # a reader finds the old shard or the new one, whole
            assert verify_shard(here, found) == []
        clean_staging(here)
        again = commit_shard(here, f"{JOB}2", replaces=old)
        clean_attempts(here, JOB, [again], [old] if old else [])
        assert assert_one_shard(server, here) == again
        if not killed:
            break
    assert step >= 4


def test_clean_attempts_leaves_what_may_be_in_use(server: Server, dst: str) -> None:
    manifest = commit_shard(dst)
    fingerprint = manifest.fingerprint[:8]
    mine = f"00000000-{fingerprint}-{JOB}2.tar"
    kept = {
        f"00000000-{fingerprint}-{OTHER_JOB}2.parquet": b"",  # another job's
        f"00000001-{fingerprint}-{JOB}2.parquet": b"",  # of a shard that is not done
        f"_x-{fingerprint}-{JOB}2.txt": b"",
    }
    server.put(dst, kept | {mine: b""})
    clean_attempts(dst, JOB, [manifest])
    assert sorted(server.names(dst)) == sorted((manifest.data_file, "00000000.json", *kept))
    # the manifest that the driver remembers may be an older one than the marker
    server.put(dst, {mine: b""})
    clean_attempts(dst, JOB, [dataclasses.replace(manifest, data_file=mine)])
    assert mine in server.names(dst)
    clean_attempts(dst, JOB, [dataclasses.replace(manifest, data_file="x.tar")])
    assert mine not in server.names(dst)
    assert manifest.data_file in server.names(dst)


# Uploads


def test_an_upload_that_breaks_leaves_nothing(
    server: Server, dst: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "PART_BYTES", 5 << 20)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12 << 20))
    bucket = dst.split("/")[2]

    def uploads() -> list[Any]:
        return server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])

    for what in ("partNumber=3", "uploadId"):
        server.fault = lambda request, what=what: (
            "InternalError" if request.method != "DELETE" and what in request.query else ""
        )
        with pytest.raises(UnavailableError, match=rf"cannot write {dst}/a: InternalError"):
            atomic.upload(path, f"{dst}/a")
        server.fault = lambda _: ""
        assert server.names(dst) == []
        assert uploads() == []
    atomic.upload(path, f"{dst}/a")
    assert fs.read_bytes(f"{dst}/a") == path.read_bytes()


def test_an_upload_that_arrives_short_is_deleted(server: Server, dst: str) -> None:
    server.fault = lambda request: "short" if request.key.endswith(".parquet") else ""
    with pytest.raises(UnavailableError, match=r"of \d+ bytes \d+ bytes arrived"):
        commit_shard(dst)
    assert server.names(dst) == []
