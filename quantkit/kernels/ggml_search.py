"""What a scale is worth to a group of weights, and which one is best: for ggml's types without a minimum.

The weights of a group shall become ``scale * level``, levels being whole numbers in a range, or a table.  Once every weight has its
level, the best scale is ``sum(w x level) / sum(w level^2)``, and it takes ``sum(w x level)^2 / sum(w level^2)`` off the weighted
squared error.  So one visit tells what a candidate is worth after the refit, and four candidates are tried in one visit.

Candidates are given as the number that the group's extreme weight (the largest magnitude, with its sign) is mapped to.  The error
has many local minima: where levels are not symmetric, either sign can win, and where inputs differ in importance it can pay to
clip an unimportant extreme far.  The lists of candidates were chosen one by one, each for what it adds to those before, on normal,
Laplace, Student and trained weights.

Weights are divided by a power of two near the block's largest, so no sum overflows; what is stored is rounded as it really is.
Levels are those of a ``grid`` of :mod:`quantkit.kernels.ggml_grids`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.ggml_grids import nearest_level
from quantkit.kernels.halves import from_half, to_half
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32, store
from quantkit.kernels.simd import floats, from_bits, fused, ints, maximum, minimum, nearest, select

LEAST_SHARE = 2.0**-30  # of the largest in a block: inputs that are never used still get sensible codes, and sums stay above 0
LARGE = 3e38
CLEARLY = 1.0 + 2.0**-21  # what a candidate must be better by; less may be rounding

# ------------------------------------------------------------------------------------------------------------ preparation


class Weighting(NamedTuple):
    """Importance of the inputs in the forms that are needed.

    shares: of the largest in the same block, at least ``LEAST_SHARE``; ones where nothing is important.  scaled: by 1 / ``unit``,
    a power of two, so that no weighted sum overflows.  uniform: whether all inputs are equally important.
    """

    shares: Any
    scaled: Any
    unit: float
    uniform: bool


@compiled
def prepared(importance: Any, block: int) -> Weighting:
    """Importance float32 ``[columns]``, for blocks of that size."""
    shares, scaled = np.empty(importance.size, np.float32), np.empty(importance.size, np.float32)
    unit = math.ldexp(1.0, math.frexp(importance.max())[1])
    for first in range(0, importance.size, block):
        largest = importance[first : first + block].max()
        for column in range(first, first + block):
            share = importance[column] / largest if largest > 0 else np.float32(1.0)
            shares[column], scaled[column] = max(share, np.float32(LEAST_SHARE)), importance[column] / unit
    return Weighting(shares, scaled, unit, importance.min() == importance.max())


@compiled
def units(largest: Any) -> tuple[Any, Any]:
    """The power of two below the largest magnitude, given as bits, and its inverse; both are normal numbers."""
    power = minimum(maximum(largest & ints(0x7F800000), ints(27 << 23)), ints(253 << 23))
    return from_bits(power), from_bits(ints(254 << 23) - power)


@compiled
def divide_by_unit(tile: Any, start: int, count: int, inverse_unit: Any, block: Any, place: int) -> None:
    """Copy ``count`` inputs of a tile to ``block``, in units."""
    for step in range(count):
        store(block, place + step * 16, load_float32(tile, start + step * 16) * inverse_unit)


@compiled
def nearest_scale(scale: Any, unit: Any, inverse_unit: Any) -> tuple[Any, Any]:
    """A scale in units as FP16 bits, and what these stand for, in units.

    Between 2^-27 and the smallest FP16 number that one is taken: it is still better than nothing.
    """
    value = scale * unit
    half = to_half(value)
    vanishes = maximum(value, floats(0.0) - value) > floats(2.0**-27)
    half = select(vanishes, maximum(half & ints(0x7FFF), ints(1)) | (half & ints(0x8000)), half)
    return half, from_half(half) * inverse_unit


@compiled
def scale_not_below(scale: Any, unit: Any, inverse_unit: Any) -> tuple[Any, Any]:
    """The same, but a scale that would lose 1 / 256 is rounded up: so many steps of it would fall short of the largest weight.

    FP16 numbers are so coarse near their smallest, and there weights of some 1e-4 have their scales.
    """
    value = scale * unit
    half = to_half(value)
    size = half & ints(0x7FFF)
    below = from_half(size) * floats(1.0 + 2.0**-8) < maximum(value, floats(0.0) - value)
    half = minimum(size + ints(below), ints(0x7BFF)) | (half & ints(0x8000))
    return half, from_half(half) * inverse_unit


@compiled
def reciprocal(value: Any) -> Any:
    """1 / value, and 0 for 0."""
    return select(value != floats(0.0), floats(1.0) / value, floats(0.0))


@compiled
def extreme(block: Any, start: int, count: int) -> Any:
    """The weight with the largest magnitude, of each lane."""
    low, high = floats(0.0), floats(0.0)
    for step in range(count):
        weight = load_float32(block, start + step * 16)
        low, high = minimum(weight, low), maximum(weight, high)
    return select(floats(0.0) - low > high, low, high)


# ------------------------------------------------------------------------------------------------------- scale of a group


@compiled
def best_scale(
    block: Any, start: int, count: int, shares: Any, first: int, candidates: Any, top: Any, grid: Any
) -> tuple[Any, Any]:
    """Scale with the least error and the sum of its weighted squared levels.  candidates: ``[visits, 4]``; top: see ``extreme``.

    ``along^2 / square`` of two candidates is compared without dividing.
    """
    inverse_top = reciprocal(top)
    along, square = floats(0.0), floats(1.0)
    for four in candidates:
        inverse0, inverse1 = inverse_top * floats(four[0]), inverse_top * floats(four[1])
        inverse2, inverse3 = inverse_top * floats(four[2]), inverse_top * floats(four[3])
        along0, along1, along2, along3 = floats(0.0), floats(0.0), floats(0.0), floats(0.0)
        square0, square1, square2, square3 = floats(0.0), floats(0.0), floats(0.0), floats(0.0)
        for step in range(count):
            value, share = load_float32(block, start + step * 16), floats(shares[first + step])
            level0, level1 = nearest_level(value, inverse0, grid), nearest_level(value, inverse1, grid)
            level2, level3 = nearest_level(value, inverse2, grid), nearest_level(value, inverse3, grid)
            weighted0, weighted1, weighted2, weighted3 = share * level0, share * level1, share * level2, share * level3
            along0, square0 = fused(weighted0, value, along0), fused(weighted0, level0, square0)
            along1, square1 = fused(weighted1, value, along1), fused(weighted1, level1, square1)
            along2, square2 = fused(weighted2, value, along2), fused(weighted2, level2, square2)
            along3, square3 = fused(weighted3, value, along3), fused(weighted3, level3, square3)
        for other, its_square in ((along0, square0), (along1, square1), (along2, square2), (along3, square3)):
            better = other * other * square > along * along * its_square * floats(CLEARLY)
            along, square = select(better, other, along), select(better, its_square, square)
    return along / square, square


@compiled
def level_sums(block: Any, start: int, count: int, shares: Any, first: int, scale: Any, grid: Any) -> tuple[Any, Any]:
    """sum(w x level) and sum(w level^2) for the levels that a scale gives."""
    inverse, along, square = reciprocal(scale), floats(0.0), floats(0.0)
    for step in range(count):
        value = load_float32(block, start + step * 16)
        chosen = nearest_level(value, inverse, grid)
        weighted = floats(shares[first + step]) * chosen
        along, square = fused(weighted, value, along), fused(weighted, chosen, square)
    return along, square


@compiled
def fitted_scale(block: Any, start: int, count: int, shares: Any, first: int, candidates: Any, top: Any, grid: Any) -> Any:
    """``best_scale``, and once more the best scale for the levels that it gives."""
    scale, _ = best_scale(block, start, count, shares, first, candidates, top, grid)
    along, square = level_sums(block, start, count, shares, first, scale, grid)
    return select(square > floats(0.0), along / square, scale)


@compiled
def luckiest_scale(block: Any, start: int, count: int, shares: Any, first: int, candidates: Any, top: Any) -> Any:
    """The candidate with the least error, for whole numbers of many bits, none of which a candidate clips.

    The error of any scale is then close to a twelfth of a squared step for every weight; but it scatters by 16 % from scale to
    scale, and scales that are 1 % apart round the larger weights differently.  So of a few scales that are barely larger than
    needed the luckiest is some 15 % better than the smallest.  Errors are small beside the weights, so they are added up as such.
    """
    inverse_top, least, best = reciprocal(top), floats(LARGE), floats(0.0)
    for four in candidates:
        inverse0, inverse1 = inverse_top * floats(four[0]), inverse_top * floats(four[1])
        inverse2, inverse3 = inverse_top * floats(four[2]), inverse_top * floats(four[3])
        error0, error1, error2, error3 = floats(0.0), floats(0.0), floats(0.0), floats(0.0)
        for step in range(count):
            value, share = load_float32(block, start + step * 16), floats(shares[first + step])
            steps0, steps1, steps2, steps3 = value * inverse0, value * inverse1, value * inverse2, value * inverse3
            miss0, miss1 = steps0 - nearest(steps0), steps1 - nearest(steps1)
            miss2, miss3 = steps2 - nearest(steps2), steps3 - nearest(steps3)
            error0, error1 = fused(share * miss0, miss0, error0), fused(share * miss1, miss1, error1)
            error2, error3 = fused(share * miss2, miss2, error2), fused(share * miss3, miss3, error3)
        for error, inverse in ((error0, inverse0), (error1, inverse1), (error2, inverse2), (error3, inverse3)):
            scale = reciprocal(inverse)
            squared = error * scale * scale
            better = squared < least
            least, best = select(better, squared, least), select(better, scale, best)
    return best


@compiled
def weighted_errors(
    block: Any, start: int, count: int, shares: Any, first: int, scales: tuple[Any, Any, Any], grid: Any
) -> tuple[Any, Any, Any]:
    """sum(w (x - scale level)^2) of three scales."""
    inverse0, inverse1, inverse2 = reciprocal(scales[0]), reciprocal(scales[1]), reciprocal(scales[2])
    minus0, minus1, minus2 = floats(0.0) - scales[0], floats(0.0) - scales[1], floats(0.0) - scales[2]
    error0, error1, error2 = floats(0.0), floats(0.0), floats(0.0)
    for step in range(count):
        value, share = load_float32(block, start + step * 16), floats(shares[first + step])
        miss0 = fused(minus0, nearest_level(value, inverse0, grid), value)
        miss1 = fused(minus1, nearest_level(value, inverse1, grid), value)
        miss2 = fused(minus2, nearest_level(value, inverse2, grid), value)
        error0, error1 = fused(share * miss0, miss0, error0), fused(share * miss1, miss1, error1)
        error2 = fused(share * miss2, miss2, error2)
    return error0, error1, error2


# ------------------------------------------------------------------------------------------------------- scale of a block


@compiled
def clamped(multiple: Any, lowest: float, highest: float) -> Any:
    """Whole multiples of a block's scale, in their range."""
    return minimum(maximum(multiple, floats(lowest)), floats(highest))


@compiled
def common_scale(fits: Any, squares: Any, groups: int, candidates: Any, lowest: float, highest: float) -> Any:
    """Scale of a block whose whole multiples come closest to the ``fits`` of its groups, at the cost ``squares`` of each.

    Candidates are what the extreme fit is divided by.
    """
    low, high = floats(0.0), floats(0.0)
    for group in range(groups):
        fit = load_float32(fits, group * 16)
        low, high = minimum(fit, low), maximum(fit, high)
    inverse_top = reciprocal(select(floats(0.0) - low > high, low, high))
    along, square = floats(0.0), floats(1.0)
    for candidate in candidates:
        inverse, other, its_square = inverse_top * floats(candidate), floats(0.0), floats(0.0)
        for group in range(groups):
            fit = load_float32(fits, group * 16)
            multiple = clamped(nearest(fit * inverse), lowest, highest)
            weighted = load_float32(squares, group * 16) * multiple
            other, its_square = fused(weighted, fit, other), fused(weighted, multiple, its_square)
        better = other * other * square > along * along * its_square * floats(CLEARLY)
        along, square = select(better, other, along), select(better, its_square, square)
    return along / square


@compiled
def best_multiples(
    block: Any,
    count: int,
    groups: int,
    shares: Any,
    first: int,
    scale: Any,
    middles: Any,
    unit_of_middles: Any,
    lowest: float,
    highest: float,
    grid: Any,
    multiples: Any,
) -> Any:
    """Leave the best multiple of every group: that next to ``middles / unit_of_middles``, or a neighbour; return the error."""
    total, inverse_unit = floats(0.0), reciprocal(unit_of_middles)
    for group in range(groups):
        middle = nearest(load_float32(middles, group * 16) * inverse_unit)
        same = clamped(middle, lowest, highest)
        below, above = clamped(middle - floats(1.0), lowest, highest), clamped(middle + floats(1.0), lowest, highest)
        start, column, scales = group * count * 16, first + group * count, (scale * below, scale * same, scale * above)
        low, least, high = weighted_errors(block, start, count, shares, column, scales, grid)
        chosen = same
        least, chosen = select(low < least, low, least), select(low < least, below, chosen)
        least, chosen = select(high < least, high, least), select(high < least, above, chosen)
        total = total + least
        store(multiples, group * 16, chosen)
    return total


@compiled
def refitted_common(block: Any, count: int, groups: int, shares: Any, first: int, scale: Any, multiples: Any, grid: Any) -> Any:
    """The best scale of a block for the multiples and the levels that ``scale`` gives."""
    along, square = floats(0.0), floats(0.0)
    for group in range(groups):
        multiple = load_float32(multiples, group * 16)
        start, column = group * count * 16, first + group * count
        its_along, its_square = level_sums(block, start, count, shares, column, scale * multiple, grid)
        along, square = fused(its_along, multiple, along), fused(its_square * multiple, multiple, square)
    return select(square > floats(0.0), along / square, scale)
