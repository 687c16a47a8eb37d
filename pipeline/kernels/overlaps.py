"""Least-squares colours from one gradient: a step of Newton's method.

For fixed geometry the rendering is A c, and the best colours are (A^T A)^-1 A^T (target - A c) away
from c: the gradient, but for a factor, divided by how much Gaussians overlap. Their squared weights
are summed beside the gradient; of the rest of A^T A, which is cosines times the roots of two such
sums, there is a closed form over the whole plane,

    cos = 2 sqrt(det L_i det L_j / det S) exp(-d^T S^-1 d / 2),   S = Sigma_i + Sigma_j,

with d the way from one mean to the other. Few pairs overlap enough to matter, about eight per
Gaussian, so the system is sparse and its conjugate-gradient steps cost next to nothing beside a
rendering. The twin is `reference.color_change`, dense.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.pipeline.kernels.cpu_errors import color_sums
from splatshard.pipeline.kernels.simd import (
    LANES,
    below,
    divide,
    exp2,
    f32,
    load,
    splat,
    square_root,
    store,
    zero_above,
)
from splatshard.pipeline.splats import Splats

STEPS = 6
DAMPING = 0.01
"""Added to the diagonal: the closed form is not exact where pixels and the cutoff count."""
LEAST_OVERLAP = 0.02
"""Cosine of two Gaussians, as vectors of pixels: pairs of a smaller one count as apart."""
LEAST_SEEN = 0.02
"""Of a Gaussian's squared weight: one of which the picture sees less is not moved by more."""
LEAST_CURVATURE = 1e-3
"""Ways along which there is less are not gone: pairs that are left out can make it negative."""
MOST_PAIRS = 256
"""Per Gaussian, on average: further ones are left out, as where all lie on one another."""
REACH = math.sqrt(2 * math.log(1 / LEAST_OVERLAP))
"""Standard deviations of S beyond which two Gaussians overlap less than that."""
X, Y, XX, XY, YY, ROOT, NORM, TOP, BOTTOM = range(9)
"""Rows of the array that describes the Gaussians of one image: mean, covariance, the root of det L;
the root of the sum of squared weights, as far as the picture sees them; reach upwards and down."""

LANES_OF = np.zeros((1 << LANES, LANES), np.int32)
"""The lanes of each pattern of bits, in order; as a table, since nobody can foresee a branch."""
for pattern in range(1 << LANES):
    lanes = [lane for lane in range(LANES) if pattern >> lane & 1]
    LANES_OF[pattern, : len(lanes)] = lanes
COUNT_OF = np.array([pattern.bit_count() for pattern in range(1 << LANES)])


def color_change(
    splats: Splats, target: Tensor, cutoff: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What to add to the colours of `splats` for `target` [B, 3, H, W], float32 [B, N, 3]; the
    squared error of their sum that is foreseen then, float64 [B]; the sums of their squared weights
    over the picture, float32 [B, N]."""
    error, sums = color_sums(splats, target, cutoff)
    inputs = (splats.means, splats.cholesky)
    means, cholesky = (x.detach().float().contiguous().numpy() for x in inputs)
    mask = splats.mask.numpy()
    top = means[..., 1] - REACH * np.hypot(cholesky[..., 1], cholesky[..., 2])
    order = np.argsort(np.where(mask, top, np.inf), axis=1)
    change = np.zeros((*mask.shape, 3), np.float32)
    gain = np.zeros(len(change))
    _color_change(means, cholesky, order, mask.sum(1), sums.numpy(), change, gain)
    return torch.from_numpy(change), error.double() - torch.from_numpy(gain), sums[..., 3]


@compiled()
def _color_change(means, cholesky, order, counts, sums, change, gain):
    """In units of each Gaussian's norm, so that the diagonal is 1."""
    for b in range(len(means)):
        kept = order[b, : counts[b]]
        shape = np.empty((9, len(kept) + LANES), f32)
        shape[:, len(kept) :] = f32(0)
        _describe(means[b], cholesky[b], kept, sums[b], shape)
        ends, other, cosines = _pairs(shape, len(kept))
        residual = np.empty((len(kept), 3))
        for i in range(len(kept)):
            for k in range(3):
                residual[i, k] = -sums[b, kept[i], k] / shape[NORM, i]
        found = _solve(ends, other, cosines, residual)
        for i in range(len(kept)):
            for k in range(3):
                step = found[i, k] / shape[NORM, i]
                change[b, kept[i], k] = step
                gain[b] -= step * sums[b, kept[i], k]


@inner(inline="always")
def _describe(means, cholesky, kept, sums, shape):
    for i in range(len(kept)):
        y = means[kept[i], 1]
        l11, l21, l22 = cholesky[kept[i], 0], cholesky[kept[i], 1], cholesky[kept[i], 2]
        syy, det = l21 * l21 + l22 * l22, l11 * l22
        reach = f32(REACH) * math.sqrt(syy)
        shape[X, i], shape[Y, i], shape[ROOT, i] = means[kept[i], 0], y, math.sqrt(det)
        shape[XX, i], shape[XY, i], shape[YY, i] = l11 * l11, l11 * l21, syy
        shape[NORM, i] = math.sqrt(max(sums[kept[i], 3], f32(LEAST_SEEN * math.pi) * det))
        shape[TOP, i], shape[BOTTOM, i] = y - reach, y + reach


@inner(inline="always")
def _pairs(shape, n):
    """Of each Gaussian those after it that it overlaps: where they end, their numbers, cosines."""
    ends = np.empty(n, np.int64)
    other, cosines = np.empty(16 * n, np.int32), np.empty(16 * n, f32)
    near, found = np.empty(n + LANES, np.int32), np.empty((ROOT + 1, n + LANES), f32)
    size = np.empty(n + LANES, f32)
    total = 0
    for i in range(n):
        count = _near(shape, i, _reached(shape, i, n), near, found)
        count = min(_overlapping(shape, i, count, near, found, size), MOST_PAIRS * n - total)
        if total + count > len(other):
            other = np.concatenate((other, np.empty(len(other) + count, np.int32)))
            cosines = np.concatenate((cosines, np.empty(len(cosines) + count, f32)))
        for p in range(count):
            other[total + p] = near[p]
            cosines[total + p] = size[p]
        total += count
        ends[i] = total
    return ends, other, cosines


@inner(inline="always")
def _reached(shape, i, n):
    """How many of the Gaussians begin above where i ends, by bisection: they are sorted by that."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if shape[TOP, middle] <= shape[BOTTOM, i]:
            low = middle + 1
        else:
            high = middle
    return low


@inner(inline="always")
def _near(shape, i, last, near, found):
    """Those of the Gaussians after i, before `last`, that may reach it: their numbers, and their
    columns of `shape` side by side; how many."""
    x, y = splat(shape[X, i]), splat(shape[Y, i])
    xx, yy = splat(shape[XX, i]), splat(shape[YY, i])
    reach = splat(f32(REACH * REACH))
    pitch, flat = shape.shape[1], shape.reshape(-1)
    count = 0
    for j in range(i + 1, last, LANES):
        dx, dy = load(flat, X * pitch + j) - x, load(flat, Y * pitch + j) - y
        lanes = below(dx * dx, reach * (load(flat, XX * pitch + j) + xx))
        lanes &= below(dy * dy, reach * (load(flat, YY * pitch + j) + yy))
        for k in range(LANES):
            near[count + k] = j + LANES_OF[lanes, k]
        count += COUNT_OF[lanes]
    while count and near[count - 1] >= last:  # of the last vector, those beyond
        count -= 1
    for p in range(count):
        for row in range(ROOT + 1):
            found[row, p] = shape[row, near[p]]
    return count


@inner(inline="always")
def _overlapping(shape, i, count, near, found, size):
    """Keep those of `near` that i overlaps, and give the cosines; how many."""
    x, y = splat(shape[X, i]), splat(shape[Y, i])
    xx, xy, yy = splat(shape[XX, i]), splat(shape[XY, i]), splat(shape[YY, i])
    own, two, one = splat(f32(2) * shape[ROOT, i]), splat(f32(2)), splat(f32(1))
    half, reach = splat(f32(-0.5 / math.log(2))), splat(f32(REACH * REACH))
    pitch, flat = found.shape[1], found.reshape(-1)
    for p in range(0, count, LANES):
        dx, dy = load(flat, X * pitch + p) - x, load(flat, Y * pitch + p) - y
        sxx, sxy = load(flat, XX * pitch + p) + xx, load(flat, XY * pitch + p) + xy
        syy = load(flat, YY * pitch + p) + yy
        inverse = divide(one, sxx * syy - sxy * sxy)
        q = (syy * dx * dx - two * sxy * dx * dy + sxx * dy * dy) * inverse
        root = own * load(flat, ROOT * pitch + p) * square_root(inverse)
        store(size, p, zero_above(root * exp2(half * q), q, reach))
    kept = 0
    for p in range(count):
        near[kept], size[kept] = near[p], size[p]
        kept += size[kept] > f32(LEAST_OVERLAP)
    return kept


@inner(fastmath={"reassoc", "contract"})
def _solve(ends, other, cosines, residual):
    """Conjugate gradients from zero; `residual` [N, 3] is used up."""
    found, direction, applied = residual.copy(), residual.copy(), residual.copy()
    found[:] = 0.0
    left, way, to = residual.reshape(-1), direction.reshape(-1), applied.reshape(-1)
    place, energy = found.reshape(-1), 0.0
    for i in range(len(left)):
        energy += left[i] * left[i]
    for _ in range(STEPS):
        for i in range(len(way)):
            to[i] = (1 + DAMPING) * way[i]
        _add_overlaps(ends, other, cosines, direction, applied)
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


@inner()
def _add_overlaps(ends, other, cosines, direction, applied):
    begin = 0
    for i in range(len(ends)):
        r, g, b = direction[i, 0], direction[i, 1], direction[i, 2]
        sum_r, sum_g, sum_b = 0.0, 0.0, 0.0
        for p in range(begin, ends[i]):
            j, size = other[p], cosines[p]
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
