"""The sequential part of GPTQ on the CPU: one block of inputs for all rows, column after column, with feedback inside the block.
And what surrounds it and would take longer than a product in plain torch: a permuted triangle, a transposed table of codes.

Everything is input-major: neighbouring output rows lie side by side and are the lanes of a vector, and a strip of rows of one block
stays in the first-level cache.  A rounding error made at one input is fed to the later inputs of the block at once; what it does to
later blocks is a matrix product, which is the caller's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.jit import kernel
from quantkit.kernels.memory import load_float32, load_int32, scatter_bytes, store
from quantkit.kernels.simd import doubles, floats, fused, ints, lane_sum, lookup, maximum, minimum, nearest

STRIP = 32  # rows taken at once: two vectors
BLOCK = 128  # inputs of a block: its strip fills half of a first-level cache


class Table(NamedTuple):
    """The 16 levels of codes that are no numbers.

    midpoints: float32 ``[15]`` between neighbouring levels, rising.  levels: float32 ``[16]``, rising.  codes: int32 ``[16]``,
    theirs.
    """

    midpoints: Any
    levels: Any
    codes: Any


@kernel
def quantize_block(
    errors: Any,
    corrections: Any,
    feedback: Any,
    variances: Any,
    scales: Any,
    zero_points: Any,
    minimums: Any,
    groups: Any,
    places: Any,
    lowest: float,
    highest: float,
    table: Table,
    codes: Any,
    rows: int,
    first_row: int,
    last_row: int,
) -> tuple[float, float, int]:
    """Quantize a block of inputs for the rows ``first_row .. last_row``, whole strips.

    All arrays are flat views of row-major ones.  errors: float32 ``[inputs, rows]``, weights on entry, weight - stored value on
    return. corrections: float32 ``[inputs, rows]``, what earlier blocks feed forward.  feedback: float32 ``[inputs, inputs]``, of
    which the strictly upper part is used.  variances: float64 ``[inputs]``, what one squared rounding error at that input
    costs.  scales, zero_points: float32 ``[groups, rows]``.  minimums: the same, what is subtracted from every stored value, or
    empty.  groups, places: int64 ``[inputs]``, the group of an input and its row in ``codes``, int8 ``[in, rows]``.  table: what
    codes stand for where they are no numbers, else empty arrays.

    Returns the sums over these rows of variance * (rounding error)^2 and of (weight - stored value)^2, and how many codes were cut
    off at the ends of the range.
    """
    inputs = variances.size
    tile = np.empty(inputs * STRIP, np.float32)
    low, high = floats(lowest), floats(highest)
    loss, squared, clipped = doubles(0.0), doubles(0.0), ints(0)
    for start in range(first_row, last_row, STRIP):
        for k in range(inputs):
            for r in range(0, STRIP, 16):
                place = k * rows + start + r
                store(tile, k * STRIP + r, load_float32(errors, place) + load_float32(corrections, place))
        for k in range(inputs):
            for r in range(0, STRIP, 16):
                place = k * rows + start + r
                wanted = load_float32(tile, k * STRIP + r)
                scale = load_float32(scales, groups[k] * rows + start + r)
                zero_point = load_float32(zero_points, groups[k] * rows + start + r)
                least = floats(0.0)
                if minimums.size:
                    least = load_float32(minimums, groups[k] * rows + start + r)
                if table.midpoints.size:
                    ratio, rank = wanted / scale, ints(0)
                    for midpoint in table.midpoints:
                        rank = rank + ints(ratio > floats(midpoint))
                    value = lookup(load_float32(table.levels, 0), rank) * scale
                    scatter_bytes(codes, places[k] * rows + start + r, 1, lookup(load_int32(table.codes, 0), rank))
                else:
                    code = nearest((wanted + least) / scale + zero_point)
                    inside = minimum(maximum(code, low), high)
                    clipped = clipped + ints(code != inside)
                    value = (inside - zero_point) * scale - least
                    scatter_bytes(codes, places[k] * rows + start + r, 1, ints(inside))
                rounding, error = wanted - value, load_float32(errors, place) - value
                store(errors, place, error)
                loss = loss + doubles(variances[k]) * doubles(rounding * rounding)
                squared = squared + doubles(error * error)
            one = load_float32(errors, k * rows + start)
            other = load_float32(errors, k * rows + start + 16)
            for later in range(k + 1, inputs):
                share = floats(feedback[k * inputs + later])
                store(tile, later * STRIP, fused(share, one, load_float32(tile, later * STRIP)))
                store(tile, later * STRIP + 16, fused(share, other, load_float32(tile, later * STRIP + 16)))
    return lane_sum(loss), lane_sum(squared), lane_sum(clipped)


@kernel
def permute_rows(matrix: Any, order: Any, factor: Any, out: Any, first_row: int, last_row: int) -> None:
    """Rows ``first_row .. last_row`` of the upper triangle of ``factor * matrix[order][:, order]``.

    matrix, out: float32 ``[inputs, inputs]``, flat; symmetric, but only the upper triangle of ``matrix`` is read and only that of
    ``out`` is written.  order: int64 ``[inputs]``.
    """
    inputs = order.size
    for row in range(first_row, last_row):
        one = order[row]
        for column in range(row, inputs):
            other = order[column]
            out[row * inputs + column] = factor * matrix[min(one, other) * inputs + max(one, other)]


@kernel
def transpose_codes(codes: Any, out: Any, first_row: int, last_row: int) -> None:
    """``out[row, input] = codes[input, row]`` for some rows; int8.

    Lines of ``codes`` are often a power of two apart, so a block of them does not stay in the cache; it goes through a small tile.
    """
    inputs = out.shape[1]
    tile = np.empty((64, 64), np.int8)
    for row in range(first_row, last_row, 64):
        height = min(64, last_row - row)
        for first in range(0, inputs, 64):
            width = min(64, inputs - first)
            for k in range(width):
                for r in range(height):
                    tile[k, r] = codes[first + k, row + r]
            for r in range(height):
                for k in range(width):
                    out[row + r, first + k] = tile[k, r]
