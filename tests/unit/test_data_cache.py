"""The cache of remote shards: bounded, whole files only."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splatshard.pipeline.data import cache as cache_module
from splatshard.pipeline.data.cache import ShardCache
from splatshard.pipeline.storage.staging import STAGING
from splatshard.schemas.errors import CorruptShardError, SourceError, StorageError, UsageError
from tests.unit.caching import Remote, cached, read, remote_in


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    return remote_in(tmp_path / "remote", monkeypatch)


def test_a_file_is_fetched_once(tmp_path: Path, remote: Remote) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    shard = remote.put("a", b"abc")
    assert [read(cache, shard), read(cache, shard)] == [b"abc"] * 2
    assert read(ShardCache(tmp_path / "cache", 1000), shard) == b"abc"
    assert remote.fetched == ["a"]


def test_files_of_one_name_are_different_files(tmp_path: Path, remote: Remote) -> None:
    """In other folders, or replaced since: the etag tells, or the marker's digest."""
    cache = ShardCache(tmp_path / "cache", 1000)
    a, b = remote.put("a/00000", b"abc"), remote.put("b/00000", b"xyz")
    assert [read(cache, a), read(cache, b), read(cache, a)] == [b"abc", b"xyz", b"abc"]
    url, _, size, digest = new = remote.put("a/00000", b"new")
    assert read(cache, new) == b"new"
    assert read(cache, (url, "etag-2", size, digest)) == b"new"
    assert remote.fetched == ["00000"] * 4


def test_the_longest_unused_goes_first(tmp_path: Path, remote: Remote) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    shards = [remote.put(name, name.encode() * 40) for name in "abc"]
    for age, shard in ((30, shards[0]), (20, shards[1])):
        read(cache, shard)
        newest = max((tmp_path / "cache").glob("?" * 64), key=lambda p: p.stat().st_mtime)
        os.utime(newest, (time.time() - age,) * 2)
    read(cache, shards[0])  # used again
    read(cache, shards[2])
    assert cached(tmp_path / "cache") == [40, 40]
    remote.fetched.clear()
    read(cache, shards[0])
    read(cache, shards[2])
    assert remote.fetched == []
    read(cache, shards[1])
    assert remote.fetched == ["b"]


def test_what_is_not_the_caches_is_neither_deleted_nor_counted(
    tmp_path: Path, remote: Remote
) -> None:
    """A folder that has other files, too: cache_dir="."."""
    (tmp_path / STAGING).mkdir()
    others = [tmp_path / "checkpoint.pt", tmp_path / ("A" * 64), tmp_path / STAGING / "notes"]
    for path in others:
        path.write_bytes(b"x" * 90)
        os.utime(path, (time.time() - 60,) * 2)
    cache = ShardCache(tmp_path, 100)
    shards = [remote.put(name, name.encode() * 40) for name in "abc"]
    for shard in shards:
        read(cache, shard)
    assert [path.stat().st_size for path in others] == [90] * 3
    assert len([path for path in tmp_path.iterdir() if path.stat().st_size == 40]) == 2


def test_a_file_that_is_read_outlives_its_eviction(tmp_path: Path, remote: Remote) -> None:
    cache = ShardCache(tmp_path / "cache", 50)
    with cache.open(*remote.put("a", b"a" * 40)) as stream:
        read(cache, remote.put("b", b"b" * 40))
        assert cached(tmp_path / "cache") == [40]
        assert stream.read() == b"a" * 40


def test_bytes_that_are_not_the_shards_are_not_kept(tmp_path: Path, remote: Remote) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    url, etag, size, _ = remote.put("a", b"abc")
    for wrong in (b"abd", b"ab", b"abcd"):
        digest = hashlib.sha256(wrong).hexdigest()
        with pytest.raises(CorruptShardError, match=f"{url}.*repair"):
            cache.open(url, etag, size if len(wrong) == 3 else len(wrong), digest)
    assert cached(tmp_path / "cache") == []
    assert not (tmp_path / "cache" / STAGING).exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def zero(path: Path) -> None:
    """All but the size is lost, as after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, zero])
def test_a_file_that_the_disk_damaged_is_fetched_again(
    tmp_path: Path, remote: Remote, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder, shard = tmp_path / "cache", remote.put("a", b"abc")
    read(ShardCache(folder, 1000), shard)
    (path,) = folder.glob("?" * 64)
    damage(path)
    later = ShardCache(folder, 1000)  # another process's
    assert [read(later, shard), read(later, shard)] == [b"abc"] * 2
    assert remote.fetched == ["a", "a"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} was damaged on this disk: it is fetched again"
    ]


def test_a_file_is_hashed_once(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is fetched, or as a process first opens it; not without `checksum`."""
    hashed, digest = [], cache_module.hashlib.file_digest
    monkeypatch.setattr(
        cache_module.hashlib, "file_digest", lambda *a: (hashed.append(a), digest(*a))[1]
    )
    folder, shard = tmp_path / "cache", remote.put("a", b"abc")
    first, second = ShardCache(folder, 1000), ShardCache(folder, 1000)
    assert [read(first, shard) for _ in range(2)] == [b"abc"] * 2
    second.open(*shard, checksum=False).close()
    assert not hashed
    assert [read(second, shard) for _ in range(2)] == [b"abc"] * 2
    assert len(hashed) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def noted(fd: int) -> None:
        assert not list((tmp_path / "cache").glob("?" * 64))
        synced.append(os.pread(fd, 9, 0))
        fsync(fd)

    monkeypatch.setattr(cache_module.os, "fsync", noted)
    assert read(ShardCache(tmp_path / "cache", 1000), remote.put("a", b"abc")) == b"abc"
    assert synced == [b"abc"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        ShardCache(tmp_path / "cache", 1000).open(str(tmp_path / "nowhere"), "", 3, "0" * 64)
    assert cached(tmp_path / "cache") == []


def test_a_file_larger_than_the_cache(tmp_path: Path, remote: Remote) -> None:
    with pytest.raises(UsageError, match=r"cache_bytes is 2.* alone has 3"):
        ShardCache(tmp_path / "cache", 2).open(*remote.put("a", b"abc"))


def test_a_full_disk_is_said(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = remote.put("a", b"abc")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.raises(StorageError, match=r"no space left.*lower cache_bytes.*cache_dir"):
        ShardCache(tmp_path / "cache", 1000).open(*shard)
    monkeypatch.undo()
    assert cached(tmp_path / "cache") == []
