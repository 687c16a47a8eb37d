"""The space in which GViT predicts Gaussians: nine unconstrained numbers each.

    B images, k Gaussians, C colours, H x W px

    g [B, k, 9] = x, y, log s1, log s2, angle, red, green, blue, opacity

                    from g                                                range
    means           size ((1 + 2 m) sigmoid(g) - m), m = MARGIN           the image and a tenth more
    scales          min (side / min) ^ sigmoid(g)                         min_scale px to the side
    angle           g, radians                                            all; repeats after pi
    colours         2 sigmoid(g) - 1 (sum), sigmoid(g) (alpha)            -1 to 1, 0 to 1
    opacity         sigmoid(g)                                            0 to 1

A step of about 1 in any number is a visible one, so one learning rate, one residual and one
clipped gradient fit all nine. The nine are those of GViT (arXiv 2506.23532); the maps and the start
are ours, as it does not publish them.

Colours are signed in a sum, as in our shards, where they make up for overlaps; there opacity is a
factor of the colour and says nothing of its own.

Where Gaussians start: in rows of equal cells, one Gaussian each, moved within its cell. Any k
covers the image without holes, so every Gaussian has pixels of its own to explain. Means drawn
independently leave e^-pi = 4 % of the image further than two standard deviations from any Gaussian,
and crowd elsewhere. The other numbers are drawn about a disc of half the spacing, in grey;
`colored` gives it the image's colour. So the first picture is an even grey, or the image, blurred.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from splatshard.pipeline.data.random_numbers import uniform
from splatshard.pipeline.kernels.gsplat_alpha import reference_alpha, render_alpha
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.splats import Splats, cholesky_from_scales_and_angles
from splatshard.schemas.model import GViTConfig

NUMBERS = 9
MARGIN = 0.1
"""How far beyond the border means may be, in images."""

JITTER = 0.25
"""Of the means at the start: the largest distance from the cell's middle, in half cells."""
SCALE, SCALE_JITTER = 0.5, 0.25
"""Standard deviations at the start in units of the spacing, and of their logarithm at most."""
OVERLAP = 2 * math.pi * SCALE**2
"""How many times over discs of this size cover the image: 1.57."""
GREY, OPACITY, LOOK_JITTER = 0.45, 0.8, 0.1
"""At the start: the mean of photographs; the last is in units of g. On digits (k = 24, 200 steps,
one seed) a jitter of 0.1 gave 18.0 dB, 0.5 17.6: noise that has to be undone, and places tell
tokens apart already."""
SEEN = 0.25
"""Standard deviation, in spacings, of the window through which `colored` sees the image."""


def drawn(seeds: Tensor, count: int, height: int, width: int, config: GViTConfig) -> Tensor:
    """g float32 [B, count, 9] for images of this size: a function of each sample's seed, int64 [B],
    wherever in a batch the sample is."""
    noise = 2 * uniform(seeds, count * NUMBERS).unflatten(1, (count, NUMBERS)) - 1
    centers, cells = grid(count, height, width, seeds.device)
    places = (centers + JITTER / 2 * noise[..., :2] * cells + MARGIN) / (1 + 2 * MARGIN)
    spacing = math.sqrt(height * width / count)
    low, high = math.log(config.min_scale), math.log(math.sqrt(height * width))
    logs = math.log(SCALE * spacing) + SCALE_JITTER * noise[..., 2:4]
    share = ((logs - low) / (high - low)).clamp(0.02, 0.98)  # also of a few px
    grey, opacity = noise.new_full((3,), GREY), noise.new_full((1,), OPACITY)
    look = torch.cat((numbers_of(grey, config), opacity.logit()))
    return torch.cat(
        (
            torch.logit(places),
            torch.logit(share),
            math.pi / 2 * noise[..., 4:5],
            look + LOOK_JITTER * noise[..., 5:],
        ),
        -1,
    )


@torch.no_grad()
def colored(g: Tensor, pixels: Tensor, config: GViTConfig) -> Tensor:
    """g [B, k, 9] in the colours that the images [B, 3, H, W], 0 to 1, have at its means."""
    height, width = pixels.shape[2:]
    places_Bk2 = (1 + 2 * MARGIN) * g[..., :2].sigmoid() - MARGIN
    deviation = SEEN * math.sqrt(height * width / g.shape[1])
    with torch.autocast(pixels.device.type, enabled=False):
        across_BkW = window(width * places_Bk2[..., 0], width, deviation)
        down_BkH = window(height * places_Bk2[..., 1], height, deviation)
        rows_BkCW = torch.einsum("bkh,bchw->bkcw", down_BkH, pixels.float())
        colors_BkC = torch.einsum("bkw,bkcw->bkc", across_BkW, rows_BkCW).clamp(0, 1)
    return torch.cat((g[..., :5], numbers_of(colors_BkC, config), g[..., 8:]), -1)


def window(centers: Tensor, size: int, deviation: float) -> Tensor:
    """Weights [..., size] of a row of pixels under a Gaussian about `centers` [...], px; their sum
    is 1."""
    pixels = torch.arange(size, device=centers.device) + 0.5
    return (-0.5 * ((pixels - centers[..., None]) / deviation).square()).softmax(-1)


def numbers_of(colors: Tensor, config: GViTConfig) -> Tensor:
    """What g holds where the picture is to have these colours, 0 to 1, at the start: [..., 3] to
    [..., 3]."""
    if config.renderer == "alpha":
        return torch.logit(colors, 0.02)
    return torch.logit((1 + colors / (OVERLAP * OPACITY)) / 2)


def grid(
    count: int, height: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Centres and sizes (x, y) of `count` cells that fill an image, float32 [count, 2], in images.
    All rows are as high, and no row has more than one cell more than another."""
    rows = max(1, min(count, round(math.sqrt(count * height / width))))
    i = torch.arange(count, device=device)
    row = i * rows // count
    begin = -(-row * count // rows)
    columns = -(-(row + 1) * count // rows) - begin
    centers = torch.stack(((i - begin + 0.5) / columns, (row + 0.5) / rows), -1)
    cells = torch.stack((1 / columns, torch.full((count,), 1 / rows, device=device)), -1)
    return centers, cells


def gaussians_of(g: Tensor, height: int, width: int, config: GViTConfig) -> tuple[Splats, Tensor]:
    """g [B, k, 9] to Gaussians [B, k] for an image of this size, and opacities [B, k], by which
    their colours are not multiplied; in g's dtype."""
    x, y = ((1 + 2 * MARGIN) * g[..., :2].sigmoid() - MARGIN).unbind(-1)
    means = torch.stack((width * x, height * y), -1)
    largest = math.log(math.sqrt(height * width) / config.min_scale)
    scales = config.min_scale * (largest * g[..., 2:4].sigmoid()).exp()
    colors = g[..., 5:8].sigmoid()
    if config.renderer == "sum":
        colors = 2 * colors - 1
    mask = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
    cholesky = cholesky_from_scales_and_angles(scales, g[..., 4])
    return Splats(means, cholesky, colors, mask), g[..., 8].sigmoid()


def splats_from_parameters(g: Tensor, height: int, width: int, config: GViTConfig) -> Splats:
    """g [B, k, 9] to Gaussians [B, k] whose colours have been multiplied by their opacity: what a
    sum renders, and what the classifier reads."""
    splats, opacities = gaussians_of(g, height, width, config)
    return replace(splats, colors=splats.colors * opacities[..., None])


def render(g: Tensor, height: int, width: int, config: GViTConfig) -> Tensor:
    """The picture of g [B, k, 9]: float32 [B, 3, H, W], white is 1, not clamped; differentiable.

    Raises BackendError where the device has no kernel.
    """
    with torch.autocast(g.device.type, enabled=False):
        g = g.float()
        if config.renderer == "alpha":
            splats, opacities = gaussians_of(g, height, width, config)
            composite = render_alpha if g.is_cuda else reference_alpha
            return composite(splats, opacities, height, width)
        backend = select_backend("triton" if g.is_cuda else "cpu")
        return backend.render(
            splats_from_parameters(g, height, width, config), height, width, config.cutoff
        )
