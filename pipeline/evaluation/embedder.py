"""Pictures, or their splats, to a trained model's embeddings.

    embed = splatshard.encoder("runs/1")
    embed(["a.jpg", "b.jpg"])                   [2, D], a row for each

Pictures become what the model was trained on: splats that are fitted here as the training shards
were (size, steps, number, cutoff; not pruned, not packed), or crops for a model of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from splatshard.pipeline.data.batch import ImageBatch, TrainBatch
from splatshard.pipeline.evaluation.tasks import tokens, unit_images
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.classifier import image_config, reads_images
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.picture import SplatImage, fit_with
from splatshard.pipeline.source.pixels import Picture, pixels_of, several
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.storage import fs
from splatshard.pipeline.train.trained import Trained, fit_of_training, load_trained
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import UsageError

TOGETHER = 64
"""Pictures in a batch."""

Input = Picture | SplatImage


class Embedder:
    """What `encoder` returns; `trained` is the model."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        model = trained.model
        self._embed: Any = unit_images(model) if isinstance(model, SplatCLIP) else tokens(model)

    def __call__(self, inputs: Input | Sequence[Input] | TrainBatch | ImageBatch) -> Tensor:
        """float32 [B, D] in main memory, a row for each input: unit vectors of a CLIP, CLS tokens
        of other models. A batch is one of SplatDataset, or of ImageDataset for a model of images.

        Raises UsageError for what the model does not read, and what `splatshard.fit` raises.
        """
        if isinstance(inputs, TrainBatch | ImageBatch):
            return self._embedded(inputs)
        listed: Sequence[Any] = inputs if several(inputs) else [inputs]
        if not listed:
            raise UsageError("no picture: give at least one")
        parts = (listed[i : i + TOGETHER] for i in range(0, len(listed), TOGETHER))
        return torch.cat([self._embedded(self._batch(part)) for part in parts])

    @torch.no_grad()
    def _embedded(self, batch: TrainBatch | ImageBatch) -> Tensor:
        wanted = ImageBatch if reads_images(self.trained.config) else TrainBatch
        if not isinstance(batch, wanted):
            raise UsageError(
                f"{self.trained.url} reads a {wanted.__name__}, this is a {type(batch).__name__}"
            )
        with self.trained.computing():
            return self._embed(batch.to(self.trained.device)).float().cpu()

    def _batch(self, inputs: Sequence[Input]) -> TrainBatch | ImageBatch:
        if not reads_images(self.trained.config):
            return splat_batch(self._splats(inputs))
        pictures = [each for each in inputs if not isinstance(each, SplatImage)]
        if len(pictures) < len(inputs):
            raise UsageError(f"{self.trained.url} reads images: give pictures, not their splats")
        config = DecodeConfig(image_size=image_config(self.trained.config).image_size)
        pixels = torch.stack([pixels_of(each, config) for each in pictures])
        return ImageBatch(pixels=pixels, **_unknown(*_sides(pixels)))

    def _splats(self, inputs: Sequence[Input]) -> list[SplatImage]:
        """Those that are given, and fits of pictures."""
        cutoff = self.trained.cutoff
        given = [each for each in inputs if isinstance(each, SplatImage)]
        if other := [each.cutoff for each in given if each.cutoff != cutoff]:
            raise UsageError(
                f"the splats have a cutoff of {other[0]} standard deviations, {self.trained.url} "
                f"was trained on {cutoff}, where the same numbers are other pictures"
            )
        if len(given) == len(inputs):
            return given
        decode, config = fit_of_training(self.trained)
        backend = select_backend("triton" if self.trained.device.type == "cuda" else "cpu")
        return [
            each if isinstance(each, SplatImage) else fit_with(each, config, decode, backend)
            for each in inputs
        ]


def encoder(path: str, *, weights: str = "auto", device: str = "auto") -> Embedder:
    """The embeddings of a run of `splatshard train` (its newest checkpoint) or of one of its
    checkpoints. `weights`: model, ema (their average) or auto, the average where there is one;
    `device`: auto, cpu or cuda.

    Raises UsageError where there is no such thing, CorruptShardError for a damaged one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Embedder(load_trained(fs.absolute(path), weights, torch.device(device)))


def splat_batch(images: Sequence[SplatImage]) -> TrainBatch:
    """[B, N] of the largest N, padded."""
    fields = (
        pad_sequence([getattr(image.splats, name)[0] for image in images], batch_first=True)
        for name in ("means", "cholesky", "colors", "mask")
    )
    sides = ([image.height for image in images], [image.width for image in images])
    heights, widths = (torch.tensor(each, dtype=torch.int32) for each in sides)
    return TrainBatch(splats=Splats(*fields), **_unknown(heights, widths))


def _sides(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths int32 [B] of [B, 3, H, W]."""
    height, width = (torch.full((len(pixels),), x, dtype=torch.int32) for x in pixels.shape[2:])
    return height, width


def _unknown(heights: Tensor, widths: Tensor) -> dict[str, Any]:
    """The rest of a batch of pictures of which nothing else is known; int32 [B]."""
    count = len(heights)
    return {
        "heights": heights,
        "widths": widths,
        "keys": [""] * count,
        "captions": [None] * count,
        "labels": torch.full((count,), -1),
        "teacher": None,
        "valid": torch.ones(count, dtype=torch.bool),
    }
