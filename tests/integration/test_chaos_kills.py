"""SIGKILL at seeded random moments: the same command again, and nothing is lost or doubled.

A sample of the moments in every test run, fifty in `make test-slow`; half of those also meet an S3
that fails one request in thirty.
"""

from __future__ import annotations

import pytest

from tests.integration.chaos import STRIKES, Arena, ordeal
from tests.integration.faults import evenly

pytestmark = pytest.mark.integration

SAMPLE = 4
MOMENTS = 50


def moment(seed: int) -> object:
    """Parameters of one moment: the strikes take turns."""
    what = list(STRIKES)[seed % len(STRIKES)]
    marks = () if seed < SAMPLE else pytest.mark.slow
    return pytest.param(what, seed, id=f"{what}-{seed}", marks=marks)


@pytest.mark.parametrize(("what", "seed"), [moment(seed) for seed in range(MOMENTS)])
def test_killed_at_a_random_moment(arena: Arena, what: str, seed: int) -> None:
    stormy = seed >= MOMENTS // 2
    ordeal(arena, what, seed, evenly(seed, 1 / 30) if stormy else None)
