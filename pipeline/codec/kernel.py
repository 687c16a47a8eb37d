"""Payloads to float32 Gaussians on a CPU: one compiled pass over a batch, straight from columns.

The twin of `planes.decode` and `layout.dequantise`, to a few float32 roundings. A chunk of
Gaussians at a time goes through three loops: their tokens to codes and widths, in vectors; what
only goes one by one, the places of their bits; and these to parameters, in vectors. No table is
looked up but one: codes, curve and powers are computed, so that a Gaussian takes some five
nanoseconds. Nothing read from a payload is used as an index before it was checked; a row that is
not valid gets a status, never a fault.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numba import float32, float64, int64, uint64
from numpy.typing import NDArray

from splatshard.pipeline.codec.bits import bits_of, eight_or_more, single, sixteen, word_at
from splatshard.pipeline.codec.layout import (
    CELLS_PER_OCTAVE,
    DIRECT,
    HEADER,
    MAX_LEVEL,
    MAX_WIDTH,
    SHEAR_CELLS,
    SHEAR_UNIT,
    slant_table,
)
from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.pipeline.kernels.simd import (
    WIDE,
    any_bit,
    divide,
    exp2,
    exponent,
    f32,
    fma,
    half_to_float,
    larger,
    load_wide,
    low_bits,
    power_of_two,
    smaller,
    store,
    store_rows,
    to_float,
    where,
)
from splatshard.schemas.errors import CorruptShardError

HEADER_BYTES = HEADER.size
CHUNK = 64
"""Gaussians at a time, whose integers stay in the first cache."""
FIELDS = 13
(GAP, C0, C1, C2, FAR, SIZE, RATIO, SHEAR, SLANT, WIDTH, WIDTH_X, WIDTH_Y, BITS) = range(
    0, FIELDS * CHUNK, CHUNK
)
"""Where a chunk's fields begin: codes, widths of extra bits in a byte each, cells, widths, the sum
of these."""
POWER = f32(1 / SHEAR_CELLS / math.log(2))
POWER_LOST = f32(1 / SHEAR_CELLS / math.log(2) - float(POWER))
"""What rounding took from it."""
EVEN_BITS = 0x55555555
LN_2, ROOT_2, ROOT_3, ROOT_6 = f32(math.log(2)), f32(2**-0.5), f32(3**-0.5), f32(6**-0.5)
ROW_OK, ROW_OFFSETS, ROW_LENGTH, ROW_HEADER, ROW_SYMBOL, ROW_PLACE = range(6)
MESSAGES = (
    "",
    "a column's offsets lie outside of its bytes",
    "its planes do not fit together",
    "its step or level is out of range",
    "a shape is out of range",
    "a Gaussian lies outside of its square",
)


@lru_cache(maxsize=1)
def slants() -> NDArray[np.int32]:
    """`slant_table` [256], zero for bytes that are no token of shears."""
    return np.pad(slant_table().numpy(), (0, 256 - 2 * DIRECT)).astype(np.int32)


@compiled()
def decode_planes(
    data, lengths, offsets, rows, counts, heights, widths, slant_of, start, out, status
):
    """Row rows[i] of the eight planes into out[i, 8 * start : 8 * (start + counts[i])].

    data, lengths: the planes' bytes, 8 or more, and how many of them count; offsets: where their
    rows begin; slant_of: `slants()`; status uint8 [B], zeros.
    """
    codes = np.empty(FIELDS * CHUNK, np.int32)
    bits, rest = np.empty(CHUNK, np.uint64), np.empty(8 * WIDE, np.float32)
    for i in range(len(rows)):
        n = int64(counts[i])
        status[i] = _checked(lengths, offsets, rows[i], n)
        if status[i] != ROW_OK or n == 0:
            continue
        row = rows[i]
        at = (
            offsets[0][row], offsets[1][row], offsets[2][row], offsets[3][row],
            offsets[4][row], offsets[5][row], offsets[6][row], offsets[7][row],
        )  # fmt: skip
        header = word_at(data[7], at[7], 0)
        step, level = float64(single(header)), int64(header >> uint64(32)) & 255
        cell_log = int64(header << uint64(16)) >> 56
        if not (step > 0 and step < np.inf) or level > MAX_LEVEL:
            status[i] = ROW_HEADER
            continue
        side = int64(max(heights[i], widths[i]))
        grid = (
            float32(step / np.sqrt(np.pi)),
            level,
            float32(2 * side / (1 << level)),
            float32(widths[i] / 2 - side),
            float32(heights[i] / 2 - side),
        )
        bit, place = int64(8 * HEADER_BYTES), int64(0)
        for first in range(0, n, CHUNK):
            count = min(CHUNK, n - first)
            if _tokens(data, at, first, count, cell_log, slant_of, codes) >= 2 * DIRECT:
                status[i] = ROW_SYMBOL
                break
            bit, place = _bits(data[7], at[7], count, level, codes, bits, bit, place)
            if place < 0:
                status[i] = ROW_PLACE
                break
            _gaussians(count, grid, codes, bits, rest, out[i, 8 * (start + first) :])
        if status[i] == ROW_OK and offsets[7][row + 1] - at[7] != (bit + 7) >> 3:
            status[i] = ROW_LENGTH


@inner(forceinline=True)
def _checked(lengths, offsets, row, n):
    """Whether a row lies within the planes' bytes, and has a token for each of its Gaussians."""
    result = ROW_OK
    for plane in range(8):
        begin, end = offsets[plane][row], offsets[plane][row + 1]
        if begin < 0 or end < begin or end > lengths[plane]:
            return ROW_OFFSETS
        least = (HEADER_BYTES if n else 0) if plane == 7 else n
        if end - begin < least or (end - begin > least and (plane < 7 or n == 0)):
            result = ROW_LENGTH
    return result


@inner(forceinline=True)
def _tokens(data, at, first, count, cell_log, slant_of, codes):
    """The fields of `codes` from `count` tokens of each plane, but extra bits; the bits of all
    tokens of shapes, by or: one of 2 * DIRECT or more is no code."""
    for j in range(count):
        codes[SLANT + j] = slant_of[data[6][at[6] + first + j]]
    shapes = sixteen(data[4], at[4] + first, count) & 0
    for j in range(0, count, WIDE):
        here, left = first + j, count - j
        gap, far_gap = _code(sixteen(data[0], at[0] + here, left))
        c0, far0 = _code(sixteen(data[1], at[1] + here, left))
        c1, far1 = _code(sixteen(data[2], at[2] + here, left))
        c2, far2 = _code(sixteen(data[3], at[3] + here, left))
        size = sixteen(data[4], at[4] + here, left)
        ratio = sixteen(data[5], at[5] + here, left)
        shear = sixteen(data[6], at[6] + here, left)
        shapes = shapes | size | ratio | shear
        octave = octave_of(c0, c1, c2)
        width = _clamp(octave - 1)
        size, ratio = size + octave - DIRECT, ratio - DIRECT
        wanted = octave + octave + (cell_log + 1)
        width_x = _clamp((wanted - size - ratio - 1 + load_wide(codes, SLANT + j)) >> 1)
        width_y = _clamp((wanted - size + ratio) >> 1)
        store(codes, GAP + j, gap)
        store(codes, C0 + j, c0)
        store(codes, C1 + j, c1)
        store(codes, C2 + j, c2)
        store(codes, FAR + j, far_gap | far0 << 8 | far1 << 16 | far2 << 24)
        store(codes, SIZE + j, size)
        store(codes, RATIO + j, ratio)
        store(codes, SHEAR + j, shear - DIRECT)
        store(codes, WIDTH + j, width)
        store(codes, WIDTH_X + j, width_x)
        store(codes, WIDTH_Y + j, width_y)
        store(codes, BITS + j, width * 3 + width_x + width_y)
    return any_bit(shapes)


@inner(forceinline=True)
def _code(token):
    """The codes of tokens without their extra bits, and the widths of these: `token_tables`."""
    width = (token >> 2 & 15) + 4
    far = (token & 3 | 4) << width
    far = where(token & DIRECT, 0, 0 - far, far)
    return where(2 * DIRECT, token, token - DIRECT, far), where(2 * DIRECT, token, 0, width)


@inner(forceinline=True)
def octave_of(c0, c1, c2):
    """`layout.class_of`, of codes without their extra bits: these have so few digits that float32
    never rounds a sum of their squares up to a power of two."""
    c0, c1, c2 = to_float(c0), to_float(c1), to_float(c2)
    return exponent(larger(fma(c0, c0, fma(c1, c1, c2 * c2)), f32(1))) >> 1


@inner(forceinline=True)
def _clamp(width):
    return smaller(larger(width, 0), MAX_WIDTH)


@inner(forceinline=True)
def _bits(data, begin, count, level, codes, bits, bit, place):
    """What only goes one by one: extra bits are added to `codes`, GAP becomes the place along the
    curve, and `bits` gets each Gaussian's others. The next bit and the last place, -1 where that
    is outside of the square."""
    for j in range(count):
        if codes[FAR + j]:
            far = codes[FAR + j]
            w0, w1, w2, w3 = far & 255, far >> 8 & 255, far >> 16 & 255, far >> 24
            word = word_at(data, begin, bit)
            codes[GAP + j] += _extra(word, 0, w0, codes[GAP + j])
            codes[C0 + j] += _extra(word, w0, w1, codes[C0 + j])
            bit += w0 + w1
            word = word_at(data, begin, bit)
            codes[C1 + j] += _extra(word, 0, w2, codes[C1 + j])
            codes[C2 + j] += _extra(word, w2, w3, codes[C2 + j])
            bit += w2 + w3
        step = codes[GAP + j] + DIRECT
        place += step
        if step < 0 or place >> 2 * level:
            return bit, int64(-1)
        codes[GAP + j] = place
        word = word_at(data, begin, bit)
        if codes[BITS + j] > 56:
            shape = 3 * codes[WIDTH + j]
            rest = word_at(data, begin, bit + shape) << uint64(shape)
            word = rest | uint64(bits_of(word, 0, shape))
        bits[j] = word
        bit += codes[BITS + j]
    return bit, place


@inner(inline="always")
def _extra(word, shift, width, code):
    extra = bits_of(word, shift, width)
    return extra if code >= 0 else -extra


@inner(forceinline=True)
def _gaussians(count, grid, codes, bits, rest, out):
    """`layout.dequantise` of `count` Gaussians into `out` [8 * count]."""
    scale, level, cell, left, top = grid
    for j in range(0, count, WIDE):
        width = load_wide(codes, WIDTH + j)
        width_x, width_y = load_wide(codes, WIDTH_X + j), load_wide(codes, WIDTH_Y + j)
        word = load_wide(bits, j)
        low, middle = low_bits(word, 0), low_bits(word, width + width)
        high = low_bits(word, width * 3 + width_x)
        mask, unit = _ones(width), power_of_two(0 - width)
        size = to_float(load_wide(codes, SIZE + j)) + _inside(low & mask, unit)
        ratio = to_float(load_wide(codes, RATIO + j)) + _inside(low >> width & mask, unit)
        shear = to_float(load_wide(codes, SHEAR + j)) + _inside(middle & mask, unit)
        # 2^(size / 2), 2^(ratio / 2), e^(shear / 8), and their inverses by one division.
        big, long = exp2(size * f32(1 / CELLS_PER_OCTAVE)), exp2(ratio * f32(1 / CELLS_PER_OCTAVE))
        power = shear * POWER
        lost = fma(shear, POWER, 0 - power) + shear * POWER_LOST
        grown = exp2(power)
        grown = fma(grown, lost * LN_2, grown)
        l11 = big * long
        inverse = divide(f32(1), l11 * grown)
        l22 = big * (inverse * (big * grown))
        l21 = (grown - inverse * l11) * l22 * f32(SHEAR_UNIT / 2)
        tint = inverse * (long * grown) * scale

        column, row = _hilbert(load_wide(codes, GAP + j), level)
        x = column << width_x | middle >> width & _ones(width_x)
        y = row << width_y | high & _ones(width_y)
        x = fma(to_float(x) + f32(0.5), power_of_two(0 - width_x) * cell, left)
        y = fma(to_float(y) + f32(0.5), power_of_two(0 - width_y) * cell, top)
        grey = to_float(load_wide(codes, C0 + j)) * tint * ROOT_3
        warm = to_float(load_wide(codes, C1 + j)) * tint * ROOT_2
        tilt = to_float(load_wide(codes, C2 + j)) * tint * ROOT_6
        values = (x, y, l11, l21, l22, grey + tilt + warm, grey - tilt - tilt, grey + tilt - warm)
        if j + WIDE <= count:  # not in a function: eight vectors would go to it through memory
            store_rows(out, 8 * j, values)
        else:
            store_rows(rest, 0, values)
            for i in range(8 * (count - j)):
                out[8 * j + i] = rest[i]


@inner(forceinline=True)
def _ones(width):
    """Numbers of `width` bits, all of them 1."""
    return (_one(width) << width) - 1


@inner(forceinline=True)
def _one(like):
    return like & 0 | 1


@inner(forceinline=True)
def _inside(place, unit):
    """The middle of a fine cell, in coarse ones."""
    return (to_float(place) + f32(0.5)) * unit


@inner(forceinline=True)
def _hilbert(place, level):
    """Column and row of places along the curve of `layout.hilbert_curve`: its quarters are mirrored
    on a diagonal (the first and the last one) and turned by 180 degrees on top of that (the last),
    which commute, so that a prefix of xor tells how often either was done above each level."""
    low, high = place & EVEN_BITS, place >> 1 & EVEN_BITS
    mirrored = (low ^ high ^ EVEN_BITS) & ((1 << 2 * level) - 1)
    turns = (mirrored | (low & high) << 1) >> 2
    turns = turns ^ turns >> 2
    turns = turns ^ turns >> 4
    turns = turns ^ turns >> 8
    turns = turns ^ turns >> 16
    x, y = high, low ^ high
    change = turns >> 1 & EVEN_BITS ^ (x ^ y) & turns
    return _packed(x ^ change), _packed(y ^ change)


@inner(forceinline=True)
def _packed(bits):
    """The even bits, side by side."""
    bits = (bits | bits >> 1) & 0x33333333
    bits = (bits | bits >> 2) & 0x0F0F0F0F
    bits = (bits | bits >> 4) & 0x00FF00FF
    return (bits | bits >> 8) & 0x0000FFFF


def decode_batch(columns, rows, counts, heights, widths, out, start) -> None:
    """`decode_planes` of eight columns (`codec.Plane`); raises CorruptShardError for a row that is
    not valid."""
    status = np.zeros(len(rows), np.uint8)
    decode_planes(
        tuple(eight_or_more(plane.data) for plane in columns),
        np.array([len(plane.data) for plane in columns]),
        tuple(plane.offsets for plane in columns),
        rows,
        counts,
        heights,
        widths,
        slants(),
        start,
        out.reshape(len(out), 8 * out.shape[1]),
        status,
    )
    if status.any():
        i = np.flatnonzero(status)[0]
        raise CorruptShardError(f"the payload of row {rows[i]} is damaged: {MESSAGES[status[i]]}")


@compiled()
def decode_fp16(data, offsets, rows, counts, heights, widths, start, out):
    """As `decode_planes`, of payloads of 16 byte planes in `data` whose lengths are right."""
    rest = np.empty(8 * WIDE, np.float32)
    for i in range(len(rows)):
        n, at = int64(counts[i]), offsets[rows[i]]
        left, top = float32(widths[i] / 2), float32(heights[i] / 2)
        own = out[i, 8 * start :]
        for j in range(0, n, WIDE):
            values = (
                _halves(data, at + j, n, n - j) + left,
                _halves(data, at + j + 2 * n, n, n - j) + top,
                _halves(data, at + j + 4 * n, n, n - j),
                _halves(data, at + j + 6 * n, n, n - j),
                _halves(data, at + j + 8 * n, n, n - j),
                _halves(data, at + j + 10 * n, n, n - j),
                _halves(data, at + j + 12 * n, n, n - j),
                _halves(data, at + j + 14 * n, n, n - j),
            )
            if j + WIDE <= n:
                store_rows(own, 8 * j, values)
            else:
                store_rows(rest, 0, values)
                for k in range(8 * (n - j)):
                    own[8 * j + k] = rest[k]


@inner(forceinline=True)
def _halves(data, at, n, left):
    """WIDE halves whose lower bytes are at `at` and whose upper ones `n` bytes on."""
    return half_to_float(sixteen(data, at, left) | sixteen(data, at + n, left) << 8)


def decode_halves(column, rows, counts, heights, widths, out, start) -> None:
    """`decode_fp16` of a column (`codec.Plane`) whose rows have the right lengths."""
    data, offsets = eight_or_more(column.data), column.offsets
    flat = out.reshape(len(out), 8 * out.shape[1])
    decode_fp16(data, offsets, rows, counts, heights, widths, start, flat)
