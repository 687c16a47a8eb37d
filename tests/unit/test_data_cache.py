"""The cache of remote shards: bounded, shared, whole files only, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from splatshard.pipeline.data import cache as cache_module
from splatshard.pipeline.data.cache import LOCKS, ShardCache
from splatshard.pipeline.storage.staging import STAGING
from splatshard.schemas.errors import CorruptShardError, SourceError, StorageError, UsageError

ROOT = Path(__file__).resolve().parents[2]


class Remote:
    """Local files that count how often they are fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def put(self, name: str, data: bytes) -> tuple[str, str, int, str]:
        """A file; the arguments of `ShardCache.open` for it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path), "", len(data), hashlib.sha256(data).hexdigest()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    found = Remote(tmp_path / "remote")
    open_read = cache_module.fs.open_read

    @contextmanager
    def counted(url: str) -> Iterator[BinaryIO]:
        found.fetched.append(Path(url).name)
        with open_read(url) as stream:
            yield stream

    monkeypatch.setattr(cache_module.fs, "open_read", counted)
    return found


def read(cache: ShardCache, shard: tuple[str, str, int, str]) -> bytes:
    with cache.open(*shard) as stream:
        return stream.read()


def cached(folder: Path) -> list[int]:
    """Sizes of the files in the cache."""
    return sorted(path.stat().st_size for path in folder.iterdir() if path.is_file())


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


def test_threads_fetch_a_file_once_and_stay_within_bounds(tmp_path: Path, remote: Remote) -> None:
    cache = ShardCache(tmp_path / "cache", 200)
    shards = [remote.put(str(i), bytes([i]) * 40) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read(cache, shards[i % 4]), range(200)))
    assert all(data == bytes([i % 4]) * 40 for i, data in enumerate(found))
    assert sorted(remote.fetched) == ["0", "1", "2", "3"]


def bytes_below(folder: Path) -> int:
    """What files take now; one that another thread moves or removes meanwhile takes nothing."""
    taken = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                taken += os.stat(os.path.join(base, name)).st_size
    return taken


@pytest.mark.parametrize("room", [90, 50])
def test_threads_of_a_small_cache_get_what_they_ask_for(
    tmp_path: Path, remote: Remote, room: int
) -> None:
    """Files are evicted all the time, while others open them; never is there more than fits."""
    folder = tmp_path / "cache"
    cache = ShardCache(folder, room)
    shards = [remote.put(str(i), bytes([i]) * 40) for i in range(4)]
    taken = []

    def read_and_look(i: int) -> bytes:
        data = read(cache, shards[i % 4])
        with cache._locked("room"):
            taken.append(bytes_below(folder))
        return data

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_and_look, range(100)))
    assert all(data == bytes([i % 4]) * 40 for i, data in enumerate(found))
    assert max(taken) <= room


SCRIPT = """
import sys, time
from contextlib import contextmanager, suppress
from pathlib import Path
from splatshard.pipeline.storage import fs
from splatshard.pipeline.data.cache import ShardCache

folder, url, size, digest, stall = sys.argv[1:]

class Slow:
    def __init__(self, stream):
        self.stream = stream
    def read(self, size):
        if stall == "yes":
            data = self.stream.read(10)
            if not data:
                print("stalled", flush=True)
                time.sleep(600)
            return data
        return self.stream.read(size)

open_read = fs.open_read

@contextmanager
def slow(url):
    print("fetch", flush=True)
    with open_read(url) as stream:
        yield Slow(stream)

fs.open_read = slow
with ShardCache(Path(folder), 1000).open(url, "", int(size), digest) as stream:
    print(len(stream.read()), flush=True)
"""


def start(folder: Path, shard: tuple[str, str, int, str], stall: str) -> subprocess.Popen[str]:
    url, _, size, digest = shard
    command = [sys.executable, "-c", SCRIPT, str(folder), url, str(size), digest, stall]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_what_a_killed_container_left_does_not_take_room_for_ever(
    tmp_path: Path,
    remote: Remote,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It counts until it has been idle for some minutes; a wait is said once."""
    folder = tmp_path / "cache"
    left = folder / STAGING / f"{'0' * 64}@elsewhere-00c0ffee-1-00000000"
    waiting = left.with_name(f"{'1' * 64}@elsewhere-00c0ffee-1-00000000")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 80)
    waiting.touch()
    slept = []

    def sleep(_: float) -> None:
        assert len(slept) < 2, "it waits for a dead process"
        slept.append(left.exists())
        if len(slept) == 2:
            for path in (left, waiting):
                os.utime(path, (time.time() - cache_module.IDLE_S - 1,) * 2)

    monkeypatch.setattr(cache_module.time, "sleep", sleep)
    monkeypatch.setattr(cache_module, "PATIENCE_S", -1)
    assert read(ShardCache(folder, 100), remote.put("a", b"a" * 40)) == b"a" * 40
    assert slept == [True, True]
    assert (left.exists(), waiting.exists()) == (False, True)
    assert [record.getMessage() for record in caplog.records] == [
        f"the shard cache {folder} has been full of files that are being fetched for -1 s: raise "
        "cache_bytes (now 100), or let fewer processes share it"
    ]


def test_a_fetch_that_was_taken_for_a_dead_one_is_done_again(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "cache", os.replace

    def late(new: Path, path: Path) -> None:
        if len(remote.fetched) == 1:
            new.unlink()
        replace(new, path)

    monkeypatch.setattr(cache_module.os, "replace", late)
    assert read(ShardCache(folder, 100), remote.put("a", b"abc")) == b"abc"
    assert remote.fetched == ["a", "a"]


@pytest.mark.integration
def test_a_fetch_that_is_killed_leaves_nothing(tmp_path: Path, remote: Remote) -> None:
    """Neither a part of a file nor a lock; a waiting process takes over."""
    folder, shard = tmp_path / "cache", remote.put("a", b"a" * 400)
    first = start(folder, shard, "yes")
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["fetch\n", "stalled\n"]
    second = start(folder, shard, "no")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)  # it waits for the first
    assert cached(folder) == []
    first.kill()
    first.communicate()
    assert second.communicate(timeout=60)[0] == "fetch\n400\n"
    assert cached(folder) == [400]
    assert not (folder / STAGING).exists()


@pytest.mark.integration
def test_processes_fetch_a_file_once(tmp_path: Path, remote: Remote) -> None:
    folder, shard = tmp_path / "cache", remote.put("a", b"a" * 400)
    processes = [start(folder, shard, "no") for _ in range(3)]
    said = "".join(process.communicate(timeout=60)[0] for process in processes)
    assert sorted(said.split()) == ["400", "400", "400", "fetch"]
    assert (folder / LOCKS).is_dir()


def test_a_lock_does_not_outlive_its_holder_in_a_process_forked_meanwhile(tmp_path: Path) -> None:
    """As a DataLoader forks workers while the dataset fetches on its thread."""
    cache = ShardCache(tmp_path, 1000)
    ours, theirs = os.pipe()
    with cache._locked("00"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads
            child = os.fork()
        if not child:
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)
    try:
        with (tmp_path / LOCKS / "00").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(theirs)
        os.close(ours)
        os.waitpid(child, 0)


def test_a_lock_is_not_held_while_another_file_is_fetched(tmp_path: Path, remote: Remote) -> None:
    """One slow file keeps nobody from others (but for those few that share its lock)."""
    cache = ShardCache(tmp_path / "cache", 1000)
    slow, fast = remote.put("slow", b"s" * 40), remote.put("fast", b"f" * 40)
    names = [
        hashlib.sha256(f"{s[0]}\0{s[1]}\0{s[3]}".encode()).hexdigest()[:2] for s in (slow, fast)
    ]
    if names[0] == names[1]:
        pytest.skip("by chance they share a lock")
    release, counted = threading.Event(), cache_module.fs.open_read

    @contextmanager
    def stalled(url: str) -> Iterator[BinaryIO]:
        if url.endswith("slow"):
            release.wait(30)
        with counted(url) as stream:
            yield stream

    cache_module.fs.open_read = stalled
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, cache, slow)
            assert read(cache, fast) == b"f" * 40
            assert not waiting.done()
            release.set()
            assert waiting.result() == b"s" * 40
    finally:
        release.set()
        cache_module.fs.open_read = counted
