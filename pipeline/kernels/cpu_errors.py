"""What packing asks of a picture on a CPU, over `cpu.add_gaussians`: the errors of a sum as it is
shown, and what each Gaussian meets of them. An image at a time goes through one buffer."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.pipeline.kernels.cpu import (
    ALL,
    BASE,
    FIRST,
    HALF,
    LAST,
    LIMIT,
    POWER,
    START,
    TOP,
    add_gaussians,
    arrays_of,
    padded_picture,
    row_table,
    row_window,
    subtract_rows,
    sum_of_squares,
)
from splatshard.pipeline.kernels.simd import (
    LANES,
    exp2,
    f32,
    fma,
    iota,
    larger,
    load,
    smaller,
    splat,
    total,
    zero_above,
)
from splatshard.pipeline.splats import Splats


def squared_errors(
    splats: Splats, target: Tensor, behind: Tensor | None, cutoff: float = 3.0
) -> Tensor:
    """Float64 [2, B]: see `quantise.squared_errors`, the twin; `target` is float32 [B, 3, H, W]."""
    height, width = target.shape[2:]
    picture = padded_picture(1, height, width)[0]
    errors = np.empty((2, len(splats)))
    back = target[:0] if behind is None else behind
    inputs = (target.contiguous().numpy(), back.contiguous().numpy())
    _squared_errors(*arrays_of(splats), *inputs, cutoff, picture, errors)
    return torch.from_numpy(errors)


def color_sums(splats: Splats, target: Tensor, cutoff: float = 3.0) -> tuple[Tensor, Tensor]:
    """Squared error of the sum of the Gaussians [B], and for each of them the sums over pixels of
    its weight times that error in R, G and B, and of its squared weight: float32 [B, N, 4]."""
    means, cholesky, colors, mask = arrays_of(splats)
    height, width = target.shape[2:]
    picture, error = padded_picture(1, height, width)[0], np.empty(len(splats), f32)
    sums = np.zeros((*mask.shape, 4), f32)
    goal = target.contiguous().numpy()
    _color_sums(means, cholesky, colors, mask, goal, cutoff, picture, sums, error)
    return torch.from_numpy(error), torch.from_numpy(sums)


@compiled()
def _squared_errors(means, cholesky, colors, mask, target, behind, cutoff, picture, errors):
    """Errors float64 [2, B]: of the sum clamped to 0..1 as `target` is, and of the sum itself."""
    height, width = target.shape[2:]
    whole, cutoff = width // LANES * LANES, f32(cutoff)
    zero, one = splat(f32(0)), splat(f32(1))
    for b in range(len(means)):
        picture[:] = f32(0)
        if len(behind):
            for c in range(3):
                for y in range(height):
                    for x in range(width):
                        picture[c, y, x] = behind[b, c, y, x]
        add_gaussians(means[b], cholesky[b], colors[b], mask[b], ALL, TOP, width, cutoff, picture)
        shown, summed = 0.0, 0.0
        for c in range(3):
            for y in range(height):
                sums, wanted = picture[c, y], target[b, c, y]
                row_shown, row_summed = zero, zero
                for x in range(0, whole, LANES):
                    value, goal = load(sums, x), load(wanted, x)
                    error = value - goal
                    row_summed = fma(error, error, row_summed)
                    error = smaller(larger(value, zero), one) - smaller(larger(goal, zero), one)
                    row_shown = fma(error, error, row_shown)
                shown += total(row_shown)
                summed += total(row_summed)
                for x in range(whole, width):
                    error = sums[x] - wanted[x]
                    summed += error * error
                    error = min(max(sums[x], f32(0)), f32(1)) - min(max(wanted[x], f32(0)), f32(1))
                    shown += error * error
        errors[0, b] = np.nan if math.isnan(summed) else shown  # a NaN is not clamped
        errors[1, b] = summed


@compiled()
def _color_sums(means, cholesky, colors, mask, target, cutoff, picture, sums, error):
    width, cutoff = target.shape[3], f32(cutoff)
    for b in range(len(means)):
        subtract_rows(target[b], 1, 0, width, picture)
        add_gaussians(means[b], cholesky[b], colors[b], mask[b], ALL, TOP, width, cutoff, picture)
        picture[:, :, width:] = f32(0)
        error[b] = sum_of_squares(picture.reshape(-1))
        _weighted_sums(means[b], cholesky[b], mask[b], width, cutoff, picture, sums[b])


@inner(inline="always")
def _weighted_sums(means, cholesky, mask, width, cutoff, picture, sums):
    """As `cpu.gradient_sums`, of the colours alone, and the squared weights inside the picture."""
    height, pitch = picture.shape[1:]
    plane = height * pitch
    pixels = picture.reshape(-1)
    scratch = np.empty((5, height + LANES), f32)
    zero, edge = splat(f32(0)), splat(f32(width - 1))
    for i in range(len(means)):
        l11, l21, l22 = cholesky[i, 0], cholesky[i, 1], cholesky[i, 2]
        if not (mask[i] and l11 > 0 and l22 > 0):
            continue
        syy = l21 * l21 + l22 * l22
        var = l11 * l11 * (l22 * l22 / syy)
        y0, y1 = row_window(means[i, 1], math.sqrt(syy), cutoff, height)
        dy, slope = f32(y0) + HALF - means[i, 1], l11 * l21 / syy
        row_table(dy, y1 - y0, means[i, 0], f32(1) / syy, var, slope, cutoff, width, scratch)
        scale = splat(POWER / var)
        sum_r, sum_g, sum_b, sum_w = zero, zero, zero, zero
        for j in range(y1 - y0):
            t = iota() + splat(scratch[START, j])
            limit = splat(scratch[LIMIT, j])
            row = (y0 + j) * pitch
            base = splat(scratch[BASE, j])
            for x in range(int(scratch[FIRST, j]), int(scratch[LAST, j]) + 1, LANES):
                t2 = t * t
                w = zero_above(exp2(fma(t2, scale, base)), t2, limit)
                o = row + x
                sum_r = fma(w, load(pixels, o), sum_r)
                sum_g = fma(w, load(pixels, o + plane), sum_g)
                sum_b = fma(w, load(pixels, o + 2 * plane), sum_b)
                w = zero_above(w, iota() + splat(f32(x)), edge)
                sum_w = fma(w, w, sum_w)
                t = t + splat(f32(LANES))
        sums[i, 0], sums[i, 1], sums[i, 2] = total(sum_r), total(sum_g), total(sum_b)
        sums[i, 3] = total(sum_w)
