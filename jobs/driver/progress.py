"""What a running conversion tells: a live line on a terminal, plain lines in a log, a small file
`_progress.json`, metrics, and a summary at the end.

All of them show the `Snapshot` that `update` takes (jobs/driver/stats.py). Nothing here may hold up
or fail the job: `_progress.json` is written on a thread, and a store that refuses it is told once.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from splatshard.jobs.cli.command import Interrupted
from splatshard.jobs.cli.log import log, structured
from splatshard.jobs.cli.text import count, duration
from splatshard.jobs.destination.figures import (
    dataset_figures,
    total_ok,
    total_samples,
)
from splatshard.jobs.destination.plan_file import PROGRESS_FILE, write_text
from splatshard.jobs.driver.prometheus import Metrics
from splatshard.jobs.driver.stats import RetryKind, Snapshot, Stats
from splatshard.jobs.driver.worker import Outcome, SkippedSample, WorkerState
from splatshard.pipeline.runtime.stage_timer import StageStats
from splatshard.pipeline.source.sample import SAID, unused_lines
from splatshard.schemas.config import CPU_BACKENDS
from splatshard.schemas.errors import SplatshardError
from splatshard.schemas.shard import ShardManifest, ShardRef

LINE_EVERY_S = 5.0
LOCAL_FILE_EVERY_S = 5.0
REMOTE_FILE_EVERY_S = 30.0
MAX_NAMED = 3
"""Skipped samples that the summary names; the report has the rest."""
LAST_FILE_S = 60.0
"""Longest wait for the final `_progress.json` when its store does not answer."""
INTERRUPTED_FILE_S = 1.0
"""The same where the job stops, with work to end before that."""

State = Literal["running", "done", "failed", "interrupted"]


class Progress:
    """Counts outcomes and shows them; a context manager around the driver loop.

    `done_before` are the shards an earlier run finished; `started` is the job's start (monotonic
    s); `_progress.json` goes to `dst`, where there is one. The driver keeps `workers` up to date,
    and says what each of them `needs` (`1 CPU`).
    """

    def __init__(
        self,
        work: Sequence[ShardRef],
        done_before: Sequence[ShardManifest],
        started: float,
        dst: str = "",
    ) -> None:
        self.manifests: list[ShardManifest] = []
        self.failures: dict[str, Outcome] = {}
        self.skipped: list[tuple[str, SkippedSample]] = []  # the first, with their shards
        self.backend = ""
        self.workers = 0
        self.needs = ""
        self.first_shard_s: float | None = None
        self.state: State = "running"
        self.worker_s = 0.0
        self.stage_s: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()  # samples
        self.fields: Counter[str] = Counter()  # samples that have them
        self._stats = Stats(work, done_before)
        self._ok_before = total_ok(done_before)
        self._started = started
        self._dst = dst
        self._file = ProgressFile(dst, time.monotonic() - started) if dst else None
        self._metrics = Metrics(dst)
        self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal and not structured():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
            self._bar = Bar(*columns, console=console, transient=True, expand=True)
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        log("job_start", f"job into {self._dst} starts", detail=True, dst=self._dst)
        self._publish(time.monotonic())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.state = "interrupted"
        else:
            bare = self.manifests and not (self._ok_before or total_ok(self.manifests))
            self.state = "failed" if error or self.failures or bare else "done"
        snapshot = self._publish(time.monotonic(), LAST_FILE_S)
        message = f"job into {self._dst} ends: {self.state}"
        fields = asdict(snapshot) if structured() else {}
        log("job_end", message, detail=True, dst=self._dst, state=self.state, **fields)

    @property
    def retries(self) -> Counter[str]:
        """By kind."""
        return self._stats.retries

    def worker_ready(self, backend: str, **fields: Any) -> None:
        """A worker has loaded; `fields` (node, pid) go to the log."""
        self.backend = backend
        self._stats.worker_ready(time.monotonic())
        log("worker_ready", "a worker is ready", detail=True, backend=backend, **fields)

    def worker_left(self, message: str, stage_stats: StageStats, **fields: Any) -> None:
        """A worker ended or was dismissed; `stage_stats` is its last, as of the end of a shard."""
        self.worker_s += stage_stats.up_s
        self.stage_s.update(stage_stats.busy_s)
        log("worker_left", message, detail=True, **fields)

    def finished(self, ref: ShardRef, outcome: Outcome) -> None:
        """A shard was committed or marked failed."""
        self._stats.finished(ref, outcome.manifest)
        room = MAX_NAMED - len(self.skipped)
        self.skipped += [(ref.name, sample) for sample in outcome.skipped[:room]]
        if structured():
            for sample in outcome.skipped:
                log_skipped(ref.name, sample)
        told = {
            unused.name: f"{unused.why} ({count(unused.samples, 'sample')}, such as {unused.key})"
            for unused in outcome.unused
            if unused.name not in self.unused  # the next shard has as many again
        }
        for names, line in unused_lines(told):
            log("unused", f"shard {ref.name}: {line}", level="warning", shard=ref.name, field=names)
        self.fields.update(outcome.fields)
        for unused in outcome.unused:
            self.unused[unused.name] += unused.samples
        if outcome.manifest:
            self.manifests.append(outcome.manifest)
            if self.first_shard_s is None:
                self.first_shard_s = time.monotonic() - self._started
            log_done(outcome.manifest)
        else:
            self.failures[ref.name] = outcome
            log(
                "shard_failed",
                f"shard {ref.name} failed: {outcome.error}: {outcome.message}",
                level="error",
                trace=outcome.trace,
                shard=ref.name,
                error=outcome.error,
            )

    def retried(self, kind: RetryKind, shard: str, message: str, **fields: Any) -> None:
        """What was done of a shard is lost, and it will be tried again."""
        self._stats.retried(kind, shard)
        text = f"shard {shard} will be tried again ({kind.replace('_', ' ')}): {message}"
        log("retry", text, level="warning", shard=shard, kind=kind, **fields)

    def interrupted(self) -> None:
        """The job will stop; told at once, since `ray job stop` kills it 3 s later."""
        self.state = "interrupted"
        self._publish(time.monotonic(), INTERRUPTED_FILE_S)

    def tell(self, line: str) -> None:
        """A line above the live one."""
        log("note", line)

    def update(self, states: Sequence[WorkerState]) -> None:
        """Show the current state; `states` are those of all live workers, as last polled."""
        now = time.monotonic()
        self._stats.update(states, now)
        snapshot = self._publish(now)
        if self._bar:
            completed = snapshot.fraction or 0.0
            text = self._line(snapshot, states)
            self._bar.update(self._task, description=text, total=1.0, completed=completed)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            fields = asdict(snapshot) if structured() else {}
            log("progress", self._line(snapshot, states), **fields)

    def _line(self, snapshot: Snapshot, states: Sequence[WorkerState]) -> str:
        if self._stats.ready:
            wait = "" if snapshot.images else "  first batch (kernels are compiled once) ..."
            return line(snapshot) + wait
        if any(state.loading for state in states):
            return "starting workers: they import torch and the kernels ..."
        return f"starting workers: each waits for {self.needs} of Ray ..."

    def _publish(self, now: float, wait_s: float = 0.0) -> Snapshot:
        """To `_progress.json`, which is waited for so long, and to the metrics."""
        snapshot = self._stats.snapshot(now, self.workers, self.backend)
        self._metrics.publish(snapshot)
        if self._file:
            self._file.update(snapshot, self.state, now, wait_s)
        return snapshot


def file_every_s(dst: str) -> float:
    """Seconds from one `_progress.json` in `dst` to the next."""
    remote = "://" in dst and not dst.startswith("file://")
    return REMOTE_FILE_EVERY_S if remote else LOCAL_FILE_EVERY_S


class ProgressFile:
    """`_progress.json` in `dst`: the state and the snapshot, for people without Prometheus.

    Of a driver that was killed it keeps saying "running", with an old `updated`.
    """

    def __init__(self, dst: str, since_start_s: float) -> None:
        self._dst = dst
        self._started = time.time() - since_start_s
        self._every_s = file_every_s(dst)
        self._last = float("-inf")
        self._thread: threading.Thread | None = None
        self._complained = False

    def update(self, snapshot: Snapshot, state: State, now: float, wait_s: float = 0.0) -> None:
        """Write it when it is due; at once, and waited for so long, when the state is final."""
        final = state != "running"
        busy = self._thread is not None and self._thread.is_alive()
        if not final and (busy or now - self._last < self._every_s):
            return
        self._last = now
        if self._thread is not None:
            self._thread.join(wait_s)
        record = {"state": state, "started": iso(self._started), "updated": iso(time.time())}
        text = json.dumps(record | asdict(snapshot), indent=2) + "\n"
        self._thread = threading.Thread(target=self._write, args=(text,), daemon=True)
        self._thread.start()
        if final:
            self._thread.join(wait_s)

    def _write(self, text: str) -> None:
        try:
            write_text(self._dst, PROGRESS_FILE, text)
        except SplatshardError as e:
            if not self._complained:
                self._complained = True
                log("progress_file", f"{PROGRESS_FILE} is not up to date: {e}", level="warning")


def iso(seconds: float) -> str:
    """Seconds since 1970 as `2026-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def line(s: Snapshot) -> str:
    """`3/4 shards  312 images  4.1 images/s  29.8 dB  20 s left`, on a GPU with its busy share."""
    parts = [
        f"{s.shards_done + s.shards_failed}/{count(s.shards, 'shard')}",
        count(s.images, "image"),
    ]
    if s.images_per_s is not None:
        parts.append(f"{s.images_per_s:.1f} images/s")
    if s.psnr_mean is not None:
        parts.append(f"{s.psnr_mean:.1f} dB")
    if "fit" in s.busy and s.backend not in CPU_BACKENDS:
        parts.append(f"fit {s.busy['fit']:.0%}".replace("%", " %"))
    if s.retries:
        retries = sum(s.retries.values())
        parts.append("1 retry" if retries == 1 else f"{retries:,} retries")
    if s.eta_s is not None:
        parts.append(f"{duration(s.eta_s)} left")
    return "  ".join(parts)


def log_skipped(shard: str, sample: SkippedSample) -> None:
    """A sample that became a row without splats."""
    event = "quarantine" if sample.status == "quarantined" else "sample_skipped"
    message = f"shard {shard}: sample {sample.key} {sample.status}: {sample.error}"
    log(event, message, level="warning", shard=shard, **asdict(sample))


def log_done(manifest: ShardManifest) -> None:
    """A committed shard; people see it when they debug."""
    counts = ", ".join(f"{n:,} {status}" for status, n in sorted(manifest.counts.items()))
    log(
        "shard_done",
        f"shard {manifest.name} done: {counts}",
        detail=True,
        shard=manifest.name,
        samples=manifest.samples,
        counts=manifest.counts,
        psnr_mean=manifest.statistics.get("psnr_mean"),
        data_file=manifest.data_file,
    )


def run_summary(
    progress: Progress,
    done_before: Sequence[ShardManifest],
    started: float,
    workers: int,
) -> dict[str, Any]:
    """The `--json` object: figures of all done shards of this SRC, rates and times of this run.

    worker_s: seconds of all workers together, from being loaded to their last shard; stage_s: those
    of them in which a stage was busy.
    """
    wall_s = time.monotonic() - started
    converted = total_samples(progress.manifests)
    return {
        **dataset_figures([*done_before, *progress.manifests]),
        "unused": dict(sorted(progress.unused.items())),
        "fields": {name: progress.fields[name] for name in SAID},
        "shards_done": len(progress.manifests),
        "shards_skipped_done": len(done_before),
        "shards_failed": len(progress.failures),
        "images_converted": converted,
        "images_per_s": converted / wall_s if converted else None,
        "wall_s": wall_s,
        "time_to_first_shard_s": progress.first_shard_s,
        "worker_s": progress.worker_s,
        "stage_s": dict(sorted(progress.stage_s.items())),
        "retries": dict(sorted(progress.retries.items())),
        "backend": progress.backend or None,
        "workers": workers,
    }
