"""Work ahead on threads: order, bounds, errors, prompt ends and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from splatshard.pipeline.runtime.prefetch import AHEAD_PER_WORKER, map_ahead, prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before, threading.enumerate()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, at most 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_order_is_kept(depth: int) -> None:
    assert list(prefetch(range(50), depth)) == list(range(50))
    assert list(prefetch((), depth)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_mapping_keeps_the_order(workers: int) -> None:
    def slow_for_even(x: int) -> int:
        time.sleep(0.002 * (x % 2 == 0))
        return x * x

    assert list(map_ahead(slow_for_even, range(30), workers)) == [x * x for x in range(30)]


def test_the_source_runs_ahead_but_not_further_than_the_depth() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(20):
            taken.append(i)
            yield i

    with closing(prefetch(source(), 3)) as items:
        assert next(items) == 0
        until(lambda: len(taken) == 4)  # the one in hand, and three ahead
        time.sleep(0.02)
        assert len(taken) == 4


def test_large_items_take_the_room_of_several() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(9):
            taken.append(i)
            yield i

    for heavy, ahead in (2, 3), (3, 3), (100, 2):
        taken.clear()
        with closing(prefetch(source(), 4, lambda _, weight=heavy: weight)) as items:
            assert next(items) == 0
            until(lambda wanted=ahead: len(taken) == wanted)
            time.sleep(0.02)
            assert len(taken) == ahead  # the one in hand, those that fit, and one that waits
            assert list(items) == list(range(1, 9))
        with closing(map_ahead(abs, source(), 1, lambda _, weight=heavy: weight)) as items:
            assert list(items) == list(range(9))


def test_a_heavy_item_that_waits_for_room_ends_with_its_consumer() -> None:
    with closing(prefetch(range(9), 4, lambda _: 3)) as items:
        assert next(items) == 0


def test_a_pool_goes_on_while_its_consumer_is_busy_but_not_for_ever() -> None:
    done: list[int] = []
    with closing(map_ahead(done.append, range(1000), 2)) as results:
        next(results)
        until(lambda: len(done) == 2 * AHEAD_PER_WORKER + 1)
        time.sleep(0.02)
        assert len(done) == 2 * AHEAD_PER_WORKER + 1


def test_source_and_consumer_overlap() -> None:
    """Each waits for the other to be at work at the same time."""
    meet = threading.Barrier(2, timeout=10)

    def source() -> Iterator[int]:
        yield 0
        meet.wait()
        yield 1

    for item in prefetch(source()):
        if item == 0:
            meet.wait()


def test_errors_pass_through_at_their_place() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("the source broke")

    items = prefetch(source(), 5)
    assert next(items) == 1
    with pytest.raises(OSError, match="the source broke"):
        next(items)

    def reciprocal(x: int) -> float:
        return 1 / x

    results = map_ahead(reciprocal, [1, 2, 0, 4], 2)
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_base_exception_passes_too() -> None:
    class Stop(BaseException):
        pass

    def source() -> Iterator[int]:
        raise Stop
        yield

    with pytest.raises(Stop):
        next(prefetch(source()))


def test_closing_ends_the_source_and_its_threads() -> None:
    """A chain as a conversion has it: a pool, a thread, a second thread; the consumer raises."""
    ended: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            ended.append("source")

    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            for item in items:
                yield item + 1
        finally:
            ended.append("stage")

    first = prefetch(map_ahead(lambda x: 2 * x, source(), 2), 2)
    second = prefetch(stage(first), 2)

    def consume() -> None:
        with closing(first), closing(second):
            for item in second:
                if item == 11:
                    raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        consume()
    assert ended == ["stage", "source"]


def test_closing_does_not_wait_for_what_was_not_begun() -> None:
    begun: list[int] = []

    def slow(x: int) -> int:
        begun.append(x)
        time.sleep(0.05)
        return x

    start = time.monotonic()
    with closing(map_ahead(slow, range(1000), 1)) as results:
        next(results)
    assert time.monotonic() - start < 5
    assert len(begun) < 6


def test_nothing_starts_before_the_first_item() -> None:
    before = threading.active_count()
    items, results = prefetch(range(3)), map_ahead(abs, range(3), 2)
    assert threading.active_count() == before
    items.close()
    results.close()
