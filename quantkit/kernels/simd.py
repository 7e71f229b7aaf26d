"""Sixteen lanes at a time: explicit vectors of 16 float32 or int32 values inside numba kernels.

Kernels process 16 neighbouring output rows side by side, one row per lane, so nothing is ever summed across lanes.  Written with
these vectors a kernel keeps its running sums in registers and does the same arithmetic, in the same order, on every machine:
LLVM turns one operation into one AVX-512 instruction, two AVX2 ones or four NEON ones, and never regroups floating-point sums.
That is why results do not depend on the CPU, which automatic vectorization (with its alias checks and cost models) does not give.

The types are ``Floats``, ``Ints``, ``Doubles`` for sums, and ``Mask``, which comparisons give and ``select`` takes.  Only what the
kernels use is defined.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

LANES = 16

_F64, _F32, _I32 = ir.DoubleType(), ir.FloatType(), ir.IntType(32)


def vector_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare an operation by the code it stands for; to readers it is an ordinary function of its arguments."""
    return intrinsic(function)  # type: ignore[no-any-return]


class _Vector(types.Type):  # type: ignore[misc]
    """Type of a vector of 16 elements, for numba; ``llvm`` is the same for LLVM."""

    def __init__(self, name: str, element: ir.Type) -> None:
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name=name)


class _FloatsType(_Vector):
    def __init__(self) -> None:
        super().__init__("Floats", _F32)


class _IntsType(_Vector):
    def __init__(self) -> None:
        super().__init__("Ints", _I32)


class _DoublesType(_Vector):
    def __init__(self) -> None:
        super().__init__("Doubles", _F64)


class _MaskType(_Vector):
    def __init__(self) -> None:
        super().__init__("Mask", ir.IntType(1))


FLOATS, INTS, DOUBLES, MASK = _FloatsType(), _IntsType(), _DoublesType(), _MaskType()


class _VectorModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


for _kind in (_FloatsType, _IntsType, _DoublesType, _MaskType):
    register_model(_kind)(_VectorModel)

# ------------------------------------------------------------------------------------------------------------- operators


def _binary(function: Any, emit: dict[tuple[_Vector, _Vector], tuple[_Vector, Callable[..., ir.Value]]]) -> None:
    """Teach numba one binary operator: operand types -> (result type, emit(builder, left, right))."""

    def typing(_context: Any) -> Any:
        def typer(left: Any, right: Any) -> Any:
            known = emit.get((left, right))
            return known[0] if known else None

        return typer

    type_callable(function)(typing)
    for operands, (_, write) in emit.items():

        def lower(_context: Any, builder: Any, _signature: Any, values: Any, write: Callable[..., ir.Value] = write) -> ir.Value:
            return write(builder, *values)

        lower_builtin(function, *operands)(lower)


_FF, _II, _DD = (FLOATS, FLOATS), (INTS, INTS), (DOUBLES, DOUBLES)
_binary(operator.add, {_FF: (FLOATS, ir.IRBuilder.fadd), _DD: (DOUBLES, ir.IRBuilder.fadd), _II: (INTS, ir.IRBuilder.add)})
_binary(operator.sub, {_FF: (FLOATS, ir.IRBuilder.fsub), _DD: (DOUBLES, ir.IRBuilder.fsub), _II: (INTS, ir.IRBuilder.sub)})
_binary(operator.mul, {_FF: (FLOATS, ir.IRBuilder.fmul), _DD: (DOUBLES, ir.IRBuilder.fmul)})
_binary(operator.truediv, {_FF: (FLOATS, ir.IRBuilder.fdiv)})
_binary(operator.and_, {_II: (INTS, ir.IRBuilder.and_)})
_binary(operator.or_, {_II: (INTS, ir.IRBuilder.or_)})
_binary(operator.lshift, {_II: (INTS, ir.IRBuilder.shl)})
_binary(operator.rshift, {_II: (INTS, ir.IRBuilder.ashr)})
for _function, _sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.ne, "!=")):
    _binary(
        _function,
        {
            _FF: (MASK, lambda builder, left, right, sign=_sign: builder.fcmp_ordered(sign, left, right)),
            _II: (MASK, lambda builder, left, right, sign=_sign: builder.icmp_signed(sign, left, right)),
        },
    )

# ------------------------------------------------------------------------------------------------------------- functions


def _call(builder: Any, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _splat(builder: Any, vector: _Vector, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


@vector_function
def floats(_typing: Any, value: Any) -> Any:
    """The scalar as float32 in every lane; Ints and Doubles are converted lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if value is INTS:
            return builder.sitofp(args[0], FLOATS.llvm)
        if value is DOUBLES:
            return builder.fptrunc(args[0], FLOATS.llvm)
        return _splat(builder, FLOATS, context.cast(builder, args[0], value, types.float32))

    return FLOATS(value), emit


@vector_function
def ints(_typing: Any, value: Any) -> Any:
    """The scalar as int32 in every lane; Floats are converted lane by lane and must be whole numbers that fit."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if value is FLOATS:
            return builder.fptosi(args[0], INTS.llvm)
        if value is MASK:
            return builder.zext(args[0], INTS.llvm)
        return _splat(builder, INTS, context.cast(builder, args[0], value, types.int32))

    return INTS(value), emit


@vector_function
def doubles(_typing: Any, value: Any) -> Any:
    """Floats widened to float64, or a scalar in every lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if value is FLOATS:
            return builder.fpext(args[0], DOUBLES.llvm)
        return _splat(builder, DOUBLES, context.cast(builder, args[0], value, types.float64))

    return DOUBLES(value), emit


@vector_function
def bits(_typing: Any, value: Any) -> Any:
    """The bits of each float32 as an integer."""
    return INTS(FLOATS), lambda context, builder, signature, args: builder.bitcast(args[0], INTS.llvm)


@vector_function
def from_bits(_typing: Any, value: Any) -> Any:
    """Integers read as the bits of float32 numbers."""
    return FLOATS(INTS), lambda context, builder, signature, args: builder.bitcast(args[0], FLOATS.llvm)


@vector_function
def select(_typing: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Lanes of ``yes`` where the mask is set, else of ``no``."""
    return yes(MASK, yes, yes), lambda context, builder, signature, args: builder.select(*args)


def _ordered(sign: str) -> Callable[..., ir.Value]:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        compare = builder.fcmp_ordered if signature.return_type is FLOATS else builder.icmp_signed
        return builder.select(compare(sign, *args), *args)

    return emit


@vector_function
def minimum(_typing: Any, left: Any, right: Any) -> Any:
    """The smaller of both, lane by lane; ``right`` where a float is NaN."""
    return left(left, right), _ordered("<")


@vector_function
def maximum(_typing: Any, left: Any, right: Any) -> Any:
    """The larger of both, lane by lane; ``right`` where a float is NaN."""
    return left(left, right), _ordered(">")


@vector_function
def fused(_typing: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend with one rounding."""
    return FLOATS(FLOATS, FLOATS, FLOATS), lambda context, builder, signature, args: _call(
        builder, "llvm.fma.v16f32", FLOATS.llvm, *args
    )


@vector_function
def nearest(_typing: Any, value: Any) -> Any:
    """The whole number nearest to each float, ties to even."""
    return FLOATS(FLOATS), lambda context, builder, signature, args: _call(builder, "llvm.roundeven.v16f32", FLOATS.llvm, *args)


@vector_function
def root(_typing: Any, value: Any) -> Any:
    """The square root of each float, correctly rounded."""
    return FLOATS(FLOATS), lambda context, builder, signature, args: _call(builder, "llvm.sqrt.v16f32", FLOATS.llvm, *args)


def _permuted(builder: Any, table: ir.Value, index: ir.Value, count: int) -> ir.Value:
    """Elements of a vector of ``count`` at as many indices: one instruction where the processor permutes so many."""
    low = builder.and_(index, ir.Constant(index.type, [count - 1] * count))
    found = ir.Constant(table.type, ir.Undefined)
    for number in range(count):
        lane = ir.Constant(_I32, number)
        found = builder.insert_element(found, builder.extract_element(table, builder.extract_element(low, lane)), lane)
    return found


def _part(builder: Any, vector: ir.Value, first: int, count: int) -> ir.Value:
    lanes = ir.Constant(ir.VectorType(_I32, count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


@vector_function
def lookup(_typing: Any, table: Any, index: Any) -> Any:
    """The elements of a table of 16 at each index, of which the low four bits count."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        features = context.codegen().magic_tuple()[-1]
        if "+avx2" not in features or "+avx512f" in features:
            return _permuted(builder, args[0], args[1], LANES)
        half, found = LANES // 2, []  # AVX2 permutes eight
        tables = [_part(builder, args[0], first, half) for first in (0, half)]
        for first in (0, half):
            some = _part(builder, args[1], first, half)
            lower, upper = (_permuted(builder, part, some, half) for part in tables)
            eight = ir.Constant(some.type, [half] * half)
            above = builder.icmp_signed("==", builder.and_(some, eight), eight)
            found.append(builder.select(above, upper, lower))
        return builder.shuffle_vector(*found, ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES))))

    return table(table, INTS), emit


@vector_function
def largest_lane(_typing: Any, value: Any) -> Any:
    """The largest of the 16 integers."""
    return types.int32(INTS), lambda context, builder, signature, args: _call(
        builder, "llvm.vector.reduce.smax.v16i32", _I32, *args
    )


@vector_function
def lane_sum(_typing: Any, value: Any) -> Any:
    """Sum of the 16 lanes, in lane order: float64 of Doubles, int32 of Ints."""
    if value is INTS:
        return types.int32(INTS), lambda context, builder, signature, args: _call(
            builder, "llvm.vector.reduce.add.v16i32", _I32, *args
        )
    return types.float64(DOUBLES), lambda context, builder, signature, args: _call(
        builder, "llvm.vector.reduce.fadd.v16f64", _F64, ir.Constant(_F64, 0.0), *args
    )
