"""`convert --dry-run`: fit a few images here, without Ray, and scale up to the whole job.

The images are the first of up to SHARDS source shards spread over the job, so that one unusual
shard does not decide; hundreds on a GPU, which fits as many together as fast as one.

How many samples there are: those shards are counted, and the bytes of all others divided by their
bytes per sample. Of a remote tar only the beginning is read, so there the bytes per sample are
those of its first PREFIX samples (of all, where there are fewer). Shards whose size a web server
does not tell count as many samples as those that were counted, on average.

Time is that of a device in the middle of a long job, after a warm-up that compiles the kernels. On
a GPU reading and decoding, fitting, and packing overlap, so the slowest of decoding (by all threads
of a worker), fitting and packing decides; a CPU core does one after another. One worker was
measured alone: several GPUs of one machine share its cores, and the estimate does not know. The
start of Ray, transfers and uneven shards are left out. Nothing is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from splatshard.jobs.cli.command import EXIT_OK
from splatshard.jobs.cli.text import count, duration, print_json, say, size
from splatshard.jobs.driver.worker import THREADS
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.shard import OK, ShardRef

if TYPE_CHECKING:
    from splatshard.pipeline.kernels.backend import Backend
    from splatshard.pipeline.source.read import RawSample

SAMPLES = 8
SAMPLES_ON_GPU = 512
SHARDS = 4
PREFIX = 64
"""Samples of a remote tar that say how large its samples are: some 7 MB of DataComp."""
MAX_COUNTED = 1_000_000
CORE = "CPU core"
"""`device` of an estimate where it is no GPU."""


def dry_run(
    work: Sequence[ShardRef], config: ConvertConfig, workers: int | None, as_json: bool
) -> int:
    """Print the estimate; returns the exit code. Raises SourceError for an unreadable source."""
    estimate: dict[str, Any] = {"dry_run": True, "shards": len(work)}
    if work:
        os.environ.update(THREADS)  # as in a worker, before torch is imported
        estimate |= estimate_job(work, config, workers)
        tell(estimate)
    else:
        say("everything is already done")
    if as_json:
        print_json(estimate)
    return EXIT_OK


def estimate_job(
    work: Sequence[ShardRef], config: ConvertConfig, workers: int | None
) -> dict[str, Any]:
    """Figures of the whole job, from a few fitted images, on `workers` devices (None: all here)."""
    import numpy as np
    import torch

    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.source.sample import NOTHING_SAID, SAID, unused_lines

    torch.set_num_threads(1)
    backend = select_backend(config.backend)
    on_gpu = backend.device.type == "cuda"
    here = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    devices = min(workers or here, len(work))
    samples, picked = look(work, SAMPLES_ON_GPU if on_gpu else SAMPLES)
    for _, line in unused_lines(dict(pair for sample in picked for pair in sample.unused)):
        say(line)
    if not picked:
        return {"samples": samples, "sampled": 0}
    if all(getattr(sample, name) is None for sample in picked for name in SAID):
        say(NOTHING_SAID)
    rows, each_s = convert_timed(picked, config, backend)
    quality = [row["psnr"] for row in rows if row["status"] == OK]
    return {
        "samples": samples,
        "sampled": len(rows),
        "sampled_ok": len(quality),
        "psnr_mean": float(np.mean(quality)) if quality else None,
        "psnr_p5": float(np.percentile(quality, 5)) if quality else None,
        "s_per_image": each_s,
        "device": torch.cuda.get_device_name(backend.device) if on_gpu else CORE,
        "device_hours": samples * each_s / 3600,
        "worker_hours": samples * each_s / 3600,
        "wall_s": samples * each_s / devices,
        "stored_bytes": samples * sum(row_bytes(row) for row in rows) / len(rows),
        "workers": devices,
        "backend": backend.name,
    }


def convert_timed(
    samples: list[RawSample], config: ConvertConfig, backend: Backend
) -> tuple[list[dict[str, Any]], float]:
    """The rows of the samples, and the seconds that each of them costs in the middle of a job."""
    from splatshard.pipeline.convert import convert_samples, overlaps
    from splatshard.pipeline.runtime.stage_timer import StageTimer

    def convert(samples: list[RawSample], timer: StageTimer) -> list[dict[str, Any]]:
        return [row for rows in convert_samples(samples, config, backend, timer) for row in rows]

    overlapping = overlaps(backend.device)
    # a GPU's kernels are compiled for the size of the batch, too
    convert(samples if overlapping else samples[:1], StageTimer())
    timer = StageTimer()
    begin = time.monotonic()
    rows = convert(samples, timer)
    wall_s = time.monotonic() - begin
    return rows, (max(timer.stage_stats().busy_s.values()) if overlapping else wall_s) / len(rows)


def look(work: Sequence[ShardRef], number: int) -> tuple[int, list[RawSample]]:
    """Estimated number of samples of all shards, and at most `number` of some of them."""
    shards = min(SHARDS, len(work))
    picked: list[RawSample] = []
    counted = counted_bytes = 0.0
    for ref in (work[i * len(work) // shards] for i in range(shards)):
        samples, found, found_bytes = begin_of(ref, number // shards)
        picked += samples
        counted += found
        counted_bytes += found_bytes
    total = 0.0
    for ref in work:
        known = ref.size_bytes and counted_bytes
        by_size = ref.size_bytes * counted / counted_bytes if known else counted / shards
        total += by_size if ref.limit is None else min(ref.limit, by_size)
    return round(total), picked


def begin_of(ref: ShardRef, number: int) -> tuple[list[RawSample], int, int]:
    """The first `number` samples of a shard; how many samples there are in how many of its bytes:
    of a remote tar of known size in its beginning, else in all of it."""
    from splatshard.pipeline.source.read import count_samples, read
    from splatshard.pipeline.storage.fs import is_local

    remote_tar = ref.kind == "tar" and not is_local(ref.urls[0]) and ref.size_bytes > 0
    wanted = max(number, PREFIX) if remote_tar else number
    wanted = min(wanted, ref.limit or wanted)
    taken = _ByteCount()
    with closing(read(replace(ref, limit=wanted), taken)) as source:
        samples = list(islice(source, number))
        found = len(samples) + sum(1 for _ in source)
    if remote_tar:
        return samples, found, ref.size_bytes if found < wanted else taken.bytes
    return samples, count_samples(ref, MAX_COUNTED), ref.size_bytes


class _ByteCount:
    """Stands for a digest: what a limited read takes of a tar goes through it."""

    bytes = 0

    def update(self, data: bytes) -> None:
        self.bytes += len(data)


def row_bytes(row: dict[str, Any]) -> int:
    """Bytes of a row's large columns: the payload, compressed, and what travels through."""
    from splatshard.pipeline.codec.planes import join

    members = sum(len(member["data"]) for member in row["members"])
    texts = sum(len(row.get(name) or "") for name in ("caption", "metadata"))
    payloads = [row.get(name) or b"" for name in row if name.startswith("splats")]
    stored = [len(join(one) if isinstance(one, dict) else one) for one in payloads]
    return sum(stored) + members + texts


def tell(estimate: dict[str, Any]) -> None:
    """The estimate for people, on stderr."""
    say(f"dry run: about {estimate['samples']:,} samples in {count(estimate['shards'], 'shard')}")
    if not estimate["sampled"]:
        say("  no sample could be read")
        return
    say(f"  {count(estimate['sampled'], 'image')} fitted, {estimate['sampled_ok']} ok")
    if estimate["sampled_ok"]:
        say(
            f"  PSNR of these {estimate['psnr_mean']:.2f} dB on average, {estimate['psnr_p5']:.2f} "
            "dB at the 5th percentile"
        )
    device, unit = estimate["device"], "core" if estimate["device"] == CORE else "GPU"
    say(
        f"  {1000 * estimate['s_per_image']:,.2f} ms per image on one {device} (backend "
        f"{estimate['backend']}), so about {estimate['device_hours']:,.2f} {unit}-hours: "
        f"{duration(estimate['wall_s'])} on {count(estimate['workers'], unit)}"
    )
    say(f"  about {size(estimate['stored_bytes'])} of shards")
    say("  nothing was written")
