"""One source shard to one splat shard: the product in one function.

    read -> decode -> fit -> prune -> pack -> write -> commit

Start here. Everything is a direct call; nothing here knows of Ray, and the same function runs in a
test, in a local worker and on a GPU actor.

On a GPU four threads work at once: one reads, one gathers the next batch (decoded by a pool of its
own), one keeps the device fitting, and the caller's packs, checks and writes the previous batch. A
CPU worker owns one core, so there the same generators run one after another; only a remote source
is read ahead. Memory is bounded by four batches on a GPU, by one elsewhere, plus one row group:
neither grows with the shard, and both are counted in bytes where samples bring large members.

A worker runs two shards at once, so that neither the start of a shard nor its upload leaves the
device idle: `slot` decides how many of them may be between read and write.

A bad sample becomes a row with a status; a bad source raises and commits nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from splatshard.pipeline.codec.pack import finite_images, pack, unpack
from splatshard.pipeline.codec.quantise import squared_errors
from splatshard.pipeline.fitting.recipe import fit_and_prune
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.models.teacher import load_teacher
from splatshard.pipeline.psnr import psnr_of
from splatshard.pipeline.runtime.batching import (
    TEACHER_TOGETHER,
    BatchLimit,
    batch_limit,
    bytes_per_image,
    own_stream,
)
from splatshard.pipeline.runtime.prefetch import map_ahead, prefetch
from splatshard.pipeline.runtime.stage_timer import StageTimer
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.decode import DecodedImage, decode
from splatshard.pipeline.source.read import RawSample, read
from splatshard.pipeline.splats import Splats, first
from splatshard.pipeline.storage.fs import Digest
from splatshard.schemas.config import ConvertConfig, output_config
from splatshard.schemas.errors import SampleError
from splatshard.schemas.shard import OK, ShardManifest, ShardRef
from splatshard.schemas.splats import MAX_PSNR, TEACHER, psnr_columns, shard_metadata

Row = dict[str, Any]

MAX_DECODERS = 16
PACKED_TOGETHER = 256
"""Images quantised and rendered at once, beside a batch that fills the device."""
READ_AHEAD = 16
"""Samples that wait in memory, of a remote source or beside a GPU."""
ORDINARY_BYTES = 4 << 20
"""A larger sample counts for several."""
BATCH_BYTES = 64 << 20
"""Of the further members of a batch, which travel through: then it is full, whatever its size."""


def convert_shard(
    ref: ShardRef,
    config: ConvertConfig,
    dst: str,
    backend: Backend,
    on_batch: Callable[[list[Row]], None] | None = None,
    *,
    on_sample: Callable[[RawSample], None] | None = None,
    timer: StageTimer | None = None,
    slot: AbstractContextManager[None] | None = None,
    quarantine: Mapping[int, str] | None = None,
    attempt: str = "",
    replaces: str = "",
) -> ShardManifest:
    """Convert the source shard `ref` into `dst` and commit it.

    `on_batch` is called with the rows of each finished batch (progress), `on_sample` with each
    sample as it is read, on whatever thread; `timer` times the stages, `slot` is held from the
    first read to the last write. Samples whose number in the shard is in `quarantine` become rows
    with that reason, unseen. `attempt` and `replaces`: see `commit.publish`.

    Raises SourceError for a source that cannot be read to its end, UnavailableError where a store
    does not answer, StorageError when `dst` cannot be written, BackendError when not even one image
    fits into the device's memory, CorruptShardError when what was written does not read back;
    nothing is committed then.
    """
    timer = timer or StageTimer()
    metadata = shard_metadata(config.pack.codec, config.fit.cutoff, output_config(config))
    digest = hashlib.sha256()
    samples_in = 0
    with staged_file(dst, ref.name) as path:
        with slot or nullcontext(), open_writer(path, config.pack.format, metadata) as writer:
            quarantine = quarantine or {}
            samples = read_samples(ref, digest, quarantine, timer, backend.device, on_sample)
            batches = convert_samples(samples, config, backend, timer)
            with closing(samples), closing(batches):
                for rows in batches:
                    samples_in += len(rows)
                    with timer.stage("pack", len(rows)):
                        writer.write(rows)
                    if on_batch:
                        on_batch(rows)
        with timer.stage("publish", max(1, samples_in)):
            sha256 = digest.hexdigest()
            return publish(
                dst, path, ref, config, sha256, samples_in, attempt=attempt, replaces=replaces
            )


def try_reading(ref: ShardRef, backend: Backend, timer: StageTimer) -> Generator[list[RawSample]]:
    """The samples of a shard, one by one and as they are read for it; to find out whether that
    kills a worker, and how many there are."""
    samples = read_samples(ref, hashlib.sha256(), {}, timer, backend.device)
    with closing(samples):
        for sample in samples:
            yield [sample]


def try_samples(
    ref: ShardRef,
    config: ConvertConfig,
    backend: Backend,
    span: tuple[int, int],
    timer: StageTimer,
    quarantine: Mapping[int, str],
) -> Generator[list[Row]]:
    """The rows of the samples from span[0] to span[1] of a shard, written nowhere; to find the one
    that kills a worker."""
    samples = read_samples(ref, hashlib.sha256(), quarantine, timer, backend.device)
    with closing(samples):
        yield from convert_samples(islice(samples, *span), config, backend, timer)


def read_samples(
    ref: ShardRef,
    digest: Digest,
    quarantine: Mapping[int, str],
    timer: StageTimer,
    device: torch.device,
    on_sample: Callable[[RawSample], None] | None = None,
) -> Generator[RawSample]:
    """The samples of a shard, read ahead of those that are worked on where that helps; those in
    quarantine carry it as their error."""

    def timed() -> Generator[RawSample]:
        with closing(read(ref, digest)) as samples:
            number = 0
            while True:
                with timer.stage("read"):
                    sample = next(samples, None)
                if sample is None:
                    return
                if number in quarantine:
                    sample = replace(sample, error=SampleError("quarantined", quarantine[number]))
                if on_sample:
                    on_sample(sample)
                yield sample
                number += 1

    ahead = overlaps(device) or "://" in ref.urls[0]
    return prefetch(timed(), READ_AHEAD, weight) if ahead else timed()


def weight(sample: RawSample) -> int:
    """How many ordinary samples one takes the room of, while it waits in memory."""
    return 1 + (len(sample.image) + sum(len(data) for _, data in sample.members)) // ORDINARY_BYTES


def convert_samples(
    samples: Iterable[RawSample], config: ConvertConfig, backend: Backend, timer: StageTimer
) -> Generator[list[Row]]:
    """Samples to complete rows, in order, batch by batch."""
    limit = batch_limit(config, backend.device)
    ahead = partial(run_ahead, timer=timer) if overlaps(backend.device) else in_step
    decoded = ahead(decode_batches(samples, limit, config, backend.device, timer), "fit")
    fitted = ahead(fit_batches(decoded, config, backend, limit, timer), "pack")
    with closing(decoded), closing(fitted):  # their threads end with the block
        for batch in fitted:
            with timer.stage("pack", len(batch.rows)):
                rows = pack_batch(batch, config, backend)
            yield rows


def overlaps(device: torch.device) -> bool:
    """Whether decoding, fitting and packing run at the same time."""
    return device.type != "cpu"


def in_step(batches: Generator[Any], stage: str) -> Generator[Any]:
    """What `run_ahead` is where nothing overlaps."""
    return batches


def run_ahead(batches: Generator[Any], stage: str, timer: StageTimer) -> Generator[Any]:
    """The same batches, made ahead on a thread; the timer counts those that wait for `stage`."""
    waiting = 0

    def produced() -> Generator[Any]:
        nonlocal waiting
        with closing(batches):
            for batch in batches:
                waiting += 1
                timer.queue(stage, 1)
                yield batch

    try:
        with closing(prefetch(produced())) as items:
            for batch in items:
                waiting -= 1
                timer.queue(stage, -1)
                yield batch
    finally:
        timer.queue(stage, -waiting)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of one size: `pixels` uint8 [B, H, W, 3] on the backend's device, and their rows."""

    rows: list[Row]
    pixels: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """The rows of all samples, in order; the images of those that decode, by size."""

    rows: list[Row]
    images: list[Images]


@dataclass(frozen=True, kw_only=True)
class FittedBatch:
    """As DecodedBatch; each group of images with its splats (in main memory) and steps [B]."""

    rows: list[Row]
    fits: list[tuple[Images, Splats, Tensor]]


def decode_batches(
    samples: Iterable[RawSample],
    limit: BatchLimit,
    config: ConvertConfig,
    device: torch.device,
    timer: StageTimer,
) -> Generator[DecodedBatch]:
    """Batches as large as `limit` says at first, the last one smaller, with their images on
    `device`."""
    size, room = limit.images, limit.room

    def decode_timed(sample: RawSample) -> tuple[Row, DecodedImage | None]:
        with timer.stage("decode"):
            return decode_sample(sample, config)

    threads = min(MAX_DECODERS, len(os.sched_getaffinity(0))) if overlaps(device) else 0
    with closing(map_ahead(decode_timed, samples, threads, weight)) as decoded:
        while batch := take(decoded, size, room, config):
            images = by_size([(row, image) for row, image in batch if image is not None], device)
            rows = [row for row, _ in batch]
            batch.clear()  # the pixels are on the device: do not keep them here as well
            yield DecodedBatch(rows=rows, images=images)


def take(
    decoded: Iterable[tuple[Row, DecodedImage | None]],
    size: int,
    room: int | None,
    config: ConvertConfig,
) -> list[tuple[Row, DecodedImage | None]]:
    """The next `size` rows and images; fewer where their further members fill BATCH_BYTES or the
    fits of their images fill `room`, or at the end."""
    batch: list[tuple[Row, DecodedImage | None]] = []
    held = fitting = 0
    for row, image in islice(decoded, size):
        batch.append((row, image))
        held += sum(len(member["data"]) for member in row["members"])
        fitting += bytes_per_image(config, image.pixels.size // 3) if image else 0
        if held >= BATCH_BYTES or (room is not None and fitting >= room):
            break
    return batch


def decode_sample(sample: RawSample, config: ConvertConfig) -> tuple[Row, DecodedImage | None]:
    """The row of a sample, as far as it is known before the fit, and its image; None if bad."""
    row: Row = {
        "key": sample.key,
        "uid": sample.uid,
        "caption": sample.caption,
        "label": sample.label,
        "metadata": sample.metadata,
        "members": [{"name": name, "data": data} for name, data in sample.members],
        "status": OK,
        "num_gaussians": 0,
    }
    try:
        if sample.error:
            raise sample.error
        return row, decode(sample.image, sample.image_name, config.decode)
    except SampleError as error:
        return row | {"status": error.status, "error": str(error)}, None


def by_size(images: list[tuple[Row, DecodedImage]], device: torch.device) -> list[Images]:
    """The images in groups of one height and width, each uploaded in one piece."""
    groups: dict[tuple[int, ...], list[tuple[Row, DecodedImage]]] = {}
    for row, image in images:
        row["original_width"] = image.original_width
        row["original_height"] = image.original_height
        groups.setdefault(image.pixels.shape, []).append((row, image))
    uploaded = []
    for group in groups.values():
        pixels = torch.stack([torch.from_numpy(image.pixels) for _, image in group])
        with own_stream(device, "upload"):
            pixels = pixels.to(device)
        uploaded.append(Images(rows=[row for row, _ in group], pixels=pixels))
    return uploaded


def fit_batches(
    batches: Iterable[DecodedBatch],
    config: ConvertConfig,
    backend: Backend,
    limit: BatchLimit,
    timer: StageTimer,
) -> Generator[FittedBatch]:
    """Fit and prune every image; `limit` shrinks when the device's memory does not suffice."""

    def fit_part(images: Images, part: slice) -> tuple[Images, Splats, Tensor]:
        images = Images(rows=images.rows[part], pixels=images.pixels[part])
        together = overlaps(backend.device)  # a GPU fits all of them in the time of a few
        with timer.stage("fit", 1 if together else len(images.rows)):
            splats, steps = fit_and_prune(planes(images.pixels), config, backend)
            return images, splats.to(torch.device("cpu")), steps.cpu()

    for batch in batches:
        fits = [
            fitted
            for images in batch.images
            for fitted in limit.in_parts(
                len(images.rows),
                partial(fit_part, images),
                bytes_per_image(config, math.prod(images.pixels.shape[1:3])),
            )
        ]
        yield FittedBatch(rows=batch.rows, fits=fits)


def pack_batch(batch: FittedBatch, config: ConvertConfig, backend: Backend) -> list[Row]:
    """The rows of all samples of a batch, complete, in order."""
    for images, splats, steps in batch.fits:
        pack_images(images, splats, steps, config, backend)
    return batch.rows


def pack_images(
    images: Images, splats: Splats, steps: Tensor, config: ConvertConfig, backend: Backend
) -> None:
    """Put the Gaussian half, from splats [B, N] and steps taken int64 [B] in main memory, into the
    rows of B images; PSNRs are those of the packed bytes, as a reader gets them."""
    finite = finite_images(splats)  # a diverged fit keeps no Gaussian and its row says so
    splats = replace(splats, mask=splats.mask & finite[:, None])

    def pack_part(part: slice) -> list[Row]:
        with own_stream(backend.device, "pack"):
            return packed_rows(planes(images.pixels[part]), splats[part], config, backend)

    packed = chain.from_iterable(BatchLimit(PACKED_TOGETHER).in_parts(len(images.rows), pack_part))
    taught = embedded_rows(images.pixels, config, backend.device)
    height, width = images.pixels.shape[1:3]
    each = zip(images.rows, packed, finite, steps, taught, strict=True)
    for row, own, is_finite, taken, embedding in each:
        row |= {"width": width, "height": height}
        if is_finite and math.isfinite(own["psnr"]):
            row |= own | {"steps": int(taken)} | embedding
        else:
            row |= {"status": "fit_diverged", "error": "the fit gave splats that are not finite"}


def packed_rows(
    target: Tensor, splats: Splats, config: ConvertConfig, backend: Backend
) -> list[Row]:
    """Payloads, number of Gaussians and PSNRs of images `target` [B, 3, H, W]."""
    budgets, cutoff, codec = config.fit.budgets, config.fit.cutoff, config.pack.codec
    height, width = target.shape[2:]
    splats = splats.to(backend.device)
    payloads = pack(splats, target, codec, cutoff, backend, budgets)
    stored = unpack(payloads, height, width, codec)

    def quality(shown: Splats) -> Tensor:
        errors = squared_errors(shown.to(backend.device), target, None, cutoff, backend)
        return psnr_of(errors[0] / math.prod(target.shape[1:])).clamp(max=MAX_PSNR).cpu()

    whole = quality(stored)
    found = {"psnr": whole, "psnr_loss": quality(splats) - whole}
    for name, budget in zip(psnr_columns(budgets), budgets, strict=False):
        found[name] = quality(first(stored, budget))
    return [
        payload
        | {"num_gaussians": int(stored.num_gaussians[i])}
        | {name: float(values[i]) for name, values in found.items()}
        for i, payload in enumerate(payloads)
    ]


def embedded_rows(pixels: Tensor, config: ConvertConfig, device: torch.device) -> Iterator[Row]:
    """The teacher's column of each image of `pixels` (uint8 [B, H, W, 3]), if there is a
    teacher."""
    if config.teacher is None:
        yield from ({} for _ in pixels)
        return
    teacher = load_teacher(config.teacher, device)

    def embed(part: slice) -> list[bytes]:
        with own_stream(device, "teach"):
            return teacher(pixels[part])

    parts = BatchLimit(TEACHER_TOGETHER).in_parts(len(pixels), embed)
    for embedding in chain.from_iterable(parts):
        yield {TEACHER: embedding}


def planes(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], 0 to 1."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
