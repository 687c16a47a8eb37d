"""The model that a configuration describes."""

from __future__ import annotations

from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.gvit import GViT
from splatshard.schemas.model import ModelConfig


def build_model(config: ModelConfig) -> SplatCLIP | SplatClassifier | GViT:
    """A GViT if `config.gvit` is set, else a classifier if `config.num_classes` is, else a CLIP;
    weights from torch's generator."""
    if config.gvit is not None:
        return GViT(config)
    return SplatCLIP(config) if config.num_classes is None else SplatClassifier(config)
