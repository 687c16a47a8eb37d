"""Payloads to float32 Gaussians on a CPU: one compiled pass over a batch, straight from columns.

The twin of `planes.decode` and `layout.dequantise`. Powers and exponentials are products of two
table entries (the coarse cell's and the place's within it), so a Gaussian takes some fifteen
nanoseconds; results agree with the twin to a few float32 roundings. Nothing read from a payload is
used as an index before it was checked; a row that is not valid gets a status, never a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, float32, int64, types, uint64
from numpy.typing import NDArray

from splatshard.pipeline.codec.layout import (
    CELLS_PER_OCTAVE,
    DIRECT,
    HEADER,
    MAX_LEVEL,
    MAX_WIDTH,
    OPPONENT,
    SHEAR_CELLS,
    SHEAR_UNIT,
    hilbert_tables,
    slant_table,
    token_tables,
)
from splatshard.pipeline.kernels.compiled import compiled, inner
from splatshard.schemas.errors import CorruptShardError

intrinsic: Callable[..., Any] = extending.intrinsic  # callers give no typing context
HEADER_BYTES = HEADER.size
STEPS = 2 << MAX_WIDTH  # places within a coarse cell, in halves
ROW_OK, ROW_LENGTH, ROW_HEADER, ROW_SYMBOL, ROW_PLACE = range(5)
MESSAGES = (
    "",
    "its planes do not fit together",
    "its step or level is out of range",
    "a shape is out of range",
    "a Gaussian lies outside of its square",
)


@lru_cache(maxsize=1)
def tables() -> tuple[NDArray, ...]:
    """Lookups of `decode_planes`: of tokens [256] base, extra width, sign; of shears slant [128];
    then pairs x, 1 / x of powers of two and of e, for coarse cells [192, 2] and for places within
    them [STEPS, 2]; widths of fine cells in coarse ones; cells along the curves of all levels."""
    base, width, sign = (table.numpy().astype(np.int64) for table in token_tables())
    coarse, fine = np.arange(-DIRECT, 2 * DIRECT), np.arange(STEPS) / STEPS

    def pairs(exponent: NDArray) -> NDArray:
        return np.stack((np.exp2(exponent), np.exp2(-exponent)), 1).astype(np.float32)

    curves = [hilbert_tables(level)[1].numpy().astype(np.uint32) for level in range(MAX_LEVEL + 1)]
    return (
        base,
        width,
        sign,
        slant_table().numpy(),
        pairs(coarse / CELLS_PER_OCTAVE),
        pairs(fine / CELLS_PER_OCTAVE),
        pairs(coarse / SHEAR_CELLS / np.log(2)),
        pairs(fine / SHEAR_CELLS / np.log(2)),
        np.exp2(-np.arange(MAX_WIDTH + 1)).astype(np.float32),
        np.concatenate(curves),
    )


@intrinsic
def _load64(typingctx, data, offset):
    """The eight bytes of the uint8 array `data` from `offset` on, low byte first."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        address = builder.gep(array.data, [args[1]])
        address = builder.bitcast(address, ir.IntType(64).as_pointer())
        return builder.load(address, align=1)

    return types.uint64(data, types.int64), codegen


@intrinsic
def log2_floor(typingctx, value):
    """floor(log2(value)) of an int64 above 0."""

    def codegen(context, builder, signature, args):
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.int64(types.int64), codegen


@inner(forceinline=True)
def _word(data, begin, bit):
    """57 or more bits of `data` from bit `bit` after byte `begin`; zeros beyond its end."""
    byte = begin + (bit >> 3)
    if byte + 8 <= len(data):
        return _load64(data, byte) >> uint64(bit & 7)
    word = uint64(0)
    for i in range(len(data) - byte):
        word |= uint64(data[byte + i]) << uint64(8 * i)
    return word >> uint64(bit & 7)


@inner(forceinline=True)
def _take(word, shift, width):
    return int64((word >> uint64(shift)) & ((uint64(1) << uint64(width)) - uint64(1)))


@inner(forceinline=True)
def _clamp(width):
    return min(max(width, 0), MAX_WIDTH)


@compiled()
def decode_planes(
    data, offsets, rows, counts, heights, widths, header, opponent, lookup, start, out, status
):
    """Row rows[i] of the eight planes into out[i, start : start + counts[i]].

    data, offsets: the planes' bytes and where their rows begin; header: step, level, cell_log of
    each row [B]; lookup: `tables()`; status uint8 [B].
    """
    steps, levels, cell_logs = header
    curves = lookup[9]
    for i in range(len(rows)):
        row, n, level = rows[i], counts[i], levels[i]
        if n == 0:
            continue
        if not (steps[i] > 0 and steps[i] < np.inf) or level > MAX_LEVEL:
            status[i] = ROW_HEADER
            continue
        side = np.float64(max(heights[i], widths[i]))
        square = (2 * side, widths[i] / 2 - side, heights[i] / 2 - side)
        curve = curves[((1 << 2 * level) - 1) // 3 :][: 1 << 2 * level]
        status[i] = _decode_row(
            data[0][offsets[0][row] :][:n],
            data[1][offsets[1][row] :][:n],
            data[2][offsets[2][row] :][:n],
            data[3][offsets[3][row] :][:n],
            data[4][offsets[4][row] :][:n],
            data[5][offsets[5][row] :][:n],
            data[6][offsets[6][row] :][:n],
            data[7],
            offsets[7][row] + HEADER_BYTES,
            offsets[7][row + 1],
            (float32(steps[i] / np.sqrt(np.pi)), level, cell_logs[i]),
            square,
            opponent,
            lookup,
            curve,
            out[i, start:],
        )


@inner(inline="always")
def _decode_row(
    gap, c0, c1, c2, sizes, ratios, shears, bits, begin, end, header, square, opponent, lookup,
    curve, out
):  # fmt: skip
    """One payload; its status. `square`: side, left and upper end in px."""
    base, extra, sign, slant, size2, place2, shear_e, place_e, cells_of, _ = lookup
    scale, level, cell_log = header
    extent, left, top = square
    cell, half_unit = extent / (1 << level), float32(SHEAR_UNIT / 2)
    bit, place = int64(0), int64(0)
    for j in range(len(gap)):
        t0, t1, t2, t3 = gap[j], c0[j], c1[j], c2[j]
        ratio, shear = ratios[j], shears[j]
        if (sizes[j] | ratio | shear) >= 2 * DIRECT:
            return ROW_SYMBOL
        step, k1, k2, k3 = base[t0] + DIRECT, base[t1], base[t2], base[t3]
        octave = log2_floor(k1 * k1 + k2 * k2 + k3 * k3 | 1) >> 1
        size = uint64(int64(sizes[j]) + octave)
        if (t0 | t1 | t2 | t3) >= 2 * DIRECT:
            w0, w1, w2, w3 = extra[t0], extra[t1], extra[t2], extra[t3]
            word = _word(bits, begin, bit)
            step += sign[t0] * _take(word, 0, w0)
            k1 += sign[t1] * _take(word, w0, w1)
            bit += w0 + w1
            word = _word(bits, begin, bit)
            k2 += sign[t2] * _take(word, 0, w2)
            k3 += sign[t3] * _take(word, w2, w3)
            bit += w2 + w3
        place += step
        if step < 0 or place >= len(curve):
            return ROW_PLACE
        width, half = _clamp(octave - 1), MAX_WIDTH - _clamp(octave - 1)
        wanted, a, b = 2 * octave + cell_log + 1, int64(size) - DIRECT, int64(ratio) - DIRECT
        width_x = _clamp((wanted - (a + b + 1) + slant[shear]) >> 1)
        width_y = _clamp((wanted - (a - b)) >> 1)
        word = _word(bits, begin, bit)
        in_size = uint64(2 * _take(word, 0, width) + 1 << half)
        in_ratio = uint64(2 * _take(word, width, width) + 1 << half)
        in_shear = uint64(2 * _take(word, 2 * width, width) + 1 << half)
        bit += 3 * width
        word = _word(bits, begin, bit)
        at = int64(curve[uint64(place)])
        x = ((at & (1 << level) - 1) << width_x) + _take(word, 0, width_x)
        y = (at >> level << width_y) + _take(word, width_x, width_y)
        bit += width_x + width_y

        big = size2[size, 0] * place2[in_size, 0]
        down = big * size2[ratio, 1] * place2[in_ratio, 1]
        grown = shear_e[shear, 0] * place_e[in_shear, 0]
        shrunk = shear_e[shear, 1] * place_e[in_shear, 1]
        tint = scale * size2[size, 1] * place2[in_size, 1]
        out[j, 0] = (x + 0.5) * (cell * cells_of[uint64(width_x)]) + left
        out[j, 1] = (y + 0.5) * (cell * cells_of[uint64(width_y)]) + top
        out[j, 2] = big * size2[ratio, 0] * place2[in_ratio, 0]
        out[j, 3] = half_unit * (grown - shrunk) * down
        out[j, 4] = down
        q1, q2, q3 = float32(k1) * tint, float32(k2) * tint, float32(k3) * tint
        out[j, 5] = opponent[0, 0] * q1 + opponent[1, 0] * q2 + opponent[2, 0] * q3
        out[j, 6] = opponent[0, 1] * q1 + opponent[1, 1] * q2 + opponent[2, 1] * q3
        out[j, 7] = opponent[0, 2] * q1 + opponent[1, 2] * q2 + opponent[2, 2] * q3
    return ROW_OK if end - begin == (bit + 7) >> 3 else ROW_LENGTH


def decode_batch(columns, rows, counts, heights, widths, out, start) -> None:
    """`decode_planes` of eight columns (`codec.Plane`) whose rows have the right lengths; raises
    CorruptShardError for a row that is not valid."""
    bits = columns[7]
    filled = counts > 0
    first = bits.offsets[rows[filled]]
    headers = np.ascontiguousarray(bits.data[first[:, None] + np.arange(HEADER.size)])
    header = np.zeros(len(rows), np.dtype([("step", "<f4"), ("level", "u1"), ("cell_log", "i1")]))
    header[filled] = headers.reshape(-1).view(header.dtype)
    status = np.zeros(len(rows), np.uint8)
    with np.errstate(invalid="ignore"):  # a signalling NaN, say: decode_planes refuses it
        step = header["step"].astype(np.float64)
    decode_planes(
        tuple(plane.data for plane in columns),
        tuple(plane.offsets for plane in columns),
        rows,
        counts,
        heights,
        widths,
        (
            step,
            header["level"].astype(np.int64),
            header["cell_log"].astype(np.int64),
        ),
        np.array(OPPONENT, np.float32),
        tables(),
        start,
        out,
        status,
    )
    wrong = np.flatnonzero(status)
    if len(wrong):
        i = wrong[0]
        raise CorruptShardError(f"the payload of row {rows[i]} is damaged: {MESSAGES[status[i]]}")


@intrinsic
def _half(typingctx, low, high):
    """The float32 of the IEEE half with these two bytes; vectors where the CPU has them."""

    def codegen(context, builder, signature, args):
        wide = [builder.zext(byte, ir.IntType(16)) for byte in args]
        bits = builder.or_(wide[0], builder.shl(wide[1], ir.Constant(ir.IntType(16), 8)))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

    return types.float32(types.uint8, types.uint8), codegen


@compiled()
def decode_fp16(data, offsets, rows, counts, heights, widths, start, out):
    """As `decode_planes`, of payloads of 16 byte planes in `data`; 64 Gaussians at a time, so that
    what is written stays in the first cache."""
    for i in range(len(rows)):
        n = counts[i]
        payload = data[offsets[rows[i]] :][: 16 * n]
        own = out[i, start:][:n]
        for begin in range(0, n, 64):
            end = min(begin + 64, n)
            for k in range(8):
                shift = float32(0)
                if k < 2:
                    shift = float32((widths[i] if k == 0 else heights[i]) / 2)
                low, high = payload[2 * k * n :][:n], payload[(2 * k + 1) * n :][:n]
                for j in range(begin, end):
                    own[j, k] = _half(low[j], high[j]) + shift
