"""The schedule under every sequence of events: each shard comes out once, each culprit is found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.actors import Task
from jobs.hunt import Hunt
from jobs.schedule import DEATHS_ALONE, REASONS, UNAVAILABLE, Schedule
from schemas.shard import ShardRef


def ref(name: str) -> ShardRef:
    return ShardRef(name=name, kind="tar", urls=(f"/{name}.tar",), size_bytes=1, etag="1")


def schedule(names: list[str], replaces: dict[str, str] | None = None) -> Schedule:
    return Schedule([ref(name) for name in names], replaces or {}, lambda *_: None, lambda _: None)


@given(st.integers(0, 400), st.data())
def test_a_hunt_finds_exactly_the_culprits(samples: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, max(0, samples - 1)), max_size=4 if samples else 0))
    order = random.Random(data.draw(st.integers(0, 9)))
    hunt, waiting, tries = Hunt(), [], 0
    while not hunt.over:
        waiting += hunt.take()
        start, stop = waiting.pop(order.randrange(len(waiting)))
        tries += 1
        if any(start <= number < stop for number in poison):
            hunt.died((start, stop), "crash")
        else:
            hunt.survived((start, stop), max(0, min(samples, stop) - start))
    assert set(hunt.found) == poison
    assert tries <= 8 + 24 * len(poison)


class World:
    """A cluster of one: samples that kill, nodes that go and stores that do not answer, at random.

    Keeps what a real one would show: which shards were finished, with which samples quarantined.
    """

    def __init__(self, shards: dict[str, tuple[int, set[int]]], seed: int, mishaps: float) -> None:
        self.shards, self.chance, self.mishaps = shards, random.Random(seed), mishaps
        self.schedule = schedule(list(shards))
        self.finished: dict[str, dict[int, str]] = {}
        self.failed: dict[str, str] = {}
        self.attempts: set[str] = set()

    def run(self) -> None:
        for now in range(100_000):
            tasks = [task for task in [self.schedule.take(now)] if task]
            if tasks and not tasks[0].alone and (beside := self.schedule.take_beside()):
                tasks.append(beside)
            if not tasks and not len(self.schedule):
                return
            self.step(tasks, now)
        raise AssertionError("the schedule never ends")

    def step(self, tasks: list[Task], now: int) -> None:
        for task in tasks:
            assert task.attempt not in self.attempts, "an attempt id was used twice"
            self.attempts.add(task.attempt)
        if self.chance.random() < self.mishaps:
            for task in reversed(tasks):
                self.schedule.innocent(task, "node_death")
        elif self.chance.random() < self.mishaps:
            for task in tasks:
                if not self.schedule.unavailable(task, "503", now):
                    self.finish(task, "503")
        elif any(self.kills(task) for task in tasks):
            for task in reversed(tasks):
                if reason := self.schedule.died(task, "worker_death"):
                    self.finish(task, reason)
        else:
            for task in tasks:
                if task.span:
                    self.schedule.survived(task, len(self.samples(task)))
                else:
                    self.finish(task)

    def samples(self, task: Task) -> range:
        count, _ = self.shards[task.ref.name]
        start, stop = task.span or (0, count)
        return range(min(start, count), min(stop, count))

    def kills(self, task: Task) -> bool:
        poison = self.shards[task.ref.name][1] - dict(task.quarantine).keys()
        return not poison.isdisjoint(self.samples(task))

    def finish(self, task: Task, error: str = "") -> None:
        name = task.ref.name
        assert name not in self.finished, "a shard came out twice"
        assert name not in self.failed, "a shard came out twice"
        if error:
            self.failed[name] = error
        else:
            self.finished[name] = dict(task.quarantine)


SHARDS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(0, 60), st.sets(st.integers(0, 59), max_size=2)),
    min_size=1,
)


@given(SHARDS, st.integers(0, 1000), st.sampled_from([0.0, 0.1]))
def test_every_shard_comes_out_once_and_only_culprits_are_quarantined(
    shards: dict[str, tuple[int, set[int]]], seed: int, mishaps: float
) -> None:
    world = World(shards, seed, mishaps)
    world.run()
    assert world.finished.keys() | world.failed.keys() == shards.keys()
    for name, quarantine in world.finished.items():
        count, poison = shards[name]
        assert set(quarantine) == {number for number in poison if number < count}
        assert set(quarantine.values()) <= {REASONS["worker_death"]}
    assert set(world.failed.values()) <= {"503"}, "given up although a culprit could be found"


def test_a_death_without_a_culprit_ends() -> None:
    """The whole shard kills, no part of it does: memory, say."""
    queue = schedule(["a"])
    alone = deaths = 0
    while task := queue.take(0):
        if task.span:
            queue.survived(task, max(0, min(20, task.span[1]) - task.span[0]))
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
