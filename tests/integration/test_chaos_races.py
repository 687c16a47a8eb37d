"""Two jobs on one DST at one time, on S3, and with clocks that are a day apart.

Whoever commits first wins, shard by shard; what the others made is gone when they have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.chaos import (
    SHARDS,
    Arena,
    Moment,
    ended,
    finish,
    holdings,
    launch,
    markers,
    shards,
    summary,
    tail,
    tallied,
)

pytestmark = pytest.mark.integration

FAKETIME = "faketime/libfaketime.so.1"


def race(
    arena: Arena, moment: Moment, dst: str, rivals: Sequence[tuple[tuple[str, ...], dict[str, str]]]
) -> list[Path]:
    """Start a job for each of `rivals` (flags, environment), all at once; their logs."""
    arena.begin()
    name = dst.rpartition("/")[2]
    logs = [arena.folder / f"{name}-{i}.log" for i in range(len(rivals))]
    jobs = [
        launch(arena, dst, *flags, log=log, alone="LD_PRELOAD" in environment, **environment)
        for (flags, environment), log in zip(rivals, logs, strict=True)
    ]
    moment.exits += [ended(job, log) for job, log in zip(jobs, logs, strict=True)]
    return logs


def test_two_jobs_of_one_configuration_share_the_work(arena: Arena) -> None:
    dst = f"{arena.out}/race"
    with tallied(arena, "race") as moment:
        logs = race(arena, moment, dst, [(("--workers=1",), {})] * 2)
        assert moment.exits == [0, 0], "".join(map(tail, logs))
        assert all(summary(log)["shards_failed"] == 0 for log in logs)
        finish(arena, dst, moment, logs[0])
        assert moment.orphans == 0


def test_of_two_configurations_one_gives_way(arena: Arena) -> None:
    """No shard is a mixture, whoever wins; in the end the one that the user wants is there."""
    dst, other = f"{arena.out}/quarrel", "--steps=90"
    with tallied(arena, "quarrel") as moment:
        logs = race(arena, moment, dst, [(("--workers=1",), {}), (("--workers=1", other), {})])
        assert set(moment.exits) in ({1}, {0, 1}), "".join(map(tail, logs))
        for code, log in zip(moment.exits, logs, strict=True):
            refused = "of another configuration or source" in log.read_text()
            assert refused == (code == 1), tail(log)
        found = shards(holdings(arena, dst))
        steps = {marker["inputs"]["recipe"]["fit"]["steps"] for marker, _ in found.values()}
        assert steps <= {90, 150}
        if 0 in moment.exits:
            assert len(found) == SHARDS
            assert len(steps) == 1
        log = arena.folder / "quarrel-over.log"
        assert ended(launch(arena, dst, "--overwrite-stale", log=log), log) == 0, tail(log)
        finish(arena, dst, moment, log)
        assert moment.orphans == 0


def faked(skew: str) -> dict[str, str]:
    """The environment of a process with another clock; skips where libfaketime is not installed.

    The monotonic clock is shifted, too: asked to leave it alone, libfaketime breaks time.sleep.
    """
    found = [path for path in Path("/usr/lib").glob(f"*/{FAKETIME}") if path.exists()]
    if not found:
        pytest.skip("no libfaketime: apt-get install libfaketime")
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": skew}


@pytest.mark.parametrize("skew", ["+1d", pytest.param("-1d", marks=pytest.mark.slow)])
def test_clocks_that_are_days_apart(moto_arena: Arena, skew: str) -> None:
    """A job whose clock is wrong, with its workers, beside one whose clock is right."""
    arena, dst = moto_arena, f"{moto_arena.out}/clock{skew}"
    skewed = (("--workers=1",), faked(skew))
    with tallied(arena, "clock") as moment:
        logs = race(arena, moment, dst, [(("--workers=1",), {}), skewed])
        assert moment.exits == [0, 0], "".join(map(tail, logs))
        finish(arena, dst, moment, logs[0])
        assert moment.orphans == 0


@pytest.mark.slow
def test_ceph_refuses_a_wrong_clock(ceph_arena: Arena) -> None:
    """A real server's refusal, not the proxy's: the error names the clock."""
    arena, dst = ceph_arena, f"{ceph_arena.out}/wrong-clock"
    skewed = ((), faked("+1d"))
    with tallied(arena, "clock", 1) as moment:
        logs = race(arena, moment, dst, [skewed])
        assert moment.exits == [1], tail(logs[0])
        assert "clock" in logs[0].read_text()
        assert not markers(arena, dst)
        finish(arena, dst, moment, logs[0])
