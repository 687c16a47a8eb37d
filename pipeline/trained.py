"""A trained model, taken from its checkpoint, and what it says of the samples in shards.

    checkpoint -> model -> shards that fit it -> a vector per sample

Shards fit when their numbers mean what those of training meant: the cutoff, which decides the
picture that the same Gaussians are. The number of Gaussians may differ, and so may image size and
codec; the stem's constants are part of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.data import SplatDataset, TrainBatch
from pipeline.models import build_model
from pipeline.shards import shard_metadata_of
from pipeline.train.checkpoint import AVERAGE, CONFIG, MODEL, Checkpoint, latest, read_checkpoint
from schemas.errors import CorruptShardError, UsageError
from schemas.train import TrainConfig

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on `device`; `weights` is the SHA-256 of the file they are from."""

    model: nn.Module
    checkpoint: Checkpoint
    config: TrainConfig
    weights: str
    device: torch.device

    def computing(self) -> AbstractContextManager[Any]:
        """On a GPU in the precision of training; on a CPU, where that is slow, in fp32."""
        dtype = PRECISIONS.get(self.config.precision)
        if self.device.type != "cuda" or dtype is None:
            return nullcontext()
        return torch.autocast("cuda", dtype)


@dataclass(frozen=True)
class Samples:
    """Of S samples: vectors float32 [S, D] in main memory, labels int64 [S] (-1 where there is
    none), keys and captions."""

    vectors: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str | None]


def load_trained(url: str, weights: str, device: torch.device) -> Trained:
    """The model of a run's dst (its newest checkpoint) or of one of its checkpoints.

    `weights`: model, ema (their average) or auto, the average where there is one. Raises UsageError
    where there is no such thing, CorruptShardError for a damaged one.
    """
    url = url.rstrip("/")
    found = read_checkpoint(url) if storage.exists(f"{url}/{CONFIG}") else latest(url)
    if found is None:
        raise UsageError(f"{url} has no checkpoint: give the dst of a splatshard train")
    name = MODEL if weights == "model" else AVERAGE
    if name not in found.files:
        if weights == "ema":
            raise UsageError(
                f"{found.url} has no average of the weights: it was trained without optim.ema; "
                "choose --weights model"
            )
        name = MODEL
    config = found.train_config()
    model = build_model(config.model)
    try:
        model.load_state_dict(found.weights(name))
    except RuntimeError as e:
        raise UsageError(f"{found.url}: {name} does not fit its configuration: {e}") from e
    digest = found.files[name]["sha256"]
    return Trained(model.to(device).eval(), found, config, digest, device)


def open_shards(trained: Trained, src: str, num_gaussians: int | None, batch: int) -> SplatDataset:
    """The shards of `src`, in order, with as many Gaussians as in training or `num_gaussians`.

    Raises UsageError where they have not so many, or are of another cutoff than those of training,
    and what SplatDataset raises.
    """
    dataset = SplatDataset(
        src,
        batch_size=batch,
        num_gaussians=num_gaussians or trained.config.data.num_gaussians,
        shuffle=False,
        drop_last=False,
    )
    first = dataset.sources[0].shards[0]  # convert writes no others beside it
    cutoff = shard_metadata_of(first.url, first.format)["cutoff"]
    before = trained.checkpoint.shards.get("cutoff")
    if before is None:
        raise CorruptShardError(
            f"{trained.checkpoint.url}: its {CONFIG} does not say what shards it was trained on"
        )
    if cutoff != before:
        raise UsageError(
            f"{src} was fitted with a cutoff of {cutoff} standard deviations, {trained.config.dst} "
            f"was trained on shards with {before}, where the same numbers are other pictures: "
            f"convert it with --cutoff {before}"
        )
    return dataset


@torch.no_grad()
def samples_of(
    trained: Trained, dataset: SplatDataset, embed: Callable[[TrainBatch], Tensor]
) -> Samples:
    """`embed` of every sample, each once. Raises CorruptShardError for a sample that the model
    makes no finite numbers of, and what reading raises."""
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    captions: list[str | None] = []
    for batch in dataset:
        valid = batch.valid
        with trained.computing():
            found = embed(batch.to(trained.device)).float().cpu()[valid]
        kept = [i for i, good in enumerate(valid.tolist()) if good]
        keys += [batch.keys[i] for i in kept]
        captions += [batch.captions[i] for i in kept]
        if not bool(found.isfinite().all()):
            bad = int((~found.isfinite().all(1)).int().argmax())
            key = keys[len(keys) - len(found) + bad]
            raise CorruptShardError(
                f"{'::'.join(dataset.sources[0].urls)}: the model makes numbers of sample {key} "
                "that are not finite: run splatshard verify on the shards"
            )
        vectors.append(found)
        labels.append(batch.labels[valid])
    return Samples(torch.cat(vectors), torch.cat(labels), keys, captions)
