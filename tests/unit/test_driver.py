"""The driver's loop with workers that break, over a stand-in for Ray: devices that are lent to one
worker each, results that come in any order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splatshard.jobs.destination.plan import make_plan
from splatshard.jobs.driver import cluster
from splatshard.jobs.driver import driver as driver_module
from splatshard.jobs.driver.worker import Outcome, Started, Task, WorkerState
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import BackendError
from splatshard.schemas.shard import ShardRef

Convert = Callable[["Device", Task], Outcome]


class Device:
    """What a worker has to itself; `spoilt` is its process, which a new worker has anew."""

    def __init__(self, number: int) -> None:
        self.number, self.free, self.spoilt = number, True, False


class Actor:
    """Starts when a device is free, and works when it is asked for the result."""

    def __init__(self, devices: list[Device], convert: Convert) -> None:
        self.devices, self.work = devices, convert
        self.device: Device | None = None
        self.stopped = False
        self.start = self._method(lambda backend: Started(backend=backend))
        self.convert = self._method(lambda task, config, dst: self._convert(task))
        self.state = self._method(WorkerState)
        self.stop = self._method(lambda: None)

    def ready(self) -> bool:
        free = [device for device in self.devices if device.free]
        if self.device is None and free:
            self.device = free[0]
            self.device.free = self.device.spoilt = False
        return self.device is not None

    def _convert(self, task: Task) -> Outcome:
        assert self.device
        return self.work(self.device, task)

    def _method(self, function: Callable[..., Any]) -> Any:
        method = SimpleNamespace(remote=lambda *args: Result(self, lambda: function(*args)))
        method.options = lambda **_: method
        return method


class Result:
    def __init__(self, actor: Actor, make: Callable[[], Any]) -> None:
        self.actor, self.make = actor, make
        self.value: Any = None


class Ray:
    """As much of it as the driver asks for."""

    def __init__(self, devices: int, convert: Convert, seed: int) -> None:
        self.devices = [Device(number) for number in range(devices)]
        self.convert, self.chance = convert, random.Random(seed)

    def remote(self, **_: Any) -> Any:
        actor = SimpleNamespace(remote=lambda *_: Actor(self.devices, self.convert))
        return lambda _: actor

    def wait(self, refs: Sequence[Result], num_returns: int = 1, timeout: float = 0) -> Any:
        ready = [ref for ref in refs if ref.actor.ready() and self.chance.random() < 0.3]
        return ready, []

    def get(self, ref: Result) -> Any:
        ref.value = ref.value or ref.make()
        return ref.value

    def kill(self, actor: Actor) -> None:
        if actor.device:
            actor.device.free = True


class Told:
    """What the driver tells; the part of Progress and Catalog that it needs."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.retries: list[tuple[str, str, str]] = []
        self.left = 0
        self.workers = 0

    def finished(self, ref: ShardRef, outcome: Outcome) -> None:
        assert ref.name not in self.outcomes, "a shard came out twice"
        self.outcomes[ref.name] = outcome

    def retried(self, kind: str, shard: str, message: str) -> None:
        self.retries.append((kind, shard, message))

    def worker_left(self, *_: Any, **__: Any) -> None:
        self.left += 1

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    tell = update = interrupted = worker_ready = write_if_due = add = _nothing

    def kinds(self) -> set[str]:
        return {outcome.kind for outcome in self.outcomes.values()}


def run(
    monkeypatch: pytest.MonkeyPatch,
    dst: Path,
    convert: Convert,
    *,
    shards: int,
    devices: int,
    workers: int | None = None,
    seed: int = 0,
) -> Told:
    """Drive a conversion in which `convert` is what the workers do."""
    told: Any = Told()
    monkeypatch.setattr("splatshard.jobs.driver.driver.ray", Ray(devices, convert, seed))
    monkeypatch.setattr(cluster, "reservation", lambda backend: {"num_gpus": 1})
    monkeypatch.setattr(cluster, "draining_nodes", set)
    monkeypatch.setattr(cluster, "check_alive", lambda answered, now: now)
    monkeypatch.setattr("splatshard.jobs.driver.driver.POLL_S", 0)
    monkeypatch.setattr("splatshard.jobs.driver.driver.RESIZE_S", 0)
    names = [f"{number:02d}" for number in range(shards)]
    refs = [ShardRef(name=n, kind="tar", urls=(n,), size_bytes=1, etag="1") for n in names]
    plan = make_plan(refs, {}, ConvertConfig(), lambda ref: "")
    signals: Any = SimpleNamespace(received=0)
    driver = driver_module.Driver(
        plan,
        ConvertConfig(),
        str(dst),
        workers=workers or devices,
        sample_timeout=100,
        storage_options={},
        progress=told,
        catalog=told,
        signals=signals,
    )
    driver.run()
    return told


def done(task: Task) -> Outcome:
    if task.span is not None:
        return Outcome(name=task.ref.name, kind="survived", tried=4)
    manifest: Any = object()
    return Outcome(name=task.ref.name, kind="done", manifest=manifest)


def broken(task: Task, message: str = "CUDA error: an illegal memory access") -> Outcome:
    return Outcome(name=task.ref.name, kind="broken", error="RuntimeError", message=message)


@pytest.mark.parametrize("devices", [2, 5])
@pytest.mark.parametrize("seed", range(20))
def test_a_device_that_fails_everything_fails_no_shard(
    devices: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(device: Device, task: Task) -> Outcome:
        return broken(task) if device.number == 0 else done(task)

    told = run(monkeypatch, tmp_path, convert, shards=40, devices=devices, seed=seed)
    assert len(told.outcomes) == 40
    assert told.kinds() == {"done"}
    assert "application" in {kind for kind, *_ in told.retries}


def test_a_broken_worker_does_not_keep_its_place_from_one_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More workers were asked for than there are devices."""

    def convert(device: Device, task: Task) -> Outcome:
        device.spoilt |= task.ref.name == "01" and not task.alone
        return broken(task) if device.spoilt else done(task)

    monkeypatch.setattr("splatshard.jobs.driver.driver.NO_WORKER_S", 0.1)
    told = run(monkeypatch, tmp_path, convert, shards=3, devices=1, workers=3)
    assert len(told.outcomes) == 3
    assert told.kinds() == {"done"}


@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_fails_everything_is_replaced(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One device, no other worker: nobody to wait for."""
    converted: list[str] = []

    def convert(device: Device, task: Task) -> Outcome:
        converted.append(task.ref.name)
        device.spoilt |= len(converted) % 5 == 0
        return broken(task) if device.spoilt else done(task)

    told = run(monkeypatch, tmp_path, convert, shards=12, devices=1, seed=seed)
    assert len(told.outcomes) == 12
    assert told.kinds() == {"done"}


@pytest.mark.parametrize("devices", [1, 3])
def test_a_shard_that_breaks_every_worker_fails_with_what_they_said(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Task] = []

    def convert(device: Device, task: Task) -> Outcome:
        if task.ref.name != "03":
            return done(task)
        tries.append(task)
        return broken(task, "a bug\nin lines")

    told = run(monkeypatch, tmp_path, convert, shards=8, devices=devices)
    assert [n for n, outcome in told.outcomes.items() if outcome.kind != "done"] == ["03"]
    assert (told.outcomes["03"].kind, told.outcomes["03"].error) == ("failed", "RuntimeError")
    assert [task.alone for task in tries] == [False, True, True]
    marker = json.loads((tmp_path / "03.failed.json").read_text())
    assert (marker["error"], marker["message"]) == ("RuntimeError", "a bug\nin lines")
    messages = [message for _, shard, message in told.retries if shard == "03"]
    assert messages == [
        "RuntimeError: a bug; next time alone at a worker",
        "RuntimeError: a bug; once more, alone",
    ]


def test_a_machine_that_fails_everything_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r"RuntimeError: CUDA error.* in a row"):
        run(monkeypatch, tmp_path, lambda _, task: broken(task), shards=50, devices=2)
    assert len(list(tmp_path.glob("*.failed.json"))) == driver_module.BROKEN_SHARDS


def test_a_sample_that_takes_all_memory_is_found_like_one_that_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(device: Device, task: Task) -> Outcome:
        start, stop = task.span or (0, 4)
        if start <= 2 < stop and 2 not in dict(task.quarantine):
            return Outcome(name=task.ref.name, kind="oom", error="MemoryError")
        quarantined.update(task.quarantine)
        return done(task)

    quarantined: dict[int, str] = {}
    told = run(monkeypatch, tmp_path, convert, shards=1, devices=2)
    assert told.kinds() == {"done"}
    assert quarantined == {2: "ran its worker out of memory"}


@pytest.mark.parametrize("seed", range(5))
def test_a_shard_given_up_while_parts_of_it_are_in_work_comes_out_once(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part ends in an error of ours, whose marker the worker has written."""

    def convert(device: Device, task: Task) -> Outcome:
        if task.ref.name != "00" or task.span == (0, 0):
            return done(task)
        kind = "failed" if task.span else "oom"
        return Outcome(name=task.ref.name, kind=kind, error="SourceError", message="cut")

    told = run(monkeypatch, tmp_path, convert, shards=3, devices=3, seed=seed)
    assert told.outcomes["00"].kind == "failed"
    assert len(told.outcomes) == 3
