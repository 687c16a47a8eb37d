"""Models on splats; start at encoder.py. `build_model` makes the one a config describes."""

from __future__ import annotations

from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.pretrained import (
    init_from_clip,
    load_clip,
    load_encoder,
    save_clip,
    save_encoder,
)
from splatshard.schemas.model import ModelConfig

__all__ = [
    "GViT",
    "PatchEncoder",
    "SplatCLIP",
    "SplatClassifier",
    "SplatEncoder",
    "build_model",
    "init_from_clip",
    "load_clip",
    "load_encoder",
    "save_clip",
    "save_encoder",
]


def build_model(config: ModelConfig) -> SplatCLIP | SplatClassifier | GViT:
    """A GViT if `config.gvit` is set, else a classifier if `config.num_classes` is, else a CLIP;
    weights from torch's generator."""
    if config.gvit is not None:
        return GViT(config)
    return SplatCLIP(config) if config.num_classes is None else SplatClassifier(config)
