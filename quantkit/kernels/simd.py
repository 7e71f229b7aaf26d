"""Sixteen lanes at a time: explicit vectors of 16 float32 or int32 values inside numba kernels.

Kernels process 16 neighbouring output rows side by side, one row per lane, so nothing is ever summed across lanes.  Written with
these vectors a kernel keeps its running sums in registers and does the same arithmetic, in the same order, on every machine:
LLVM turns one operation into one AVX-512 instruction, two AVX2 ones or four NEON ones, and never regroups floating-point sums.
That is why results do not depend on the CPU, which automatic vectorization (with its alias checks and cost models) does not give.

``Floats`` and ``Ints`` support + - * / & | << >> and comparisons among themselves (a comparison gives a ``Mask`` for ``select``).
Loads and stores name a one-dimensional array and an element index; bounds are the caller's duty.
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

_F64, _F32, _F16 = ir.DoubleType(), ir.FloatType(), ir.HalfType()
_I32, _I16, _I8 = ir.IntType(32), ir.IntType(16), ir.IntType(8)


def vector_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare an operation by the code it stands for; to readers it is an ordinary function of its arguments."""
    return intrinsic(function)  # type: ignore[no-any-return]


class _Vector(types.Type):  # type: ignore[misc]
    """Type of a vector of 16 elements; ``element`` is its LLVM element type."""

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
_binary(operator.sub, {_FF: (FLOATS, ir.IRBuilder.fsub), _II: (INTS, ir.IRBuilder.sub)})
_binary(operator.mul, {_FF: (FLOATS, ir.IRBuilder.fmul), _DD: (DOUBLES, ir.IRBuilder.fmul)})
_binary(operator.truediv, {_FF: (FLOATS, ir.IRBuilder.fdiv)})
_binary(operator.and_, {_II: (INTS, ir.IRBuilder.and_), (MASK, MASK): (MASK, ir.IRBuilder.and_)})
_binary(operator.or_, {_II: (INTS, ir.IRBuilder.or_), (MASK, MASK): (MASK, ir.IRBuilder.or_)})
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
    """The scalar as float32 in every lane; Ints are converted lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if value is INTS:
            return builder.sitofp(args[0], FLOATS.llvm)
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


# ---------------------------------------------------------------------------------------------------------------- memory

_STORED = {"float32": _F32, "int32": _I32, "bfloat16": _I16, "float16": _F16}


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: ir.Value, element: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, element.as_pointer()), [index])


def _read(builder: Any, pointer: ir.Value, stored: str) -> ir.Value:
    """16 neighbouring elements; bfloat16 and float16 become float32, exactly."""
    raw = builder.load(builder.bitcast(pointer, ir.VectorType(_STORED[stored], LANES).as_pointer()), align=1)
    if stored == "bfloat16":
        wide = builder.shl(builder.zext(raw, INTS.llvm), ir.Constant(INTS.llvm, [16] * LANES))
        return builder.bitcast(wide, FLOATS.llvm)
    return builder.fpext(raw, FLOATS.llvm) if stored == "float16" else raw


def _write(builder: Any, pointer: ir.Value, value: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def _loader(stored: str) -> Any:
    vector = INTS if stored == "int32" else FLOATS

    @vector_function
    def load(_typing: Any, array: Any, index: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            return _read(builder, _pointer(context, builder, array, args[0], args[1], _STORED[stored]), stored)

        return vector(array, types.int64), emit

    return load


load_float32, load_int32, load_bfloat16, load_float16 = map(_loader, ("float32", "int32", "bfloat16", "float16"))


@vector_function
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write 16 elements of 32 bits; ``index`` counts such elements."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        target, position, vector = args
        _write(builder, _pointer(context, builder, array, target, position, _I32), vector)
        return context.get_dummy_value()

    return types.none(array, types.int64, value), emit


def _scatterer(element: ir.IntType) -> Any:
    @vector_function
    def scatter(_typing: Any, array: Any, index: Any, stride: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            target, position, step, vector = args
            narrow = builder.trunc(vector, ir.VectorType(element, LANES))
            for lane in range(LANES):
                pointer = _pointer(context, builder, array, target, position, element)
                builder.store(builder.extract_element(narrow, ir.Constant(_I32, lane)), pointer, align=1)
                position = builder.add(position, step)
            return context.get_dummy_value()

        return types.none(array, types.int64, types.int64, INTS), emit

    return scatter


# Write the low 8 or 16 bits of 16 integers, ``stride`` such elements apart.
scatter_bytes, scatter_halves = _scatterer(_I8), _scatterer(_I16)


def _transposed(builder: Any, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose 16 vectors of 16 elements in registers, exchanging blocks of 1, 2, 4 and 8."""
    for distance in (1, 2, 4, 8):
        upper = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        lower = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        masks = [ir.Constant(ir.VectorType(_I32, LANES), lanes) for lanes in (upper, lower)]
        for first in range(LANES):
            if not first & distance:
                pair = rows[first], rows[first + distance]
                rows[first], rows[first + distance] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    return rows


def _transposer(stored: str) -> Any:
    @vector_function
    def transpose(_typing: Any, source: Any, index: Any, stride: Any, target: Any, target_index: Any, target_stride: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            from_array, position, step, to_array, to_position, to_step = args
            rows = []
            for _ in range(LANES):
                rows.append(_read(builder, _pointer(context, builder, source, from_array, position, _STORED[stored]), stored))
                position = builder.add(position, step)
            for row in _transposed(builder, rows):
                _write(builder, _pointer(context, builder, target, to_array, to_position, _I32), row)
                to_position = builder.add(to_position, to_step)
            return context.get_dummy_value()

        return types.none(source, types.int64, types.int64, target, types.int64, types.int64), emit

    return transpose


# Copy a 16 x 16 block transposed: rows ``stride`` source elements apart, to rows ``target_stride`` 32-bit elements apart.
transpose_float32, transpose_int32 = _transposer("float32"), _transposer("int32")
transpose_bfloat16, transpose_float16 = _transposer("bfloat16"), _transposer("float16")
