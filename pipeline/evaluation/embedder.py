"""Pictures, or their splats, to a trained model's embeddings.

    embed = splatshard.encoder("runs/1")
    embed(["a.jpg", "b.jpg"])                   [2, D], a row for each
    embed.encode_text(["a photo of a cat"])     [1, D], of a CLIP with a text tower
    embed.save_pretrained("encoder")            for splatshard.encoder("encoder"), or the hub

Pictures become what the model was trained on: splats that are fitted here as the training shards
were (size, steps, number, cutoff; not pruned, not packed), or crops for a model of images.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from splatshard.pipeline.data.batch import ImageBatch, TrainBatch
from splatshard.pipeline.evaluation.model_card import CARD, model_card
from splatshard.pipeline.evaluation.tasks import tokens, unit_images
from splatshard.pipeline.evaluation.zeroshot import text_vectors
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.models.classifier import image_config, reads_images
from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.picture import SplatImage, fit_with
from splatshard.pipeline.source.pixels import Picture, pixels_of, several
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.signed import write_unless_changed
from splatshard.pipeline.train.saved import place_of, refuse_other_folder, write_model
from splatshard.pipeline.train.trained import (
    Trained,
    config_to_save,
    fit_of_training,
    load_trained,
)
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import DeviceName, WeightsName

log = logging.getLogger(__name__)

TOGETHER = 64
"""Pictures in a batch."""

Input = Picture | SplatImage


class Embedder:
    """What `encoder` returns; `trained` has the model and what is known of it."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        model = trained.model
        self._embed: Any = unit_images(model) if isinstance(model, SplatCLIP) else tokens(model)
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        weights: str = "auto",
        device: str = "auto",
    ) -> Embedder:
        """As `encoder`, by the name that it has elsewhere."""
        gpu = torch.cuda.is_available()
        for name, value, choices in (
            ("weights", weights, get_args(WeightsName)),
            ("device", device, get_args(DeviceName)),
        ):
            if value not in choices:
                raise UsageError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        if device == "cuda" and not gpu:
            raise UsageError("device is 'cuda', and there is none here: choose auto or cpu")
        url = place_of(_folder(path), revision)
        chosen = "cuda" if gpu and device != "cpu" else "cpu"
        return cls(load_trained(url, weights, torch.device(chosen)))

    def __repr__(self) -> str:
        return f"Embedder({type(self.model).__name__}, {self.trained.url})"

    @property
    def model(self) -> nn.Module:
        """SplatCLIP, SplatClassifier or GViT, in eval mode; it takes batches of a dataset."""
        return self.trained.model

    def __call__(self, inputs: Input | Sequence[Input] | TrainBatch | ImageBatch) -> Tensor:
        """float32 [B, D] in main memory, a row for each input: unit vectors of a CLIP, CLS tokens
        of other models. A batch is one of SplatDataset, or of ImageDataset for a model of images.

        Raises UsageError for what the model does not read, and what `splatshard.fit` raises.
        """
        return self._each(inputs, self._embed)

    def logits(self, inputs: Input | Sequence[Input] | TrainBatch | ImageBatch) -> Tensor:
        """float32 [B, C] in main memory, of a classifier's C classes; `trained.classes` are their
        names, where they are known. As `__call__`; raises UsageError for other models, too."""
        model: Any = self.trained.model
        if self.trained.config.num_classes is None:
            raise UsageError(
                f"{self.trained.url} is no classifier: compare its embeddings, with encode_text's "
                "where it has a text tower"
            )
        if isinstance(model, GViT):
            return self._each(inputs, lambda batch: model(batch.floating().pixels).logits)
        return self._each(inputs, model)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """float32 [T, D] in main memory, the unit vectors of texts. Raises UsageError for a model
        without a text tower, or whose tokenizer cannot be loaded."""
        model = self.trained.model
        if not isinstance(model, SplatCLIP) or model.config.text is None:
            raise UsageError(f"{self.trained.url} has no text tower: it takes no texts")
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed or not all(isinstance(text, str) for text in listed):
            raise UsageError(f"{texts!r} are no texts: give a text, or a list of them")
        self._tokenizer = self._tokenizer or load_tokenizer(model.config.text)
        with self.trained.computing():
            return text_vectors(model, listed, self.trained.device, self._tokenizer)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, README.md (a model card, left alone where somebody
        has changed it) and a CLIP's tokenizer to `folder`, for `encoder`; it may be uploaded to the
        Hugging Face hub as it is.

        Raises UsageError for a folder with another config.json, and a tokenizer that cannot be
        loaded; StorageError and UnavailableError.
        """
        url = fs.absolute(_folder(folder)).rstrip("/")
        refuse_other_folder(url)
        config = config_to_save(self.trained)
        if config.cutoff is not None and config.decode is None:
            log.warning(
                "%s: the shards of its training are gone, and so is how pictures become Gaussians: "
                "the saved model takes splats and batches, and no pictures", self.trained.url,
            )  # fmt: skip
        card = model_card(url.rpartition("/")[2], self.trained, config)
        write_model(url, self.trained.model, config)
        if card:
            write_unless_changed(f"{url}/{CARD}", card)

    def _each(self, inputs: Any, embed: Any) -> Tensor:
        """`embed` of all, in batches."""
        if isinstance(inputs, TrainBatch | ImageBatch):
            return self._embedded(inputs, embed)
        if isinstance(inputs, Mapping | Dataset):
            raise UsageError(
                f"a {type(inputs).__name__} is no picture and no batch: give the batches that a "
                "dataset gives without as_dict=True, or those of a table, as table[:8]"
            )
        listed: Sequence[Any] = inputs if several(inputs) else [inputs]
        if not listed:
            raise UsageError("no picture: give at least one")
        parts = (listed[i : i + TOGETHER] for i in range(0, len(listed), TOGETHER))
        return torch.cat([self._embedded(self._batch(part), embed) for part in parts])

    @torch.no_grad()
    def _embedded(self, batch: TrainBatch | ImageBatch, embed: Any) -> Tensor:
        wanted = ImageBatch if reads_images(self.trained.config) else TrainBatch
        if not isinstance(batch, wanted):
            raise UsageError(
                f"{self.trained.url} reads a {wanted.__name__}, this is a {type(batch).__name__}"
            )
        with self.trained.computing():
            return embed(batch.to(self.trained.device)).float().cpu()

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


def encoder(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: str = "auto",
    device: str = "auto",
) -> Embedder:
    """The embeddings of a trained model.

    path      a run of `splatshard train` (its newest checkpoint), one of its checkpoints, or what
              `save_pretrained` wrote: a folder, or where there is none of this name, a repository
              USER/NAME of the Hugging Face hub
    revision  branch, tag or commit of a repository
    weights   of a run: model, ema (their average) or auto, the average where there is one
    device    auto, cpu or cuda

    Raises UsageError where there is no such thing or it is not understood, CorruptShardError for a
    damaged checkpoint.
    """
    return Embedder.from_pretrained(path, revision=revision, weights=weights, device=device)


def _folder(path: str | os.PathLike[str]) -> str:
    """The name of a model's folder. Raises UsageError for that of a file, or none."""
    name = os.fsdecode(path)
    if not name or (fs.is_local(name) and os.path.isfile(fs.local_path(name))):
        what = f"{name} is a file" if name else "the path is empty"
        raise UsageError(f"{what}: give a folder")
    return name


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
