"""A classifier: the encoder and a linear head.

B images, D width, C classes
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.data.batch import TrainBatch
from pipeline.models.encoder import SplatEncoder
from pipeline.models.patches import PatchEncoder
from schemas.model import ModelConfig


class SplatClassifier(nn.Module):
    """Logits of a batch of splats, or of pixels if the encoder's input is patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_classes is not None, "a classifier's config has num_classes"
        self.config = config
        self.encoder = make_encoder(config)
        self.head = nn.Linear(config.encoder.width, config.num_classes)
        nn.init.zeros_(self.head.weight)  # the loss starts at log C
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: TrainBatch | Tensor) -> Tensor:
        """A batch of splats, or pixels [B, 3, H, W], to logits [B, C]."""
        return self.head(encode(self.encoder, inputs))


def make_encoder(config: ModelConfig) -> SplatEncoder | PatchEncoder:
    """The vision tower that `config` names."""
    make = SplatEncoder if config.encoder.input == "splats" else PatchEncoder
    return make(config.encoder)


def encode(encoder: nn.Module, inputs: TrainBatch | Tensor) -> Tensor:
    """[B, D] of a batch of splats or of pixels [B, 3, H, W]."""
    if isinstance(inputs, Tensor):
        return encoder(inputs)
    return encoder(inputs.splats, inputs.heights, inputs.widths)
