"""What a running conversion tells: a live line on a terminal, plain lines in a log, a summary.

Totals are those of committed shards plus the counters of the shards in work; a shard lost with its
worker thus leaves the totals again. How many samples a tar holds is unknown until it is read, so
the remaining time comes from source bytes: samples per byte of the shards already done.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from jobs.actors import Counters, Outcome
from jobs.cli import count, debugging, duration
from schemas.shard import OK, ShardManifest, ShardRef

LINE_EVERY_S = 5.0


class Progress:
    """Counts outcomes and shows them on stderr; a context manager.

    `done_before` are the shards an earlier run finished; `started` is the job's start (monotonic
    s).
    """

    def __init__(
        self, work: Sequence[ShardRef], done_before: Sequence[ShardManifest], started: float
    ) -> None:
        self.manifests: list[ShardManifest] = []
        self.failures: dict[str, Outcome] = {}
        self.backend = ""
        self.first_shard_s: float | None = None
        self._shards = len(work)
        self._bytes = sum(ref.size_bytes for ref in work)
        self._done_before = done_before
        self._started = started
        self._bytes_finished = 0
        self._last_line = time.monotonic()
        self._ready: float | None = None
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
            self._bar = Bar(*columns, console=console, transient=True, expand=True)
            self._task = self._bar.add_task("starting workers ...", total=None)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def worker_ready(self, backend: str) -> None:
        """A worker has loaded; rates count from the first one."""
        self.backend = backend
        self._ready = self._ready or time.monotonic()

    def finished(self, ref: ShardRef, outcome: Outcome) -> None:
        """A shard was committed or marked failed."""
        self._bytes_finished += ref.size_bytes
        if outcome.manifest:
            self.manifests.append(outcome.manifest)
            if self.first_shard_s is None:
                self.first_shard_s = time.monotonic() - self._started
        else:
            self.failures[ref.name] = outcome
            self.tell(f"shard {ref.name} failed: {outcome.error}: {outcome.message}")
            if debugging():
                self.tell(outcome.trace)

    def tell(self, line: str) -> None:
        """A line above the live one."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def update(self, in_work: Sequence[Counters]) -> None:
        """Show the current state; `in_work` are the counters of unfinished shards."""
        now = time.monotonic()
        if self._bar is None and now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        line, fraction = self.line(in_work, now)
        if self._bar:
            self._bar.update(self._task, description=line, total=1.0, completed=fraction)
        else:
            print(line, file=sys.stderr, flush=True)

    def line(self, in_work: Sequence[Counters], now: float) -> tuple[str, float]:
        """`3/4 shards  312 images  4.1 images/s  29.8 dB  20 s left`, and the finished fraction."""
        if self._ready is None:
            return "starting workers ...", 0.0
        samples = total_samples(self.manifests) + sum(c.samples for c in in_work)
        ok = total_ok(self.manifests) + sum(c.ok for c in in_work)
        psnr = psnr_sum(self.manifests) + sum(c.psnr_sum for c in in_work)
        elapsed = max(now - self._ready, 1e-9)
        fraction = self._fraction(in_work)
        parts = [
            f"{len(self.manifests) + len(self.failures)}/{count(self._shards, 'shard')}",
            count(samples, "image"),
            f"{samples / elapsed:.1f} images/s",
        ]
        if ok:
            parts.append(f"{psnr / ok:.1f} dB")
        if fraction > 0:
            parts.append(f"{duration(elapsed * (1 - fraction) / fraction)} left")
        return "  ".join(parts), fraction

    def _fraction(self, in_work: Sequence[Counters]) -> float:
        """Finished share of the source bytes; 0 while samples per byte are unknown."""
        known = [*self.manifests, *self._done_before]
        samples = total_samples(known)
        if not samples or not self._bytes:
            return 0.0
        bytes_per_sample = sum(m.inputs["source"]["size_bytes"] for m in known) / samples
        partial = sum(c.samples for c in in_work) * bytes_per_sample
        return min(1.0, (self._bytes_finished + partial) / self._bytes)


def total_samples(manifests: Sequence[ShardManifest]) -> int:
    return sum(m.samples for m in manifests)


def total_ok(manifests: Sequence[ShardManifest]) -> int:
    return sum(m.counts.get(OK, 0) for m in manifests)


def psnr_sum(manifests: Sequence[ShardManifest]) -> float:
    """Sum of the ok samples' PSNR in dB, from the markers' means."""
    return weighted(manifests, "psnr_mean")


def weighted(manifests: Sequence[ShardManifest], statistic: str) -> float:
    """Sum over shards of a per-image mean times the number of ok images."""
    pairs = [(m.statistics.get(statistic), m.counts.get(OK, 0)) for m in manifests]
    return sum(mean * ok for mean, ok in pairs if mean is not None and ok)


def dataset_figures(manifests: Sequence[ShardManifest]) -> dict[str, Any]:
    """The figures of a set of done shards, from their markers; None where there is no ok image."""
    ok = total_ok(manifests)
    skipped: Counter[str] = Counter()
    for m in manifests:
        skipped.update({reason: n for reason, n in m.counts.items() if reason != OK and n})
    payload = sum(m.statistics.get("payload_bytes", 0) for m in manifests)
    return {
        "samples": total_samples(manifests),
        "ok": ok,
        "skipped": dict(sorted(skipped.items())),
        "psnr_mean": psnr_sum(manifests) / ok if ok else None,
        "num_gaussians_mean": weighted(manifests, "num_gaussians_mean") / ok if ok else None,
        "bytes_per_image": payload / ok if ok else None,
        "shard_bytes": sum(m.size_bytes for m in manifests),
    }


def run_summary(
    progress: Progress,
    done_before: Sequence[ShardManifest],
    started: float,
    workers: int,
) -> dict[str, Any]:
    """The `--json` object: figures of all done shards of this SRC, rates and times of this run."""
    wall_s = time.monotonic() - started
    converted = total_samples(progress.manifests)
    return {
        **dataset_figures([*done_before, *progress.manifests]),
        "shards_done": len(progress.manifests),
        "shards_skipped_done": len(done_before),
        "shards_failed": len(progress.failures),
        "images_converted": converted,
        "images_per_s": converted / wall_s if converted else None,
        "wall_s": wall_s,
        "time_to_first_shard_s": progress.first_shard_s,
        "backend": progress.backend or None,
        "workers": workers,
    }
