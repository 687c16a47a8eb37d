"""The gradients of one step, in one forward pass or in parts that fit into memory.

Where samples do not depend on each other the gradients of parts add up. CLIP's loss compares each
sample with all others, so parts would lose negatives. Then features are cached (GradCache, arXiv
2101.06983):

    1. forward all parts without gradients, keep the features
    2. loss of all features, and its gradient with respect to them
    3. forward each part again, backward from its features' gradients

which are the gradients of the whole batch, up to rounding, for the memory of one part and a third
more work. Random numbers (dropout) are those of the part, so both forward passes see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from splatshard.pipeline.train.batches import Step
from splatshard.pipeline.train.distributed import World
from splatshard.pipeline.train.losses import Features, Metrics, Stage
from splatshard.pipeline.train.schedule import seed_everything
from splatshard.schemas.train import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Embedder(nn.Module):
    """A model and the stage's `embed` as one module: what DDP wants to call."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, step: Step) -> Features:
        return self.stage.embed(self.model, step)


class Gradients:
    """Puts the gradients of a step's mean loss, over the samples of all processes, into `.grad`.

    `embedder` is an Embedder, or DDP around one.
    """

    def __init__(
        self,
        embedder: nn.Module,
        stage: Stage,
        config: TrainConfig,
        world: World,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.embedder, self.stage, self.config = embedder, stage, config
        self.world, self.scaler = world, scaler

    def __call__(self, step: Step, number: int) -> tuple[Tensor, Metrics]:
        """The loss, a scalar, and metrics of this process's samples in step `number`."""
        size = self.config.micro_batch or len(step)
        parts = [slice(i, min(i + size, len(step))) for i in range(0, len(step), size)]
        if len(parts) == 1:
            loss, metrics = self._loss(self._embed(step, number, 0), step)
            self.scaler.scale(loss).backward()
            return loss, metrics
        if self.stage.couples:
            return self._cached(step, number, parts)
        return self._summed(step, number, parts)

    def _summed(self, step: Step, number: int, parts: Sequence[slice]) -> tuple[Tensor, Metrics]:
        losses: list[Tensor] = []
        found: list[Metrics] = []
        for i, part in enumerate(parts):
            own = step[part]
            share = len(own) / len(step)
            with self._synchronised(i == len(parts) - 1):
                loss, metrics = self._loss(self._embed(own, number, i), own)
                self.scaler.scale(loss * share).backward()
            losses.append(loss.detach() * share)
            found.append({name: value * share for name, value in metrics.items()})
        total = {name: torch.stack([m[name] for m in found]).sum() for name in found[0]}
        return torch.stack(losses).sum(), total

    def _cached(self, step: Step, number: int, parts: Sequence[slice]) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            found = [self._embed(step[part], number, i) for i, part in enumerate(parts)]
        leaves = tuple(
            (torch.cat(values) if values[0].ndim else values[0]).detach().requires_grad_()
            for values in zip(*found, strict=True)
        )
        loss, metrics = self._loss(leaves, step)
        self.scaler.scale(loss).backward()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with self._synchronised(last):
                features = self._embed(step[part], number, i)
                # a scalar is the same in all parts: its gradient counts once
                gradients = [
                    _gradient(leaf)[part] if leaf.ndim else _gradient(leaf) * last
                    for leaf in leaves
                ]
                reached = [
                    (f, g) for f, g in zip(features, gradients, strict=True) if f.requires_grad
                ]
                torch.autograd.backward([f for f, _ in reached], [g for _, g in reached])
        return loss, metrics

    def _embed(self, step: Step, number: int, part: int) -> Features:
        seed_everything(self.config.seed, number, self.world.rank, part)
        # a context of its own for each pass: autocast caches weights that it has cast, and those
        # cast without gradients must not be used with them
        with self._autocast():
            return self.embedder(step)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else nullcontext()

    def _loss(self, features: Features, step: Step) -> tuple[Tensor, Metrics]:
        return self.stage.loss(features, step, self.config, self.world)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """DDP exchanges gradients in the backward pass of the last part only."""
        if last or not isinstance(self.embedder, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.embedder.no_sync()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "every feature is part of the loss"
    return leaf.grad
