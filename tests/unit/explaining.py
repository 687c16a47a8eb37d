"""What tests of explain share: toy models and Gaussians."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.splats import Splats
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
)

SIDE = 32
STEM = StemConfig(bands=2, hidden=16)
PLAIN = EncoderConfig(width=16, layers=2, heads=2, stem=STEM, resampler=None)
RESAMPLED = replace(PLAIN, tokens=4, resampler=ResamplerConfig(layers=2, heads=2, neighbours=3))


def model_of(encoder: EncoderConfig, seed: int = 0) -> Any:
    """A toy classifier of three classes whose weights are all large enough to show."""
    torch.manual_seed(seed)
    model = SplatClassifier(ModelConfig(encoder=encoder, num_classes=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model


def padded_splats(n: int = 7, padding: int = 0, seed: int = 0, batch: int = 1) -> Splats:
    g = torch.Generator().manual_seed(seed)
    scales = 1.5 + 2 * torch.rand(batch, n, 3, generator=g)
    mask = torch.arange(n).expand(batch, n) < n - padding
    return Splats(
        SIDE * torch.rand(batch, n, 2, generator=g),
        scales * torch.tensor([1.0, 0.4, 1.0]),
        torch.randn(batch, n, 3, generator=g) / 2,
        mask,
    )


def logits_of(model: SplatClassifier, splats: Splats) -> Tensor:
    sizes = torch.full((len(splats),), SIDE)
    with torch.no_grad():
        return model.head(model.encoder(splats, sizes, sizes))
