"""S3 that fails: errors, throttling, cut connections, slow bytes, a clock that is wrong.

All of it during whole conversions; what a single request does is tested in s3/.
"""

from __future__ import annotations

import pytest

from tests.integration.chaos import (
    Arena,
    ended,
    finish,
    launch,
    markers,
    summary,
    tail,
    tallied,
)
from tests.integration.faults import FAULTS, FaultPlan, evenly
from tests.integration.running import wait_until

pytestmark = pytest.mark.integration

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("share", "seed"),
    [(0.25, 0), *(pytest.param(s, i, marks=slow) for i, s in enumerate((0.1, 0.2, 0.3, 0.4), 1))],
)
def test_a_share_of_all_requests_fails(arena: Arena, share: float, seed: int) -> None:
    """The job rides it out: one run is enough, and no shard is marked failed."""
    name = f"faults-{share}-{seed}"
    dst, log = f"{arena.out}/{name}", arena.folder / f"{name}.log"
    with tallied(arena, "faults", seed) as moment:
        arena.begin(evenly(seed, share))
        moment.exits.append(ended(launch(arena, dst, log=log), log))
        assert moment.exits == [0], tail(log)
        moment.retries.update(summary(log)["retries"])
        assert len(arena.proxy.faults()) > len(FAULTS) / 2
        finish(arena, dst, moment, log)


def test_every_answer_to_a_write_is_lost_once(arena: Arena) -> None:
    """Each was done, and is repeated by a client that cannot know: nothing is doubled by that."""
    dst, log = f"{arena.out}/doubt", arena.folder / "doubt.log"
    with tallied(arena, "doubt") as moment:
        arena.begin(FaultPlan(rates={"cut_after": 1.0}, only="(PUT|POST|DELETE) ", times=1))
        moment.exits.append(ended(launch(arena, dst, "--workers=1", log=log), log))
        assert moment.exits == [0], tail(log)
        finish(arena, dst, moment, log)
        assert moment.orphans == 0


def test_an_outage_is_waited_for(arena: Arena) -> None:
    dst, log = f"{arena.out}/outage", arena.folder / "outage.log"
    with tallied(arena, "outage") as moment:
        arena.begin()
        process = launch(arena, dst, "--workers=1", log=log)
        wait_until(lambda: markers(arena, dst) or process.poll() is not None, tail(log))
        arena.begin(FaultPlan(rates={"slow_down": 0.5, "cut_before": 0.5}))
        wait_until(lambda: sum(arena.proxy.faults().values()) > 10, "the job asks again")
        moment.faults.update(arena.proxy.faults())
        arena.begin()
        moment.exits.append(ended(process, log))
        assert moment.exits == [0], tail(log)
        moment.retries.update(summary(log)["retries"])
        finish(arena, dst, moment, log)


def test_a_wrong_clock_is_named(arena: Arena) -> None:
    """S3 refuses requests whose time is wrong: the error says so, and what to do."""
    dst, log = f"{arena.out}/skewed", arena.folder / "skewed.log"
    with tallied(arena, "skewed") as moment:
        arena.begin(FaultPlan(rates={"skewed": 1.0}))
        moment.exits.append(ended(launch(arena, dst, "--workers=1", log=log), log))
        assert moment.exits == [1], tail(log)
        assert "clock" in log.read_text()
        arena.begin()
        finish(arena, dst, moment, log)
