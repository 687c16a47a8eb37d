"""Codes to planes on a CPU: one compiled pass over a batch, the inverse of `kernel.decode_planes`.

The twin is `planes.encode_image`; the bytes are the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

from splatshard.pipeline.codec.kernel import log2_floor
from splatshard.pipeline.codec.layout import DIRECT, MAX_LEVEL, Codes, hilbert_tables
from splatshard.pipeline.kernels.compiled import compiled

FIELDS = 9  # of a Gaussian in `bits`: of gap and colours the extra bits, then shape and place
BYTES_PER_GAUSSIAN = 17  # at most: four times 18 extra bits, five fields of 12
DIGIT = 10  # bits of a place that one pass of the sort looks at; a place has at most two


@lru_cache(maxsize=1)
def places() -> NDArray[np.int32]:
    """Place on the curve of cell y 2^level + x, the levels one after another: int32 [4^0 + 4^1 +
    ...]."""
    tables = [hilbert_tables(level)[0].numpy().ravel() for level in range(MAX_LEVEL + 1)]
    return np.concatenate(tables).astype(np.int32)


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


@njit(inline="always")
def _token(code):
    """Token, extra bits and their width, as `layout.tokens`."""
    if -DIRECT <= code < DIRECT:
        return code + DIRECT, np.int64(0), np.int64(0)
    magnitude = abs(code)
    octave = log2_floor(magnitude)
    width = octave - 2
    token = 2 * DIRECT + DIRECT * (code < 0) + 4 * (octave - 6) + (magnitude >> width & 3)
    return token, magnitude & ((1 << width) - 1), width


@njit(inline="always")
def _class(k1, k2, k3):
    """As `layout.class_of`, of codes: their extra bits do not count."""
    base1, base2, base3 = k1 - _extra(k1), k2 - _extra(k2), k3 - _extra(k3)
    return log2_floor(base1 * base1 + base2 * base2 + base3 * base3 | 1) >> 1


@njit(inline="always")
def _extra(code):
    """What the extra bits add to a code: signed."""
    _, extra, _ = _token(code)
    return extra if code > 0 else -extra


@compiled(error_model="numpy")
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


@compiled(error_model="numpy")
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
        order[:] = other
