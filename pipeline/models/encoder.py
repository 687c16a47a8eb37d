"""The splat encoder: stem, resampler, and the blocks of transformers' CLIP vision model.

    B images, N Gaussians, T tokens (CLS among them once it is in front), D width; of an RGB model
    H x W patches of P x P px

    splats -> stem [B, N, D] -> resampler [B, T, D] -> CLS in front -> blocks -> CLS [B, D]

Without a resampler the blocks get the stem's N tokens, padding masked.

After arXiv 2509.22615. The blocks and norms have the names they have in PatchEncoder, so that an
RGB model's state dict fits; what stood before them, class and position embeddings, becomes the
CLS token and the latents (`init_from_patches`).

Left out: dropout and stochastic depth, which CLIP does without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel

from splatshard.pipeline.models.resampler import Resampler
from splatshard.pipeline.models.stem import SplatStem, normalised_means, without_padding
from splatshard.pipeline.splats import Splats
from splatshard.schemas.model import EncoderConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels (0 to 1) that OpenAI's models and most of open_clip's were trained on."""


class SplatEncoder(nn.Module):
    """Splats to the CLS token after the final norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        model = CLIPVisionModel(vision_config(config))
        self.stem = SplatStem(config.stem, config.width)
        self.resampler: Resampler | None = None
        if config.resampler is not None:
            self.resampler = Resampler(config.resampler, config.width, config.tokens)
        self.class_embedding = nn.Parameter(model.embeddings.class_embedding.detach().clone())
        self.pre_layrnorm = model.pre_layrnorm
        self.encoder = model.encoder
        self.post_layernorm = model.post_layernorm

    def forward(
        self, splats: Splats, heights: Tensor, widths: Tensor, tokens: int | None = None
    ) -> Tensor:
        """Splats of any N, and the images' sizes in px [B], to [B, D].

        `tokens`: fewer than the resampler's, for speed.
        """
        x_BTD = self.tokens(splats, heights, widths, tokens)
        cls_B1D = self.class_embedding.to(x_BTD.dtype).expand(len(x_BTD), 1, -1)
        x_BTD = torch.cat((cls_B1D, x_BTD), 1)
        mask = None
        if self.resampler is None:
            mask = F.pad(splats.mask, (1, 0), value=True)[:, None, None, :]
        x_BTD = run_blocks(self, x_BTD, self.config.gradient_checkpointing, mask)
        return self.post_layernorm(x_BTD[:, 0])

    def tokens(
        self, splats: Splats, heights: Tensor, widths: Tensor, tokens: int | None = None
    ) -> Tensor:
        """What the blocks get, less CLS: [B, T, D], or [B, N, D] without a resampler. As
        `forward`."""
        splats = without_padding(splats)
        means_BN2 = normalised_means(splats.means, heights, widths)
        sizes_B2 = torch.stack((widths, heights), -1).float()
        x_BND = self.stem(splats, means_BN2, sizes_B2.prod(-1).sqrt())
        if self.resampler is None:
            return x_BND
        return self.resampler(x_BND, splats, means_BN2, sizes_B2, tokens)

    @torch.no_grad()
    def init_from_patches(self, state: dict[str, Tensor]) -> None:
        """Take over a PatchEncoder's blocks, norms, CLS and position embeddings.

        `state` as in PatchEncoder.state_dict(). Of a resampler the latents become the position
        embeddings at their anchors (bilinear where the grids differ). With local tokens their layer
        becomes the patch embedding and attention adds nothing yet, so that the encoder starts as
        near the RGB model as the splats are near the picture.
        """
        shared = ("pre_layrnorm.", "encoder.", "post_layernorm.")
        blocks = {k: v for k, v in state.items() if k.startswith(shared)}
        missing, unexpected = self.load_state_dict(blocks, strict=False)
        missing = [k for k in missing if k.startswith(shared)]
        assert not missing + unexpected, missing + unexpected
        positions_TD = state["embeddings.position_embedding.weight"].float()
        self.class_embedding.copy_(state["embeddings.class_embedding"] + positions_TD[0])
        if self.resampler is None:
            return
        side = round((len(positions_TD) - 1) ** 0.5)
        grid_DHW = positions_TD[1:].T.unflatten(1, (side, side))
        places = self.resampler.anchors[None, None].to(grid_DHW)
        values = F.grid_sample(grid_DHW[None], places, padding_mode="border", align_corners=False)
        self.resampler.latents.copy_(values[0, :, 0].T)
        if self.resampler.local is not None:
            kernel_D3PP = state["embeddings.patch_embedding.weight"].float()
            mean, std = kernel_D3PP.new_tensor(CLIP_MEAN), kernel_D3PP.new_tensor(CLIP_STD)
            self.resampler.local.init_from_kernel(kernel_D3PP, mean, std)
            self.resampler.silence()


ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}


def vision_config(config: EncoderConfig) -> CLIPVisionConfig:
    """transformers' configuration of the same blocks."""
    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=round(config.width * config.mlp_ratio),
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        **ATTENTION,
    )


def run_blocks(
    model: nn.Module, x_BTD: Tensor, checkpointed: bool, mask: Tensor | None = None
) -> Tensor:
    """All tokens [B, T, D] after the last block of `model`, before its final norm; as
    `block_states`."""
    return deque(block_states(model, x_BTD, checkpointed, mask), maxlen=1).pop()


def block_states(
    model: nn.Module, x_BTD: Tensor, checkpointed: bool, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """All tokens [B, T, D] after each block of `model`, whose first norm and blocks are named as
    PatchEncoder's. `mask` for the attention, broadcast to [B, heads, T, T]: tokens where it is
    False are not attended to; a float one is added to the logits."""
    x_BTD = cast(nn.Module, model.pre_layrnorm)(x_BTD)
    for block in cast(Iterable[Any], cast(Any, model.encoder).layers):
        if checkpointed and model.training:
            x_BTD = checkpoint(block, x_BTD, mask, use_reentrant=False)
        else:
            x_BTD = block(x_BTD, mask)
        yield x_BTD
