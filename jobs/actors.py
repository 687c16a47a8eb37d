"""The worker: one process that converts shards for life, pinned to a core or a GPU.

A plain class that knows nothing of scheduling; `jobs.drive` makes a Ray actor of it. Every error
comes back as a value (`Outcome`), because an exception that crosses Ray loses its type or fails to
unpickle; only the death of the process shows as a Ray error. `progress` and `stop` run on a second
thread (Ray's "control" concurrency group) while `convert` is busy; the driver polls, so a slow
driver never holds up a worker.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.clock import Pulse
from schemas.config import ConvertConfig
from schemas.errors import SplatshardError, StorageError
from schemas.shard import OK, ShardManifest, ShardRef

if TYPE_CHECKING:
    from pipeline.kernels.backend import Backend

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
"""One worker per core: threads of its own would only fight the other workers."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """How far a shard being converted is; psnr_sum in dB over the ok samples."""

    shard: str
    samples: int = 0
    ok: int = 0
    psnr_sum: float = 0.0
    payload_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """What a worker answers when polled: its shards in work, and what its stages do."""

    shards: tuple[Counters, ...] = ()
    pulse: Pulse = field(default_factory=Pulse)


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that became a row without splats; for logs."""

    key: str
    uid: str | None
    status: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one shard.

    done: committed, `manifest` is set. failed: its failed marker is written. storage: DST cannot be
    written, the job must stop. stopped: asked to stop, nothing was committed.
    """

    name: str
    kind: Literal["done", "failed", "storage", "stopped"]
    manifest: ShardManifest | None = None
    error: str = ""
    message: str = ""
    trace: str = ""
    skipped: tuple[SkippedSample, ...] = ()


class _StopConverting(BaseException):
    """Raised between two batches; not an Exception, so that no stage swallows it."""


class FitActor:
    """Converts shards one after another with one backend."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)  # before torch and numba are imported
        self._stop = False
        self._counters: Counters | None = None
        self._backend: Backend | None = None

    def start(self, backend: str) -> tuple[str, str]:
        """Load everything; ("ready", backend name) or ("error", message)."""
        import torch

        from pipeline.kernels.backend import select_backend

        torch.set_num_threads(1)
        try:
            self._backend = select_backend(backend)
        except SplatshardError as e:
            return "error", str(e)
        return "ready", self._backend.name

    def convert(self, ref: ShardRef, config: ConvertConfig, dst: str) -> Outcome:
        """Convert and commit one shard, or write its failed marker."""
        from pipeline.commit import mark_failed
        from pipeline.convert import convert_shard

        self._counters = Counters(shard=ref.name)
        try:
            if self._stop:
                raise _StopConverting
            assert self._backend is not None, "start() comes first"
            manifest = convert_shard(ref, config, dst, self._backend, self._on_batch)
            return Outcome(name=ref.name, kind="done", manifest=manifest)
        except _StopConverting:
            return Outcome(name=ref.name, kind="stopped")
        except StorageError as e:
            return _outcome(ref, "storage", e)
        except Exception as e:
            outcome = _outcome(ref, "failed", e)
            try:
                mark_failed(dst, ref, config, e)
            except StorageError as storage:
                return _outcome(ref, "storage", storage)
            return outcome
        finally:
            self._counters = None

    def _on_batch(self, rows: list[dict[str, Any]]) -> None:
        if self._stop:
            raise _StopConverting
        c = self._counters
        assert c is not None
        ok = [row for row in rows if row["status"] == OK]
        self._counters = Counters(
            shard=c.shard,
            samples=c.samples + len(rows),
            ok=c.ok + len(ok),
            psnr_sum=c.psnr_sum + sum(row["psnr"] for row in ok),
        )

    def progress(self) -> Counters | None:
        """Of the shard in work, None between shards; called from the control thread."""
        return self._counters

    def stop(self) -> None:
        """Give up the shard in work after its current batch, and take no other."""
        self._stop = True


def _outcome(ref: ShardRef, kind: Literal["failed", "storage"], error: Exception) -> Outcome:
    return Outcome(
        name=ref.name,
        kind=kind,
        error=type(error).__name__,
        message=str(error),
        trace="".join(traceback.format_exception(error)),
    )
