"""Staged files: unique, and cleaned up once nobody uses them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from splatshard.pipeline.shards.commit import (
    clean_staging,
    staged_file,
)
from splatshard.pipeline.storage import atomic
from splatshard.schemas.errors import (
    UsageError,
)
from tests.unit.committing import assert_nothing_committed, commit_shard


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_staged_files_are_unique_and_vanish(tmp_path: Path) -> None:
    with staged_file(str(tmp_path), "a") as first, staged_file(str(tmp_path), "a") as second:
        assert first != second
        assert first.parent == tmp_path / "_staging"
        assert str(os.getpid()) in first.name
    assert_nothing_committed(tmp_path)


def staged_name(shard: str, pid: int) -> str:
    """As this host would name a file of the process `pid`."""
    with staged_file(tempfile.gettempdir(), shard) as path:
        return path.name.replace(f"-{os.getpid()}-", f"-{pid}-")


def test_only_dead_processes_of_this_host_are_cleaned_up(tmp_path: Path) -> None:
    """Not those of hosts whose name ends like ours, and not what other versions named otherwise."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    host, dead = socket.gethostname(), dead_pid()
    theirs = staged_name("a", dead)
    kept = [
        *(staged_name("a", pid) for pid in (os.getpid(), 1)),
        *(theirs.replace("@", separator) for separator in ("@x-", "@x", "-")),
        *(f"a-{host}-{dead}-00ff", f"a-gpu-{host}-{dead}-00ff", "notes"),
    ]
    for name in [theirs, staged_name("a@b", dead), staged_name(f"a@{host}-0", dead), *kept]:
        (folder / name).touch()
    clean_staging(str(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)
    clean_staging(str(tmp_path / "none"))


@pytest.mark.parametrize("what", ["boot_id", "namespace"])
def test_other_process_ids_of_the_same_number_are_left_alone(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host of our name, and of a container that shares the folder with us."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    if what == "boot_id":
        monkeypatch.setattr(Path, "read_text", lambda _: "another")
    else:
        monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    name = staged_name("a", dead_pid())
    monkeypatch.undo()
    (folder / name).touch()
    clean_staging(str(tmp_path))
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_nobody_has_written_to_for_long_is_cleaned_up(tmp_path: Path) -> None:
    """Of other hosts, of this one before it was started anew, of older versions."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    ours, theirs = staged_name("a", os.getpid()), staged_name("a", dead_pid()).replace("@", "@x")
    for name in (ours, theirs, "a-host-17-00ff"):
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    (folder / f"{theirs}1").touch()
    clean_staging(str(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == sorted([ours, f"{theirs}1"])


def test_files_for_s3_are_staged_below_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweeps what killed workers left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with staged_file("s3://bucket/splats", "00000000") as path:
        assert path.parent == tmp_path / f"splatshard-{os.getuid()}" / "_staging"
        left = path.with_name(staged_name("00000001", dead_pid()))
        left.touch()
        with staged_file("s3://bucket/splats", "00000002"):
            assert path.exists()
            assert not left.exists()
    assert not path.exists()


def test_a_commit_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    """Its data file is in place, its marker not yet; another job starts on the folder."""
    done = commit_shard(tmp_path)
    other = tmp_path / "00000000-0123abcd.parquet"
    with atomic.exclusive(str(tmp_path), "00000000"):
        shutil.copy(tmp_path / done.data_file, other)
        clean_staging(str(tmp_path))
        assert other.exists()
    clean_staging(str(tmp_path))
    assert not other.exists()
    assert not (tmp_path / "_staging").exists()


@pytest.mark.parametrize("name", ["_plan", ".x", "a/b", "a.failed", "", "..", "a\0"])
def test_names_that_would_clash_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="rename the source"), staged_file(str(tmp_path), name):
        pass
