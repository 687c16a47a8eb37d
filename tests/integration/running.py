"""Running conversions in tests: here on a shared Ray, or as a process that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import convert, status, verify
from tests.make import datacomp_tar

SMALL = ("--image-size=32", "--num-gaussians=16", "--steps=3", "--workers=1")
"""Fits in milliseconds; each worker takes seconds to load torch."""

LONG = (
    *("--image-size=128", "--num-gaussians=200", "--steps=280", "--row-stride=1"),
    *("--batch-size=2", "--workers=2"),
)
"""Half a second per shard, so that there is time to interfere."""

PER_RUN = ("_run.json", "_progress.json", "_manifest.json", "_card.md", "README.md")
"""Files that differ from run to run."""


def tars(folder: Path, shards: int = 2, samples: int = 3) -> str:
    """`shards` DataComp tars of `samples` each; returns the brace pattern."""
    for i in range(shards):
        datacomp_tar(folder / f"{i:08d}.tar", samples, start=i * samples)
    return f"{folder}/{{{0:08d}..{shards - 1:08d}}}.tar"


def run_json(
    capsys: pytest.CaptureFixture[str], job: Any, *arguments: object
) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON line and standard error of a job in this process."""
    capsys.readouterr()
    code = job.main([str(a) for a in arguments] + ["--json"])
    out, err = capsys.readouterr()
    # a Ray that outlives the job prints news of dead workers whenever it likes, before, after and
    # on the same line
    start = out.find('{"')
    return code, json.JSONDecoder().raw_decode(out, start)[0] if start >= 0 else {}, err


def convert_json(
    capsys: pytest.CaptureFixture[str], src: object, dst: object, *flags: str
) -> tuple[int, dict[str, Any], str]:
    return run_json(capsys, convert, src, dst, *SMALL, *flags)


def assert_verified(capsys: pytest.CaptureFixture[str], dst: Path) -> dict[str, Any]:
    """`verify` finds nothing wrong and nothing odd; returns what `status` says."""
    code, found, err = run_json(capsys, verify, dst)
    assert (code, found["problems"], found["notes"]) == (0, [], []), err
    return run_json(capsys, status, dst)[1]


def files(dst: Path) -> dict[str, bytes]:
    """All files of DST but those that tell times and commands, by relative path."""
    return {
        str(path.relative_to(dst)): path.read_bytes()
        for path in sorted(dst.rglob("*"))
        if path.is_file() and path.name not in PER_RUN
    }


@dataclass(frozen=True)
class Converted:
    """A conversion that many tests start from: made once, put back before each of them.

    Plans hold absolute paths and modification times, so tests get not copies but the place itself,
    `folder`, as it was.
    """

    folder: Path
    src: str
    saved: Path

    @property
    def dst(self) -> Path:
        return self.folder / "out"

    def put_back(self) -> tuple[str, Path, dict[str, bytes]]:
        """SRC, DST and the files of DST, whatever was done to them."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved, self.folder)  # with modification times
        return self.src, self.dst, files(self.dst)


def convert_once(folder: Path, shards: int) -> Converted:
    """`shards` tars in `folder`, converted."""
    place = folder / "place"
    src = tars(place / "in", shards)
    assert convert.main([src, str(place / "out"), *SMALL]) == 0
    shutil.copytree(place, folder / "saved")
    return Converted(place, src, folder / "saved")


def finished(dst: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the data files that markers name."""
    found: dict[str, tuple[int, int]] = {}
    for marker in dst.glob("[!_]*.json"):
        if not marker.name.endswith(".failed.json"):
            stat = (dst / json.loads(marker.read_text())["data_file"]).stat()
            found[marker.name] = stat.st_ino, stat.st_mtime_ns
    return found


def start(src: object, dst: object, *flags: str, log: Path) -> subprocess.Popen[bytes]:
    """A conversion with a Ray of its own, in a process group of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "convert", str(src), str(dst), *flags],
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"timed out: {what}")


def descendants(pid: int) -> dict[int, str]:
    """Process ids below `pid` and their command lines."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), ()):
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            found[child] = command.decode(errors="replace")
            todo.append(child)
    return found


def converting(pid: int) -> list[int]:
    """The workers below `pid` that are in the middle of a shard."""
    return [p for p, command in descendants(pid).items() if "FitActor.convert" in command]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver and to all that it started, and to nothing else."""
    below: Sequence[int] = list(descendants(process.pid))
    for pid in (process.pid, *below):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)
    wait_until(lambda: not any(Path(f"/proc/{p}").exists() for p in below), "processes end")
