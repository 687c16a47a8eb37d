"""One source shard to one splat shard: the product in one function.

    read -> decode -> fit -> prune -> pack -> write -> commit

Start here. Everything is a direct call; nothing here knows of Ray, and the same function runs in a
test, in a local worker and on a GPU actor. Memory is bounded by one batch plus one row group.

A bad sample becomes a row with a status; a bad source raises and commits nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from pipeline.commit import publish, staged_file
from pipeline.decode import DecodedImage, decode
from pipeline.fit import fit
from pipeline.kernels.backend import Backend
from pipeline.metrics import psnr
from pipeline.pack import finite_images, pack, unpack
from pipeline.prune import prune
from pipeline.read import RawSample, read
from pipeline.write import open_writer
from schemas.config import ConvertConfig, recipe
from schemas.errors import SampleError
from schemas.shard import OK, ShardManifest, ShardRef
from schemas.splats import MAX_PSNR, shard_metadata

Row = dict[str, Any]


def convert_shard(
    ref: ShardRef,
    config: ConvertConfig,
    dst: str,
    backend: Backend,
    on_batch: Callable[[list[Row]], None] | None = None,
) -> ShardManifest:
    """Convert the source shard `ref` into `dst` and commit it.

    `on_batch` is called with the rows of each finished batch (progress). Raises SourceError for a
    source that cannot be read to its end, StorageError when `dst` cannot be written,
    CorruptShardError when what was written does not read back; nothing is committed then.
    """
    metadata = shard_metadata(config.pack.codec, config.fit.cutoff, recipe(config))
    digest = hashlib.sha256()
    samples_in = 0
    with staged_file(dst, ref.name) as path:
        with open_writer(path, config.pack.format, metadata) as writer:
            for samples in batches(read(ref, digest), config.batch_size):
                samples_in += len(samples)
                rows = convert_batch(samples, config, backend)
                writer.write(rows)
                if on_batch:
                    on_batch(rows)
        return publish(dst, path, ref, config, digest.hexdigest(), samples_in)


def convert_batch(samples: list[RawSample], config: ConvertConfig, backend: Backend) -> list[Row]:
    """Samples to rows, one each, in order. Only images that decode are fitted."""
    decoded = [try_decode(sample, config) for sample in samples]
    images = [d for d in decoded if isinstance(d, DecodedImage)]
    fitted = iter(fit_and_pack(images, config, backend) if images else ())
    rows = []
    for sample, outcome in zip(samples, decoded, strict=True):
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
        if isinstance(outcome, SampleError):
            row |= {"status": outcome.status, "error": str(outcome)}
        else:
            row |= next(fitted)
        rows.append(row)
    return rows


def fit_and_pack(
    images: list[DecodedImage], config: ConvertConfig, backend: Backend
) -> Iterator[Row]:
    """The Gaussian half of a row for each image; PSNR is that of the packed bytes, as a reader
    gets them."""
    target = torch.stack([torch.from_numpy(d.pixels) for d in images]).to(backend.device)
    target = target.permute(0, 3, 1, 2).float().div(255).contiguous()  # [B, 3, H, W]
    height, width = target.shape[2:]
    splats, steps = fit(target, config.fit, backend)
    splats = prune(splats, target, config, backend)
    finite = finite_images(splats)  # a diverged fit keeps no Gaussian and its row says so
    splats = replace(splats, mask=splats.mask & finite[:, None])
    payloads = pack(splats, height, width, config.pack.codec)
    stored = unpack(payloads, height, width, config.pack.codec).to(backend.device)
    quality = psnr(backend.render(stored, height, width, config.fit.cutoff), target)
    quality = quality.clamp(max=MAX_PSNR)
    finite &= quality.isfinite()
    for i, image in enumerate(images):
        row: Row = {
            "width": width,
            "height": height,
            "original_width": image.original_width,
            "original_height": image.original_height,
        }
        if finite[i]:
            row |= {
                "num_gaussians": int(stored.num_gaussians[i]),
                "psnr": float(quality[i]),
                "steps": int(steps[i]),
                "splats": payloads[i],
            }
        else:
            row |= {"status": "fit_diverged", "error": "the fit gave splats that are not finite"}
        yield row


def try_decode(sample: RawSample, config: ConvertConfig) -> DecodedImage | SampleError:
    """The decoded image, or the error that the reader or the decoder has for this sample."""
    if sample.error:
        return sample.error
    try:
        return decode(sample.image, sample.image_name, config.decode)
    except SampleError as error:
        return error


def batches(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    """Consecutive lists of `size` samples, the last one shorter."""
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
