"""Models on splats; start at encoder.py. `build_model` makes the one a config describes."""

from __future__ import annotations

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.clip import SplatCLIP
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.export import load_encoder, save_clip, save_encoder
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.models.patches import PatchEncoder
from splatshard.pipeline.models.pretrained import init_from_clip, load_clip

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
