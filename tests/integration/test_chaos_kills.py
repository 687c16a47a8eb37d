"""Killed at seeded random moments: the same command again, and nothing is lost or doubled.

A sample of the moments in every test run, fifty in `make test-slow`, and there some more on Ceph.
Half of the fifty also meet an S3 that fails one request in thirty.
"""

from __future__ import annotations

import pytest

from tests.integration.chaos import Arena
from tests.integration.faults import evenly
from tests.integration.strikes import STRIKES, ordeal

pytestmark = pytest.mark.integration

SAMPLE = 5
MOMENTS = 50
ON_CEPH = 10


def moments(begin: int, end: int) -> list[object]:
    """Parameters of a test: the strikes take turns."""
    names = list(STRIKES)
    return [
        pytest.param(
            names[seed % len(names)],
            seed,
            id=f"{names[seed % len(names)]}-{seed}",
            marks=() if seed < SAMPLE else pytest.mark.slow,
        )
        for seed in range(begin, end)
    ]


@pytest.mark.parametrize(("what", "seed"), moments(0, MOMENTS))
def test_killed_at_a_random_moment(moto_arena: Arena, what: str, seed: int) -> None:
    stormy = seed >= MOMENTS // 2
    ordeal(moto_arena, what, seed, evenly(seed, 1 / 30) if stormy else None)


@pytest.mark.parametrize(("what", "seed"), moments(MOMENTS, MOMENTS + ON_CEPH))
def test_killed_at_a_random_moment_on_ceph(ceph_arena: Arena, what: str, seed: int) -> None:
    ordeal(ceph_arena, what, seed)
