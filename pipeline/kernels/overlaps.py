"""Least-squares colours from one gradient: a step of Newton's method, nothing rendered.

For fixed geometry the rendering is A c, and the best colours are (A^T A)^-1 A^T (target - A c) away
from c: the gradient, but for a factor, divided by how much Gaussians overlap. Over the whole plane
there is a closed form for that,

    2 pi det L_i det L_j / sqrt(det S) exp(-d^T S^-1 d / 2),   S = Sigma_i + Sigma_j,

with d the way from one mean to the other; what the picture's pixels see of it is `seen`. Few pairs
overlap enough to matter, about ten per Gaussian, so the system is sparse and its conjugate-gradient
steps cost next to nothing beside a rendering. The twin is `reference.color_change`, dense.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from splatshard.pipeline.kernels.compiled import compiled
from splatshard.pipeline.kernels.simd import LANES, below, load, lowest, splat
from splatshard.pipeline.splats import Splats

STEPS = 8
DAMPING = 0.01
"""Added to the diagonal: the closed form is not exact where pixels and the cutoff count."""
LEAST_OVERLAP = 0.02
"""Cosine of two Gaussians, as vectors of pixels: pairs of a smaller one count as apart."""
LEAST_SEEN = 0.02
"""Of the share of a Gaussian's squared weight that the picture sees."""
LEAST_CURVATURE = 1e-3
"""Ways along which there is less are not gone: pairs that are left out can make it negative."""
MOST_PAIRS = 256
"""Per Gaussian, on average: further ones are left out, as where all lie on one another."""
REACH = math.sqrt(2 * math.log(1 / LEAST_OVERLAP))
"""Standard deviations of S beyond which two Gaussians overlap less than that."""
X, Y, XX, XY, YY, DET, NORM, TOP, BOTTOM = range(9)
"""Rows of the array that describes the Gaussians of one image; NORM: the root of the sum of squared
weights, as far as the picture sees them."""


def color_change(splats: Splats, gradient: Tensor, height: int, width: int) -> Tensor:
    """What to add to the colours of `splats` [B, N] of pictures of `height` x `width` px, where
    their loss has this `gradient` [B, N, 3] (see `LossAndGrad`): float32 [B, N, 3]."""
    inputs = (splats.means, splats.cholesky, gradient)
    means, cholesky, slope = (x.detach().float().contiguous().numpy() for x in inputs)
    change = np.zeros_like(slope)
    mask = splats.mask.numpy()
    top = means[..., 1] - REACH * np.hypot(cholesky[..., 1], cholesky[..., 2])
    order = np.argsort(np.where(mask, top, np.inf), axis=1)
    _color_change(means, cholesky, order, mask.sum(1), slope, height, width, change)
    return torch.from_numpy(change)


@compiled(error_model="numpy")
def _color_change(means, cholesky, order, counts, gradient, height, width, change):
    """In units of each Gaussian's norm, so that the diagonal is 1."""
    scale = -1.5 * height * width  # the loss is a mean, and twice A^T (A c - target) its gradient
    for b in range(len(means)):
        kept = order[b, : counts[b]]
        shape = np.empty((9, len(kept)))
        _describe(means[b], cholesky[b], kept, height, width, shape)
        ends, other, overlap = _pairs(shape)
        residual = np.empty((len(kept), 3))
        for i in range(len(kept)):
            for k in range(3):
                residual[i, k] = scale * gradient[b, kept[i], k] / shape[NORM, i]
        found = _solve(ends, other, overlap, residual)
        for i in range(len(kept)):
            for k in range(3):
                change[b, kept[i], k] = found[i, k] / shape[NORM, i]


@compiled(error_model="numpy")
def _describe(means, cholesky, kept, height, width, shape):
    for i in range(len(kept)):
        x, y = np.float64(means[kept[i], 0]), np.float64(means[kept[i], 1])
        l11, l21 = np.float64(cholesky[kept[i], 0]), np.float64(cholesky[kept[i], 1])
        l22 = np.float64(cholesky[kept[i], 2])
        xx, xy, yy = l11 * l11, l11 * l21, l21 * l21 + l22 * l22
        sx, sy, det = l11, math.sqrt(yy), l11 * l22
        seen = _inside(x, sx, width) * _inside(y, sy, height) * _on_pixels(x, y, xx, xy, yy)
        shape[X, i], shape[Y, i], shape[XX, i], shape[XY, i], shape[YY, i] = x, y, xx, xy, yy
        shape[DET, i], shape[NORM, i] = det, math.sqrt(math.pi * det * max(seen, LEAST_SEEN))
        shape[TOP, i], shape[BOTTOM, i] = y - REACH * sy, y + REACH * sy


@njit(inline="always")
def _inside(mean, deviation, size):
    """Share of a Gaussian's squared weight between 0 and `size`, along one axis."""
    if 3 * deviation < mean < size - 3 * deviation:
        return 1.0
    return (math.erf((size - mean) / deviation) + math.erf(mean / deviation)) / 2


@njit(inline="always")
def _on_pixels(x, y, xx, xy, yy):
    """The sum of squared weights over all pixel centres beside their integral (Poisson)."""
    if xx > 1 and yy > 1 and xx + yy - 2 * abs(xy) > 1:
        return 1.0
    total, square, turn = 1.0, math.pi * math.pi, 2 * math.pi
    for kx, ky in ((1, 0), (0, 1), (1, 1), (1, -1)):
        decay = math.exp(-square * (kx * kx * xx + 2 * kx * ky * xy + ky * ky * yy))
        total += 2 * decay * math.cos(turn * (kx * (x - 0.5) + ky * (y - 0.5)))
    return total


@compiled(error_model="numpy")
def _pairs(shape):
    """Of each Gaussian those after it that it overlaps: where they end, their numbers, how much."""
    n = shape.shape[1]
    ends = np.zeros(n, np.int64)
    other, overlap = np.empty(16 * n, np.int32), np.empty(16 * n, np.float32)
    bounds = np.zeros((4, n + LANES), np.float32)
    bounds[0, :n], bounds[1, :n] = shape[X], shape[Y]
    bounds[2, :n], bounds[3, :n] = REACH * REACH * shape[XX], REACH * REACH * shape[YY]
    root = np.sqrt(shape[DET])
    near, size = np.empty(n + LANES, np.int32), np.empty(n + LANES, np.float32)
    found = 0
    for i in range(n):
        last = np.searchsorted(shape[TOP], shape[BOTTOM, i], side="right")
        count = _near(bounds, i, last, near)
        count = min(_overlapping(shape, root, i, near[:count], size), MOST_PAIRS * n - found)
        if found + count > len(other):
            other = np.concatenate((other, np.empty(len(other) + count, np.int32)))
            overlap = np.concatenate((overlap, np.empty(len(overlap) + count, np.float32)))
        for p in range(count):
            other[found + p] = near[p]
            overlap[found + p] = size[p]
        found += count
        ends[i] = found
    return ends, other, overlap


@compiled(error_model="numpy")
def _near(bounds, i, last, near):
    """Those of the Gaussians after i, before `last`, that may reach it; how many."""
    across, down, wide, high = bounds[0], bounds[1], bounds[2], bounds[3]
    x, y, own_wide, own_high = splat(across[i]), splat(down[i]), splat(wide[i]), splat(high[i])
    count = 0
    for j in range(i + 1, last, LANES):
        dx, dy = load(across, j) - x, load(down, j) - y
        lanes = below(dx * dx, load(wide, j) + own_wide) & below(dy * dy, load(high, j) + own_high)
        while lanes:
            near[count] = j + lowest(lanes)
            count += 1
            lanes &= lanes - 1
    while count and near[count - 1] >= last:  # of the last vector, those beyond
        count -= 1
    return count


@compiled(error_model="numpy")
def _overlapping(shape, root, i, near, size):
    """Keep those of `near` that i overlaps, and say how much; how many."""
    x, y, xx, xy, yy = shape[:5, i]
    own = 2 * root[i]
    count = 0
    for j in near:
        dx, dy = shape[X, j] - x, shape[Y, j] - y
        sxx, sxy, syy = shape[XX, j] + xx, shape[XY, j] + xy, shape[YY, j] + yy
        full = sxx * syy - sxy * sxy
        q = syy * dx * dx - 2 * sxy * dx * dy + sxx * dy * dy
        if q < REACH * REACH * full:
            inverse = 1 / full
            share = own * root[j] * math.sqrt(inverse) * math.exp(-0.5 * q * inverse)
            if share > LEAST_OVERLAP:
                near[count] = j
                size[count] = share
                count += 1
    return count


@compiled(error_model="numpy", fastmath={"reassoc", "contract"})
def _solve(ends, other, overlap, residual):
    """Conjugate gradients from zero; `residual` [N, 3] is used up."""
    found, direction, applied = np.zeros_like(residual), residual.copy(), np.empty_like(residual)
    left, way, to = residual.reshape(-1), direction.reshape(-1), applied.reshape(-1)
    place, energy = found.reshape(-1), 0.0
    for i in range(len(left)):
        energy += left[i] * left[i]
    for _ in range(STEPS):
        for i in range(len(way)):
            to[i] = (1 + DAMPING) * way[i]
        _add_overlaps(ends, other, overlap, direction, applied)
        curvature, square, before = 0.0, 0.0, energy
        for i in range(len(way)):
            curvature += way[i] * to[i]
            square += way[i] * way[i]
        step = before / curvature if curvature > LEAST_CURVATURE * square else 0.0
        energy = 0.0
        for i in range(len(way)):
            place[i] += step * way[i]
            left[i] -= step * to[i]
            energy += left[i] * left[i]
        onward = energy / max(before, 1e-30)
        for i in range(len(way)):
            way[i] = left[i] + onward * way[i]
    return found


@compiled(error_model="numpy")
def _add_overlaps(ends, other, overlap, direction, applied):
    begin = 0
    for i in range(len(ends)):
        r, g, b = direction[i, 0], direction[i, 1], direction[i, 2]
        sum_r, sum_g, sum_b = 0.0, 0.0, 0.0
        for p in range(begin, ends[i]):
            j, size = other[p], overlap[p]
            sum_r += size * direction[j, 0]
            sum_g += size * direction[j, 1]
            sum_b += size * direction[j, 2]
            applied[j, 0] += size * r
            applied[j, 1] += size * g
            applied[j, 2] += size * b
        applied[i, 0] += sum_r
        applied[i, 1] += sum_g
        applied[i, 2] += sum_b
        begin = ends[i]
