"""Search for scales by what they do to outputs, on the CPU: one group of inputs for all rows of a part of a matrix.

The candidates are, as in the search in ``groups``, stored scales in rounds around the best so far; but each is judged by the form
e^T H e + 2 c^T e of the rounding errors e that it makes, with H the mean products of the inputs of this group and c what the errors
of all other groups contribute.

Everything is input-major, as in ``gptq``: neighbouring output rows lie side by side and are the lanes of a vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float32, load_int32, scatter_bytes, store
from quantkit.kernels.numbers import SMALLEST_SEARCHED, Numbers, clamp_scale, decode_scale, shift_zero_point
from quantkit.kernels.simd import doubles, floats, fused, ints, lane_sum, maximum, minimum, nearest, select
from quantkit.kernels.tiles import Search

STRIP = 32  # rows taken at once: two vectors, so that every number of H that is loaded serves both
STEP = 4  # rows of H taken at once


class Group(NamedTuple):
    """One group of inputs of ``rows`` rows, as flat views of row-major arrays.

    weights, errors, cross: float32 ``[inputs, rows]``; errors, weight - stored value, are written; cross is 2 c.  metric: float32
    ``[inputs, inputs]``, upper triangular, with e^T metric e = e^T H e.  scale_codes: int32 ``[rows]``.  zero_points: float32
    ``[rows]``.  Both are improved in place.
    """

    weights: Any
    errors: Any
    cross: Any
    metric: Any
    scale_codes: Any
    zero_points: Any
    inputs: int
    rows: int


@compiled
def cost(group: Group, tile: Any) -> tuple[Any, Any]:
    """The quadratic form for the errors in ``tile``, float32 ``[inputs, STRIP]``, whose cross terms lie behind them."""
    inputs, metric = group.inputs, group.metric
    left, right = floats(0.0), floats(0.0)
    for first in range(0, inputs, STEP):
        place = (inputs + first) * STRIP
        a, b = load_float32(tile, place), load_float32(tile, place + 16)
        c, d = load_float32(tile, place + STRIP), load_float32(tile, place + STRIP + 16)
        e, f = load_float32(tile, place + 2 * STRIP), load_float32(tile, place + 2 * STRIP + 16)
        g, h = load_float32(tile, place + 3 * STRIP), load_float32(tile, place + 3 * STRIP + 16)
        for other in range(first, inputs):
            one, two = load_float32(tile, other * STRIP), load_float32(tile, other * STRIP + 16)
            at = first * inputs + other
            weight = floats(metric[at])
            a, b = fused(weight, one, a), fused(weight, two, b)
            weight = floats(metric[at + inputs])
            c, d = fused(weight, one, c), fused(weight, two, d)
            weight = floats(metric[at + 2 * inputs])
            e, f = fused(weight, one, e), fused(weight, two, f)
            weight = floats(metric[at + 3 * inputs])
            g, h = fused(weight, one, g), fused(weight, two, h)
        place = first * STRIP
        left = fused(a, load_float32(tile, place), left)
        right = fused(b, load_float32(tile, place + 16), right)
        left = fused(c, load_float32(tile, place + STRIP), left)
        right = fused(d, load_float32(tile, place + STRIP + 16), right)
        left = fused(e, load_float32(tile, place + 2 * STRIP), left)
        right = fused(f, load_float32(tile, place + 2 * STRIP + 16), right)
        left = fused(g, load_float32(tile, place + 3 * STRIP), left)
        right = fused(h, load_float32(tile, place + 3 * STRIP + 16), right)
    return left, right


@compiled
def round_lane(numbers: Numbers, group: Group, start: int, tile: Any, lane: int, unit: Any, code: Any, zero_point: Any) -> None:
    """Leave in the tile ``unit`` times the errors of 16 rows under these scales and zero points; start: the strip's first row."""
    low, high, scale = floats(numbers.lowest), floats(numbers.highest), decode_scale(numbers, code, 1.0)
    for k in range(group.inputs):
        weight = load_float32(group.weights, k * group.rows + start + lane)
        inside = minimum(maximum(nearest(weight / scale + zero_point), low), high)
        store(tile, k * STRIP + lane, (weight - (inside - zero_point) * scale) * unit)


@compiled
def judge(
    numbers: Numbers, group: Group, start: int, tile: Any, units: tuple[Any, Any], codes: tuple[Any, Any], zeros: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Cost of one candidate for each of the ``STRIP`` rows."""
    round_lane(numbers, group, start, tile, 0, units[0], codes[0], zeros[0])
    round_lane(numbers, group, start, tile, 16, units[1], codes[1], zeros[1])
    return cost(group, tile)


@compiled
def unit_of(numbers: Numbers, code: Any) -> Any:
    """One by the scale, in which errors are compared, so that none is too large or too small to be squared.

    0 where that may be infinite: then no candidate is better than another.
    """
    scale = decode_scale(numbers, code, 1.0)
    return select(scale > floats(SMALLEST_SEARCHED), floats(1.0) / scale, floats(0.0))


@kernel
def search_group(numbers: Numbers, group: Group, search: Search) -> None:
    """Improve scales and zero points of a group, whole strips of rows, and leave the errors that they make.

    A candidate that is not better, or whose cost is not a number, is not taken.
    """
    tile = np.empty(2 * group.inputs * STRIP, np.float32)
    for start in range(0, group.rows, STRIP):
        one, two = load_int32(group.scale_codes, start), load_int32(group.scale_codes, start + 16)
        units = unit_of(numbers, one), unit_of(numbers, two)
        for k in range(group.inputs):
            place, from_place = (group.inputs + k) * STRIP, k * group.rows + start
            store(tile, place, load_float32(group.cross, from_place) * units[0])
            store(tile, place + 16, load_float32(group.cross, from_place + 16) * units[1])
        zero, other_zero = load_float32(group.zero_points, start), load_float32(group.zero_points, start + 16)
        best, second = judge(numbers, group, start, tile, units, (one, two), (zero, other_zero))
        first = 0
        for end in search.ends:
            middle, other_middle, middle_zero, other_middle_zero = one, two, zero, other_zero
            for index in range(first, end):
                code = clamp_scale(numbers, middle + ints(search.offsets[index]))
                other = clamp_scale(numbers, other_middle + ints(search.offsets[index]))
                shifted = shift_zero_point(numbers, middle_zero, search.shifts[index])
                moved = shift_zero_point(numbers, other_middle_zero, search.shifts[index])
                left, right = judge(numbers, group, start, tile, units, (code, other), (shifted, moved))
                one, two = select(left < best, code, one), select(right < second, other, two)
                zero, other_zero = select(left < best, shifted, zero), select(right < second, moved, other_zero)
                best, second = select(left < best, left, best), select(right < second, right, second)
            first = end
        round_lane(numbers, group, start, tile, 0, floats(1.0), one, zero)
        round_lane(numbers, group, start, tile, 16, floats(1.0), two, other_zero)
        for k in range(group.inputs):
            for lane in range(0, STRIP, 16):
                store(group.errors, k * group.rows + start + lane, load_float32(tile, k * STRIP + lane))
        store(group.scale_codes, start, one)
        store(group.scale_codes, start + 16, two)
        store(group.zero_points, start, zero)
        store(group.zero_points, start + 16, other_zero)


@kernel
def write_codes(numbers: Numbers, group: Group, first_input: int, inputs: int, codes: Any) -> tuple[float, int]:
    """Codes of a group to the row-major ``codes``, int8 ``[rows, inputs]``, from ``first_input`` on.

    Returns the sum of squared errors and how many weights lie beyond the outermost values.
    """
    low, high = floats(numbers.lowest), floats(numbers.highest)
    squared, clipped = doubles(0.0), ints(0)
    for start in range(0, group.rows, 16):
        scale = decode_scale(numbers, load_int32(group.scale_codes, start), 1.0)
        zero_point = load_float32(group.zero_points, start)
        for k in range(group.inputs):
            steps = load_float32(group.weights, k * group.rows + start) / scale + zero_point
            inside = minimum(maximum(steps, low), high)
            clipped = clipped + ints(steps != inside)
            scatter_bytes(codes, start * inputs + first_input + k, inputs, ints(nearest(inside)))
            error = doubles(load_float32(group.errors, k * group.rows + start))
            squared = squared + error * error
    return lane_sum(squared), lane_sum(clipped)
