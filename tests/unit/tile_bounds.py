"""What half precision may cost a step of tile_step.cu: the gradient in float64, and how far from it
the kernel may be, term by term. Nothing here is fitted to what the kernel does.

A number x that is rounded to a half is off by UNIT |x| at most, and by TINY where that is more. A
weight is so, and besides by what float32 loses in its exponent. A pixel whose weight is as near to
that at the cutoff may fall to either side. From there on errors follow from the formulas: picture,
residual, slopes, e, and the sums of e z, e z z' and of weight times residual.

Tensors: weights [B, N, H, W], picture and residual [B, 3, H, W], gradients [B, N, 8].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splatshard.pipeline.fitting.rows import squeezed
from splatshard.pipeline.splats import Splats

UNIT, TINY = 2.0**-11, 2.0**-25
FLOAT = 2.0**-24
GAIN = 256


def gradient_and_bound(
    splats: Splats, target: Tensor, cutoff: float, stride: int, phase: int
) -> tuple[Tensor, Tensor]:
    """The whitened gradient [B, N, 8] of splats [B, N] for `target` [B, 3, H, W] on some rows, and
    the largest error that the kernel may have."""
    whole = splats.map(lambda x: x if x.dtype == torch.bool else x.double())
    seen = squeezed(whole, stride, phase)
    target = target[:, :, phase::stride].double()
    height, width = target.shape[2:]
    l11, l21, l22 = seen.cholesky[..., None, None].unbind(-3)
    a, c = 1 / l11, 1 / l22
    b = -l21 * a * c
    x = torch.arange(width).double() + 0.5
    y = torch.arange(height).double()[:, None] + 0.5
    dx, dy = x - seen.means[..., 0, None, None], y - seen.means[..., 1, None, None]
    z1 = (a * dx).expand(-1, -1, height, -1)
    z2 = b * dx + c * dy
    q = z1.square() + z2.square()
    drawn = splats.mask[..., None, None]
    full = torch.where(drawn, torch.exp(-0.5 * q), 0)
    w = torch.where(q <= cutoff**2, full, 0)

    # the exponent: what its terms about the centre of a tile can amount to, and the mean's place
    sizes = z1.abs() + 7 * a, z2.abs() + 7 * (b.abs() + c)
    place = 4 * FLOAT * (1 + seen.means[..., 1, None, None].abs()) * c * sizes[1]
    off = 16 * FLOAT * 2 * (sizes[0].square() + sizes[1].square()) + place + 4 * FLOAT
    w_error = w * (UNIT + off) + TINY * (w > 0)
    least = math.exp(-0.5 * cutoff**2)
    rim = (full - least).abs() <= 2 * UNIT * least + 2 * TINY + off * full
    w_error = torch.where(rim & drawn, 1.01 * full + w_error, w_error)

    colors = seen.colors
    size = colors.abs()
    scale = 2.0 ** (1 + size.amax(-1, keepdim=True).clamp(min=1e-18).log2().floor())

    def over_gaussians(weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bnyx,bnc->bcyx", weights, values)

    def over_pixels(weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bnyx,bcyx->bnc", weights, values)

    most = w + w_error
    residual = over_gaussians(w, colors) - target
    r_error = over_gaussians(most, UNIT * size + TINY) + over_gaussians(w_error, size)
    r_error = r_error + 16 * FLOAT * over_gaussians(most, size)
    r_error = r_error + UNIT * (residual.abs() + r_error) + TINY / GAIN
    r = residual.abs() + r_error
    color_gradient = over_pixels(w, residual)
    color_error = over_pixels(w_error, r) + over_pixels(w, r_error)
    color_error = color_error + 16 * FLOAT * over_pixels(most, r)

    def per_pixel(colors: Tensor, picture: Tensor) -> Tensor:
        return torch.einsum("bnc,bcyx->bnyx", colors, picture)

    slope = per_pixel(colors, residual)
    near_error = UNIT * size + TINY * scale
    slope_error = per_pixel(near_error, r) + per_pixel(size, r_error)
    slope_error = slope_error + 2 * UNIT * per_pixel(size, r) + 2 * TINY * scale[..., None] / GAIN
    e = w * slope
    e_error = w_error * (slope.abs() + slope_error) + w * slope_error
    e_error = e_error + UNIT * (e.abs() + e_error) + TINY * scale[..., None] / GAIN * (most > 0)
    size1, size2 = sizes
    pairs = (
        (z1, size1), (z2, size2), (z1 * z1, size1**2), (z1 * z2, size1 * size2), (z2 * z2, size2**2)
    )  # fmt: skip
    sums = [(e * z).sum((2, 3)) for z, _ in pairs]
    errors = [
        (e_error * z.abs() + 32 * FLOAT * (e.abs() + e_error) * size).sum((2, 3))
        for z, size in pairs
    ]
    tiles = -(-height // 8) * -(-width // 8)
    fixed = tiles * 2.0**-33 * torch.cat((scale.expand(-1, -1, 5), torch.ones_like(colors)), -1)
    gradient = torch.cat((torch.stack(sums, -1), color_gradient), -1)
    bound = torch.cat((torch.stack(errors, -1), color_error), -1) + fixed
    factor = 2 / (3 * height * width)
    return factor * gradient, factor * bound * (
        1 + 16 * FLOAT
    ) + 16 * FLOAT * factor * gradient.abs()
