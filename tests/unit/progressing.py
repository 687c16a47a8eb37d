"""Shards, markers and answers of workers, for tests of progress and its figures."""

from __future__ import annotations

from typing import Any

from splatshard.jobs.driver.worker import Counters, Outcome, SkippedSample, WorkerState
from splatshard.pipeline.runtime.stage_timer import StageStats
from splatshard.schemas.shard import ShardManifest, ShardRef


def tar(number: int, size_bytes: int = 1000, limit: int | None = None) -> ShardRef:
    name = f"{number:08d}"
    return ShardRef(
        name=name, kind="tar", urls=(f"{name}.tar",), size_bytes=size_bytes, etag="e", limit=limit
    )


def folder(number: int, images: int) -> ShardRef:
    urls = tuple(f"{number}/{i}.jpg" for i in range(images))
    return ShardRef(name=f"f-{number}", kind="folder", urls=urls, size_bytes=1000, etag="e")


def manifest(ref: ShardRef, ok: int = 10, corrupt: int = 0, psnr: float = 30.0) -> ShardManifest:
    statistics = {"payload_bytes": 256 * ok}
    if ok:
        statistics |= {"psnr_mean": psnr, "num_gaussians_mean": 16.0}
    return ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}.parquet",
        size_bytes=2000,
        sha256="0" * 64,
        format="parquet",
        samples=ok + corrupt,
        counts={"ok": ok} | ({"corrupt_image": corrupt} if corrupt else {}),
        statistics=statistics,
        fingerprint="0" * 64,
        inputs={
            "recipe": {},
            "source": {"size_bytes": ref.size_bytes, "etag": ref.etag, "limit": ref.limit},
        },
        source_url=ref.urls[0],
        source_sha256="0" * 64,
    )


def done(ref: ShardRef, skipped: tuple[SkippedSample, ...] = (), **figures: Any) -> Outcome:
    return Outcome(name=ref.name, kind="done", manifest=manifest(ref, **figures), skipped=skipped)


def failed(ref: ShardRef) -> Outcome:
    return Outcome(
        name=ref.name, kind="failed", error="SourceError", message="truncated", trace="trace\n"
    )


def state(
    *shards: tuple[ShardRef, int], up_s: float = 0.0, fit_s: float = 0.0, queued: int = 0
) -> WorkerState:
    counters = tuple(
        Counters(shard=ref.name, samples=n, ok=n, psnr_sum=20.0 * n) for ref, n in shards
    )
    stage_stats = StageStats(busy_s={"fit": fit_s}, up_s=up_s, queued={"fit": queued})
    return WorkerState(shards=counters, stage_stats=stage_stats)
