"""Interrupted in every way, then run again: the same bytes, and no finished shard redone.

Each conversion that is interrupted is a process with a Ray of its own, since killing it is the
point; one of those that go on is, too.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from splatshard.jobs import convert
from tests.integration.running import (
    LONG,
    assert_verified,
    converting,
    descendants,
    files,
    finished,
    kill_tree,
    start,
    tars,
    wait_until,
)

pytestmark = pytest.mark.integration

Capsys = pytest.CaptureFixture[str]

SHARDS = 6


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tars(tmp_path_factory.mktemp("in"), SHARDS, samples=8)


@pytest.fixture(scope="module")
def undisturbed(
    src: str, tmp_path_factory: pytest.TempPathFactory, shared_ray: None
) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    dst = tmp_path_factory.mktemp("undisturbed")
    assert convert.main([src, str(dst), *LONG]) == 0
    return files(dst)


def finish(src: str, dst: Path, log: Path) -> None:
    """Run to the end, in peace; whatever was finished before stays untouched."""
    before = finished(dst) if dst.exists() else {}
    process = start(src, dst, *LONG, log=log)
    assert process.wait(120) == 0, log.read_text()
    assert before.items() <= finished(dst).items()


def finish_here(src: str, dst: Path) -> None:
    """The same on the shared Ray, which is there already."""
    before = finished(dst)
    assert convert.main([src, str(dst), *LONG]) == 0
    assert before.items() <= finished(dst).items()


def test_killed_at_random_moments(
    src: str, undisturbed: dict[str, bytes], tmp_path: Path, capsys: Capsys
) -> None:
    chance = random.Random(2026)
    dst, log = tmp_path / "out", tmp_path / "log"
    for _ in range(2):
        before = finished(dst) if dst.exists() else {}
        process = start(src, dst, *LONG, log=log)
        wait_until(lambda p=process: converting(p.pid) or p.poll() is not None, log.read_text())
        time.sleep(chance.uniform(0, 1.2))
        kill_tree(process)
        assert before.items() <= finished(dst).items()
    finish(src, dst, log)
    assert files(dst) == undisturbed
    assert assert_verified(capsys, dst)["shards_done"] == SHARDS


def test_a_killed_worker_is_replaced(
    src: str, undisturbed: dict[str, bytes], tmp_path: Path, capsys: Capsys
) -> None:
    dst, log = tmp_path / "out", tmp_path / "log"
    process = start(src, dst, *LONG, log=log)
    victim = wait_until(lambda: converting(process.pid), "a worker converts")[0]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert "worker" in log.read_text()
    assert files(dst) == undisturbed
    assert assert_verified(capsys, dst)["shards_done"] == SHARDS


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_ctrl_c_and_sigterm_stop_cleanly(
    src: str,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: Capsys,
    number: int,
    code: int,
    word: str,
) -> None:
    dst, log = tmp_path / "out", tmp_path / "log"
    process = start(src, dst, *LONG, log=log)
    wait_until(lambda: converting(process.pid) or process.poll() is not None, "a worker converts")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the whole group
    else:
        process.send_signal(number)
    assert process.wait(60) == code, log.read_text()
    text = log.read_text()
    assert f"splatshard: {word}; run the same command again to continue" in text
    assert "Traceback" not in text
    assert not (dst / "_staging").exists()
    committed = {path.name.split("-")[0] for path in dst.glob("*.parquet")}
    assert committed == {name.removesuffix(".json") for name in finished(dst)}
    finish_here(src, dst)
    assert files(dst) == undisturbed
    assert assert_verified(capsys, dst)["shards_done"] == SHARDS


def test_a_ray_that_is_lost_ends_the_job(src: str, tmp_path: Path) -> None:
    """The raylet of the only node: no worker comes again. Fits are long, so that there is work left
    when that is noticed."""
    dst, log = tmp_path / "out", tmp_path / "log"
    process = start(src, dst, *LONG, "--steps=2000", log=log)
    kept = wait_until(lambda: converting(process.pid) and finished(dst), "a shard is done")
    below = descendants(process.pid).items()
    (raylet,) = [pid for pid, command in below if command.split()[0].endswith("/raylet/raylet")]
    os.kill(raylet, signal.SIGKILL)
    assert process.wait(60) == 1, log.read_text()
    assert "(raylet) of this job's Ray has died" in log.read_text()
    assert kept.items() <= finished(dst).items()
