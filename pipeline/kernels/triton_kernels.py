"""The GPU kernels of a fitting step: draw, differentiate, Adam.

Forward: one program of one warp per image and tile of 8 x 8 px. It takes the tile's list in groups
of GROUP Gaussians, evaluates group x 64 pixels, sums over the group within each thread, keeps RGB
in registers, subtracts the target, and writes the residual and the tile's sum of squares.

Backward: the rendering is a sum, so a Gaussian's gradient needs only the residual and its own
window: one program of one warp per SHARED Gaussians of an image, 8 lanes each. A window is a
slanted strip: with sy^2 = l21^2 + l22^2, the row at dy from the mean is centred at dy l11 l21 /
sy^2 and at most 2 cutoff l11 l22 / sy wide, so a long diagonal Gaussian pays for its own area, not
for its bounding box. Strips are walked as flat pixel numbers, PIXELS at a time, so narrow windows
waste no lanes. The weights are recomputed (14 operations; a store and a load would cost more). A
program runs to its largest window, and those of one image reach from 10 to 30,000 px, so Gaussians
share programs in the order of their windows (`triton_backend.by_window`): in the order of the start
the kernel has twice the instructions. Lanes are a flat vector. As SHARED x PIXELS, Triton 3.6 gives
addresses and loads different layouts, and a round has 230 instructions instead of 57.

With z = L^-1 (p - mu) and e = w <residual, color>, the sums of e z and of lower(e z z^T) are the
gradient in whitened coordinates (mu += L d, L <- L (I + T)), with no cancellation at high aspect
ratio, and d loss / d mu = L^-T sum(e z), d loss / d L = lower(L^-T sum(e z z^T)).

Adam is a kernel of its own, one thread per Gaussian: fused into the backward kernel, its 200
instructions would be repeated by all 8 lanes of a Gaussian, which at N = 4900 (windows of 64 to
100 px) doubles that kernel; the gradient's way through memory costs 64 bytes per Gaussian.

Nothing is atomic and every sum has a fixed order: two runs give the same bits, and an image does
not depend on its batch. (Reductions of torch around them may round otherwise in a batch of another
size, so the bytes of a shard can depend on that.)

Arithmetic (counted in the machine code for sm_90 with Triton 3.7.1 and 3.6.0, and in the windows
and tiles of fits on the CPU by benchmarks/gpu_counts.py; not measured: no GPU was at hand).
Forward: 949 instructions per warp for 32 Gaussians x 64 pixels and 243 around them, 168 registers,
so 12 warps per SM, each with 64 independent evaluations. Backward: 57 per 32 evaluations (addresses
and bounds are half of them) and 335 around them, 52 registers, 32 warps per SM, the most that
blocks of one warp can have. Neither spills. On 224 x 224 px, million warp instructions per image
and step:

    N      forward  backward  lists, every other step   Adam   in all
    400       1.00      1.16                     0.23   0.01     2.40
    1600      1.20      1.20                     0.31   0.02     2.73
    4900      1.56      1.50                     0.62   0.06     3.74

An H200 can issue 132 SM x 4 x 1.98 G = 1.05 T/s, so at most 0.43 M image-steps/s at N = 400, and
0.28 M where 65 % of that is reached. Tiles of 16 px with groups of 8 have no fewer instructions.

Left out: the residual in half precision (it would halve 1.2 of about 2 MB of traffic per image and
step, which at 3.3 TB/s is 0.6 us: arithmetic is the larger bound, so it would cost digits for
nothing certain); tensor cores for the exponent (z is 2-dimensional: a GEMM with k = 6 in tf32 has
10 bits, and q up to 9 needs more; tile_step.cu has them for the sums); CUDA graphs (a step is five
launches; with a thousand images they take milliseconds, and an unbatched fit is not what this
backend is for).
"""

from __future__ import annotations

import triton
import triton.language as tl

from splatshard.pipeline.kernels.triton_launch import SIZES, jit
from splatshard.pipeline.kernels.triton_lists import candidates, listed
from splatshard.pipeline.splats import MIN_SIGMA_PX as SMALLEST

GROUP = 32
"""Gaussians of a tile evaluated at once: loaded one per lane, then shared by all lanes."""
SHARED, PIXELS = 4, 8
"""Gaussians per program of the backward kernel, and pixels of each evaluated at once: a warp."""
ADAM_BLOCK = 128
"""Gaussians per program of the Adam kernel, 4 warps."""
HUGE = tl.constexpr(1e30)
LOG2_E_HALF = tl.constexpr(0.7213475204444817)
MIN_SIGMA_PX = tl.constexpr(SMALLEST)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    means, cholesky, colors, mask, target, out, squares,
    fine, fine_counts, coarse, coarse_counts, columns, tiles, coarse_columns, coarse_tiles,
    n, height, width, cutoff, whole_height, stride, phase,
    TILE: tl.constexpr, RATIO: tl.constexpr, CAPACITY: tl.constexpr,
    COARSE_CAPACITY: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile of `out`: the rendering [B, 3, H, W], or with RESIDUAL rendering - target as
    [B, H, W, 3], and the tile's sum of its squares in `squares` [B, tiles]. H counts the rows
    `phase`, `phase` + `stride`, ... of `target` [B, 3, whole_height, W]."""
    program = tl.program_id(0)
    image, tile = (program // tiles).to(tl.int64), program % tiles
    start, count, whole = candidates(
        fine, fine_counts, coarse, coarse_counts, columns, tiles, coarse_columns, coarse_tiles,
        image, tile, n, RATIO, CAPACITY, COARSE_CAPACITY,
    )  # fmt: skip
    pixel = tl.arange(0, TILE * TILE)
    px, py = tile % columns * TILE + pixel % TILE, tile // columns * TILE + pixel // TILE
    x, y = px.to(tl.float32)[None, :], (py * stride + phase).to(tl.float32)[None, :]
    red = tl.zeros([TILE * TILE], tl.float32)
    green = tl.zeros([TILE * TILE], tl.float32)
    blue = tl.zeros([TILE * TILE], tl.float32)
    for first in range(0, count, GROUP):
        index, live = listed(start, first + tl.arange(0, GROUP), count, whole)
        i = image * n + index
        mx, my = tl.load(means + 2 * i, live, 0), tl.load(means + 2 * i + 1, live, 0)
        l11 = tl.load(cholesky + 3 * i, live, 0)
        l21 = tl.load(cholesky + 3 * i + 1, live, 0)
        l22 = tl.load(cholesky + 3 * i + 2, live, 0)
        r = tl.load(colors + 3 * i, live, 0)
        g = tl.load(colors + 3 * i + 1, live, 0)
        b = tl.load(colors + 3 * i + 2, live, 0)
        live &= tl.load(mask + i, live, 0) != 0
        live &= (l11 > 0) & (l22 > 0)
        limit = tl.where(live, cutoff * cutoff, -1.0)
        inv11, inv22 = 1 / tl.where(live, l11, 1), 1 / tl.where(live, l22, 1)
        inv21 = -l21 * inv11 * inv22
        dx, dy = x - (mx - 0.5)[:, None], y - (my - 0.5)[:, None]
        z1 = dx * inv11[:, None]
        z2 = dx * inv21[:, None] + dy * inv22[:, None]
        q = z1 * z1 + z2 * z2
        w = tl.where(q <= limit[:, None], tl.exp2(q * -LOG2_E_HALF), 0)
        red += tl.sum(w * r[:, None], 0)
        green += tl.sum(w * g[:, None], 0)
        blue += tl.sum(w * b[:, None], 0)
    inside = (px < width) & (py < height)
    plane = whole_height * width
    at = image * 3 * plane + (py * stride + phase) * width + px
    step = plane
    if RESIDUAL:
        red = tl.where(inside, red - tl.load(target + at, inside, 0), 0)
        green = tl.where(inside, green - tl.load(target + at + plane, inside, 0), 0)
        blue = tl.where(inside, blue - tl.load(target + at + 2 * plane, inside, 0), 0)
        tl.store(squares + program, tl.sum(red * red + green * green + blue * blue, 0))
        at = 3 * (image * height * width + py * width + px)
        step = 1
    tl.store(out + at, red, inside)
    tl.store(out + at + step, green, inside)
    tl.store(out + at + 2 * step, blue, inside)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(squares, loss, tiles, scale, BLOCK: tl.constexpr):
    """loss[b] = scale * the sum of squares[b], in an order that does not depend on the batch."""
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tiles, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(squares + image * tiles + k, k < tiles, 0)
    tl.store(loss + image, tl.sum(total, 0) * scale)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    means, cholesky, colors, mask, field, gradient, order,
    n, groups, height, width, cutoff, scale, squeeze, shift,
    SHARED: tl.constexpr, PIXELS: tl.constexpr, WHITENED: tl.constexpr,
):  # fmt: skip
    """`gradient` [B, N, 8] = scale * the vector-Jacobian product of the rendering with `field`
    [B, H, W, 3], for (position 2, shape 3, colour 3); 0 for Gaussians that draw nothing. The field
    is some rows of a picture, in which y is y * `squeeze` - `shift`.

    `order` int32 [B, N], a permutation of each image's Gaussians, says which ones share a program;
    the gradient's bits do not depend on it."""
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    lane = tl.arange(0, SHARED * PIXELS)
    slot = program % groups * SHARED + lane // PIXELS
    exists = slot < n
    i = image * n + tl.load(order + image * n + slot, exists, 0)
    mx, my = tl.load(means + 2 * i, exists, 0), tl.load(means + 2 * i + 1, exists, 0)
    l11 = tl.load(cholesky + 3 * i, exists, 0)
    l21 = tl.load(cholesky + 3 * i + 1, exists, 0)
    l22 = tl.load(cholesky + 3 * i + 2, exists, 0)
    my = my * squeeze - shift  # from here on, in the picture that the rows make
    l21, l22 = l21 * squeeze, l22 * squeeze
    cr = tl.load(colors + 3 * i, exists, 0)
    cg = tl.load(colors + 3 * i + 1, exists, 0)
    cb = tl.load(colors + 3 * i + 2, exists, 0)
    drawn = (tl.load(mask + i, exists, 0) != 0) & (l11 > 0) & (l22 > 0)
    l11, l22 = tl.where(drawn, l11, 1), tl.where(drawn, l22, 1)
    # finite, whatever the parameters: a weight of 0 times z must be 0
    inv11, inv22 = tl.minimum(1 / l11, HUGE), tl.minimum(1 / l22, HUGE)
    inv21 = tl.minimum(tl.maximum(-l21 * inv11 * inv22, -HUGE), HUGE)

    # The window: `rows` from `high`, each `columns` wide from its own left edge. Compared and
    # clamped as floats, so that no NaN or huge value is ever converted to an integer.
    sy = tl.sqrt(l21 * l21 + l22 * l22)
    half_y, half_x = cutoff * sy * 1.00001 + 1e-3, cutoff * l11 * (l22 / sy) * 1.00001 + 1e-3
    slope = l11 * (l21 / sy) / sy
    center_x, center_y = mx - 0.5, my - 0.5
    high, low = center_y - half_y, center_y + half_y
    drawn &= (high < height) & (low >= 0)
    drawn &= (mx - cutoff * l11 < width) & (mx + cutoff * l11 > 0)
    high = tl.ceil(tl.where(drawn & (high > 0), high, 0))
    low = tl.where(low < height - 1, tl.where(drawn, low, 0), height - 1)
    rows = tl.where(drawn, tl.floor(low) - high + 1, 0)
    columns = tl.floor(2 * half_x) + 1
    columns = tl.where(columns < width, columns, width)
    columns = tl.where(columns >= 1, columns, 1)
    count = rows * columns
    per_column, edge = 1 / columns, center_x - half_x
    plane = height * width
    rgb = field + image * 3 * plane

    sum_r = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_g = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_b = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_1 = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_2 = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_11 = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_21 = tl.zeros([SHARED * PIXELS], tl.float32)
    sum_22 = tl.zeros([SHARED * PIXELS], tl.float32)
    own = (lane % PIXELS).to(tl.float32)
    for first in range(0, tl.max(count, 0).to(tl.int32), PIXELS):
        k = own + first
        row = tl.floor((k + 0.5) * per_column)  # exact up to 4 M pixels per window
        y = high + row
        dy = y - center_y
        left = tl.minimum(tl.maximum(tl.ceil(edge + slope * dy), 0), width)
        x = left + (k - row * columns)
        pixel = y.to(tl.int32) * width + x.to(tl.int32)
        inside = (k < count) & (x < width) & (pixel.to(tl.uint32) < plane)
        at = rgb + 3 * pixel
        red = tl.load(at, inside, 0)
        green = tl.load(at + 1, inside, 0)
        blue = tl.load(at + 2, inside, 0)
        dx = x - center_x
        z1 = dx * inv11
        z2 = dx * inv21 + dy * inv22
        q = z1 * z1 + z2 * z2
        w = tl.where(inside & (q <= cutoff * cutoff), tl.exp2(q * -LOG2_E_HALF), 0)
        sum_r += w * red
        sum_g += w * green
        sum_b += w * blue
        e = w * (red * cr + green * cg + blue * cb)
        e1, e2 = e * z1, e * z2
        sum_1 += e1
        sum_2 += e2
        sum_11 += e1 * z1
        sum_21 += e1 * z2
        sum_22 += e2 * z2
    if not WHITENED:
        sum_1, sum_2 = sum_1 * inv11 + sum_2 * inv21, sum_2 * inv22 * squeeze
        sum_11, sum_21 = sum_11 * inv11 + sum_21 * inv21, sum_21 * inv22 * squeeze
        sum_22 = sum_22 * inv22 * squeeze
    slot = program % groups * SHARED + tl.arange(0, SHARED)
    exists = slot < n
    out = gradient + 8 * (image * n + tl.load(order + image * n + slot, exists, 0))
    tl.store(out, of_each(sum_1, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 1, of_each(sum_2, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 2, of_each(sum_11, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 3, of_each(sum_21, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 4, of_each(sum_22, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 5, of_each(sum_r, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 6, of_each(sum_g, drawn, scale, SHARED, PIXELS), exists)
    tl.store(out + 7, of_each(sum_b, drawn, scale, SHARED, PIXELS), exists)


@jit
def of_each(parts, drawn, scale, SHARED: tl.constexpr, PIXELS: tl.constexpr):
    """scale * the sums of `parts` [SHARED * PIXELS] over each Gaussian's lanes, [SHARED]; 0 where
    it is not drawn."""
    parts = tl.where(drawn, parts * scale, 0)
    return tl.sum(tl.reshape(parts, [SHARED, PIXELS]), 1)


@triton.jit(do_not_specialize=SIZES)
def adam_kernel(
    means, cholesky, colors, gradient, moment1, moment2, count,
    keep1, keep2, correction2, rate_means, rate_shape, rate_colors, l1_colors,
    low_x, high_x, low_y, high_y, largest,
    BLOCK: tl.constexpr, WHITENED: tl.constexpr,
):  # fmt: skip
    """One Adam step of `count` = B * N Gaussians in place; the twin is `TorchStep.step`.

    rate_* already hold the schedule and the first moment's bias correction; the last five numbers
    are `splats.bounds`.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    r = tl.load(colors + 3 * i, live, 0)
    g = tl.load(colors + 3 * i + 1, live, 0)
    b = tl.load(colors + 3 * i + 2, live, 0)
    at = 8 * i
    dx = adam(gradient, moment1, moment2, at, live, 0.0, keep1, keep2, correction2)
    dy = adam(gradient, moment1, moment2, at + 1, live, 0.0, keep1, keep2, correction2)
    t11 = adam(gradient, moment1, moment2, at + 2, live, 0.0, keep1, keep2, correction2)
    t21 = adam(gradient, moment1, moment2, at + 3, live, 0.0, keep1, keep2, correction2)
    t22 = adam(gradient, moment1, moment2, at + 4, live, 0.0, keep1, keep2, correction2)
    l1_r, l1_g, l1_b = l1_colors * sign(r), l1_colors * sign(g), l1_colors * sign(b)
    dr = adam(gradient, moment1, moment2, at + 5, live, l1_r, keep1, keep2, correction2)
    dg = adam(gradient, moment1, moment2, at + 6, live, l1_g, keep1, keep2, correction2)
    db = adam(gradient, moment1, moment2, at + 7, live, l1_b, keep1, keep2, correction2)
    tl.store(colors + 3 * i, r - rate_colors * dr, live)
    tl.store(colors + 3 * i + 1, g - rate_colors * dg, live)
    tl.store(colors + 3 * i + 2, b - rate_colors * db, live)
    dx, dy = -rate_means * dx, -rate_means * dy
    t11, t21, t22 = -rate_shape * t11, -rate_shape * t21, -rate_shape * t22
    x, y = tl.load(means + 2 * i, live, 0), tl.load(means + 2 * i + 1, live, 0)
    l11 = tl.load(cholesky + 3 * i, live, 1)
    l21 = tl.load(cholesky + 3 * i + 1, live, 0)
    l22 = tl.load(cholesky + 3 * i + 2, live, 1)
    if WHITENED:
        x, y = x + l11 * dx, y + (l21 * dx + l22 * dy)
        grow = tl.exp(t11)
        l11, l21, l22 = l11 * grow, l21 * grow + l22 * t21, l22 * tl.exp(t22)
    else:
        x, y, l21 = x + dx, y + dy, l21 + t21
        l11, l22 = tl.maximum(l11 + t11, MIN_SIGMA_PX), tl.maximum(l22 + t22, MIN_SIGMA_PX)
    tl.store(means + 2 * i, within(x, low_x, high_x), live)
    tl.store(means + 2 * i + 1, within(y, low_y, high_y), live)
    tl.store(cholesky + 3 * i, within(l11, -largest, largest), live)
    tl.store(cholesky + 3 * i + 1, within(l21, -largest, largest), live)
    tl.store(cholesky + 3 * i + 2, within(l22, -largest, largest), live)


@jit
def within(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@jit
def adam(gradient, moment1, moment2, at, live, penalty, keep1, keep2, correction2):
    """Update the moments of one parameter; its direction, before the rate."""
    g = tl.load(gradient + at, live, 0) + penalty
    m1 = tl.load(moment1 + at, live, 0)
    m2 = tl.load(moment2 + at, live, 0)
    m1 += (1 - keep1) * (g - m1)
    m2 += (1 - keep2) * (g * g - m2)
    tl.store(moment1 + at, m1, live)
    tl.store(moment2 + at, m2, live)
    return m1 / (tl.sqrt(m2 / correction2) + 1e-12)


@jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
