"""`convert --dry-run`: fit a few images here, without Ray, and scale up to the whole job.

A few images from up to SHARDS source shards far apart, so that one unusual shard does not decide;
hundreds on a GPU, which fits as many together as fast as one. How many samples there are comes from
counting those shards and from the bytes of the others. Time is that of decoding and fitting on one
worker after a warm-up that compiles the kernels; the start of Ray and transfers are left out.
Nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from jobs.actors import THREADS
from jobs.cli import EXIT_OK, count, duration, print_json, say, size
from schemas.config import ConvertConfig
from schemas.shard import OK, ShardRef

SAMPLES = 8
SAMPLES_ON_GPU = 512
SHARDS = 2
MAX_COUNTED = 1_000_000


def dry_run(
    work: Sequence[ShardRef], config: ConvertConfig, workers: int | None, as_json: bool
) -> int:
    """Print the estimate; returns the exit code. Raises SourceError for an unreadable source."""
    estimate: dict[str, Any] = {"dry_run": True, "shards": len(work)}
    if work:
        os.environ.update(THREADS)  # as in a worker, before torch is imported
        workers = min(workers or len(os.sched_getaffinity(0)), len(work))
        estimate |= estimate_job(work, config, workers)
        tell(estimate)
    else:
        say("everything is already done")
    if as_json:
        print_json(estimate)
    return EXIT_OK


def estimate_job(work: Sequence[ShardRef], config: ConvertConfig, workers: int) -> dict[str, Any]:
    """Figures of the whole job, from a few fitted images."""
    import torch

    from pipeline.convert import convert_batch
    from pipeline.kernels.backend import select_backend

    torch.set_num_threads(1)
    backend = select_backend(config.backend)
    samples, picked = look(work, SAMPLES if backend.device.type == "cpu" else SAMPLES_ON_GPU)
    if not picked:
        return {"samples": samples, "sampled": 0}
    convert_batch(picked[:1], config, backend)  # warm-up
    begin = time.monotonic()
    rows = convert_batch(picked, config, backend)
    each_s = (time.monotonic() - begin) / len(rows)
    ok = [row for row in rows if row["status"] == OK]
    return {
        "samples": samples,
        "sampled": len(rows),
        "sampled_ok": len(ok),
        "psnr_mean": sum(row["psnr"] for row in ok) / len(ok) if ok else None,
        "s_per_image": each_s,
        "worker_hours": samples * each_s / 3600,
        "wall_s": samples * each_s / workers,
        "stored_bytes": samples * sum(row_bytes(row) for row in rows) / len(rows),
        "workers": workers,
        "backend": backend.name,
    }


def look(work: Sequence[ShardRef], number: int) -> tuple[int, list[Any]]:
    """Estimated number of samples of all shards, and at most `number` spread over some of them."""
    from pipeline.read import count_samples, read

    chosen = [work[0]] if len(work) < SHARDS else [work[0], work[len(work) // 2]]
    picked: list[Any] = []
    for ref in chosen:
        picked += islice(read(ref, hashlib.sha256()), number // len(chosen))
    counted = sum(count_samples(ref, MAX_COUNTED) for ref in chosen)
    counted_bytes = sum(ref.size_bytes for ref in chosen)
    total_bytes = sum(ref.size_bytes for ref in work)
    samples = round(counted * total_bytes / counted_bytes) if counted_bytes else counted
    limits = [ref.limit for ref in work if ref.limit is not None]
    return (min(samples, sum(limits)) if len(limits) == len(work) else samples), picked


def row_bytes(row: dict[str, Any]) -> int:
    """Bytes of a row's large columns: the payload and what travels through."""
    members = sum(len(member["data"]) for member in row["members"])
    texts = sum(len(row.get(name) or "") for name in ("caption", "metadata"))
    return len(row.get("splats") or b"") + members + texts


def tell(estimate: dict[str, Any]) -> None:
    """The estimate for people, on stderr."""
    say(f"dry run: about {estimate['samples']:,} samples in {count(estimate['shards'], 'shard')}")
    if not estimate["sampled"]:
        say("  no sample could be read")
        return
    psnr = estimate["psnr_mean"]
    say(
        f"  {count(estimate['sampled'], 'image')} fitted, {estimate['sampled_ok']} ok"
        + (f", PSNR {psnr:.2f} dB on average" if psnr is not None else "")
    )
    say(
        f"  {estimate['s_per_image']:.2f} s per image on one worker, so about "
        f"{duration(estimate['wall_s'])} with {count(estimate['workers'], 'worker')} "
        f"({estimate['worker_hours']:,.2f} worker-hours, backend {estimate['backend']})"
    )
    say(f"  about {size(estimate['stored_bytes'])} of shards")
    say("  nothing was written")
