"""A disk that fills up: the job stops and says so; with room again, the same command ends it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.chaos import Arena, ended, finish, launch, tail, tallied

pytestmark = pytest.mark.integration


def mount(folder: Path, options: str) -> None:
    """A file system in memory at `folder`; skips where this may not be done."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"no small file system for a full disk: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 KiB; a shard takes 16, the plan and the journal some more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=48k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def test_a_destination_that_fills_up(moto_arena: Arena, disk: Path) -> None:
    arena, dst, log = moto_arena, str(disk / "out"), moto_arena.folder / "disk.log"
    with tallied(arena, "disk") as moment:
        arena.begin()
        moment.exits.append(ended(launch(arena, dst, "--workers=1", log=log), log))
        assert moment.exits == [1], tail(log)
        assert "no space left: free some" in log.read_text()
        mount(disk, "remount,size=8m")
        finish(arena, dst, moment, log)
        assert moment.orphans == 0


def test_a_worker_without_room_for_its_files(moto_arena: Arena, disk: Path) -> None:
    """Shards for S3 are written below TMPDIR first; nothing of one that did not fit is uploaded.

    There is room for the three markers of what is compiled ahead, of a page each: Python takes /tmp
    for a TMPDIR in which there is none at all.
    """
    arena, dst, log = moto_arena, f"{moto_arena.out}/tmpdir", moto_arena.folder / "tmpdir.log"
    (disk / "filler").write_bytes(bytes(28 << 10))
    environment = {"TMPDIR": str(disk), "RAY_TMPDIR": "/tmp"}
    with tallied(arena, "tmpdir") as moment:
        arena.begin()
        moment.exits.append(
            ended(launch(arena, dst, "--workers=1", log=log, alone=True, **environment), log)
        )
        assert moment.exits == [1], tail(log)
        assert "no space left: free some" in log.read_text()
        finish(arena, dst, moment, log)
        assert moment.done_before == 0
        assert moment.orphans == 0
