"""A block of inputs of 16 rows while its numbers are searched for, and how it is written.

A block is float32 ``[inputs, 16]``, scaled by a power of two so that the largest magnitude of each row is in [1, 2): squares do not
overflow or vanish, and scaling back is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.halves import from_half, to_half
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32, store
from quantkit.kernels.simd import bits, doubles, floats, from_bits, fused, ints, maximum, minimum, nearest, select
from quantkit.kernels.tiles import TILE_INPUTS

LEAST_IMPORTANCE = 2.0**-20  # of the largest in the block, so that every group has a solution
SMALLEST_STEP = 2.0**-100  # smaller ones have no reciprocal worth using: they count as 0


class Importance(NamedTuple):
    """Importance of the inputs, float32.

    search ``[columns]``: divided by the largest in its block, and at least LEAST_IMPORTANCE.  groups ``[columns / group]``: sums of
    ``search``; shares: their reciprocals.  exact ``[columns]``: as given, divided by ``divisor``, a power of two.
    """

    search: Any
    groups: Any
    shares: Any
    exact: Any
    divisor: float


class Errors(NamedTuple):
    """Sums over weights in float64 lanes: squared errors, squared weights, and both weighted by importance."""

    squared: Any
    power: Any
    weighted: Any
    weighted_power: Any


@compiled
def prepare_importance(given: Any, block: int, group: int) -> Any:
    """Importance as the search needs it."""
    search, exact = np.empty(given.size, np.float32), np.empty(given.size, np.float32)
    groups = np.empty(given.size // group, np.float32)
    overall = np.float64(given.max())
    divisor = 2.0 ** np.floor(np.log2(overall)) if overall > 0.0 else 1.0
    for first in range(0, given.size, block):
        largest = np.float64(given[first : first + block].max())
        for index in range(first, first + block):
            exact[index] = given[index] / divisor
            search[index] = max(given[index] / largest, LEAST_IMPORTANCE) if largest > 0.0 else 1.0
    for index in range(groups.size):
        groups[index] = search[index * group : (index + 1) * group].sum()
    return Importance(search, groups, np.float32(1.0) / groups, exact, divisor)


@compiled
def copy_inputs(tile: Any, start: int, count: int, block: Any, first: int) -> Any:
    """Copy inputs of 16 rows from a tile to the block; returns the bits of the largest magnitudes."""
    largest, mask = ints(0), ints(0x7FFFFFFF)
    for index in range(count):
        weight = load_float32(tile, start + index * 16)
        largest = maximum(largest, bits(weight) & mask)
        store(block, (first + index) * 16, weight)
    return largest


@compiled
def scale_block(block: Any, count: int, largest: Any) -> Any:
    """Divide by the power of two below each row's largest magnitude (given as bits), within 2**-100 to 2**126.

    Returns that unit and its reciprocal.
    """
    exponent = maximum(minimum(largest & ints(0x7F800000), ints(253 << 23)), ints(27 << 23))
    unit, inverse_unit = from_bits(exponent), from_bits(ints(254 << 23) - exponent)
    for place in range(0, count * 16, 16):
        store(block, place, load_float32(block, place) * inverse_unit)
    return unit, inverse_unit


@compiled
def stored(value: Any, unit: Any, inverse_unit: Any) -> Any:
    """What FP16 makes of a number of the scaled block."""
    return from_half(to_half(value * unit)) * inverse_unit


@compiled
def reciprocal(step: Any) -> Any:
    """1 / step, and 0 where the step is 0."""
    usable = step > floats(SMALLEST_STEP)
    return select(usable, floats(1.0) / select(usable, step, floats(1.0)), floats(0.0))


@compiled
def write_group(
    block: Any, start: int, count: int, importance: Any, first: int, step: Any, low: Any, highest: float, words: Any, errors: Errors
) -> Any:
    """Leave the codes of a group in words, four to each; returns the errors with those of the group added.

    importance: exact, and that of the group from ``first`` on.  words: ``[TILE_INPUTS / 4, 16]``, placed as the inputs are.

    step, low: as stored, so that ``step * code - low`` is what a reader computes, less the block's unit.
    """
    inverse, top, bottom = reciprocal(step), floats(highest), floats(0.0)
    offset = low * inverse
    squared = power = weighted = weighted_power = floats(0.0)
    for word in range(0, count, 4):
        packed = ints(0)
        for byte in range(4):
            index = word + byte
            weight = load_float32(block, (start + index) * 16)
            code = maximum(minimum(nearest(fused(weight, inverse, offset)), top), bottom)
            packed = packed | (ints(code) << ints(8 * byte))
            missed, wide = weight - (step * code - low), floats(importance[first + index])
            error, square = missed * missed, weight * weight
            squared, power = squared + error, power + square
            weighted, weighted_power = fused(error, wide, weighted), fused(square, wide, weighted_power)
        store(words, (first % TILE_INPUTS + word) // 4 * 16, packed)
    return Errors(
        errors.squared + doubles(squared),
        errors.power + doubles(power),
        errors.weighted + doubles(weighted),
        errors.weighted_power + doubles(weighted_power),
    )


@compiled
def no_errors() -> Any:
    """Sums of nothing."""
    zeros = doubles(0.0)
    return Errors(zeros, zeros, zeros, zeros)


@compiled
def add_errors(totals: Errors, errors: Errors, unit: Any) -> Any:
    """Add the errors of a block that was divided by ``unit``."""
    square = doubles(unit) * doubles(unit)
    return Errors(
        totals.squared + errors.squared * square,
        totals.power + errors.power * square,
        totals.weighted + errors.weighted * square,
        totals.weighted_power + errors.weighted_power * square,
    )
