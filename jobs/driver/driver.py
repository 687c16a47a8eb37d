"""The driver loop over Ray: shards to workers, every result inspected, dead workers replaced.

    resize -> assign -> ray.wait -> done | failed | unavailable | worker died -> poll -> again

Why a loop of our own: ray.util.ActorPool drops a dead actor and loses its item, and Ray Data names
outputs after blocks, not inputs. Workers have max_restarts=0 and are replaced here, since the loop
must know what was in work when one died; `jobs.driver.scheduler` decides what becomes of it.

An error of ours from the stages is deterministic: the shard is marked failed and not retried. A
StorageError stops the job, because a full disk would fail every shard after it; so does a store
that has stopped answering everybody.

Any other error (CUDA's, say) may be the device's or the process's. Its worker counts as dead, since
it would fail shard after shard; but it keeps its place until others have its shards, because a new
worker would get the same device, idle, and with it the same shards.

Nothing is remembered between jobs: the markers in DST say what is done, and the recovery for
everything is to run the same command again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from splatshard.jobs.cli.command import Interrupted
from splatshard.jobs.cli.log import log_format
from splatshard.jobs.cli.signals import StopSignals
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import Plan
from splatshard.jobs.driver import cluster
from splatshard.jobs.driver.progress import Progress
from splatshard.jobs.driver.scheduler import UNAVAILABLE, Schedule
from splatshard.jobs.driver.stats import RetryKind
from splatshard.jobs.driver.worker import (
    IN_FLIGHT,
    THREADS,
    FitActor,
    Outcome,
    Started,
    Task,
    WorkerState,
)
from splatshard.pipeline.runtime.stage_timer import StageStats
from splatshard.pipeline.shards.commit import mark_failed
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import BackendError, SplatshardError, StorageError, UnavailableError

POLL_S = 0.5
RESIZE_S = 5.0
STOP_GRACE_S = 10.0
START_DEATHS = 4
"""Workers in a row that may die before they have loaded."""
BROKEN_SHARDS = 8
"""Shards that may fail in a row by errors that are not ours, with none done in between."""
NO_WORKER_S = 60.0
"""Without any worker; then the user hears what the job waits for."""


@dataclass(eq=False, kw_only=True)
class Worker:
    """An actor and what was asked of it.

    `heard` is when it last answered (monotonic s), `worked` its pulse at the end of its last shard,
    `broken` when it broke.
    """

    actor: Any
    started: Any
    node: str = ""
    in_flight: dict[Any, Task] = field(default_factory=dict)
    polled: Any = None
    heard: float = 0.0
    state: WorkerState = field(default_factory=WorkerState)
    worked: StageStats = field(default_factory=StageStats)
    retiring: bool = False
    broken: float | None = None

    @property
    def able(self) -> bool:
        """Whether it may be given tasks; before it has loaded it may wait for a place."""
        return self.started is None and not self.retiring and self.broken is None

    @property
    def occupied(self) -> bool:
        """Whether it works on a shard that must be alone."""
        return any(task.alone for task in self.in_flight.values())


class Driver:
    """One job's loop. `run` returns when every shard is done or failed.

    Raises StorageError, UnavailableError or BackendError (the job cannot go on) and Interrupted
    (after the workers gave up cleanly). Shards committed before that stay.
    """

    def __init__(
        self,
        plan: Plan,
        config: ConvertConfig,
        dst: str,
        *,
        workers: cluster.Workers,
        sample_timeout: float,
        storage_options: dict[str, Any],
        progress: Progress,
        catalog: Catalog,
        signals: StopSignals,
    ) -> None:
        self.config, self.dst = config, dst
        self.workers: cluster.Workers = workers
        self.sample_timeout, self.storage_options = sample_timeout, storage_options
        self.progress, self.catalog, self.signals = progress, catalog, signals
        self.schedule = Schedule(plan.work, plan.replaces, progress.retried, progress.tell)
        self.reserved = cluster.reservation(config.backend)
        self.progress.needs = cluster.needs(self.reserved)
        self.team: list[Worker] = []
        self.resized = float("-inf")
        self.complain_at = time.monotonic() + NO_WORKER_S
        self.answered = time.monotonic()
        self.start_deaths = 0
        self.in_vain = 0
        self.broken_shards = 0

    def run(self) -> int:
        """Convert everything; returns the largest number of workers there were."""
        largest = 0
        try:
            while len(self.schedule) or any(worker.in_flight for worker in self.team):
                if self.signals.received:
                    self.progress.interrupted()
                    raise Interrupted(128 + self.signals.received, self.signals.message)
                self.resize()
                self.replace_broken()
                largest = max(largest, len(self.team))
                self.assign()
                for worker in self.wait():
                    try:
                        self.collect(worker)
                    except RayError as e:
                        self.on_worker_lost(worker, cluster.cause_of_death(e))
                self.poll()
                self.progress.workers = len(self.team)
                self.progress.update([worker.state for worker in self.team])
                self.catalog.write_if_due()
        except (Interrupted, SplatshardError):
            self.stop()
            raise
        finally:
            for worker in list(self.team):
                self.dismiss(worker, "the job ends")
        return largest

    # The team

    def resize(self) -> None:
        """Hire as many as there is room and work for; nodes that will end get no more tasks. Raises
        BackendError where Ray is gone."""
        now = time.monotonic()
        if now - self.resized < RESIZE_S:
            return
        self.resized = now
        self.answered = cluster.check_alive(self.answered, now)
        if self.answered < now:
            return  # the head does not answer, and Ray would wait for it
        leaving = cluster.draining_nodes()
        for worker in list(self.team):
            if worker.node in leaving and not worker.retiring:
                worker.retiring = True
                self.progress.tell(f"node {worker.node[:8]} is draining: its worker takes no more")
            if worker.in_flight or worker.started is not None:
                continue
            if worker.retiring or not len(self.schedule):  # an autoscaler may have its place
                self.dismiss(worker, "its node is draining" if worker.retiring else "no more work")
        staying = [worker for worker in self.team if not worker.retiring]
        taken = sum(bool(worker.in_flight) or worker.broken is not None for worker in staying)
        wanted = len(self.schedule) + taken
        places = cluster.room(self.workers, self.reserved, leaving)
        for _ in range(min(places, wanted) - len(staying)):
            self.hire()
        if any(worker.started is None for worker in self.team):
            self.complain_at = now + NO_WORKER_S
        elif now > self.complain_at:
            self.complain_at = float("inf")
            needs = self.progress.needs
            self.progress.tell(f"still no worker: each needs {needs}, and none is free")

    def hire(self) -> None:
        """A new worker; its loading starts at once."""
        options: dict[str, Any] = {
            "concurrency_groups": {"control": 1, "convert": IN_FLIGHT},
            "max_restarts": 0,
            "max_task_retries": 0,
            **self.reserved,
        }
        actor = ray.remote(**options)(FitActor).remote(THREADS, self.storage_options, log_format())
        self.team.append(Worker(actor=actor, started=actor.start.remote(self.config.backend)))

    def replace_broken(self) -> None:
        """Dismiss broken workers, once what they had is in work elsewhere or cannot be: nobody else
        has loaded, and those that have not may be waiting for their places."""
        able = any(worker.able for worker in self.team)
        loading = any(worker.started is not None for worker in self.team)
        since = time.monotonic() - NO_WORKER_S
        for worker in [worker for worker in self.team if worker.broken is not None]:
            wait = able or (loading and (worker.broken or 0) > since)
            if not (wait and self.schedule.suspects):
                self.dismiss(worker, "it is broken")

    def dismiss(self, worker: Worker, why: str) -> None:
        """Out of the team, and dead: a lost connection only looks like a death."""
        self.team.remove(worker)
        ray.kill(worker.actor)
        self.progress.worker_left(f"a worker leaves: {why}", worker.worked, node=worker.node)
        self.resized = float("-inf")  # look at once whether there is room for another

    # Tasks and their outcomes

    def assign(self) -> None:
        """Fill the workers breadth first; the last shards are not queued behind a busy worker."""
        now = time.monotonic()
        team = [worker for worker in self.team if worker.able]
        for worker in team:
            if not worker.in_flight and (task := self.schedule.take(now)):
                self.give(worker, task)
        for worker in team:
            beside = 0 < len(worker.in_flight) < IN_FLIGHT and not worker.occupied
            if (
                beside
                and self.schedule.ready >= len(team)
                and (task := self.schedule.take_beside())
            ):
                self.give(worker, task)

    def give(self, worker: Worker, task: Task) -> None:
        convert = worker.actor.convert.options(concurrency_group="convert")
        worker.in_flight[convert.remote(task, self.config, self.dst)] = task

    def wait(self) -> list[Worker]:
        """Workers with something to collect, within POLL_S."""
        watched = [ref for w in self.team for ref in (w.started, *w.in_flight) if ref is not None]
        if not watched:
            time.sleep(POLL_S)
            return []
        ready, _ = ray.wait(watched, num_returns=len(watched), timeout=0)
        if not ready:
            ready, _ = ray.wait(watched, num_returns=1, timeout=POLL_S)
        found = set(ready)
        return [w for w in self.team if w.started in found or not found.isdisjoint(w.in_flight)]

    def collect(self, worker: Worker) -> None:
        """Take all finished results of one worker.

        Raises RayError when the worker died, SplatshardError when the job must stop.
        """
        if worker.started is not None:
            if not is_ready(worker.started):
                return
            self.on_ready(worker)
        errors: dict[Any, Outcome] = {}
        for ref in [ref for ref in worker.in_flight if is_ready(ref)]:
            outcome: Outcome = ray.get(ref)
            if outcome.kind in ("oom", "broken"):
                errors[ref] = outcome
                continue
            task = worker.in_flight.pop(ref)
            unfinished = tuple(c for c in worker.state.shards if c.shard != task.ref.name)
            worker.state = WorkerState(shards=unfinished, stage_stats=outcome.stage_stats)
            worker.worked = outcome.stage_stats
            worker.heard = time.monotonic()
            self.on_outcome(task, outcome)
        if errors:
            oom = all(outcome.kind == "oom" for outcome in errors.values())
            self.on_worker_lost(worker, "oom" if oom else "application", errors)

    def on_ready(self, worker: Worker) -> None:
        """A worker has loaded, or cannot."""
        try:
            started: Started = ray.get(worker.started)
        except RayTaskError as e:
            raise BackendError(f"a worker cannot start: {e.cause}") from None
        if started.error:
            raise BackendError(started.error)
        worker.started, worker.node, worker.heard = None, started.node, time.monotonic()
        self.start_deaths = 0
        self.progress.worker_ready(started.backend, node=started.node, pid=started.pid)

    def on_outcome(self, task: Task, outcome: Outcome) -> None:
        """What follows from an outcome. Raises StorageError and UnavailableError."""
        if task.ref.name in self.schedule.closed:
            return
        if outcome.kind == "storage":
            raise StorageError(
                f"{outcome.message} (shard {outcome.name}; finished shards are kept)"
            )
        if outcome.kind == "unavailable":
            self.unavailable(task, outcome)
            return
        self.in_vain = 0
        if outcome.kind == "survived":
            self.schedule.survived(task, outcome.tried)
        else:
            self.finish(task, outcome)

    def finish(self, task: Task, outcome: Outcome) -> None:
        self.schedule.close(task)
        self.progress.finished(task.ref, outcome)
        if outcome.manifest:
            self.broken_shards = 0
            self.catalog.add(outcome.manifest)

    def unavailable(self, task: Task, outcome: Outcome) -> None:
        """Later again, or not. Raises UnavailableError when no shard gets anywhere any more."""
        self.in_vain += 1
        if self.in_vain > UNAVAILABLE * max(1, len(self.team)):
            raise UnavailableError(
                f"{outcome.message} ({self.in_vain} attempts in a row; finished shards are kept, "
                "run the same command again when the store answers)"
            )
        if not self.schedule.unavailable(task, outcome.message, time.monotonic()):
            self.finish(task, replace(outcome, kind="failed"))

    def on_worker_lost(
        self, worker: Worker, kind: RetryKind, errors: Mapping[Any, Outcome] | None = None
    ) -> None:
        """A worker is gone or, "application", broken; its tasks, of which some may have come back
        with `errors`, go where they belong. Raises BackendError if no worker loads, or all are
        broken."""
        if kind == "application":
            worker.broken = time.monotonic()
            self.resized = float("-inf")  # others may have left when there was no more work
            worker.actor.stop.options(concurrency_group="control").remote()
        else:
            self.dismiss(worker, kind.replace("_", " "))
        tasks, worker.in_flight = worker.in_flight, {}
        node_gone = kind in ("node_death", "preempted")
        if worker.started is not None and not node_gone:
            self.start_deaths += 1
            if self.start_deaths >= START_DEATHS:
                raise BackendError(
                    f"the worker died {self.start_deaths} times before its first shard: is there "
                    "enough memory for it? --debug shows its log"
                )
        for ref, task in reversed(tasks.items()):
            if task.ref.name in self.schedule.closed:
                continue
            error = errors.get(ref) if errors else None
            if kind == "storage":
                message = "reading the source or writing to DST took too long"
                self.unavailable(
                    task, Outcome(name=task.ref.name, kind="unavailable", message=message)
                )
            elif node_gone:
                self.schedule.innocent(task, kind)
            elif reason := self.schedule.died(task, kind, first_line(error)):
                if error is not None and kind == "application":
                    self.broke(task, error)
                else:
                    self.give_up(task, SplatshardError.__name__, reason)

    def broke(self, task: Task, error: Outcome) -> None:
        """A shard fails by an error that may not be its own. Raises BackendError when no shard gets
        anywhere any more, and as `give_up`."""
        self.give_up(task, error.error, error.message, error.trace)
        self.broken_shards += 1
        if self.broken_shards >= BROKEN_SHARDS:
            raise BackendError(
                f"{first_line(error)} ({self.broken_shards} shards in a row failed like this, each "
                "in several processes: is the machine in order? Finished shards are kept)"
            )

    def give_up(self, task: Task, error: str, message: str, trace: str = "") -> None:
        """Mark a shard failed from here. Raises StorageError and UnavailableError."""
        mark_failed(self.dst, task.ref, self.config, SplatshardError(message), error)
        self.finish(
            task,
            Outcome(name=task.ref.name, kind="failed", error=error, message=message, trace=trace),
        )

    # What the workers are doing

    def poll(self) -> None:
        """Fetch each worker's state without waiting for any; one that hangs is killed."""
        now = time.monotonic()
        for worker in list(self.team):
            if worker.started is not None or not worker.in_flight:
                worker.heard = now  # it cannot hang
                if worker.started is None:
                    continue
            if worker.polled is None:
                control = worker.actor.state.options(concurrency_group="control")
                worker.polled = control.remote()
            elif is_ready(worker.polled):
                self.hear(worker, now)
            if hung := self.hung(worker, now):
                self.on_worker_lost(worker, hung)

    def hear(self, worker: Worker, now: float) -> None:
        """Take a worker's answer, less the shards whose results have come in meanwhile."""
        try:
            state: WorkerState = ray.get(worker.polled)
        except RayError:
            state = WorkerState()  # dead: `collect` meets the same news
        names = {task.ref.name for task in worker.in_flight.values()}
        shards = tuple(c for c in state.shards if c.shard in names)
        worker.state, worker.heard, worker.polled = replace(state, shards=shards), now, None

    def hung(self, worker: Worker, now: float) -> RetryKind | None:
        """How a worker hangs: in a sample, or at a store; None when it does not."""
        silent_s, stage_stats = now - worker.heard, worker.state.stage_stats
        if stage_stats.slowest_s + silent_s <= self.sample_timeout:
            return None
        return "storage" if stage_stats.slowest in ("read", "publish") else "hang"

    def stop(self) -> None:
        """Ask all workers to give up after their current batch, and wait STOP_GRACE_S for it."""
        for worker in self.team:
            worker.actor.stop.options(concurrency_group="control").remote()
        waiting = {
            ref: task
            for worker in self.team
            if worker.started is None
            for ref, task in worker.in_flight.items()
        }
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=STOP_GRACE_S)
        for ref in ready:
            try:
                outcome: Outcome = ray.get(ref)
            except RayError:
                continue
            task = waiting[ref]
            if outcome.kind in ("done", "failed") and task.ref.name not in self.schedule.closed:
                self.finish(task, outcome)


def first_line(error: Outcome | None) -> str:
    """`RuntimeError: CUDA error: ...`, the first line of it."""
    return f"{error.error}: {error.message}".partition("\n")[0] if error else ""


def is_ready(ref: Any) -> bool:
    """Whether a result, or the news of the worker's death, is there."""
    return bool(ray.wait([ref], timeout=0)[0])
