"""The RGB twin of the splat encoder: transformers' CLIP vision model on patches.

    B images, T tokens (CLS and the patches), D width

Parameters are named as in transformers' CLIPVisionModel, the blocks', norms' and projection's
also as in SplatEncoder: a state dict of one fits the other there.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionModel

from splatshard.pipeline.models.encoder import CLIP_MEAN, CLIP_STD, run_blocks, vision_config
from splatshard.pipeline.models.stem import Triple, standardised
from splatshard.schemas.model import EncoderConfig


class PatchEncoder(nn.Module):
    """Pixels to the CLS token after the final norm. `mean` and `std` are of the pixels (0 to 1)
    that it was trained on; they are not among its parameters."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        model = CLIPVisionModel(vision_config(config))
        self.embeddings = model.embeddings
        self.pre_layrnorm = model.pre_layrnorm
        self.encoder = model.encoder
        self.post_layernorm = model.post_layernorm

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W], see `normalised`, to [B, D]; H and W are the config's `image_size`."""
        x_BTD = self.embeddings(pixels)
        x_BTD = run_blocks(self, x_BTD, self.config.gradient_checkpointing)
        return self.post_layernorm(x_BTD[:, 0])


def normalised(pixels: Tensor, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> Tensor:
    """Pixels [B, 3, H, W] from 0 to 1, standardised; by default as CLIP wants them."""
    return standardised(pixels, mean, std, 1)
