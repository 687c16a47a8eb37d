"""Bytes and bits of a column, as compiled code reads them: whole words, never beyond the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, int64, types, uint64
from numpy.typing import NDArray

from splatshard.pipeline.kernels.compiled import inner
from splatshard.pipeline.kernels.simd import bytes_of, load_bytes

intrinsic: Callable[..., Any] = extending.intrinsic  # callers give no typing context


def eight_or_more(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`data`, uint8 [...], with zeros behind it if it is shorter; read-only, so that all columns
    are alike."""
    if len(data) < 8 or data.flags.writeable:
        data = np.pad(data, (0, 8)) if len(data) < 8 else data.view()
        data.flags.writeable = False
    return data


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
def single(typingctx, bits):
    """The IEEE single of the lower 32 bits of a uint64."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.uint64), codegen


@intrinsic
def log2_floor(typingctx, value):
    """floor(log2(value)) of an int64 above 0."""

    def codegen(context, builder, signature, args):
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.int64(types.int64), codegen


@inner(forceinline=True)
def word_at(data, begin, bit):
    """57 or more bits of `data`, of 8 bytes or more, from bit `bit` after byte `begin`; zeros
    beyond its end."""
    byte = begin + (bit >> 3)
    beyond = byte + 8 - len(data)
    if beyond <= 0:
        return _load64(data, byte) >> uint64(bit & 7)
    if beyond >= 8:
        return uint64(0)
    return _load64(data, len(data) - 8) >> uint64(8 * beyond + (bit & 7))


@inner(inline="always")
def bits_of(word, shift, width):
    """`width` bits of a word from bit `shift` on, as an int64."""
    return int64((word >> uint64(shift)) & ((uint64(1) << uint64(width)) - uint64(1)))


@inner(forceinline=True)
def sixteen(data, at, left):
    """WIDE bytes of `data` from `at` on; zeros for those after the first `left`."""
    if left >= 16 and at + 16 <= len(data):
        return load_bytes(data, at)
    low = word_at(data, at, 0) & ~uint64(0) >> uint64(8 * max(0, 8 - left))
    if left <= 8:
        return bytes_of(low, uint64(0))
    return bytes_of(low, word_at(data, at + 8, 0) & ~uint64(0) >> uint64(8 * max(0, 16 - left)))
