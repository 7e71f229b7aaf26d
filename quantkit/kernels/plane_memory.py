"""Loads and stores of 16 codes at a time, between planes of words and one code per byte; see :mod:`quantkit.kernels.planes`.

Sixteen neighbouring inputs of a group come from neighbouring words: from 16 of them in planes of 4 and 8 bits, from 8 words twice
in planes of 2, from 4 words four times in planes of 1.  There the fields of later copies lie further up, by ``copy_shifts_of_...``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from quantkit.kernels.simd import INTS, LANES, vector_function

_I32, _I8 = ir.IntType(32), ir.IntType(8)
_BYTES = ir.VectorType(_I8, LANES)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: ir.Value, element: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, element.as_pointer()), [index])


def _lanes(numbers: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)


def _repeated(count: int) -> Any:
    @vector_function
    def load(_typing: Any, array: Any, index: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            kind = ir.VectorType(_I32, count)
            pointer = _pointer(context, builder, array, args[0], args[1], _I32)
            words = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)
            return builder.shuffle_vector(words, ir.Constant(kind, ir.Undefined), _lanes([lane % count for lane in range(LANES)]))

        return INTS(array, types.int64), emit

    return load


def _folded(count: int) -> Any:
    @vector_function
    def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
            target, position, vector = args
            width = LANES
            while width > count:
                width //= 2
                halves = [_lanes(list(range(first, first + width))) for first in (0, width)]
                undefined = ir.Constant(vector.type, ir.Undefined)
                vector = builder.or_(*(builder.shuffle_vector(vector, undefined, half) for half in halves))
            pointer = _pointer(context, builder, array, target, position, _I32)
            builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(array, types.int64, INTS), emit

    return store


# 8 or 4 words from word ``index`` on, repeated over 16 lanes; and the reverse: copies joined bit by bit, written as so many words.
load_eight, load_four = _repeated(8), _repeated(4)
store_eight, store_four = _folded(8), _folded(4)


def _shifts(width: int) -> Any:
    @vector_function
    def shifts(_typing: Any) -> Any:
        lanes = _lanes([lane // (4 * width) * width for lane in range(LANES)])
        return INTS(), lambda context, builder, signature, args: lanes

    return shifts


# By lane, how much further up the fields of a copy lie than those of the first copy, in planes of 2 bits and of 1.
copy_shifts_of_two, copy_shifts_of_one = _shifts(2), _shifts(1)


@vector_function
def load_codes(_typing: Any, array: Any, index: Any) -> Any:
    """16 bytes from byte ``index`` on, without sign."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        pointer = _pointer(context, builder, array, args[0], args[1], _I8)
        return builder.zext(builder.load(builder.bitcast(pointer, _BYTES.as_pointer()), align=1), INTS.llvm)

    return INTS(array, types.int64), emit


@vector_function
def store_codes(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the low 8 bits of 16 integers as neighbouring bytes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        pointer = _pointer(context, builder, array, args[0], args[1], _I8)
        builder.store(builder.trunc(args[2], _BYTES), builder.bitcast(pointer, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, INTS), emit
