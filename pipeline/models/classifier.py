"""A classifier: the encoder and a linear head.

B images, D width, C classes
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from splatshard.pipeline.data.batch import ImageBatch, TrainBatch
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.patches import PatchEncoder, normalised
from splatshard.pipeline.models.stem import Triple
from splatshard.schemas.model import EncoderConfig, ModelConfig


class SplatClassifier(nn.Module):
    """Logits of a batch of splats, or of images if the encoder's input is patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_classes is not None, "a classifier's config has num_classes"
        self.config = config
        self.encoder = make_encoder(config)
        self.head = nn.Linear(config.encoder.width, config.num_classes)
        nn.init.zeros_(self.head.weight)  # the loss starts at log C
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: TrainBatch | ImageBatch | Tensor) -> Tensor:
        """A batch, or normalised pixels [B, 3, H, W], to logits [B, C]."""
        return self.head(encode(self.encoder, inputs))


def make_encoder(config: ModelConfig) -> SplatEncoder | PatchEncoder:
    """The vision tower that `config` names."""
    make = SplatEncoder if config.encoder.input == "splats" else PatchEncoder
    return make(config.encoder)


def reads_images(config: ModelConfig) -> bool:
    """Whether the model's samples are images; else they are splats."""
    return image_config(config).input == "patches"


def image_config(config: ModelConfig) -> EncoderConfig:
    """The part of the model that reads the samples; its `image_size` is that of images."""
    return config.encoder if config.gvit is None else config.gvit.predictor


def encode(encoder: nn.Module, inputs: TrainBatch | ImageBatch | Tensor) -> Tensor:
    """[B, D] of a batch of splats or of images, or of normalised pixels [B, 3, H, W]."""
    if isinstance(inputs, Tensor):
        return encoder(inputs)
    if isinstance(inputs, TrainBatch):
        return encoder(inputs.splats, inputs.heights, inputs.widths)
    mean, std = (cast(Triple, getattr(encoder, name)) for name in ("mean", "std"))
    return encoder(normalised(inputs.floating().pixels, mean, std))
