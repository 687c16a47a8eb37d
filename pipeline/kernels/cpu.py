"""The CPU kernel: windowed, fused forward and backward over explicit vectors, one thread, no
atomics.

Method. In one picture row a Gaussian is a one-dimensional Gaussian: with sy^2 = l21^2 + l22^2, a
pixel at (dx, dy) from the mean has

    q = (t / sx)^2 + (dy / sy)^2,    t = dx - dy * l11 l21 / sy^2,    sx = l11 l22 / sy

so a row needs only its centre, its share (dy/sy)^2 of q and where it leaves the cutoff
ellipse. These are computed for LANES rows at once; then each row runs over LANES pixels at once
without a branch: the window is rounded up to whole vectors, lanes beyond the ellipse are zeroed,
and the picture's rows are padded so that they may overrun.

The weight is one power of two, of q scaled: a sum in the exponent's bits and a polynomial of degree
5, ten operations. Letting the weights of a row follow from each other by ratios takes two, and is
slower from 1600 Gaussians on, and no faster at 400: rows of two to four vectors are too short.

The backward pass recomputes the weights (cheaper than fetching them) and keeps its nine sums in
registers over all rows of a Gaussian; the moments are of (t / sx, dy / sy), a rotation of z =
L^-1 (p - mu), so high aspect ratios lose no digits.

Rows. Everything here works on every `stride`-th row of the picture from `phase` on, too: with
y' = (y - 0.5 - phase) / stride + 0.5 and l21, l22 divided by stride, they are a picture of their
own. cpu_step.py fits on them.

Processes, not threads, use more cores: images are independent and a worker owns one core. What an
evaluation costs: benchmarks/cpu_kernel.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from splatshard.pipeline.kernels.backend import LossAndGrad
from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.pipeline.kernels.simd import (
    LANES,
    ceiling,
    exp2,
    f32,
    floor,
    fma,
    iota,
    larger,
    load,
    smaller,
    splat,
    square_root,
    store,
    total,
    zero_above,
)
from splatshard.pipeline.splats import Splats

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
HALF = f32(0.5)
LOG2_E = f32(1 / math.log(2))
RIM = f32(1e-3)
"""Pixels by which a row's window is widened: `limit` decides on the rim, not the rounded window."""
POWER = LOG2_E * f32(-0.5)
"""Over q, the weight's power of two."""
ALL, TOP = f32(1), f32(0)
"""Squeeze and phase of a picture with all of its rows."""
FIRST, LAST, START, LIMIT, BASE = range(5)
"""Rows of the scratch array: first and last pixel, t at the first pixel, largest t^2, power of two
of the row's weight."""


def render(splats: Splats, height: int, width: int, cutoff: float = 3.0) -> Tensor:
    """The sum of the Gaussians, float32 [B, 3, H, W], differentiable in means, cholesky and colors;
    see `reference.render`, the twin of this."""
    return _Render.apply(
        splats.means, splats.cholesky, splats.colors, splats.mask, height, width, cutoff
    )


def loss_and_grad(splats: Splats, target: Tensor, cutoff: float = 3.0) -> LossAndGrad:
    """See `LossAndGrad` and `reference.loss_and_grad`. `target` is float32 [B, 3, H, W]."""
    arrays = arrays_of(splats)
    gradients = _zeros(arrays)
    loss = np.empty(len(splats), f32)
    height, width = target.shape[2:]
    picture = padded_picture(1, height, width)[0]
    _loss_and_grad(*arrays, target.contiguous().numpy(), cutoff, picture, *gradients, loss)
    means, cholesky, colors = map(torch.from_numpy, gradients)
    return LossAndGrad(loss=torch.from_numpy(loss), means=means, cholesky=cholesky, colors=colors)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, cholesky, colors, mask, height, width, cutoff):
        arrays = arrays_of(Splats(means, cholesky, colors, mask))
        picture = padded_picture(len(means), height, width)
        _draw(*arrays, width, cutoff, picture)
        ctx.save_for_backward(means, cholesky, colors, mask)
        ctx.cutoff = cutoff
        return torch.from_numpy(np.ascontiguousarray(picture[..., :width]))

    @staticmethod
    def backward(ctx, grad):
        arrays = arrays_of(Splats(*ctx.saved_tensors))
        height, width = grad.shape[2:]
        picture = padded_picture(len(grad), height, width)
        picture[..., :width] = grad.numpy()
        gradients = _zeros(arrays)
        for inputs, image, outputs in zip(
            zip(*arrays, strict=True), picture, zip(*gradients, strict=True), strict=True
        ):
            _gradients(*inputs, width, f32(ctx.cutoff), image, f32(1), *outputs)
        return (*map(torch.from_numpy, gradients), None, None, None, None)


def arrays_of(splats: Splats) -> Arrays:
    """The four tensors of `splats` [B, N] as arrays, C order, float32 and bool."""
    floats = (splats.means, splats.cholesky, splats.colors)
    means, cholesky, colors = (x.detach().float().contiguous().numpy() for x in floats)
    return means, cholesky, colors, splats.mask.contiguous().numpy()


def _zeros(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of all but the mask."""
    means, cholesky, colors, _ = map(np.zeros_like, arrays)
    return means, cholesky, colors


def padded_picture(batch: int, height: int, width: int) -> np.ndarray:
    """Zeros [batch, 3, height, width + LANES]: a row's last vector may overrun its end."""
    return np.zeros((batch, 3, height, width + LANES), f32)


@compiled()
def _draw(means, cholesky, colors, mask, width, cutoff, picture):
    """Each image of a batch into its own padded picture."""
    cutoff = f32(cutoff)
    for b in range(len(means)):
        add_gaussians(
            means[b], cholesky[b], colors[b], mask[b], ALL, TOP, width, cutoff, picture[b]
        )


@compiled()
def _loss_and_grad(
    means, cholesky, colors, mask, target, cutoff, picture, g_means, g_cholesky, g_colors, loss
):
    """All images of a batch through one picture buffer, which stays in the L2 cache."""
    height, width = target.shape[2:]
    cutoff = f32(cutoff)
    size = f32(3 * height * width)
    for b in range(len(means)):
        subtract_rows(target[b], 1, 0, width, picture)
        add_gaussians(means[b], cholesky[b], colors[b], mask[b], ALL, TOP, width, cutoff, picture)
        picture[:, :, width:] = f32(0)
        loss[b] = sum_of_squares(picture.reshape(-1)) / size
        _gradients(
            means[b], cholesky[b], colors[b], mask[b], width, cutoff, picture, f32(2) / size,
            g_means[b], g_cholesky[b], g_colors[b],
        )  # fmt: skip


@inner(forceinline=True)
def subtract_rows(target, stride, phase, width, picture):
    """Minus the rows `phase`, `phase` + `stride`, ... of `target` [3, H, W] into `picture`; element
    by element, since numba compiles for seconds what says that slices do not fit."""
    for channel in range(3):
        for row in range(picture.shape[1]):
            source, line = target[channel, phase + stride * row], picture[channel, row]
            for x in range(width):
                line[x] = -source[x]


@inner(forceinline=True)
def row_window(mean_y, sy, cutoff, height):
    """First row and one past the last that the cutoff ellipse can reach; (0, 0) where there is
    none."""
    top = mean_y - cutoff * sy - HALF
    bottom = mean_y + cutoff * sy - HALF
    if not (top < height and bottom >= 0):  # also when not finite
        return 0, 0
    first = math.ceil(max(top, f32(0)))
    last = math.floor(min(bottom, f32(height - 1)))
    return first, last + 1


@inner(forceinline=True)
def row_table(dy0, count, mean_x, inv_syy, var, slope, cutoff, width, scratch):
    """Fill `scratch` for `count` rows starting dy0 below the mean. inv_syy = 1/sy^2, var = sx^2."""
    for r in range(0, count, LANES):
        dy = iota() + splat(dy0 + f32(r))
        q = dy * dy * splat(inv_syy)
        limit = larger((splat(cutoff * cutoff) - q) * splat(var), splat(f32(0)))
        shift = dy * splat(slope)
        center = shift + splat(mean_x - HALF)
        half = square_root(limit) + splat(RIM)
        first = larger(ceiling(center - half), splat(f32(0)))
        first = smaller(first, splat(f32(width)))
        last = larger(floor(center + half), splat(f32(-1)))
        start = (first + splat(HALF - mean_x)) - shift
        store(scratch[FIRST], r, first)
        store(scratch[LAST], r, smaller(last, splat(f32(width - 1))))
        store(scratch[START], r, start)
        store(scratch[LIMIT], r, limit)
        store(scratch[BASE], r, q * splat(POWER))


@inner()
def add_gaussians(means, cholesky, colors, mask, squeeze, phase, width, cutoff, picture):
    """Add every Gaussian to `picture` [3, rows, width + LANES], which is the rows `phase`,
    `phase` + 1 / `squeeze`, ... of an image; the last LANES columns are overrun."""
    height, pitch = picture.shape[1:]
    plane = height * pitch
    pixels = picture.reshape(-1)
    scratch = np.empty((5, height + LANES), f32)
    for i in range(len(means)):
        l11, l21, l22 = cholesky[i, 0], cholesky[i, 1] * squeeze, cholesky[i, 2] * squeeze
        if not (mask[i] and l11 > 0 and l22 > 0):
            continue
        mean_y = (means[i, 1] - HALF - phase) * squeeze + HALF
        syy = l21 * l21 + l22 * l22
        var = l11 * l11 * (l22 * l22 / syy)
        y0, y1 = row_window(mean_y, math.sqrt(syy), cutoff, height)
        dy = f32(y0) + HALF - mean_y
        row_table(
            dy, y1 - y0, means[i, 0], f32(1) / syy, var, l11 * l21 / syy, cutoff, width, scratch
        )
        scale = splat(POWER / var)
        red, green, blue = splat(colors[i, 0]), splat(colors[i, 1]), splat(colors[i, 2])
        for j in range(y1 - y0):
            t = iota() + splat(scratch[START, j])
            limit = splat(scratch[LIMIT, j])
            row = (y0 + j) * pitch
            base = splat(scratch[BASE, j])
            for x in range(int(scratch[FIRST, j]), int(scratch[LAST, j]) + 1, LANES):
                t2 = t * t
                w = zero_above(exp2(fma(t2, scale, base)), t2, limit)
                o = row + x
                store(pixels, o, fma(w, red, load(pixels, o)))
                store(pixels, o + plane, fma(w, green, load(pixels, o + plane)))
                store(pixels, o + 2 * plane, fma(w, blue, load(pixels, o + 2 * plane)))
                t = t + splat(f32(LANES))


@inner()
def gradient_sums(
    mean_x, mean_y, l11, l21, l22, red, green, blue, width, cutoff, height, pitch, pixels, scratch
):
    """The vector-Jacobian product of one Gaussian with `pixels`, a picture of `height` rows (its
    padding zero), in whitened coordinates: with p = w <r, color> the sums of p z, of p zz^T, and of
    w r, for residuals r."""
    plane = height * pitch
    syy = l21 * l21 + l22 * l22
    sy = math.sqrt(syy)
    sx = l11 * (l22 / sy)
    y0, y1 = row_window(mean_y, sy, cutoff, height)
    dy = f32(y0) + HALF - mean_y
    row_table(dy, y1 - y0, mean_x, f32(1) / syy, sx * sx, l11 * l21 / syy, cutoff, width, scratch)
    scale = splat(POWER / (sx * sx))
    red, green, blue = splat(red), splat(green), splat(blue)
    zero = splat(f32(0))
    sum_r, sum_g, sum_b = zero, zero, zero
    sum_t, sum_y, sum_tt, sum_ty, sum_yy = zero, zero, zero, zero, zero
    for j in range(y1 - y0):
        t = iota() + splat(scratch[START, j])
        limit = splat(scratch[LIMIT, j])
        row = (y0 + j) * pitch
        row_p, row_t = zero, zero
        base = splat(scratch[BASE, j])
        for x in range(int(scratch[FIRST, j]), int(scratch[LAST, j]) + 1, LANES):
            t2 = t * t
            w = zero_above(exp2(fma(t2, scale, base)), t2, limit)
            o = row + x
            r, g, b = load(pixels, o), load(pixels, o + plane), load(pixels, o + 2 * plane)
            sum_r, sum_g, sum_b = fma(w, r, sum_r), fma(w, g, sum_g), fma(w, b, sum_b)
            p = w * fma(r, red, fma(g, green, b * blue))
            row_p = row_p + p
            row_t = fma(p, t, row_t)
            sum_tt = fma(p, t2, sum_tt)
            t = t + splat(f32(LANES))
        y = splat(dy + f32(j))
        sum_t = sum_t + row_t
        sum_ty = fma(row_t, y, sum_ty)
        sum_y = fma(row_p, y, sum_y)
        sum_yy = fma(row_p * y, y, sum_yy)
    # Moments of (u, v) = (t / sx, dy / sy), rotated into those of z = L^-1 (p - mu).
    cos, sin = l22 / sy, l21 / sy
    u, v = total(sum_t) / sx, total(sum_y) / sy
    uu, uv, vv = total(sum_tt) / (sx * sx), total(sum_ty) / (sx * sy), total(sum_yy) / syy
    return (
        cos * u + sin * v,
        cos * v - sin * u,
        cos * cos * uu + f32(2) * cos * sin * uv + sin * sin * vv,
        cos * sin * (vv - uu) + (cos * cos - sin * sin) * uv,
        sin * sin * uu - f32(2) * cos * sin * uv + cos * cos * vv,
        total(sum_r),
        total(sum_g),
        total(sum_b),
    )


@inner(forceinline=True)
def unwhitened(l11, l21, l22, z1, z2, z11, z21, z22):
    """`gradient_sums` as gradients of mean and factor: L^-T z and lower(L^-T zz^T)."""
    return (
        (z1 - l21 * z2 / l22) / l11,
        z2 / l22,
        (z11 - l21 * z21 / l22) / l11,
        z21 / l22,
        z22 / l22,
    )


@compiled()
def _gradients(
    means, cholesky, colors, mask, width, cutoff, picture, scale, g_means, g_cholesky, g_colors
):
    """`scale` times the vector-Jacobian product of `add_gaussians` with `picture` (its padding
    zero)."""
    height, pitch = picture.shape[1:]
    pixels = picture.reshape(-1)
    scratch = np.empty((5, height + LANES), f32)
    for i in range(len(means)):
        l11, l21, l22 = cholesky[i, 0], cholesky[i, 1], cholesky[i, 2]
        if not (mask[i] and l11 > 0 and l22 > 0):
            continue
        z1, z2, z11, z21, z22, r, g, b = gradient_sums(
            means[i, 0], means[i, 1], l11, l21, l22, colors[i, 0], colors[i, 1], colors[i, 2],
            width, cutoff, height, pitch, pixels, scratch,
        )  # fmt: skip
        gx, gy, g11, g21, g22 = unwhitened(l11, l21, l22, z1, z2, z11, z21, z22)
        g_means[i, 0], g_means[i, 1] = scale * gx, scale * gy
        g_cholesky[i, 0], g_cholesky[i, 1], g_cholesky[i, 2] = scale * g11, scale * g21, scale * g22
        g_colors[i, 0], g_colors[i, 1], g_colors[i, 2] = scale * r, scale * g, scale * b


@inner()
def sum_of_squares(values):
    """Sum of squares of a float32 array whose length is any; vector lanes, then the tail."""
    whole = len(values) // LANES * LANES
    sums = splat(f32(0))
    for i in range(0, whole, LANES):
        x = load(values, i)
        sums = fma(x, x, sums)
    tail = f32(0)
    for i in range(whole, len(values)):
        tail += values[i] * values[i]
    return total(sums) + tail
