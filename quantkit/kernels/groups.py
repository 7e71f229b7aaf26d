"""One scale for each group of 16, 32, 64 or 128 inputs of a row: everything happens in one visit to the tile."""

from __future__ import annotations

from typing import Any

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.numbers import (
    SMALLEST_SEARCHED,
    Numbers,
    best_multiple,
    clamp_scale,
    decode_scale,
    encode_scale,
    fit_range,
    fit_scale,
    largest_magnitude,
    round_tile,
    shift_zero_point,
    smallest_and_largest,
    squared_error,
)
from quantkit.kernels.simd import (
    doubles,
    floats,
    from_bits,
    ints,
    lane_sum,
    largest_lane,
    maximum,
    select,
)
from quantkit.kernels.tiles import TILE_INPUTS, Scratch, Search, Source, Target, load_tile, store_codes, store_scales, strip_rows


@compiled
def search_scale(
    numbers: Numbers, tile: Any, start: int, count: int, fitted: Any, zero_point: Any, global_scale: float, search: Search
) -> tuple[Any, Any]:
    """Scale codes and zero points with the least error of each lane: the fitted ones, their neighbours, refinements.

    Errors are compared in units of the fitted scale, so that no weight is too large or too small to be squared.  A candidate that
    is not better, or whose error is not a number, is not taken.
    """
    unit = decode_scale(numbers, fitted, global_scale)
    error = squared_error(numbers, tile, start, count, unit, zero_point)
    best, chosen = select(unit > floats(SMALLEST_SEARCHED), error, floats(0.0)), fitted  # nothing is better than 0
    inverse, first = floats(1.0) / unit, 0
    for end in search.ends:
        middle, middle_zero = chosen, zero_point
        for index in range(first, end):
            code = clamp_scale(numbers, middle + ints(search.offsets[index]))
            shifted = shift_zero_point(numbers, middle_zero, search.shifts[index])
            scale = decode_scale(numbers, code, global_scale)
            ratio = scale * inverse
            error = squared_error(numbers, tile, start, count, scale, shifted) * ratio * ratio
            better = error < best
            best, chosen = select(better, error, best), select(better, code, chosen)
            zero_point = select(better, shifted, zero_point)
        first = end
    if numbers.whole:
        multiple = best_multiple(numbers, tile, start, count, decode_scale(numbers, chosen, global_scale), zero_point)
        code = encode_scale(numbers, multiple)
        scale = decode_scale(numbers, code, global_scale)
        ratio = scale * inverse
        error = squared_error(numbers, tile, start, count, scale, zero_point) * ratio * ratio
        chosen = select(error < best, code, chosen)
    return chosen, zero_point


@kernel
def quantize_groups(
    numbers: Numbers, source: Source, target: Target, scratch: Scratch, group: int, global_scale: float, search: Search
) -> tuple[float, float, int, int]:
    """Quantize a matrix.

    Returns the sums of squared errors and squared weights, the number of clipped weights and the bits of the largest magnitude.
    When those bits are not of a finite number the results mean nothing.
    """
    groups = source.columns // group
    errors, weights, clipped, peak = doubles(0.0), doubles(0.0), ints(0), ints(0)
    height = strip_rows(source)
    for strip in range(0, source.rows, height):
        vectors = min(height, source.rows - strip) // 16
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, scratch.tile)
            for vector in range(vectors):
                row = strip + vector * 16
                for first in range(0, TILE_INPUTS, group):
                    start = (vector * TILE_INPUTS + first) * 16
                    largest = largest_magnitude(scratch.tile, start, group)
                    peak = maximum(peak, largest)
                    zero_point = floats(0.0)
                    if numbers.symmetric:
                        code = fit_scale(numbers, from_bits(largest), global_scale)
                    else:
                        low, high = smallest_and_largest(scratch.tile, start, group, floats(0.0), floats(0.0))
                        code, zero_point = fit_range(numbers, low, high)
                    if search.ends.size:
                        code, zero_point = search_scale(numbers, scratch.tile, start, group, code, zero_point, global_scale, search)
                    store_scales(numbers, target, row * groups + (chunk + first) // group, groups, code, zero_point)
                    scale = decode_scale(numbers, code, global_scale)
                    error, weight, beyond = round_tile(
                        numbers, scratch.tile, start, group, scale, zero_point, scratch.words, first // 4
                    )
                    squared_scale = doubles(scale) * doubles(scale)
                    errors, weights = errors + doubles(error) * squared_scale, weights + doubles(weight) * squared_scale
                    clipped = clipped + beyond
                store_codes(scratch.words, target.codes, row, chunk, source.columns)
    return lane_sum(errors), lane_sum(weights), lane_sum(clipped), largest_lane(peak)
