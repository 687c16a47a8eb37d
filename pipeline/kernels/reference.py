"""The oracle: every Gaussian at every pixel, in plain torch, with autograd, in any float dtype.

The obvious twin of every fast kernel. It is dense, so its cost is N * H * W; `loss_and_grad` goes
through the picture in strips of rows to keep memory bounded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from splatshard.pipeline.kernels.backend import LossAndGrad
from splatshard.pipeline.kernels.overlaps import (
    DAMPING,
    LEAST_CURVATURE,
    LEAST_OVERLAP,
    LEAST_SEEN,
    STEPS,
)
from splatshard.pipeline.kernels.solve_colors import square_norm
from splatshard.pipeline.splats import Splats, covariances

STRIP_ELEMENTS = 1 << 24
"""Gaussian-pixel pairs evaluated at once; about ten temporaries of this many floats are alive."""


def render(splats: Splats, height: int, width: int, cutoff: float = 3.0) -> Tensor:
    """Sum of the Gaussians at the pixel centres: [B, 3, H, W] in the splats' dtype.

    A Gaussian is exactly zero beyond `cutoff` standard deviations. Differentiable with respect to
    means, cholesky and colors (the cut itself has no gradient).
    """
    return render_rows(splats, 0, height, width, cutoff)


def render_rows(splats: Splats, start: int, stop: int, width: int, cutoff: float) -> Tensor:
    """Rows `start` to `stop` of `render`: [B, 3, stop - start, W]."""
    kind = {"dtype": splats.means.dtype, "device": splats.means.device}
    x = torch.arange(width, **kind) + 0.5
    y = torch.arange(start, stop, **kind) + 0.5
    l11, l21, l22 = splats.cholesky.unbind(-1)
    dx = x - splats.means[..., 0, None]  # [B, N, W]
    dy = y - splats.means[..., 1, None]  # [B, N, rows]
    z1 = (dx / l11[..., None])[:, :, None, :]
    z2 = (dy[:, :, :, None] - l21[..., None, None] * z1) / l22[..., None, None]
    q = z1 * z1 + z2 * z2  # [B, N, rows, W], squared Mahalanobis distance
    inside = (q <= cutoff * cutoff) & splats.mask[:, :, None, None]
    weights = torch.where(inside, torch.exp(-0.5 * q), 0)
    return torch.einsum("bnyx,bnc->bcyx", weights, splats.colors)


def loss_and_grad(splats: Splats, target: Tensor, cutoff: float = 3.0) -> LossAndGrad:
    """See `LossAndGrad`, of `target` [B, 3, H, W]; by autograd, strip by strip."""
    batch, _, height, width = target.shape
    names = ("means", "cholesky", "colors")
    leaves = {n: getattr(splats, n).detach().requires_grad_() for n in names}
    splats = replace(splats, **leaves)
    rows = max(1, STRIP_ELEMENTS // max(1, splats.mask.numel() * width))
    loss = target.new_zeros(batch)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        with torch.enable_grad():
            strip = render_rows(splats, start, stop, width, cutoff) - target[:, :, start:stop]
            error = strip.square().sum((1, 2, 3)) / (3 * height * width)
            if error.requires_grad:
                error.sum().backward()
        loss += error.detach()
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return LossAndGrad(loss=loss, **gradients)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, C, H, W] by `sigma` px, border repeated; weights up to ceil(3 sigma) px
    away, which sum to 1."""
    radius = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).to(image) / sigma) ** 2)
    weights /= weights.sum()
    wide = F.pad(image, (radius,) * 4, mode="replicate").flatten(0, 1)[:, None]
    rows = F.conv2d(wide, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1)).view_as(image)


def color_change(
    splats: Splats, target: Tensor, cutoff: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """See `overlaps.color_change`, [B, N, 3], [B] and [B, N] for `target` [B, 3, H, W]; with the
    whole matrix, float64."""
    splats = splats.map(lambda x: x if x.dtype == torch.bool else x.double())
    means, cholesky, mask = splats.means, splats.cholesky, splats.mask
    found = loss_and_grad(splats, target.double(), cutoff)
    size = math.prod(target.shape[1:])
    gradient = found.colors * (size / 2)
    height, width = target.shape[2:]
    weights = splats_alone(splats, height, width, cutoff)
    seen = weights.square().sum((2, 3))
    norm = torch.maximum(seen, LEAST_SEEN * square_norm(cholesky)).sqrt()
    norm = torch.where(mask, norm, 1)[..., None]
    xx, xy, yy = (x[:, :, None] + x[:, None] for x in covariances(cholesky).unbind(-1))
    dx, dy = (means[:, :, None] - means[:, None]).unbind(-1)
    full = xx * yy - xy * xy
    q = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / full
    det = cholesky[..., 0] * cholesky[..., 2]
    cosine = 2 * (det[:, :, None] * det[:, None] / full).sqrt() * torch.exp(-0.5 * q)
    kept = (cosine > LEAST_OVERLAP) & mask[:, :, None] & mask[:, None]
    matrix = torch.where(kept, cosine, 0) + DAMPING * torch.eye(mask.shape[1], dtype=torch.double)
    residual = torch.where(mask[..., None], -gradient / norm, 0)
    change, direction = torch.zeros_like(residual), residual
    energy = residual.square().sum((1, 2), keepdim=True)
    for _ in range(STEPS):
        applied = matrix @ direction
        curvature = (direction * applied).sum((1, 2), keepdim=True)
        square = direction.square().sum((1, 2), keepdim=True)
        step = torch.where(curvature > LEAST_CURVATURE * square, energy / curvature, 0)
        change = change + step * direction
        residual = residual - step * applied
        before, energy = energy, residual.square().sum((1, 2), keepdim=True)
        direction = residual + energy / before.clamp(min=1e-30) * direction
    change = change / norm
    error = found.loss * size + (gradient * change).sum((1, 2))
    return change.float(), error, seen.float()


def splats_alone(splats: Splats, height: int, width: int, cutoff: float) -> Tensor:
    """The weights of each Gaussian at each pixel, [B, N, H, W]."""
    one = torch.ones_like(splats.colors[..., :1]).expand(-1, -1, 3)
    alone = splats.map(lambda x: x.flatten(0, 1)[:, None])
    alone = replace(alone, colors=one.flatten(0, 1)[:, None])
    return render(alone, height, width, cutoff)[:, 0].reshape(*splats.mask.shape, height, width)
