"""Explicit float32 vectors for numba: `f32x16` values that LLVM keeps in registers.

numba leaves vectorisation to LLVM's heuristics, which handle neither short rows of unknown length
nor reductions carried across them. This module gives the kernel what a C compiler offers as vector
extensions: a value type, arithmetic operators, fused multiply-add, select, unaligned load and
store, and a horizontal sum. LLVM legalises 16 lanes to what the machine has (AVX-512: one
register, AVX2: two, NEON: four), so the code is portable. Only what the CPU's kernels need is
here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, overload, register_model

LANES = 8
intrinsic: Callable[..., Any] = extending.intrinsic  # callers give no typing context
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class VectorType(types.Type):
    """Numba type of a vector of `LANES` float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VECTOR)


@intrinsic
def splat(typingctx, value):
    """All lanes equal to the float32 `value`."""

    def codegen(context, builder, signature, args):
        x = context.cast(builder, args[0], signature.args[0], types.float32)
        one = builder.insert_element(
            ir.Constant(_VECTOR, ir.Undefined), x, ir.Constant(ir.IntType(32), 0)
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return vector(value), codegen


@intrinsic
def iota(typingctx):
    """0, 1, 2, ... LANES - 1."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_VECTOR, [float(i) for i in range(LANES)])

    return vector(), codegen


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


@intrinsic
def load(typingctx, array, index):
    """LANES values of the contiguous 1-D float32 `array` from element `index`; unaligned."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(pointer, align=4)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write the lanes of `value` to `array[index:index + LANES]`; unaligned."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, args):
        signature_ir = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        name = f"llvm.fma.v{LANES}f32"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, signature_ir, name), args
        )

    return vector(vector, vector, vector), codegen


def _unary(name: str):
    @intrinsic
    def op(typingctx, x):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(_VECTOR, [_VECTOR])
            symbol = f"llvm.{name}.v{LANES}f32"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), args)

        return vector(vector), codegen

    return op


square_root, ceiling, floor = _unary("sqrt"), _unary("ceil"), _unary("floor")


@intrinsic
def times_power_of_two(typingctx, value, shifted):
    """`value` * 2^n for `shifted` = n + 1.5 * 2^23, n whole: n is added to the exponent's bits,
    which must hold the result."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(32), LANES)
        value, shifted = (builder.bitcast(x, kind) for x in args)
        n = builder.shl(shifted, ir.Constant(kind, [23] * LANES))  # the rest falls out on the left
        return builder.bitcast(builder.add(value, n), _VECTOR)

    return vector(vector, vector), codegen


@intrinsic
def larger(typingctx, a, b):
    """Lane-wise a if a > b else b (b where either is NaN)."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return vector(vector, vector), codegen


@intrinsic
def smaller(typingctx, a, b):
    """Lane-wise a if a < b else b (b where either is NaN)."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[0], args[1])

    return vector(vector, vector), codegen


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


def _binary(name: str):
    @intrinsic
    def op(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, name)(*args)

        return vector(vector, vector), codegen

    return op


_add, _sub, _mul = _binary("fadd"), _binary("fsub"), _binary("fmul")
divide = _binary("fdiv")


@overload(operator.add, jit_options={"forceinline": True})
def _overload_add(a, b):
    if a == vector and b == vector:
        return lambda a, b: _add(a, b)
    return None


@overload(operator.sub, jit_options={"forceinline": True})
def _overload_sub(a, b):
    if a == vector and b == vector:
        return lambda a, b: _sub(a, b)
    return None


@overload(operator.mul, jit_options={"forceinline": True})
def _overload_mul(a, b):
    if a == vector and b == vector:
        return lambda a, b: _mul(a, b)
    return None
