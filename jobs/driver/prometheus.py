"""Metrics for Prometheus, through Ray: the driver's `Snapshot`, exported by its node's agent.

Ray prefixes the names with `ray_`, adds the driver's id (`WorkerId`), and exports every 10 s and
when the driver leaves. Counters then stay with the cluster; gauges go 20 s after their last report.
The tag `dst` tells jobs apart; of its letters Ray takes ASCII alone. Counters count finished shards
only, so that they end with the numbers of `_run.json`.

A Ray with a dashboard lists its nodes' ports for Prometheus in a file; an embedded one is started
without, so `advertised` writes such a file beside it. A fixed port would need no file, but a second
job on the machine would not get it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from splatshard.jobs.driver.stats import Snapshot
from splatshard.pipeline.storage.options import redact

COUNTERS = {
    "splatshard_images_total": "Samples of committed shards, skipped ones included",
    "splatshard_samples_skipped_total": "Samples of committed shards without splats, by status",
    "splatshard_payload_bytes_total": "Bytes of packed splats in committed shards",
    "splatshard_retries_total": "Shards tried again, by kind of trouble",
}
GAUGES = {
    "splatshard_shards": "Shards of this run by state: done, failed, in_work, pending",
    "splatshard_images_per_second": "Samples converted per second of late, shards in work included",
    "splatshard_psnr_db": "Mean PSNR in dB of the images converted by this run",
    "splatshard_stage_busy_share": "Share of the last 30 s a worker was busy with a stage, mean",
    "splatshard_queue_depth": "Batches that wait for a stage, over all workers",
    "splatshard_workers": "Workers that live",
    "splatshard_eta_seconds": "Estimated seconds to the end",
}
TAGS = {
    "splatshard_samples_skipped_total": "status",
    "splatshard_retries_total": "kind",
    "splatshard_shards": "state",
    "splatshard_stage_busy_share": "stage",
    "splatshard_queue_depth": "stage",
}
"""The tag that a metric has besides `dst`."""

Reading = tuple[str, str, float]
"""Name, value of its own tag ("" without one), value."""


class Metrics:
    """Publishes snapshots of one job into `dst`; does nothing while there is no Ray."""

    def __init__(self, dst: str) -> None:
        self._dst = redact(dst).encode("ascii", "backslashreplace").decode()
        self._published: dict[tuple[str, str], float] = {}

    def publish(self, snapshot: Snapshot) -> None:
        """Raise the counters, set the gauges."""
        import ray

        if not ray.is_initialized():
            return
        for name, tag, value in readings(snapshot):
            tags = {"dst": self._dst} | ({TAGS[name]: tag} if name in TAGS else {})
            if name in GAUGES:
                _instruments()[name].set(value, tags=tags)
                continue
            more = value - self._published.get((name, tag), 0.0)
            if more > 0:
                _instruments()[name].inc(more, tags=tags)
                self._published[name, tag] = value


def readings(s: Snapshot) -> Iterator[Reading]:
    """All metrics of a snapshot; what is not known yet is left out."""
    yield "splatshard_images_total", "", s.images_committed
    yield "splatshard_payload_bytes_total", "", s.payload_bytes
    for status, number in s.skipped.items():
        yield "splatshard_samples_skipped_total", status, number
    for kind, number in s.retries.items():
        yield "splatshard_retries_total", kind, number
    pending = s.shards - s.shards_done - s.shards_failed - s.shards_in_work
    yield "splatshard_shards", "done", s.shards_done
    yield "splatshard_shards", "failed", s.shards_failed
    yield "splatshard_shards", "in_work", s.shards_in_work
    yield "splatshard_shards", "pending", pending
    if s.images_per_s is not None:
        yield "splatshard_images_per_second", "", s.images_per_s
    yield "splatshard_workers", "", s.workers
    if s.psnr_mean is not None:
        yield "splatshard_psnr_db", "", s.psnr_mean
    if s.eta_s is not None:
        yield "splatshard_eta_seconds", "", s.eta_s
    for stage, share in s.busy.items():
        yield "splatshard_stage_busy_share", stage, share
    for stage, depth in s.queued.items():
        yield "splatshard_queue_depth", stage, depth


@cache
def _instruments() -> dict[str, Any]:
    """Ray's metrics by name; a process makes each once."""
    from ray.util.metrics import Counter, Gauge

    made: dict[str, Any] = {}
    for kind, descriptions in ((Counter, COUNTERS), (Gauge, GAUGES)):
        for name, description in descriptions.items():
            tags = ("dst", TAGS[name]) if name in TAGS else ("dst",)
            made[name] = kind(name, description=description, tag_keys=tags)
    return made


@contextmanager
def advertised(session_dir: str) -> Generator[None]:
    """While the block runs, `prom_metrics_*.json` in Ray's folder names the ports of this Ray.

    `session_dir` is that of `ray.init(...).address_info`. For an embedded Ray only.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    session = Path(session_dir)
    path = session.parent / f"prom_metrics_{session.name}.json"
    content = json.dumps([{"labels": {"job": "ray"}, "targets": targets}])
    with suppress(OSError):  # Prometheus then does not see this job, which converts all the same
        staged = session / path.name
        staged.write_text(content)
        os.replace(staged, path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
