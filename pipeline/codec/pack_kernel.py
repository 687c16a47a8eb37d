"""Gaussians to codes and codes to planes on a CPU: compiled passes over a batch.

`on_grid` has its twin in quantise.py, `encode` in `planes.encode_image`: the same integers, the
same bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numba import uint64
from numpy.typing import NDArray

from splatshard.pipeline.codec.bits import log2_floor
from splatshard.pipeline.codec.layout import (
    CELLS_PER_OCTAVE,
    DIRECT,
    MAX_CODE,
    MAX_LEVEL,
    MAX_WIDTH,
    OPPONENT,
    RATIO_CELLS,
    SHEAR_CELLS,
    SHEAR_RANGE,
    SHEAR_UNIT,
    SIZE_CELLS,
    STEP_RANGE,
    Codes,
    hilbert_tables,
    level_of,
    slant_table,
)
from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.pipeline.splats import Splats

FIELDS = 9  # of a Gaussian in `bits`: of gap and colours the extra bits, then shape and place
BYTES_PER_GAUSSIAN = 17  # at most: four times 18 extra bits, five fields of 12
LARGEST = float(np.finfo(np.float64).max)
DIGIT = 10  # bits of a place that one pass of the sort looks at; a place has at most two


@lru_cache(maxsize=1)
def places() -> NDArray[np.int32]:
    """Place on the curve of cell y 2^level + x, the levels one after another: int32 [4^0 + 4^1 +
    ...]."""
    tables = [hilbert_tables(level)[0].numpy().ravel() for level in range(MAX_LEVEL + 1)]
    return np.concatenate(tables).astype(np.int32)


def on_grid(splats: Splats, solved: Splats, step: torch.Tensor, height: int, width: int) -> Codes:
    """As `quantise.on_grid`, of splats [B, N] in main memory, for images of `height` x `width`."""
    level, cell_log = level_of(splats.num_gaussians, height, width)
    batch, n = splats.mask.shape
    step = step.clone()
    colors = np.empty((batch, n, 3), np.int64)
    cells = np.empty((8, batch, n), np.int64)
    values = (splats.means, splats.cholesky, solved.cholesky, solved.colors)
    put_on_grid(
        *(x.double().contiguous().numpy() for x in values),
        splats.mask.contiguous().numpy(),
        step.numpy(),
        level.numpy(),
        cell_log.numpy(),
        (height, width),
        np.array(OPPONENT),
        slant_table().numpy(),
        colors,
        cells,
    )
    names = ("size", "ratio", "shear", "x", "y", "width", "width_x", "width_y")
    found = dict(zip(names, map(torch.from_numpy, cells), strict=True))
    return Codes(step, level, cell_log, torch.from_numpy(colors), **found, mask=splats.mask)


@compiled()
def put_on_grid(
    means, cholesky, solved, tint, mask, step, level, cell_log, picture, opponent, slant,
    colors, cells,
):  # fmt: skip
    """See `on_grid`; `solved` and `tint` are cholesky and colours of the solution. `cells`: size,
    ratio, shear, x, y, then their widths, in the order of `Codes`."""
    height, width = picture
    side = max(height, width)
    for b in range(len(means)):
        step[b] = _color_codes(solved[b], tint[b], mask[b], step[b], opponent, colors[b])
        last = (1 << level[b]) - 1
        for i in range(mask.shape[1]):
            l11, l21, l22 = 1.0, 1.0, 1.0
            if mask[b, i]:
                l11, l21, l22 = cholesky[b, i, 0], cholesky[b, i, 1], cholesky[b, i, 2]
            octave = _class(colors[b, i, 0], colors[b, i, 1], colors[b, i, 2])
            wide = _clamp(octave - 1)
            log11, log22 = np.log2(l11), np.log2(l22)
            size = _place((log11 + log22) / 2 * CELLS_PER_OCTAVE, wide, SIZE_CELLS)
            ratio = _place((log11 - log22) / 2 * CELLS_PER_OCTAVE, wide, RATIO_CELLS)
            middle = (ratio + 0.5) / (1 << wide)
            slope = l21 / l11 * np.exp2(2 * middle / CELLS_PER_OCTAVE)
            shear = _place(math.asinh(slope / SHEAR_UNIT) * SHEAR_CELLS, wide, SHEAR_RANGE)
            wanted, a, d = 2 * octave + cell_log[b] + 1, size >> wide, ratio >> wide
            wide_x = _clamp((wanted - (a + d + 1) + slant[(shear >> wide) + DIRECT]) >> 1)
            wide_y = _clamp((wanted - (a - d)) >> 1)
            x = ((means[b, i, 0] - width / 2) / (2 * side) + 0.5) * (last + 1)
            y = ((means[b, i, 1] - height / 2) / (2 * side) + 0.5) * (last + 1)
            cells[0, b, i], cells[1, b, i], cells[2, b, i] = size, ratio, shear
            cells[3, b, i] = _place(x, wide_x, (0, last))
            cells[4, b, i] = _place(y, wide_y, (0, last))
            cells[5, b, i], cells[6, b, i], cells[7, b, i] = wide, wide_x, wide_y


@inner(inline="always")
def _color_codes(cholesky, tint, mask, step, opponent, colors):
    """Fill in the codes of one image; its step, as `quantise.color_codes`."""
    n = len(mask)
    amplitude, largest = np.zeros((n, 3)), 0.0
    for i in range(n):
        if not mask[i]:
            continue
        scale = math.sqrt(math.pi * cholesky[i, 0] * cholesky[i, 2])
        for k in range(3):
            value = 0.0
            for c in range(3):
                value += tint[i, c] * scale * opponent[k, c]
            value = 0.0 if math.isnan(value) else min(max(value, -LARGEST), LARGEST)
            amplitude[i, k] = value
            largest = max(largest, abs(value))
    step = max(step, largest / (MAX_CODE - 2))
    if math.isnan(step):
        step = STEP_RANGE[1]
    step = np.float64(np.float32(min(max(step, STEP_RANGE[0]), STEP_RANGE[1])))
    for i in range(n):
        for k in range(3):
            code = np.rint(amplitude[i, k] / step)
            colors[i, k] = np.int64(min(max(code, 1.0 - MAX_CODE), MAX_CODE - 1.0))
    return step


@inner(forceinline=True)
def _clamp(width):
    return min(max(width, 0), MAX_WIDTH)


@inner(forceinline=True)
def _place(value, width, cells):
    """As `quantise.place`; something in range for a NaN as well."""
    lowest, highest = cells[0] << width, (cells[1] + 1 << width) - 1
    fine = np.floor(value * (1 << width))
    return min(max(np.int64(min(max(fine, lowest), highest)), lowest), highest)


def encode(codes: Codes) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """Of B images of up to N Gaussians, codes in main memory: tokens uint8 [B, 7, N], bits uint8
    [B, ...], and bytes of bits [B]."""
    batch, n = codes.mask.shape
    symbols = np.empty((batch, 7, n), np.uint8)
    bits = np.empty((batch, BYTES_PER_GAUSSIAN * n), np.uint8)
    sizes = np.empty(batch, np.int64)
    names = ("size", "ratio", "shear", "x", "y")
    widths = ("width", "width_x", "width_y")
    encode_planes(
        codes.level.numpy(),
        codes.colors.numpy(),
        tuple(getattr(codes, name).numpy() for name in names),
        tuple(getattr(codes, name).numpy() for name in widths),
        codes.mask.numpy(),
        places(),
        symbols,
        bits,
        sizes,
    )
    return symbols, bits, sizes


@inner(forceinline=True)
def _token(code):
    """Token, extra bits and their width, as `layout.tokens`."""
    if -DIRECT <= code < DIRECT:
        return code + DIRECT, np.int64(0), np.int64(0)
    magnitude = abs(code)
    octave = log2_floor(magnitude)
    width = octave - 2
    token = 2 * DIRECT + DIRECT * (code < 0) + 4 * (octave - 6) + (magnitude >> width & 3)
    return token, magnitude & ((1 << width) - 1), width


@inner(forceinline=True)
def _class(k1, k2, k3):
    """As `layout.class_of`, of codes: their extra bits do not count."""
    base1, base2, base3 = k1 - _extra(k1), k2 - _extra(k2), k3 - _extra(k3)
    return log2_floor(base1 * base1 + base2 * base2 + base3 * base3 | 1) >> 1


@inner(forceinline=True)
def _extra(code):
    """What the extra bits add to a code: signed."""
    _, extra, _ = _token(code)
    return extra if code > 0 else -extra


@compiled()
def encode_planes(level, colors, cells, widths, mask, curve, symbols, bits, sizes):
    """See `encode`; `cells` and `widths` [B, N] in the order of `Codes`, `curve` is `places()`."""
    size, ratio, shear, x, y = cells
    width, width_x, width_y = widths
    n = mask.shape[1]
    order, place = np.empty(n, np.int64), np.empty(n, np.int64)
    value, wide = np.empty(FIELDS, np.int64), np.empty(FIELDS, np.int64)
    for b in range(len(mask)):
        first = ((1 << 2 * level[b]) - 1) // 3
        count = 0
        for i in range(n):
            if mask[b, i]:
                cell = (y[b, i] >> width_y[b, i] << level[b]) + (x[b, i] >> width_x[b, i])
                place[i] = curve[first + cell]
                order[count] = i
                count += 1
        _sort(order[:count], place)
        word, filled, at, before = uint64(0), 0, 0, np.int64(0)
        for j in range(count):
            i = order[j]
            k1, k2, k3 = colors[b, i, 0], colors[b, i, 1], colors[b, i, 2]
            symbols[b, 0, j], value[0], wide[0] = _token(place[i] - before - DIRECT)
            symbols[b, 1, j], value[1], wide[1] = _token(k1)
            symbols[b, 2, j], value[2], wide[2] = _token(k2)
            symbols[b, 3, j], value[3], wide[3] = _token(k3)
            before = place[i]
            wide[4:7] = width[b, i]
            wide[7], wide[8] = width_x[b, i], width_y[b, i]
            value[4], value[5], value[6] = size[b, i], ratio[b, i], shear[b, i]
            value[7], value[8] = x[b, i], y[b, i]
            coarse = (value[4] >> wide[4]) - _class(k1, k2, k3)
            symbols[b, 4, j] = coarse + DIRECT
            symbols[b, 5, j] = (value[5] >> wide[5]) + DIRECT
            symbols[b, 6, j] = (value[6] >> wide[6]) + DIRECT
            for f in range(FIELDS):
                low = value[f] & ((1 << wide[f]) - 1)
                word |= uint64(low) << uint64(filled)
                filled += wide[f]
                while filled >= 8:
                    bits[b, at] = word & uint64(255)
                    word >>= uint64(8)
                    filled -= 8
                    at += 1
        if filled:
            bits[b, at] = word & uint64(255)
            at += 1
        sizes[b] = at


@inner(inline="always")
def _sort(order, place):
    """Put the indices `order` in the order of place[index]; equal places keep theirs."""
    other = np.empty_like(order)
    for shift in (0, DIGIT):
        start = np.zeros((1 << DIGIT) + 1, np.int64)
        for i in order:
            start[(place[i] >> shift & ((1 << DIGIT) - 1)) + 1] += 1
        for digit in range(1 << DIGIT):
            start[digit + 1] += start[digit]
        for i in order:
            digit = place[i] >> shift & ((1 << DIGIT) - 1)
            other[start[digit]] = i
            start[digit] += 1
        for j in range(len(order)):
            order[j] = other[j]
