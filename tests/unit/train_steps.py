"""Configurations and single steps for tests of the parts of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from splatshard.pipeline.data import ImageBatch, TrainBatch
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.gvit import Guidance
from splatshard.pipeline.train.batches import Step
from splatshard.pipeline.train.distributed import World
from splatshard.schemas.model import (
    EncoderConfig,
    GViTConfig,
    GViTLossConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.train import (
    AugmentConfig,
    OptimConfig,
    TrainConfig,
)
from tests.rows import HEIGHT, WIDTH, random_splats

ALONE = World(0, 1, torch.device("cpu"))
ENCODER = EncoderConfig(
    width=16,
    layers=2,
    heads=2,
    tokens=4,
    stem=StemConfig(bands=2, hidden=8),
    resampler=ResamplerConfig(heads=2),
)
TEXT = TextConfig(width=16, layers=1, heads=2, vocab_size=20, context_length=6, tokenizer="")
PREDICTS = GViTConfig(
    gaussians=6,
    predictor=EncoderConfig(
        input="patches", width=16, layers=1, heads=2, image_size=16, patch_size=8, tokens=4
    ),
)
OPTIM = OptimConfig(steps=10, lr=1e-2, warmup_steps=4)


def config_of(stage: str, **options: Any) -> TrainConfig:
    if stage == "gvit":
        model = ModelConfig(encoder=replace(ENCODER, resampler=None), num_classes=5, gvit=PREDICTS)
        loss = GViTLossConfig(ramp=(0, 0))
        return TrainConfig(stage=stage, model=model, optim=OPTIM, gvit=loss, **options)
    classify = stage == "classify"
    model = ModelConfig(
        encoder=ENCODER,
        text=None if classify else TEXT,
        embed_dim=8,
        num_classes=5 if classify else None,
    )
    return TrainConfig(stage=stage, model=model, optim=OPTIM, **options)  # type: ignore[arg-type]


def step_of(count: int = 7, seed: int = 0, stage: str = "") -> Step:
    """Splats, or images if the stage is gvit."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 19, (count, 6), generator=g)
    tokens[:, -1] = 19
    fields: dict[str, Any] = {
        "heights": torch.full((count,), HEIGHT, dtype=torch.int32),
        "widths": torch.full((count,), WIDTH, dtype=torch.int32),
        "keys": [str(i) for i in range(count)],
        "captions": ["a caption"] * count,
        "labels": torch.randint(5, (count,), generator=g),
        "teacher": torch.randn(count, 16, generator=g),
        "valid": torch.ones(count, dtype=torch.bool),
    }
    if stage == "gvit":
        pixels = torch.rand(count, 3, 16, 16, generator=g)
        batch = ImageBatch(pixels=pixels, **fields)
        return Step(batch, None, torch.arange(count), guidance=Guidance(0.7, 2.0))
    batch = TrainBatch(splats=random_splats(count, 6, seed), **fields)
    return Step(batch, tokens, torch.arange(count))


def model_of(config: TrainConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model)
    if config.stage in ("classify", "gvit"):  # their heads begin with zeros
        nn.init.normal_(model.head.weight)  # type: ignore[union-attr,arg-type]
    return model


ALL = AugmentConfig(
    height=40, width=56, crop_scale=(0.4, 0.9), flip=0.5, rotation=20, shear=10, zoom=(0.8, 1.2),
    shift=0.1, brightness=0.3, contrast=0.3, saturation=0.4, hue=20, grayscale=0.2, dropout=0.3,
    rescale=True,
)  # fmt: skip
