"""Explicit vectors for numba, of float32, int32 or uint64 lanes, which LLVM keeps in registers.

numba leaves vectorisation to LLVM's heuristics, which handle neither short rows of unknown length
nor reductions carried across them, and computes with int64 whatever the array holds. This module
gives kernels what a C compiler offers as vector extensions: value types, operators, fused
multiply-add, select, unaligned load and store, and a horizontal sum; a number beside a vector
stands for all of its lanes. LLVM legalises 8 or 16 lanes to what the machine has (AVX-512: one
register of 16, AVX2: of 8, NEON: of four), so the code is portable. Only what the CPU's kernels
need is here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.typing import templates
from numba.extending import lower_builtin, models, register_model

from splatshard.pipeline.kernels.compiled import inner

LANES, WIDE = 8, 16
"""Of `load` and `splat`, of `load_wide`."""
SHIFT = 1.5 * 2**23
f32 = np.float32
intrinsic: Callable[..., Any] = extending.intrinsic  # callers give no typing context
infer_global: Callable[..., Any] = templates.infer_global  # a decorator, too
_KINDS = {types.float32: ir.FloatType(), types.int32: ir.IntType(32), types.uint64: ir.IntType(64)}
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class VectorType(types.Type):
    """Numba type of a vector of `count` lanes."""

    def __init__(self, lane: types.Type, count: int) -> None:
        self.lane, self.count = lane, count
        self.kind = ir.VectorType(_KINDS[lane], count)
        super().__init__(name=f"{lane}x{count}")

    def of(self, lane: types.Type) -> VectorType:
        """The vector of as many lanes of another type."""
        return VectorType(lane, self.count)

    def constant(self, value: int) -> ir.Constant:
        return ir.Constant(self.kind, [value] * self.count)


vector = VectorType(types.float32, LANES)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.kind)


def _vector_of(*args: types.Type) -> VectorType:
    return next(arg for arg in args if isinstance(arg, VectorType))


def _filled(context, builder, value, own: types.Type, wanted: VectorType):
    """`value` if it is a vector, else all lanes equal to it."""
    if isinstance(own, VectorType):
        return value
    x = context.cast(builder, value, own, wanted.lane)
    undefined = ir.Constant(wanted.kind, ir.Undefined)
    one = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), wanted.count), [0] * wanted.count)
    return builder.shuffle_vector(one, undefined, zeros)


def _lanewise(build: Callable[..., Any], arguments: int) -> Any:
    """An intrinsic of vectors of one type, or numbers in their place: `build(builder, type, *args)`
    makes the result, of that type."""

    def typed(*args):
        result = _vector_of(*args)

        def codegen(context, builder, signature, values):
            kinds = zip(values, signature.args, strict=True)
            lanes = [_filled(context, builder, value, own, result) for value, own in kinds]
            return build(builder, result, *lanes)

        return result(*args), codegen

    functions = (
        lambda typingctx, a: typed(a),
        lambda typingctx, a, b: typed(a, b),
        lambda typingctx, a, b, c: typed(a, b, c),
        lambda typingctx, a, b, c, d: typed(a, b, c, d),
    )
    return intrinsic(functions[arguments - 1])


@intrinsic
def splat(typingctx, value):
    """All LANES lanes equal to the float32 `value`."""

    def codegen(context, builder, signature, args):
        return _filled(context, builder, args[0], signature.args[0], vector)

    return vector(value), codegen


@intrinsic
def iota(typingctx):
    """0, 1, 2, ... LANES - 1."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_VECTOR, [float(i) for i in range(LANES)])

    return vector(), codegen


def _pointer(context, builder, signature, args, kind):
    """Where the vector lies of which the first two arguments are the array and the index."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), kind.as_pointer())


def _loader(count: int) -> Any:
    @intrinsic
    def op(typingctx, array, index):
        result = VectorType(array.dtype, count)

        def codegen(context, builder, signature, args):
            pointer = _pointer(context, builder, signature, args, result.kind)
            return builder.load(pointer, align=4)

        return result(array, types.intp), codegen

    return op


load, load_wide = _loader(LANES), _loader(WIDE)
"""LANES, or WIDE, values of a contiguous 1-D array from element `index`; unaligned."""


@intrinsic
def store(typingctx, array, index, value):
    """Write the lanes of `value` to the contiguous 1-D `array` from `index` on; unaligned."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args, value.kind)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def store_rows(typingctx, array, index, columns):
    """Write the 8 vectors `columns` (a tuple) to the float32 `array` from `index` on, transposed:
    lane 0 of each, lane 1 of each, ..."""
    kind = columns[0]

    def codegen(context, builder, signature, args):
        rows = [builder.extract_value(args[2], i) for i in range(8)]

        def mixed(a, b, *lanes):
            """Lanes of a and b (from `count` on) in each four, as registers are wired."""
            chosen = [lane + four for four in range(0, kind.count, 4) for lane in lanes]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)
            return builder.shuffle_vector(a, b, mask)

        b = kind.count
        pairs = [
            mixed(rows[i], rows[i + 1], *lanes)
            for i in range(0, 8, 2)
            for lanes in ((0, b, 1, b + 1), (2, b + 2, 3, b + 3))
        ]
        fours = [
            mixed(pairs[i], pairs[i + 2], *lanes)
            for i in (0, 1, 4, 5)
            for lanes in ((0, 1, b, b + 1), (2, 3, b + 2, b + 3))
        ]
        first = _pointer(context, builder, signature, args, _VECTOR)
        for row in range(kind.count):
            four = row // 4 * 4
            lanes = [part + four + i for part in (0, b) for i in range(4)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), 8), lanes)
            place = builder.gep(first, [ir.Constant(ir.IntType(32), row)])
            whole = builder.shuffle_vector(fours[row % 4], fours[row % 4 + 4], mask)
            builder.store(whole, place, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, columns), codegen


@intrinsic
def load_bytes(typingctx, array, index):
    """WIDE bytes of the uint8 `array` from `index` on, as int32 lanes."""
    result = VectorType(types.int32, WIDE)

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(8), WIDE)
        pointer = _pointer(context, builder, signature, args, kind)
        return builder.zext(builder.load(pointer, align=1), result.kind)

    return result(array, types.intp), codegen


@intrinsic
def bytes_of(typingctx, low, high):
    """The bytes of two uint64, the lowest first, as WIDE int32 lanes."""
    result = VectorType(types.int32, WIDE)

    def codegen(context, builder, signature, args):
        pair = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for i, word in enumerate(args):
            pair = builder.insert_element(pair, word, ir.Constant(ir.IntType(32), i))
        return builder.zext(builder.bitcast(pair, ir.VectorType(ir.IntType(8), WIDE)), result.kind)

    return result(types.uint64, types.uint64), codegen


@intrinsic
def low_bits(typingctx, value, shift):
    """The lower 32 bits of uint64 lanes shifted right by int32 ones."""
    result = value.of(types.int32)

    def codegen(context, builder, signature, args):
        by = _filled(context, builder, args[1], signature.args[1], result)
        shifted = builder.lshr(args[0], builder.zext(by, value.kind))
        return builder.trunc(shifted, result.kind)

    return result(value, shift), codegen


@intrinsic
def to_float(typingctx, value):
    """int32 lanes as the nearest float32."""
    result = value.of(types.float32)

    def codegen(context, builder, signature, args):
        return builder.sitofp(args[0], result.kind)

    return result(value), codegen


@intrinsic
def reinterpreted(typingctx, value):
    """The bits of float32 lanes as int32 ones, or the other way round."""
    result = value.of(types.float32 if value.lane == types.int32 else types.int32)

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], result.kind)

    return result(value), codegen


def _where(builder, kind, a, b, x, y):
    return builder.select(builder.icmp_signed(">", a, b), x, y)


where = _lanewise(_where, 4)
"""Lane-wise x if a > b else y, of int32 lanes."""


@intrinsic
def any_bit(typingctx, value):
    """The bits of all int32 lanes, by or."""

    def codegen(context, builder, signature, args):
        bits = args[0]
        width = value.count
        while width > 1:
            width //= 2
            lanes = [i + width if i < width else i for i in range(value.count)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), value.count), lanes)
            bits = builder.or_(bits, builder.shuffle_vector(bits, bits, mask))
        return builder.extract_element(bits, ir.Constant(ir.IntType(32), 0))

    return types.int32(value), codegen


def _called(name: str, arguments: int) -> Any:
    """LLVM's intrinsic of a name."""

    def build(builder, kind, *args):
        signature = ir.FunctionType(kind.kind, [kind.kind] * arguments)
        symbol = f"llvm.{name}.v{kind.count}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, symbol), args)

    return _lanewise(build, arguments)


fma = _called("fma", 3)
"""a * b + c, rounded once."""
square_root, ceiling, floor = (_called(name, 1) for name in ("sqrt", "ceil", "floor"))


def _times_power_of_two(builder, kind, value, shifted):
    lanes = kind.of(types.int32)
    value, shifted = (builder.bitcast(x, lanes.kind) for x in (value, shifted))
    n = builder.shl(shifted, lanes.constant(23))  # the rest falls out on the left
    return builder.bitcast(builder.add(value, n), kind.kind)


times_power_of_two = _lanewise(_times_power_of_two, 2)
"""`value` * 2^n for `shifted` = n + 1.5 * 2^23, n whole: n is added to the exponent's bits, which
must hold the result."""


def _compared(sign: str) -> Any:
    def build(builder, kind, a, b):
        test = builder.icmp_signed if kind.lane == types.int32 else builder.fcmp_ordered
        return builder.select(test(sign, a, b), a, b)

    return _lanewise(build, 2)


larger, smaller = _compared(">"), _compared("<")
"""Lane-wise a if a > b (a < b) else b; b where either is NaN."""


@intrinsic
def zero_above(typingctx, value, x, limit):
    """`value` where x <= limit, 0 elsewhere (and where x is NaN)."""

    def codegen(context, builder, signature, args):
        inside = builder.fcmp_ordered("<=", args[1], args[2])
        return builder.select(inside, args[0], ir.Constant(_VECTOR, [0.0] * LANES))

    return vector(vector, vector, vector), codegen


@intrinsic
def below(typingctx, a, b):
    """The lanes in which a < b as the bits of an int64, the first lane lowest."""

    def codegen(context, builder, signature, args):
        lanes = builder.fcmp_ordered("<", args[0], args[1])
        return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(vector, vector), codegen


@intrinsic
def total(typingctx, value):
    """Sum of the lanes, pairwise: log2(LANES) shuffles, always in the same order."""

    def codegen(context, builder, signature, args):
        (v,) = args
        width = LANES
        while width > 1:
            width //= 2
            lanes = [i + width if i < width else i for i in range(LANES)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
            v = builder.fadd(v, builder.shuffle_vector(v, v, mask))
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), codegen


divide = _lanewise(lambda builder, kind, a, b: builder.fdiv(a, b), 2)


def _define(symbol: Callable[..., Any], of_floats: str, of_ints: str, *lanes: types.Type) -> None:
    """`symbol` for vectors of these lanes, and for such a vector and a number; not as an overload,
    of which numba compiles a function for every pair of types."""

    @infer_global(symbol)
    class _Operator(templates.AbstractTemplate):
        def generic(self, args, kws):
            kinds = [x for x in args if isinstance(x, VectorType)]
            numbers = [x for x in args if isinstance(x, types.Number)]
            fits = kinds and len(kinds) + len(numbers) == 2 and kinds[0] == kinds[-1]
            return kinds[0](*args) if fits and kinds[0].lane in lanes else None

    def lower(context, builder, signature, args):
        kind = signature.return_type
        own = zip(args, signature.args, strict=True)
        a, b = (_filled(context, builder, value, typed, kind) for value, typed in own)
        return getattr(builder, of_ints if kind.lane == types.int32 else of_floats)(a, b)

    for a, b in ((VectorType, VectorType), (VectorType, types.Number), (types.Number, VectorType)):
        lower_builtin(symbol, a, b)(lower)


_define(operator.add, "fadd", "add", types.float32, types.int32)
_define(operator.sub, "fsub", "sub", types.float32, types.int32)
_define(operator.mul, "fmul", "mul", types.float32, types.int32)
_define(operator.and_, "", "and_", types.int32)
_define(operator.or_, "", "or_", types.int32)
_define(operator.xor, "", "xor", types.int32)
_define(operator.lshift, "", "shl", types.int32)
_define(operator.rshift, "", "ashr", types.int32)


@inner(forceinline=True)
def exp2(x):
    """2^x for x from -126 to 127, to two roundings.

    The polynomial has the least relative error on -0.5 to 0.5 of those that are 1 at 0: 7e-8.
    """
    shifted = x + SHIFT  # whose last bits are the nearest whole number
    x = x - (shifted - SHIFT)
    p = fma(f32(0.0013352725), x, f32(0.0096718863))
    p = fma(p, x, f32(0.055504490))
    p = fma(p, x, f32(0.24022230))
    p = fma(p, x, f32(0.69314722))
    p = fma(p, x, f32(1))
    return times_power_of_two(p, shifted)


@inner(forceinline=True)
def exponent(x):
    """floor(log2(x)) of float32 lanes x, normal and positive, as int32 ones."""
    return (reinterpreted(x) >> 23) - 127


@inner(forceinline=True)
def power_of_two(n):
    """2^n as float32 of int32 lanes n from -126 to 127."""
    return reinterpreted((n + 127) << 23)


@inner(forceinline=True)
def half_to_float(half):
    """The float32 of IEEE halves, the lower 16 bits of int32 lanes; without the instruction for it,
    which some virtual machines hide."""
    size = half & 0x7FFF
    bits = (size << 13) + (112 << 23)
    bits = where(size, 0x7BFF, bits + (112 << 23), bits)  # infinity, NaN
    tiny = reinterpreted((size << 13) + (113 << 23)) - f32(2**-14)
    bits = where(0x0400, size, reinterpreted(tiny), bits)
    return reinterpreted(bits | (half & 0x8000) << 16)
