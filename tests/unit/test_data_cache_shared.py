"""The cache of remote shards among threads and processes: fetched once, bounded, whoever dies."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from splatshard.pipeline.data import cache as cache_module
from splatshard.pipeline.data.cache import LOCKS, ShardCache
from splatshard.pipeline.storage.staging import STAGING
from tests.unit.caching import Remote, cached, read, remote_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    return remote_in(tmp_path / "remote", monkeypatch)


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
    monkeypatch.setattr(cache_module, "REPORT_AFTER_S", -1)
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
