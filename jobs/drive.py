"""The driver loop over Ray: shards to workers, every result inspected, dead workers replaced.

    assign -> ray.wait -> done | failed | storage | worker died -> poll progress -> again

Why a loop of our own: ray.util.ActorPool drops a dead actor and loses its item, and Ray Data names
outputs after blocks, not inputs. At most two shards are in flight per worker, so that one waits at
the worker while the driver is busy. Workers have max_restarts=0 and are replaced here, since the
loop must know which shard was in work when one died: that one is retried, up to MAX_RETRIES times;
the shard queued behind it is innocent and goes back without a count. An error from the stages is
deterministic and is not retried; a StorageError stops the job, because a full disk would fail
every shard after it.

Left out, for the cluster step: bisection of shards that kill workers, and growing with the cluster.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.actors import THREADS, FitActor, Outcome
from jobs.cli import Interrupted, debugging, say
from jobs.progress import Progress
from jobs.signals import StopSignals
from pipeline.commit import mark_failed
from schemas.config import ConvertConfig
from schemas.errors import BackendError, SplatshardError, StorageError
from schemas.shard import ShardRef

IN_FLIGHT = 2
MAX_RETRIES = 3
POLL_S = 0.5
STOP_GRACE_S = 10.0
BACKOFF_S = 1.0

CPU_BACKENDS = ("cpu", "reference")


@dataclass(eq=False, kw_only=True)
class Worker:
    """An actor and what was asked of it. `in_flight` is in order: its first shard is in work."""

    actor: Any
    started: Any
    in_flight: dict[Any, ShardRef] = field(default_factory=dict)
    polled: Any = None
    counters: Any = None


@contextmanager
def ray_session(workers: int | None, backend: str) -> Iterator[tuple[int, dict[str, float]]]:
    """An embedded Ray, or the one this process is in, or that RAY_ADDRESS names (set by
    `ray job submit`).

    Gives the number of workers and what each one reserves. Raises BackendError when a GPU backend
    was asked for and Ray sees no GPU.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "log_to_driver": debugging(),
        "logging_level": "INFO" if debugging() else "ERROR",
    }
    joined = ray.is_initialized()
    if joined:
        pass
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
    else:
        ray.init(
            address="local",
            num_cpus=workers or len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=100 * 2**20,  # only small records pass through it
            **common,
        )
    try:
        with redirect_stdout(sys.stderr):  # where Ray's threads would print that a worker died
            yield _team(workers, backend)
    finally:
        if not joined:
            ray.shutdown()


def _team(workers: int | None, backend: str) -> tuple[int, dict[str, float]]:
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    if backend == "triton" and gpus == 0:
        raise BackendError("--backend triton: Ray sees no GPU here; use --backend cpu")
    if gpus and backend not in CPU_BACKENDS:
        return workers or gpus, {"num_cpus": 1, "num_gpus": 1}
    return workers or max(1, int(total.get("CPU", 1))), {"num_cpus": 1}


def drive(
    work: Sequence[ShardRef],
    config: ConvertConfig,
    dst: str,
    workers: int,
    resources: dict[str, float],
    progress: Progress,
    signals: StopSignals,
) -> None:
    """Convert `work`; every outcome goes to `progress`.

    Raises StorageError or BackendError (the job cannot go on) and Interrupted (after the workers
    gave up cleanly). Shards committed before that stay.
    """
    pending = deque(work)
    deaths: Counter[str] = Counter()
    team = [hire(config.backend, resources) for _ in range(min(workers, len(work)))]
    try:
        while pending or any(worker.in_flight for worker in team):
            if signals.received:
                raise Interrupted(128 + signals.received, signals.message)
            assign(team, pending, config, dst)
            for worker in wait(team):
                try:
                    collect(worker, progress)
                except RayError:
                    team[team.index(worker)] = replace(
                        worker, pending, deaths, config, dst, resources, progress
                    )
            poll(team)
            progress.update([worker.counters for worker in team if counting(worker)])
    except (Interrupted, SplatshardError):
        stop(team, progress)
        raise
    finally:
        for worker in team:
            ray.kill(worker.actor)


def hire(backend: str, resources: dict[str, float]) -> Worker:
    """A new worker; its loading starts at once."""
    remote = ray.remote(
        concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0, **resources
    )
    actor = remote(FitActor).remote(THREADS)
    return Worker(actor=actor, started=actor.start.remote(backend))


def assign(team: list[Worker], pending: deque[ShardRef], config: ConvertConfig, dst: str) -> None:
    """Fill the workers breadth first; the last shards are not queued behind a busy worker."""
    for depth in range(IN_FLIGHT):
        for worker in team:
            queueing = depth > 0 and len(pending) < len(team)
            if pending and len(worker.in_flight) == depth and not queueing:
                ref = pending.popleft()
                worker.in_flight[worker.actor.convert.remote(ref, config, dst)] = ref


def wait(team: list[Worker]) -> list[Worker]:
    """Workers with something to collect, within POLL_S."""
    watched = [ref for w in team for ref in (w.started, *w.in_flight) if ref is not None]
    ready, _ = ray.wait(watched, num_returns=len(watched), timeout=0)
    if not ready:
        ready, _ = ray.wait(watched, num_returns=1, timeout=POLL_S)
    found = set(ready)
    return [w for w in team if w.started in found or not found.isdisjoint(w.in_flight)]


def collect(worker: Worker, progress: Progress) -> None:
    """Take all finished results of one worker, in order.

    Raises RayError when the worker died, BackendError and StorageError when the job must stop.
    """
    if worker.started is not None:
        if not is_ready(worker.started):
            return
        state, detail = ray.get(worker.started)
        worker.started = None
        if state == "error":
            raise BackendError(detail)
        progress.worker_ready(detail)
    for ref in list(worker.in_flight):
        if not is_ready(ref):
            return
        outcome: Outcome = ray.get(ref)
        shard = worker.in_flight.pop(ref)
        worker.counters = None
        if outcome.kind == "storage":
            raise StorageError(
                f"{outcome.message} (shard {outcome.name}; finished shards are kept)"
            )
        progress.finished(shard, outcome)


def is_ready(ref: Any) -> bool:
    """Whether a result, or the news of the worker's death, is there."""
    return bool(ray.wait([ref], timeout=0)[0])


def replace(
    dead: Worker,
    pending: deque[ShardRef],
    deaths: Counter[str],
    config: ConvertConfig,
    dst: str,
    resources: dict[str, float],
    progress: Progress,
) -> Worker:
    """A new worker in place of a dead one, whose shards go back to the front of the queue."""
    ray.kill(dead.actor)  # a lost connection looks like a death; make it one
    shards = list(dead.in_flight.values())
    blamed = shards[0].name if shards else ""
    deaths[blamed] += 1
    if deaths[blamed] > MAX_RETRIES:
        reason = (
            f"the worker died {deaths[blamed]} times "
            + ("while converting this shard" if blamed else "before its first shard")
            + " (out of memory, or a crash in a decoder or kernel)"
        )
        if not blamed or dead.started is not None:
            raise BackendError(reason)
        shard = shards.pop(0)
        mark_failed(dst, shard, config, SplatshardError(reason))
        progress.finished(
            shard,
            Outcome(name=shard.name, kind="failed", error="SplatshardError", message=reason),
        )
    elif blamed:
        say(f"a worker died while converting {blamed}; retry {deaths[blamed]} of {MAX_RETRIES}")
    pending.extendleft(reversed(shards))
    time.sleep(BACKOFF_S)
    return hire(config.backend, resources)


def poll(team: list[Worker]) -> None:
    """Fetch each worker's counters without waiting for any."""
    for worker in team:
        if worker.polled is None and worker.in_flight and worker.started is None:
            control = worker.actor.progress.options(concurrency_group="control")
            worker.polled = control.remote()
        elif worker.polled is not None and is_ready(worker.polled):
            try:
                worker.counters = ray.get(worker.polled)
            except RayError:
                worker.counters = None  # dead: `collect` meets the same news
            worker.polled = None


def counting(worker: Worker) -> bool:
    """Whether its counters are of a shard whose result has not been collected."""
    names = [shard.name for shard in worker.in_flight.values()]
    return worker.counters is not None and worker.counters.shard in names


def stop(team: list[Worker], progress: Progress) -> None:
    """Ask all workers to give up after their current batch, and wait STOP_GRACE_S for it."""
    for worker in team:
        worker.actor.stop.options(concurrency_group="control").remote()
    waiting = {ref: shard for w in team if w.started is None for ref, shard in w.in_flight.items()}
    ready, _ = (
        ray.wait(list(waiting), num_returns=len(waiting), timeout=STOP_GRACE_S)
        if (waiting)
        else ([], [])
    )
    for ref in ready:
        try:
            outcome: Outcome = ray.get(ref)
        except (RayError, RayTaskError):
            continue
        if outcome.kind in ("done", "failed"):
            progress.finished(waiting[ref], outcome)
