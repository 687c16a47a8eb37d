"""The schedule under every sequence of events: each shard comes out once, each culprit is found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.jobs.driver.bisect import READ, Bisection
from splatshard.jobs.driver.scheduler import (
    DEATHS_ALONE,
    MOST_DEATHS,
    REASONS,
    UNAVAILABLE,
    Schedule,
)
from splatshard.jobs.driver.worker import Task
from splatshard.schemas.shard import ShardRef


def ref(name: str) -> ShardRef:
    return ShardRef(name=name, kind="tar", urls=(f"/{name}.tar",), size_bytes=1, etag="1")


def schedule(names: list[str], replaces: dict[str, str] | None = None) -> Schedule:
    return Schedule([ref(name) for name in names], replaces or {}, lambda *_: None, lambda _: None)


@given(st.integers(0, 400), st.data())
def test_bisection_finds_exactly_the_culprits(samples: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, max(0, samples - 1)), max_size=4 if samples else 0))
    order = random.Random(data.draw(st.integers(0, 9)))
    bisection, waiting, tries = Bisection(), [], 0
    while not bisection.over:
        waiting += bisection.take()
        span = start, stop = waiting.pop(order.randrange(len(waiting)))
        tries += 1
        if any(start <= number < stop for number in poison):
            bisection.died(span, "crash")
        else:
            assert span == READ or stop <= samples, "a part of the shard"
            bisection.survived(span, samples if span == READ else stop - start)
    assert set(bisection.found) == poison
    assert tries <= 3 + 2 * len(poison) * samples.bit_length()


@dataclass(kw_only=True)
class Shard:
    """Numbers of samples: those whose reading (-1: the opening) kills, whose decoding does, and
    that raise. So many samples together also kill."""

    samples: int = 0
    reading: set[int] = field(default_factory=set[int])
    decoding: set[int] = field(default_factory=set[int])
    raising: set[int] = field(default_factory=set[int])
    too_many: int = 10**9

    @property
    def culprits(self) -> set[int]:
        return {number for number in self.decoding if number < self.samples}

    @property
    def deadly_to_read(self) -> bool:
        return any(number < self.samples for number in self.reading)

    def becomes(self, task: Task) -> str:
        """ "kills", "raises" or "survives"."""
        start, stop = task.span or (0, self.samples)
        end = self.samples if task.span in (None, READ) else min(stop, self.samples)
        if any(number < end for number in self.reading):
            return "kills"
        quarantine = dict(task.quarantine)

        def touches(numbers: set[int]) -> bool:
            return any(start <= number < stop and number not in quarantine for number in numbers)

        if touches(self.decoding) or stop - start - len(quarantine) >= self.too_many:
            return "kills"
        return "raises" if touches(self.raising) else "survives"


class World:
    """A cluster: samples that kill, nodes that go and stores that do not answer, at random.

    Keeps what a real one would show: which shards were finished, with which samples quarantined.
    """

    def __init__(
        self, shards: Mapping[str, Shard], seed: int = 0, mishaps: float = 0.0, workers: int = 1
    ) -> None:
        self.shards, self.chance, self.mishaps = shards, random.Random(seed), mishaps
        self.schedule = schedule(list(shards))
        self.workers: list[list[Task]] = [[] for _ in range(workers)]
        self.finished: dict[str, dict[int, str]] = {}
        self.failed: dict[str, str] = {}
        self.attempts: set[str] = set()
        self.tries: Counter[str] = Counter()

    def run(self) -> World:
        for now in range(100_000):
            for tasks in self.workers:
                if not tasks and (task := self.schedule.take(now)):
                    tasks.append(task)
                one = len(tasks) == 1 and not tasks[0].alone
                if one and (task := self.schedule.take_beside()):
                    tasks.append(task)
            busy = [tasks for tasks in self.workers if tasks]
            if not busy and not len(self.schedule):
                return self
            if busy:
                tasks = self.chance.choice(busy)
                self.step(list(tasks), now)
                tasks.clear()
        raise AssertionError("the schedule never ends")

    def step(self, tasks: list[Task], now: int) -> None:
        for task in tasks:
            assert task.attempt not in self.attempts, "an attempt id was used twice"
            self.attempts.add(task.attempt)
            self.tries[task.ref.name] += 1
        tasks = [task for task in tasks if task.ref.name not in self.schedule.closed]
        becomes = {self.shards[task.ref.name].becomes(task) for task in tasks}
        if self.chance.random() < self.mishaps:
            for task in reversed(tasks):
                self.schedule.innocent(task, "node_death")
        elif self.chance.random() < self.mishaps:
            for task in tasks:
                if not self.schedule.unavailable(task, "503", now):
                    self.finish(task, "503")
        elif becomes - {"survives"}:
            kind = "worker_death" if "kills" in becomes else "application"
            for task in reversed(tasks):
                if reason := self.schedule.died(task, kind, "ValueError: a bug"):
                    self.finish(task, reason)
        else:
            for task in tasks:
                if task.span:
                    samples = self.shards[task.ref.name].samples
                    self.schedule.survived(task, samples if task.span == READ else 1)
                else:
                    self.finish(task)

    def finish(self, task: Task, error: str = "") -> None:
        name = task.ref.name
        assert name not in self.finished, "a shard came out twice"
        assert name not in self.failed, "a shard came out twice"
        self.schedule.close(task)
        if error:
            self.failed[name] = error
        else:
            self.finished[name] = dict(task.quarantine)


@st.composite
def shards(draw: st.DrawFn, samples: int = 60) -> Shard:
    """Mostly with something wrong, sometimes with several things."""
    numbers = st.sets(st.integers(0, samples - 1), max_size=3)
    kinds = draw(st.sets(st.sampled_from(["reading", "decoding", "raising", "too_many"])))
    return Shard(
        samples=draw(st.integers(0, samples)),
        reading=draw(numbers) | draw(st.sets(st.just(-1))) if "reading" in kinds else set(),
        decoding=draw(numbers) if "decoding" in kinds else set(),
        raising=draw(numbers) if "raising" in kinds else set(),
        too_many=draw(st.integers(1, samples)) if "too_many" in kinds else 10**9,
    )


NAMED = st.dictionaries(st.sampled_from("abcdef"), shards(), min_size=1)


@given(NAMED, st.integers(0, 1000), st.sampled_from([0.0, 0.1]), st.integers(1, 3))
def test_every_shard_comes_out_once_and_only_culprits_are_quarantined(
    named: dict[str, Shard], seed: int, mishaps: float, workers: int
) -> None:
    world = World(named, seed, mishaps, workers).run()
    assert world.finished.keys() | world.failed.keys() == named.keys()
    for name, quarantine in world.finished.items():
        assert not named[name].deadly_to_read
        if named[name].too_many > 60:
            assert set(quarantine) == named[name].culprits
        assert set(quarantine.values()) <= {REASONS["worker_death"]}
    for name, error in world.failed.items():
        shard = named[name]
        simple = not shard.deadly_to_read and not shard.raising and shard.too_many > 60
        assert error == "503" or not simple, "given up although the culprits could be found"


@given(shards(samples=3000), st.integers(0, 9), st.integers(1, 3))
def test_whatever_kills_where_the_tries_are_few(shard: Shard, seed: int, workers: int) -> None:
    world = World({"a": shard}, seed, workers=workers).run()
    most = 2 * MOST_DEATHS + 12
    if shard.too_many > 3000:
        most = 10 + 2 * (len(shard.decoding) + 1) * (shard.samples + 2).bit_length()
    if shard.deadly_to_read:
        most = 2 + DEATHS_ALONE
    assert world.tries["a"] <= most


@pytest.mark.parametrize("reading", [{-1}, {0}, {40}, {99}, {-1, 3, 4, 99}])
def test_a_shard_whose_reading_kills_is_given_up_and_says_so(reading: set[int]) -> None:
    world = World({"a": Shard(samples=100, reading=reading, decoding={2, 50})}).run()
    assert world.failed["a"].startswith(f"shard a: reading /a.tar {REASONS['worker_death']}")
    assert "replace it" in world.failed["a"]
    assert world.tries["a"] == 2 + DEATHS_ALONE


def test_twenty_samples_that_kill_are_found() -> None:
    shard = Shard(samples=1000, decoding=set(range(7, 1000, 50)))
    world = World({"a": shard}).run()
    assert len(shard.decoding) == 20
    assert world.finished["a"].keys() == shard.decoding


def test_a_shard_of_which_every_sample_kills_is_given_up() -> None:
    world = World({"a": Shard(samples=10_000, decoding=set(range(10_000)))}, workers=4).run()
    assert "too many of its samples" in world.failed["a"]
    assert world.tries["a"] <= MOST_DEATHS + 5


def test_an_error_of_another_kind_fails_its_shard_with_its_own_words_and_no_search() -> None:
    named = {"a": Shard(samples=1000, raising={5}), "b": Shard(samples=5)}
    world = World(named, workers=2).run()
    assert world.failed == {"a": "ValueError: a bug"}
    assert world.finished == {"b": {}}
    assert world.tries["a"] == 1 + DEATHS_ALONE


def test_parts_that_are_in_work_when_their_shard_is_given_up_are_forgotten() -> None:
    queue = schedule(["a"])
    task = queue.take(0)
    assert task
    while not task.span or task.span == READ:  # until there are two parts to try
        if task.span == READ:
            queue.survived(task, 100)
        else:
            assert not queue.died(task, "worker_death")
        task = queue.take(0)
        assert task
    assert queue.suspects
    queue.close(task)
    assert (len(queue), queue.suspects, queue.closed) == (0, False, {"a"})


def test_a_death_without_a_culprit_ends() -> None:
    """The whole shard kills, no part of it does: memory, say."""
    queue = schedule(["a"])
    alone = deaths = 0
    while task := queue.take(0):
        if task.span:
            queue.survived(task, 20)
            continue
        deaths += 1
        alone += task.alone
        reason = queue.died(task, "oom")
    assert "out of memory" in reason
    assert "--workers" in reason
    assert deaths == alone + 1
    assert alone > DEATHS_ALONE


def test_a_store_that_never_answers_is_given_up_after_longer_and_longer_waits() -> None:
    queue, now, waits = schedule(["a"]), 0.0, []
    task = queue.take(now)
    assert task
    while queue.unavailable(task, "503", now):
        assert queue.take(now) is None, "not at once"
        before = now
        while not (task := queue.take(now)):
            now += 0.25
        waits.append(now - before)
    assert len(waits) == UNAVAILABLE
    assert waits[-1] > 8 * waits[0]


def test_suspects_wait_for_an_idle_worker_and_nothing_is_put_beside_them() -> None:
    queue = schedule(["a", "b", "c"])
    first, second = queue.take(0), queue.take_beside()
    assert first
    assert second
    for task in (second, first):
        assert queue.died(task, "worker_death") == ""
    assert queue.take_beside() is None, "a worker that is busy would never become idle"
    task = queue.take(0)
    assert task
    assert (task.ref.name, task.alone) == ("a", True)


@pytest.mark.parametrize("event", ["innocent", "unavailable", "died"])
def test_another_attempt_may_replace_the_same_marker(event: str) -> None:
    queue = schedule(["a"], {"a": "digest"})
    task = queue.take(0)
    assert task
    if event == "innocent":
        queue.innocent(task, "preempted")
    elif event == "unavailable":
        queue.unavailable(task, "503", 0)
    else:
        queue.died(task, "hang")
    again = queue.take(1000)
    assert again
    assert again.replaces == task.replaces == "digest"
    assert again.attempt != task.attempt
    assert again.attempt.startswith(queue.job)
