"""Loads, stores and transposes of vectors of 16.

They name a one-dimensional array of any element type and the index of an element of the type that is read or written; nothing need
be aligned, and bounds are the caller's duty.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from quantkit.kernels.simd import FLOATS, INTS, LANES, vector_function

_F32, _I64, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_STORED = {"float32": _F32, "int32": _I32, "bfloat16": _I16, "float16": _I16, "int8": _I8, "uint8": _I8}


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: ir.Value, element: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, element.as_pointer()), [index])


def _read(builder: Any, pointer: ir.Value, stored: str) -> ir.Value:
    """16 neighbouring elements; bfloat16 and float16 become float32, int8 and uint8 become int32, exactly."""
    raw = builder.load(builder.bitcast(pointer, ir.VectorType(_STORED[stored], LANES).as_pointer()), align=1)
    if stored == "bfloat16":
        wide = builder.shl(builder.zext(raw, INTS.llvm), ir.Constant(INTS.llvm, [16] * LANES))
        return builder.bitcast(wide, FLOATS.llvm)
    if stored in ("int8", "uint8"):
        return (builder.sext if stored == "int8" else builder.zext)(raw, INTS.llvm)
    return _widened_float16(builder, raw) if stored == "float16" else raw


def _widened_float16(builder: Any, raw: ir.Value) -> ir.Value:
    """float16 bits to float32 by integer arithmetic; processors without such an instruction would call a library for it."""

    def constant(value: int) -> ir.Constant:
        return ir.Constant(INTS.llvm, [value] * LANES)

    wide = builder.zext(raw, INTS.llvm)
    magnitude = builder.and_(wide, constant(0x7FFF))
    bias = constant((127 - 15) << 23)
    finite = builder.add(builder.shl(magnitude, constant(13)), bias)
    special = builder.icmp_signed(">=", magnitude, constant(0x7C00))  # infinity and NaN
    normal = builder.select(special, builder.add(finite, bias), finite)
    small = builder.fmul(builder.sitofp(magnitude, FLOATS.llvm), ir.Constant(FLOATS.llvm, [2.0**-24] * LANES))
    below = builder.icmp_signed("<", magnitude, constant(0x0400))
    value = builder.select(below, builder.bitcast(small, INTS.llvm), normal)
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(value, sign), FLOATS.llvm)


def _write(builder: Any, pointer: ir.Value, value: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def _loader(stored: str) -> Any:
    vector = INTS if "int" in stored else FLOATS

    @vector_function
    def load(_typing: Any, array: Any, index: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            return _read(builder, _pointer(context, builder, array, args[0], args[1], _STORED[stored]), stored)

        return vector(array, types.int64), emit

    return load


load_float32, load_int32, load_bfloat16, load_float16 = map(_loader, ("float32", "int32", "bfloat16", "float16"))
load_int8, load_uint8 = map(_loader, ("int8", "uint8"))


@vector_function
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write 16 elements of 32 bits; ``index`` counts such elements."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        target, position, vector = args
        _write(builder, _pointer(context, builder, array, target, position, _I32), vector)
        return context.get_dummy_value()

    return types.none(array, types.int64, value), emit


@vector_function
def load_word(_typing: Any, array: Any, index: Any) -> Any:
    """The eight bytes from byte ``index`` on, as one word."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        pointer = _pointer(context, builder, array, args[0], args[1], _I8)
        return builder.load(builder.bitcast(pointer, _I64.as_pointer()), align=1)

    return types.uint64(array, types.int64), emit


@vector_function
def store_word(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a word as eight bytes, from byte ``index`` on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        _write(builder, _pointer(context, builder, array, args[0], args[1], _I8), args[2])
        return context.get_dummy_value()

    return types.none(array, types.int64, types.uint64), emit


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
