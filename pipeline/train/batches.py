"""Splat shards, or images, to what a training step gets.

    SplatDataset or ImageDataset -> Prepare (in the reading processes) -> Feed (in this one) -> Step

All that is wrong with samples is found here, before they are trained on: Prepare looks at every
batch where it was read, and Feed raises what it found, naming shard and key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from splatshard.pipeline.data import ImageBatch, ImageDataset, SplatDataset, TrainBatch
from splatshard.pipeline.data.augment_pixels import check_pixels
from splatshard.pipeline.data.batch import values_of
from splatshard.pipeline.data.catalog import numbered_otherwise
from splatshard.pipeline.data.epoch_order import Ordering
from splatshard.pipeline.data.random_numbers import sample_seeds
from splatshard.pipeline.models.classifier import image_config, reads_images
from splatshard.pipeline.models.clip import load_tokenizer, tokenize
from splatshard.pipeline.models.gvit import UNGUIDED, Guidance
from splatshard.pipeline.shards.rows import shard_metadata_of
from splatshard.pipeline.splats import Splats
from splatshard.pipeline.train.augmentation import augmented, augmented_pixels
from splatshard.pipeline.train.distributed import World, ignore_signals, on_rank_zero
from splatshard.pipeline.train.faults import (
    Bools,
    caption_faults,
    label_faults,
    other_width,
    reasons,
    refuse_differences,
    teacher_faults,
)
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.splats import TEACHER
from splatshard.schemas.train import AugmentConfig, TrainConfig

State = dict[str, Any]
Dataset = SplatDataset | ImageDataset


@dataclass(frozen=True)
class Step:
    """One process's samples of a step.

    batch     B samples, augmented once they are on the device
    tokens    int64 [B, L], captions as token ids; None where the stage reads none
    seeds     int64 [B], of the samples' augmentation, and of the Gaussians that GViT starts from
    guidance  of GViT in this step
    problem   what is wrong with a sample, and its key; empty where nothing is
    """

    batch: TrainBatch | ImageBatch
    tokens: Tensor | None
    seeds: Tensor
    problem: tuple[str, str] | None = None
    guidance: Guidance = UNGUIDED

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, part: slice) -> Step:
        tokens = None if self.tokens is None else self.tokens[part]
        return Step(self.batch[part], tokens, self.seeds[part], guidance=self.guidance)

    def to(self, device: torch.device) -> Step:
        """The same on `device`."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        batch = self.batch.to(device, non_blocking=True)
        return Step(batch, tokens, self.seeds.to(device, non_blocking=True))

    def pin_memory(self) -> Step:
        """Torch's DataLoader calls it."""
        tokens = None if self.tokens is None else self.tokens.pin_memory()
        return Step(self.batch.pin_memory(), tokens, self.seeds.pin_memory(), self.problem)


class Prepare:
    """What is done to a batch where it is read: checks, tokens, seeds."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.text = config.model.text if config.stage == "contrast" else None
        self.tokenizer = load_tokenizer(self.text) if self.text else None

    def __call__(self, batch: TrainBatch | ImageBatch) -> Step:
        position = batch.position
        assert position is not None, "the dataset makes batches with positions"
        seeds = sample_seeds(batch.keys, self.config.data.seed, position.epoch, position.samples)
        tokens = None
        if self.text:
            captions = [caption or "" for caption in batch.captions]
            tokens, _ = tokenize(self.tokenizer, captions, self.text.context_length)
        return Step(batch, tokens, seeds, problem_of(batch, self.config))


def problem_of(batch: TrainBatch | ImageBatch, config: TrainConfig) -> tuple[str, str] | None:
    """What is wrong with the first bad sample, with its remedy, and its key."""
    if isinstance(batch, TrainBatch):
        values = values_of(batch.splats)
        assert values is not None, "a batch as the dataset made it"
        bad = ~values.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            message = "has numbers that are not finite: make the shard anew with splatshard repair"
            return message, batch.keys[int(bad.int().argmax())]
    if config.stage == "distill":
        if batch.teacher is None:
            return "is in a shard without teacher's embeddings: run splatshard embed", batch.keys[0]
        size, width = batch.teacher.shape[1], config.model.encoder.width
        if size != width:
            return f"has a teacher's embedding of {other_width(size, width)}", batch.keys[0]
    for fault, bad in faults_of(batch, config).items():
        if bad.any():
            i, count = int(bad.argmax()), int(bad.sum())
            left = len(bad) - count or None
            what, remedy = reasons(fault, int(batch.labels[i]), left, config)
            share = f"{count} of {len(bad)} samples of its batch are so"
            return f"{what} ({share}): {remedy}", batch.keys[i]
    return None


def faults_of(batch: TrainBatch | ImageBatch, config: TrainConfig) -> dict[str, Bools]:
    """What is wrong with the samples of `batch`, by the names of faults.py."""
    if config.stage == "contrast":
        return caption_faults(batch.captions, config)
    if config.stage == "distill":
        assert batch.teacher is not None, "looked for before"
        return teacher_faults(batch.teacher.numpy())
    return label_faults(batch.labels.numpy(), config)


class Feed:
    """The steps of one process, epoch after epoch, from `state` on. `shards` says what the data
    are: the shards' fingerprint, cutoff (None: images) and teacher.

    Raises UsageError for data that do not fit the configuration, and what the datasets raise.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        data = config.data
        if not data.src:
            kind = "images" if reads_images(config.model) else "splats"
            raise UsageError(f"data.src is empty: {WANTED[kind]}")
        if data.batch_size % world.size:
            raise UsageError(
                f"data.batch_size is {data.batch_size}, of all {world.size} processes together: "
                f"choose a multiple of {world.size}"
            )
        self.config, self.world = config, world
        if reads_images(config.model):
            check_images(config)
        self.dataset = open_dataset(config, world)
        self.steps_per_epoch = len(self.dataset)
        constants = constants_of(self.dataset, config)
        self.cutoff: float | None = constants["cutoff"]
        self.state: State = self.dataset.state_dict()
        self.shards = {"data": self.state["data"], **constants}
        self.waited_s = 0.0
        self._loader = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=data.workers,
            # given what the dataset gives, not a list of it as its published type says
            collate_fn=cast(Any, Prepare(config)),
            pin_memory=world.device.type == "cuda",
            persistent_workers=data.workers > 0,
            worker_init_fn=ignore_signals,
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which another number of processes may have saved. Raises UsageError
        where the shards or their order are not those of the state."""
        self.dataset.load_state_dict(state)
        self.state = dict(state)

    def __iter__(self) -> Iterator[Step]:
        """Steps; with each, `state` is the one to save once it is done. Never ends."""
        while True:
            self.dataset.load_state_dict(self.state)
            steps = iter(self._loader) if self.dataset.steps_left else iter(())
            while (step := self._next(steps)) is not None:
                if step.problem:
                    self._complain(step)
                self.state = self.dataset.state_after(step.batch)
                yield self._placed(step)
            # lanes and grain stay as they are, for they decide the order
            self.state = {**self.state, "epoch": self.state["epoch"] + 1, "samples": 0}

    def _next(self, steps: Iterator[Step]) -> Step | None:
        begin = time.perf_counter()
        step = next(steps, None)
        self.waited_s += time.perf_counter() - begin
        return step

    def _placed(self, step: Step) -> Step:
        """On the device, augmented there."""
        step = step.to(self.world.device)
        if isinstance(step.batch, ImageBatch):
            step = replace(step, batch=step.batch.floating())
        augment = self.config.augment
        if augment is None:
            return step
        return replace(step, batch=augmented_batch(step.batch, augment, step.seeds, self.cutoff))

    def _complain(self, step: Step) -> None:
        assert step.problem is not None
        message, key = step.problem
        url = self.dataset.shard_of(step.batch, key, self.config.data.batch_size)
        kind = CorruptShardError if "not finite" in message else UsageError
        raise kind(f"{url}: sample {key} {message}")


WANTED = {
    "splats": "give the folder that splatshard convert wrote to",
    "images": "the model reads images: give what splatshard convert takes as its source",
}


def check_images(config: TrainConfig) -> None:
    """Raises UsageError for what a run on images cannot have."""
    if config.stage == "distill":
        raise UsageError(
            "stage is distill, but the model reads images, and a teacher's embeddings are in splat "
            "shards: choose classify or contrast, or a model.encoder.input of splats"
        )
    if config.data.num_gaussians is not None:
        raise UsageError(
            f"data.num_gaussians is {config.data.num_gaussians}, but the model reads images: leave "
            "it at None"
        )
    if config.augment is None:
        return
    check_pixels(config.augment)
    size, side = (
        (config.augment.height, config.augment.width),
        image_config(config.model).image_size,
    )
    if size != (side, side):
        raise UsageError(
            f"augment.height and augment.width are {size[0]} and {size[1]}, but the model reads "
            f"images of {side} px: set both to that"
        )


def open_dataset(config: TrainConfig, world: World) -> Dataset:
    """This process's part of the samples, of which rank 0 tells all what there is: to count images
    in tars, or to filter tars, is to read them. Raises on all what the datasets raise."""
    data = config.data
    sources = [part for part in data.src.split("::") if part]
    mixture = dict(zip(sources, data.weights, strict=True)) if data.weights else None
    ordering: Ordering = {
        "batch_size": data.batch_size // world.size,
        "rank": world.rank if world.size > 1 else None,  # None: it says what speaks against that
        "world_size": world.size if world.size > 1 else None,
        "seed": data.seed,
        "shuffle_shards": data.shuffle_shards,
        "lanes": data.lanes or world.size * max(1, data.workers),
        "filter": data.filter,
        "epoch_samples": data.epoch_samples,
        "on_rank_zero": partial(on_rank_zero, world),
    }
    if reads_images(config.model):
        side = image_config(config.model).image_size
        return ImageDataset(mixture or data.src, image_size=side, **ordering)
    return SplatDataset(
        mixture or sources,
        num_gaussians=data.num_gaussians,
        checksum=data.checksum,
        cache_dir=data.cache_dir or None,
        cache_bytes=data.cache_bytes,
        **ordering,
    )


def augmented_batch(
    batch: TrainBatch | ImageBatch, config: AugmentConfig, seeds: Tensor, cutoff: float | None
) -> TrainBatch | ImageBatch:
    """`batch` augmented, sample by sample by `seeds` (int64 [B]), to images of `config`'s size;
    `cutoff` of the shards, None of images."""
    sides = {
        "heights": torch.full_like(batch.heights, config.height),
        "widths": torch.full_like(batch.widths, config.width),
    }
    with torch.no_grad():
        if isinstance(batch, ImageBatch):
            pixels = augmented_pixels(batch.pixels, batch.heights, batch.widths, config, seeds)
            return replace(batch, pixels=pixels, **sides)
        assert cutoff is not None, "splats have a cutoff"
        splats = augmented(batch.splats, batch.heights, batch.widths, config, seeds, cutoff)
        return replace(batch, splats=splats, **sides)


def constants_of(dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What all sources must have in common for their numbers to mean the same: the cutoff, and for
    distillation the teacher; of images the classes; where labels are trained on the digest of the
    classes that number them. Raises UsageError where they differ, or there is no teacher."""
    numbered = {}
    if config.stage in ("classify", "gvit"):
        if len(lists := dataset.class_lists) > 1:
            raise UsageError(numbered_otherwise(lists))
        numbered = {"class_list": next(iter(lists), "")}
    if isinstance(dataset, ImageDataset):
        return {"cutoff": None, "classes": list(dataset.classes)} | numbered
    names = ("cutoff", TEACHER) if config.stage == "distill" else ("cutoff",)
    firsts = {s.url.rpartition("/")[0]: s for source in dataset.sources for s in source.shards}
    metadata = {s.url: shard_metadata_of(s.url, s.format) for s in firsts.values()}
    for name in names:
        refuse_differences(metadata, name, "folders")
    return {name: next(iter(metadata.values())).get(name) for name in names} | numbered


def probe(config: TrainConfig, device: torch.device) -> Step:
    """Two made-up samples, to see what a loss depends on before there is any data."""
    text, zeros = config.model.text, torch.zeros(2, dtype=torch.int64, device=device)
    tokens = None
    if text is not None:
        tokens = torch.full((2, text.context_length), text.eos, device=device)
    images = reads_images(config.model)
    size = image_config(config.model).image_size if images else 32
    side = torch.full((2,), size, dtype=torch.int32, device=device)
    fields: dict[str, Any] = {
        "heights": side,
        "widths": side,
        "keys": ["0", "1"],
        "captions": ["", ""],
        "labels": zeros,
        "valid": zeros == 0,
    }
    if images:
        pixels = torch.full((2, 3, size, size), 0.5, device=device)
        return Step(ImageBatch(pixels=pixels, teacher=None, **fields), tokens, zeros)
    splats = Splats(
        torch.full((2, 4, 2), 16.0, device=device),
        torch.tensor([1.0, 0.0, 1.0], device=device).expand(2, 4, 3).contiguous(),
        torch.full((2, 4, 3), 0.5, device=device),
        torch.ones(2, 4, dtype=torch.bool, device=device),
    )
    teacher = torch.ones(2, config.model.encoder.width, device=device)
    return Step(TrainBatch(splats=splats, teacher=teacher, **fields), tokens, zeros)
