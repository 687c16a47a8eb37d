"""An RGB CLIP on the images themselves: the reference that models on splats are compared with.

Images are read and cropped as convert does it, at the size that the model wants, and normalised as
its files say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from pipeline.decode import decode
from pipeline.models.weights import load_clip
from pipeline.prefetch import map_ahead
from pipeline.read import RawSample, read
from pipeline.sources import list_shards
from pipeline.teacher import described
from pipeline.trained import Data, Trained
from schemas.config import DecodeConfig, TeacherConfig, source_of
from schemas.errors import SampleError
from schemas.shard import ShardRef
from schemas.splats import canonical_json

DECODERS = 8


@dataclass(frozen=True)
class PixelBatch:
    """As TrainBatch, with normalised pixels float32 [B, 3, H, W] in place of splats."""

    pixels: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str | None]
    valid: Tensor

    def to(self, device: torch.device) -> PixelBatch:
        """The same batch with its pixels on `device`."""
        return replace(self, pixels=self.pixels.to(device))


def load_rgb(name: str, device: torch.device) -> tuple[Trained, TeacherConfig]:
    """The CLIP `name`, see `pipeline.models.weights.load_clip`, and how its images are made. Raises
    UsageError where it cannot be loaded."""
    model, how = load_clip(name), described(name)
    digest = hashlib.sha256(how.weights.encode())  # the vision tower's; and what else there is
    for parameter, value in sorted(model.state_dict().items()):
        if not parameter.startswith("vision."):
            digest.update(f"{parameter}\0".encode() + value.float().contiguous().numpy().tobytes())
    digest.update(canonical_json([how.mean, how.std]).encode())
    trained = Trained(
        model=model.to(device).eval(),
        config=model.config,
        url=name,
        step=None,
        weights=digest.hexdigest(),
        device=device,
    )
    return trained, how


def open_images(how: TeacherConfig, src: str, batch: int) -> Data:
    """The images of `src`, as convert understands it. Raises UsageError and SourceError."""
    refs = list_shards(src)
    content = hashlib.sha256(canonical_json([source_of(ref) for ref in refs]).encode())
    return Data(src, content.hexdigest(), Images(refs, how, batch))


class Images:
    """The batches of `refs`, of samples that decode; one run through them after another."""

    def __init__(self, refs: list[ShardRef], how: TeacherConfig, batch: int) -> None:
        self.refs, self.how, self.batch = refs, how, batch

    def __iter__(self) -> Iterator[PixelBatch]:
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.how.mean, self.how.std))
        with closing(map_ahead(self._decoded, self._samples(), DECODERS)) as decoded:
            ok = ((sample, pixels) for sample, pixels in decoded if pixels is not None)
            while batch := list(islice(ok, self.batch)):
                pixels = torch.stack([image for _, image in batch]).permute(0, 3, 1, 2)
                samples = [sample for sample, _ in batch]
                labels = [-1 if sample.label is None else sample.label for sample in samples]
                yield PixelBatch(
                    pixels=(pixels / 255 - mean) / std,
                    labels=torch.tensor(labels),
                    keys=[sample.key for sample in samples],
                    captions=[sample.caption for sample in samples],
                    valid=torch.ones(len(samples), dtype=torch.bool),
                )

    def _samples(self) -> Iterator[RawSample]:
        for ref in self.refs:
            yield from read(ref, hashlib.sha256())

    def _decoded(self, sample: RawSample) -> tuple[RawSample, Tensor | None]:
        try:
            if sample.error:
                raise sample.error
            config = DecodeConfig(image_size=self.how.image_size)
            pixels = decode(sample.image, sample.image_name, config).pixels
        except SampleError:
            return sample, None
        return sample, torch.from_numpy(pixels)
