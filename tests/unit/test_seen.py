"""Keys that were seen: as a dictionary tells, in a tenth of its memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from splatshard.pipeline.source import seen
from splatshard.pipeline.source.seen import SeenKeys

KINDS = [frozenset(("jpg", "txt")), frozenset(("jpg",)), frozenset[str](), frozenset(("json",))]


@pytest.mark.parametrize("recent", [1, 7, 64, 10_000])
def test_a_second_time_is_known(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what came the first time."""
    monkeypatch.setattr(seen, "RECENT", recent)
    rng, keys, wanted = random.Random(recent), SeenKeys(), dict[str, frozenset[str]]()
    for _ in range(2000):
        key, kind = f"{rng.randrange(1200):09d}", rng.choice(KINDS)
        assert keys.before(key, kind) == wanted.get(key)
        wanted.setdefault(key, kind)


def test_so_many_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MAX_KINDS", 3)
    keys = SeenKeys()
    for i in range(9):
        assert keys.before(f"{i}", frozenset((f"{i}",))) is None
    found = [keys.before(f"{i}", frozenset()) for i in range(9)]
    assert found == [frozenset("0"), frozenset("1"), *[frozenset()] * 7]


def test_a_key_takes_few_bytes() -> None:
    keys = SeenKeys()
    tracemalloc.start()
    try:
        for i in range(3 * seen.RECENT):
            keys.before(f"{i:012d}", KINDS[0])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 13 * 3 * seen.RECENT
