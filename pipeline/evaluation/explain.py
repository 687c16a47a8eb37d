"""Why a classifier of splats says what it says: scores for each Gaussian, and a map for the image.

    B = 1 image, N Gaussians, T latents, C classes

Works for whatever reads Gaussians: SplatClassifier on fitted ones, GViT on those it predicts. With
y the logit (before the softmax) of one class, and each Gaussian's numbers in the frame of the fit
(pipeline/fitting/fit.py: position in its own standard deviations, shape relative, colours with
white 1):

    gradient      |dy / d (position 2, shape 3, colour 3)|
    contribution  sum over r, g, b of colour * dy / dcolour, its mean while all colours rise from 0
    attention     what CLS takes from it

gradient: after the saliency of arXiv 1312.6034, which takes the largest over the channels of a
pixel; of eight numbers of unlike kinds we take the norm. In px the small Gaussians would lead, as a
pixel is many of their deviations; and the scores would change with the image's size. A Gaussian
that is an exact circle has no angle, so the gradient of its shape does not exist, and counts as 0.

contribution: signed, positive where the Gaussian speaks for the class. In a sum the colour 0 is a
Gaussian that is not there, so gradient times input (arXiv 1605.01713) is the first order of how
much y falls without it. But a model that is sure has hardly a slope left: one that looks for a red
Gaussian (tests/unit/test_explain.py; 0.997 sure) loses 5 of its logit without it, of which gradient
times input sees 0.01, and it points at the red one in 17 % of 60 scenes. So the product is taken
all the way from black to the image, integrated gradients (arXiv 1703.01365) of the colours: 100 %.
The contributions sum to y less y of black Gaussians.

attention: without a resampler CLS's row in the last block, the mean of its heads, less what goes to
CLS itself. With one, the blocks see latents, and the row is an attention rollout (arXiv
2005.00928): each block counts as (A + I) / 2, A the mean of its heads, and so does each layer of
the resampler, from latents to Gaussians. What stays with CLS and the latents themselves is
`elsewhere`; the local tokens (pipeline/models/local.py) are no attention, and are part of that.
Fused attention returns no weights: they are computed again, from q and k.

The map of a score is the Gaussians rendered with it in place of their colours, by the same kernel.

Left out: smoothing over noise, and for GViT the way back to pixels: its Gaussians are predicted,
and here they are the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from splatshard.pipeline.fitting.fit import parameter_gradient
from splatshard.pipeline.kernels.backend import Backend, LossAndGrad
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.encoder import SplatEncoder
from splatshard.pipeline.models.gvit import GViT
from splatshard.pipeline.splats import Splats
from splatshard.schemas.config import FitConfig

STEPS = 32
"""Of the integral behind `contribution`; each is a pass forth and back."""

SCORES = ("gradient", "contribution", "attention")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in px."""


@dataclass(frozen=True)
class Explanation:
    """What the model says of an image, and of each Gaussian in it; see the module's docstring.

    logits        float32 [C]
    label         the class that the scores are about
    splats        N Gaussians, B = 1
    gradient      [N], not negative
    contribution  [N], signed
    attention     [N], with elsewhere a sum of 1
    elsewhere     [1], or [1 + T] with a resampler: attention to CLS and the latents
    """

    logits: Tensor
    label: int
    splats: Splats
    gradient: Tensor
    contribution: Tensor
    attention: Tensor
    elsewhere: Tensor

    @property
    def probabilities(self) -> Tensor:
        """[C], the softmax of the logits."""
        return self.logits.softmax(0)


def explain(
    model: SplatClassifier | GViT, splats: Splats, height: int, width: int, label: int | None = None
) -> Explanation:
    """`model`'s view of one image of this size in px, as splats [1, N], about class `label`, None
    for the likeliest; the model in eval mode, on the device of the splats. Padding scores 0."""
    assert len(splats) == 1, "one image at a time"
    encoder = cast(SplatEncoder, model.encoder)
    device = splats.means.device
    sizes = [torch.tensor([x], device=device) for x in (height, width)]
    parts = (x.detach().float() for x in (splats.means, splats.cholesky, splats.colors))
    means, cholesky, colors = (x.clone().requires_grad_() for x in parts)
    with torch.enable_grad(), recorded(encoder) as seen:
        logits = logits_of(model, Splats(means, cholesky, colors, splats.mask), sizes)
        label = int(logits.argsort(descending=True, stable=True)[0]) if label is None else label
        gradients = torch.autograd.grad(logits[label], (means, cholesky, colors))
    splats = Splats(means.detach(), cholesky.detach(), colors.detach(), splats.mask)
    gradient = sizes_of(splats, gradients)
    contribution = contributions(model, splats, sizes, label)
    attention, elsewhere = attention_scores(encoder, seen)
    mask = splats.mask[0]
    return Explanation(
        logits=logits.detach().float(),
        label=label,
        splats=splats,
        gradient=torch.where(mask, gradient, 0),
        contribution=torch.where(mask, contribution, 0),
        attention=torch.where(mask, attention, 0),
        elsewhere=elsewhere,
    )


def logits_of(model: SplatClassifier | GViT, splats: Splats, sizes: list[Tensor]) -> Tensor:
    """[C] of one image; `sizes` are height and width, [1] each."""
    return model.head(cast(SplatEncoder, model.encoder)(splats, *sizes))[0]


def sizes_of(splats: Splats, gradients: Sequence[Tensor]) -> Tensor:
    """gradient [N] from those of the logit with respect to means, cholesky and colours, [1, N,
    ...]; see the module's docstring."""
    means, cholesky, colors = gradients
    result = LossAndGrad(means.new_zeros(1), means, cholesky.nan_to_num(0, 0, 0), colors)
    own_frame = parameter_gradient(splats, result, FitConfig(whitened=True, l1_colors=0))
    return torch.linalg.vector_norm(own_frame[0], dim=-1)


def contributions(
    model: SplatClassifier | GViT, splats: Splats, sizes: list[Tensor], label: int
) -> Tensor:
    """contribution [N], by the midpoint rule; see the module's docstring."""
    total = torch.zeros_like(splats.colors)
    for step in range(STEPS):
        colors = ((step + 0.5) / STEPS * splats.colors).requires_grad_()
        with torch.enable_grad():
            logit = logits_of(model, replace(splats, colors=colors), sizes)[label]
            total += torch.autograd.grad(logit, colors)[0]
    return (splats.colors * total)[0].sum(-1) / STEPS


# Attention

Seen = dict[str, list[tuple[Any, ...]]]


@contextmanager
def recorded(encoder: SplatEncoder) -> Iterator[Seen]:
    """The arguments that the layers of `encoder` get meanwhile: of its blocks, and of its
    resampler's layers."""
    parts = {"blocks": cast(Any, encoder.encoder).layers, "resampler": ()}
    if encoder.resampler is not None:
        parts["resampler"] = encoder.resampler.layers
    seen: Seen = {name: [] for name in parts}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args))
        for name, layers in parts.items()
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_scores(encoder: SplatEncoder, seen: Seen) -> tuple[Tensor, Tensor]:
    """attention [N] and elsewhere, [1] or [1 + T], from what `recorded` saw of one forward pass."""
    blocks = list(cast(Iterable[nn.Module], cast(Any, encoder.encoder).layers))
    if encoder.resampler is None:
        row_T = block_attention(blocks[-1], *seen["blocks"][-1], rows=1)[0, 0]
        return row_T[1:], row_T[:1]
    row_T = seen["blocks"][0][0].new_zeros(seen["blocks"][0][0].shape[1])
    row_T[0] = 1
    for block, arguments in zip(reversed(blocks), reversed(seen["blocks"]), strict=True):
        row_T = (row_T @ block_attention(block, *arguments)[0] + row_T) / 2
    latents_T, gaussians_N = row_T[1:], torch.zeros(())
    for layer, arguments in zip(
        reversed(encoder.resampler.layers), reversed(seen["resampler"]), strict=True
    ):
        latents_T = latents_T / 2
        gaussians_N = latents_T @ resampler_attention(layer, *arguments)[0] + gaussians_N.to(row_T)
    return gaussians_N, torch.cat((row_T[:1], latents_T))


def block_attention(
    block: Any, x_BTD: Tensor, mask: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """[B, R, T]: what each of the first `rows` tokens (None: all) takes from which, in a block of
    transformers' CLIP, the mean of its heads; rows sum to 1. `mask` as the block gets it: False is
    not attended to."""
    attention = block.self_attn
    x_BTD = block.layer_norm1(x_BTD)
    q, k = attention.q_proj(x_BTD[:, :rows]), attention.k_proj(x_BTD)
    q, k = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k))
    logits = q @ k.mT * attention.scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).mean(1)


def resampler_attention(
    layer: Any, x_BTD: Tensor, tokens_BND: Tensor, latent_TJ: Tensor, gaussian_BNJ: Tensor
) -> Tensor:
    """[B, T, N]: what each latent takes from which Gaussian, the mean of the heads; rows sum to 1.
    The arguments are those of ResamplerLayer.forward, with its distance bias and mask."""
    q, k = layer.q_proj(layer.norm1(x_BTD)), layer.k_proj(tokens_BND)
    q, k = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k))
    bias_BHTN = (latent_TJ * layer.slopes(latent_TJ)) @ gaussian_BNJ[:, None].mT
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias_BHTN).softmax(-1).mean(1)


# The map, and whether it points at the object


def saliency_map(
    splats: Splats, scores: Tensor, height: int, width: int, cutoff: float, backend: Backend
) -> Tensor:
    """float32 [H, W]: the Gaussians (B = 1) rendered with `scores` [N] in place of colours."""
    colors = scores[None, :, None].float().expand(-1, -1, 3).contiguous()
    return backend.render(replace(splats, colors=colors), height, width, cutoff)[0, 0]


def box_in_crop(box: Box, width: int, height: int, size: int) -> Box | None:
    """`box` of an upright image of this size, in px of the `size` px wide crop that convert makes
    of it (the centred square over the short side); None where nothing of it is in there."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    moved = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    x0, y0, x1, y1 = (min(max(x, 0.0), side) * size / side for x in moved)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def covered(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """bool [H, W]: pixels whose centre is in one of the boxes. Its mean is the pointing game's
    chance, that of a map whose maximum may be anywhere."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    found = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        found |= ((top <= y) & (y <= bottom))[:, None] & (left <= x) & (x <= right)
    return found


def pointing_hit(map_HW: Tensor, boxes: Sequence[Box]) -> bool:
    """Whether the largest value of a map [H, W] lies in one of the boxes, px of the map: the
    pointing game (arXiv 1608.00507), without its tolerance of 15 px around them. A map that is the
    same everywhere points nowhere."""
    if bool(map_HW.min() == map_HW.max()):
        return False
    return bool(covered(boxes, *map_HW.shape).flatten()[map_HW.flatten().argmax().cpu()])
