"""The worker: one process that converts shards for life, pinned to a core or a GPU.

A plain class that knows nothing of scheduling; `jobs.driver.driver` makes a Ray actor of it. Every
error comes back as a value (`Outcome`), because an exception that crosses Ray loses its type or
fails to unpickle; only the death of the process shows as a Ray error. Two shards may be in work at
once (Ray's "convert" concurrency group): on a CPU one is fitted while the other is uploaded or
waits, on a GPU both may fit, so that the device has work while either begins or ends. `state` and
`stop` run on a thread of their own ("control"); the driver polls, so a slow driver never holds up a
worker.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from splatshard.jobs.cli.log import Format, configure
from splatshard.jobs.driver.bisect import READ
from splatshard.pipeline.runtime.stage_timer import StageStats, StageTimer
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import SplatshardError, StorageError, UnavailableError
from splatshard.schemas.shard import OK, ShardManifest, ShardRef

if TYPE_CHECKING:
    from splatshard.pipeline.kernels.backend import Backend
    from splatshard.pipeline.source.read import RawSample

IN_FLIGHT = 2
"""Shards that a worker is given at once."""

MAX_UNUSED = 20
"""Names of members, columns and JSON values that a shard tells."""
MAX_SKIPPED = 100
"""Skipped samples of one shard that the driver is sent; the rows hold them all."""

THREADS: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""One worker per core: threads of its own would only fight the other workers."""

NO_REASON = "it gives no reason; --debug shows where"
NO_MEMORY = "the worker ran out of memory; fewer --workers leave each more"

OutcomeKind = Literal[
    "done", "survived", "failed", "unavailable", "storage", "stopped", "oom", "broken"
]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt at a shard.

    `attempt` is unique among all attempts of all jobs; `replaces` is the digest of the marker that
    may be replaced. `quarantine` are numbers of samples and why they are not touched. With `span`
    only the samples from span[0] to span[1] are tried and nothing is written; with READ all are
    read and none is decoded. `alone`: nothing else may be in work at that worker, since this shard
    may kill it.
    """

    ref: ShardRef
    attempt: str
    replaces: str = ""
    quarantine: tuple[tuple[int, str], ...] = ()
    span: tuple[int, int] | None = None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Counters:
    """How far a shard being converted is; psnr_sum in dB over the ok samples."""

    shard: str
    samples: int = 0
    ok: int = 0
    psnr_sum: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """What a worker answers when polled: whether it still loads, its shards in work, and what its
    stages do."""

    loading: bool = False
    shards: tuple[Counters, ...] = ()
    stage_stats: StageStats = field(default_factory=StageStats)


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that became a row without splats; for logs."""

    key: str
    uid: str | None
    status: str
    error: str


@dataclass
class Unused:
    """What no field of a sample was taken from: a member (`.npy`), a column, a value of the JSON;
    why, in the sample `key`, and in how many samples of a shard."""

    name: str
    why: str
    key: str
    samples: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one task.

    done: committed, `manifest` is set. survived: the span, which has `tried` samples, did no harm.
    failed: the failed marker is written. unavailable: a store did not answer, trying again may
    help. storage: DST cannot be written, the job must stop. stopped: asked to stop, nothing was
    committed. oom: a MemoryError. broken: any other error that is none of ours; the device, the
    process or our code may be at fault, and the worker should get no other task. `fields` says how
    many samples have a caption, label or metadata; `stage_stats` is the worker's at that moment.
    """

    name: str
    kind: OutcomeKind
    manifest: ShardManifest | None = None
    error: str = ""
    message: str = ""
    trace: str = ""
    skipped: tuple[SkippedSample, ...] = ()
    unused: tuple[Unused, ...] = ()
    fields: dict[str, int] = field(default_factory=dict)
    tried: int = 0
    stage_stats: StageStats = field(default_factory=StageStats)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What `start` answers: the backend that was loaded, or why none could be."""

    backend: str = ""
    error: str = ""
    node: str = ""
    pid: int = 0


class _StopConverting(BaseException):
    """Raised between two batches; not an Exception, so that no stage swallows it."""


class FitActor:
    """Converts shards with one backend."""

    def __init__(
        self,
        environment: Mapping[str, str],
        storage_options: Mapping[str, Any] | None = None,
        log_format: Format | None = None,
    ) -> None:
        """`log_format` is how the process logs; None leaves that as it is."""
        os.environ.update(environment)  # before torch and numba are imported
        if log_format:
            configure(log_format)
        self._storage_options = storage_options or {}
        self._stop = False
        self._timer = StageTimer()
        self._counters: dict[str, Counters] = {}
        self._backend: Backend | None = None
        self._slots = threading.Semaphore(1)
        self._loading = True

    def start(self, backend: str) -> Started:
        """Load everything; comes before any `convert`."""
        import ray
        import torch

        from splatshard.pipeline.compile_ahead import await_compiled
        from splatshard.pipeline.kernels.select import select_backend
        from splatshard.pipeline.storage.fs import use_options

        torch.set_num_threads(1)
        use_options(self._storage_options)
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        try:
            self._backend = select_backend(backend)
        except SplatshardError as e:
            return Started(error=str(e), node=node, pid=os.getpid())
        if self._backend.device.type != "cpu":
            self._slots = threading.Semaphore(IN_FLIGHT)
        await_compiled()
        self._timer = StageTimer()  # shares of time count from here
        self._loading = False
        return Started(backend=self._backend.name, node=node, pid=os.getpid())

    def convert(self, task: Task, config: ConvertConfig, dst: str) -> Outcome:
        """Convert and commit one shard, or write its failed marker; or try some of its samples."""
        assert self._backend is not None, "start() comes first"
        self._counters[task.ref.name] = Counters(shard=task.ref.name)
        try:
            outcome = self._attempt(task, config, dst, self._backend)
        finally:
            self._counters.pop(task.ref.name, None)
        return replace(outcome, stage_stats=self._timer.stage_stats())

    def _attempt(self, task: Task, config: ConvertConfig, dst: str, backend: Backend) -> Outcome:
        from splatshard.pipeline.shards.commit import mark_failed

        ref = task.ref
        skipped: list[SkippedSample] = []
        unused: dict[str, Unused] = {}
        fields: dict[str, int] = {}
        try:
            if task.span:
                tried = self._try(task, config, backend, task.span)
                return Outcome(name=ref.name, kind="survived", tried=tried)
            manifest = self._convert(task, config, dst, backend, skipped, unused, fields)
            return Outcome(
                name=ref.name,
                kind="done",
                manifest=manifest,
                skipped=tuple(skipped),
                unused=tuple(unused.values()),
                fields=fields,
            )
        except _StopConverting:
            return Outcome(name=ref.name, kind="stopped")
        except StorageError as e:
            return _outcome(ref, "storage", e)
        except UnavailableError as e:
            return _outcome(ref, "unavailable", e)
        except SplatshardError as e:
            try:
                mark_failed(dst, ref, config, e)
            except StorageError as storage:
                return _outcome(ref, "storage", storage)
            except UnavailableError as unavailable:
                return _outcome(ref, "unavailable", unavailable)
            return _outcome(ref, "failed", e)
        except MemoryError as e:
            return _outcome(ref, "oom", e)
        except Exception as e:
            return _outcome(ref, "broken", e)

    def _convert(
        self,
        task: Task,
        config: ConvertConfig,
        dst: str,
        backend: Backend,
        skipped: list[SkippedSample],
        unused: dict[str, Unused],
        fields: dict[str, int],
    ) -> ShardManifest:
        from splatshard.pipeline.convert import convert_shard
        from splatshard.pipeline.source.sample import SAID

        def on_batch(rows: list[dict[str, Any]]) -> None:
            self._check()
            self._count(task.ref.name, rows)
            skipped.extend(_skipped(rows)[: MAX_SKIPPED - len(skipped)])

        def on_sample(sample: RawSample) -> None:
            for name in SAID:
                said = getattr(sample, name) not in (None, -1)  # a label of none
                fields[name] = fields.get(name, 0) + said
            for name, why in sample.unused:
                if name in unused:
                    unused[name].samples += 1
                elif len(unused) < MAX_UNUSED:
                    unused[name] = Unused(name, why, sample.key)

        return convert_shard(
            task.ref,
            config,
            dst,
            backend,
            on_batch,
            on_sample=on_sample,
            timer=self._timer,
            slot=self._slot(),
            quarantine=dict(task.quarantine),
            attempt=task.attempt,
            replaces=task.replaces,
        )

    def _try(
        self, task: Task, config: ConvertConfig, backend: Backend, span: tuple[int, int]
    ) -> int:
        """Number of samples that the span has; that the shard has, for READ."""
        from splatshard.pipeline.convert import try_reading, try_samples

        tried = 0
        quarantine = dict(task.quarantine)
        with self._slot():
            if span == READ:
                batches = try_reading(task.ref, backend, self._timer)
            else:
                batches = try_samples(task.ref, config, backend, span, self._timer, quarantine)
            with closing(batches):
                for batch in batches:
                    self._check()
                    tried += len(batch)
        return tried

    def _check(self) -> None:
        if self._stop:
            raise _StopConverting

    @contextmanager
    def _slot(self) -> Iterator[None]:
        with self._slots:
            self._check()
            yield

    def _count(self, shard: str, rows: list[dict[str, Any]]) -> None:
        c = self._counters[shard]
        ok = [row for row in rows if row["status"] == OK]
        self._counters[shard] = replace(
            c,
            samples=c.samples + len(rows),
            ok=c.ok + len(ok),
            psnr_sum=c.psnr_sum + sum(row["psnr"] for row in ok),
        )

    def state(self) -> WorkerState:
        """Of the shards in work and the stages; called from the control thread."""
        return WorkerState(
            loading=self._loading,
            shards=tuple(self._counters.copy().values()),
            stage_stats=self._timer.stage_stats(),
        )

    def stop(self) -> None:
        """Give up the shards in work after their current batch, and take no other."""
        self._stop = True


def _skipped(rows: list[dict[str, Any]]) -> list[SkippedSample]:
    return [
        SkippedSample(
            key=row["key"], uid=row["uid"], status=row["status"], error=row.get("error") or ""
        )
        for row in rows
        if row["status"] != OK
    ]


def _outcome(ref: ShardRef, kind: OutcomeKind, error: Exception) -> Outcome:
    return Outcome(
        name=ref.name,
        kind=kind,
        error=type(error).__name__,
        message=str(error) or (NO_MEMORY if isinstance(error, MemoryError) else NO_REASON),
        trace="".join(traceback.format_exception(error)),
    )
