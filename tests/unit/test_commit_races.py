"""Several attempts at one shard: one stays."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from splatshard.pipeline.shards.commit import (
    clean_staging,
    mark_failed,
    publish,
    staged_file,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import atomic
from splatshard.schemas.errors import (
    SourceError,
    StorageError,
    UnavailableError,
)
from splatshard.schemas.shard import ShardManifest
from tests.make import datacomp_sample, write_tar
from tests.rows import config_of, make_ref, make_rows, write_shard
from tests.unit.committing import DIGEST, assert_nothing_committed, commit_shard, snapshot


def test_the_first_of_two_equal_attempts_stays(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    files = snapshot(tmp_path)
    inode = (tmp_path / first.data_file).stat().st_ino
    assert commit_shard(tmp_path) == first
    assert snapshot(tmp_path) == files
    assert (tmp_path / first.data_file).stat().st_ino == inode


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    """Also when the shard that was to be replaced has been replaced by somebody else since."""
    old = commit_shard(tmp_path, config_of("webdataset"))
    first = commit_shard(tmp_path, config_of("parquet", "balanced"), replaces=old)
    files = snapshot(tmp_path)
    for replaces in (None, old):
        with pytest.raises(StorageError, match=r"pack\.codec: balanced -> fp16.*another job"):
            commit_shard(tmp_path, config_of("parquet", "fp16"), replaces=replaces)
        assert snapshot(tmp_path) == files
    assert verify_shard(str(tmp_path), first) == []


def test_a_damaged_marker_and_damaged_data_are_replaced(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    wanted = snapshot(tmp_path)
    (tmp_path / "00000000.json").write_text("{}")
    commit_shard(tmp_path)
    assert snapshot(tmp_path) == wanted
    (tmp_path / first.data_file).write_bytes(b"damaged")
    commit_shard(tmp_path, replaces=first)
    assert snapshot(tmp_path) == wanted


@pytest.mark.parametrize("configs", [("parquet", "parquet"), ("parquet", "webdataset")])
def test_many_jobs_at_once_leave_one_shard(tmp_path: Path, configs: tuple[str, str]) -> None:
    """Equal ones all succeed; of two configurations the slower one's jobs all stop."""
    torch.set_num_threads(1)

    def job(number: int) -> ShardManifest | StorageError:
        try:
            return commit_shard(tmp_path, config_of(configs[number % 2]))
        except StorageError as e:
            return e

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(job, range(16)))
    (marker,) = read_markers(str(tmp_path)).values()
    assert isinstance(marker, ShardManifest)
    assert sorted(snapshot(tmp_path)) == [marker.data_file, "00000000.json"]
    assert verify_shard(str(tmp_path), marker) == []
    for number, result in enumerate(results):
        if configs[number % 2] == marker.format:
            assert result == marker
        else:
            assert "pack.format" in str(result)


def test_only_what_splatshard_wrote_is_a_leftover(tmp_path: Path) -> None:
    """img2dataset's numbers look like our fingerprints."""
    write_tar(tmp_path / "train-00000001.tar", datacomp_sample(0))
    (tmp_path / "train-00000002.parquet").write_bytes(b"damaged")
    theirs = snapshot(tmp_path)
    first = commit_shard(tmp_path, name="train")
    shutil.copy(tmp_path / first.data_file, tmp_path / "train-00000003.parquet")
    assert commit_shard(tmp_path, name="train") == first
    shutil.copy(tmp_path / first.data_file, tmp_path / "train-00000003.parquet")
    clean_staging(str(tmp_path))
    left = snapshot(tmp_path)
    assert left.keys() - theirs.keys() == {first.data_file, "train.json"}
    assert left | theirs == left


def test_a_zombie_does_not_mark_a_done_shard_failed(tmp_path: Path) -> None:
    commit_shard(tmp_path)
    files = snapshot(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut"))
    assert snapshot(tmp_path) == files


def test_a_lock_that_is_held_for_long_is_given_up(tmp_path: Path) -> None:
    with (
        atomic.exclusive(str(tmp_path), "a"),
        pytest.raises(UnavailableError, match=r"a\.lock is held by another process"),
        atomic.exclusive(str(tmp_path), "a", 0),
    ):
        pass
    with atomic.exclusive(str(tmp_path), "a"), atomic.exclusive(str(tmp_path), "b"):
        pass
    assert_nothing_committed(tmp_path)


def test_file_systems_without_locks_are_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    old = commit_shard(tmp_path, config_of("webdataset"))
    manifest = commit_shard(tmp_path, replaces=old)
    assert sorted(snapshot(tmp_path)) == [manifest.data_file, "00000000.json"]
    assert "no file locks here, start only one job at a time" in caplog.text


def test_secrets_stay_out_of_markers(tmp_path: Path) -> None:
    signed = "https://me:hunter2@host/a.tar?Authorization=abcdef&policy=xyz"
    ref = dataclasses.replace(make_ref(), urls=(signed,))
    mark_failed(str(tmp_path), ref, config_of(), SourceError(f"cannot read {signed}: cut"))
    text = (tmp_path / "00000000.failed.json").read_text()
    assert "https://***@host/a.tar?***" in text
    with staged_file(str(tmp_path), ref.name) as path:
        write_shard(path, make_rows(4))
        manifest = publish(str(tmp_path), path, ref, config_of(), DIGEST)
    assert manifest.source_url == "https://***@host/a.tar?***"
    text += (tmp_path / "00000000.json").read_text()
    assert not re.search("hunter2|abcdef|xyz", text)
