"""One scale for each row: a strip of rows is read once for its scales, once for each round of a search, and once for its codes.

Only the first read goes to memory; a strip is small enough to come from cache afterwards.  A scale for all rows of several matrices
needs to see all of them first: it is found before (``tiles.largest_bits``, ``candidate_errors``) and given.
"""

from __future__ import annotations

from typing import Any

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import (
    load_float32,
    load_int32,
    store,
)
from quantkit.kernels.numbers import (
    SMALLEST_SEARCHED,
    Numbers,
    clamp_scale,
    decode_scale,
    fit_range,
    fit_scale,
    round_tile,
    shift_zero_point,
    smallest_and_largest,
    squared_error,
)
from quantkit.kernels.simd import (
    doubles,
    floats,
    ints,
    lane_sum,
    largest_lane,
    maximum,
    select,
)
from quantkit.kernels.tiles import (
    STRIP_ROWS,
    TILE_INPUTS,
    Scratch,
    Search,
    Source,
    Target,
    largest_of_strip,
    load_tile,
    store_codes,
    store_scales,
    strip_rows,
)


@compiled
def fit_strip(numbers: Numbers, source: Source, strip: int, vectors: int, scratch: Scratch) -> Any:
    """Leave the fitted scale codes in ``scale_codes`` and the zero points in ``low``; return the largest magnitudes' bits."""
    peak = largest_of_strip(source, strip, vectors, scratch)
    for lane in range(0, STRIP_ROWS, 16):
        store(scratch.low, lane, floats(0.0))
        store(scratch.high, lane, floats(0.0))
    if numbers.symmetric:
        for lane in range(0, vectors * 16, 16):
            store(scratch.scale_codes, lane, fit_scale(numbers, load_float32(scratch.largest, lane), 1.0))
        return peak
    for chunk in range(0, source.columns, TILE_INPUTS):
        load_tile(source, strip, chunk, vectors, scratch.tile)
        for lane in range(0, vectors * 16, 16):
            low, high = load_float32(scratch.low, lane), load_float32(scratch.high, lane)
            low, high = smallest_and_largest(scratch.tile, lane * TILE_INPUTS, TILE_INPUTS, low, high)
            store(scratch.low, lane, low)
            store(scratch.high, lane, high)
    for lane in range(0, vectors * 16, 16):
        code, zero_point = fit_range(numbers, load_float32(scratch.low, lane), load_float32(scratch.high, lane))
        store(scratch.scale_codes, lane, code)
        store(scratch.low, lane, zero_point)
    return peak


@compiled
def search_strip(numbers: Numbers, source: Source, strip: int, vectors: int, scratch: Scratch, offsets: Any, shifts: Any) -> None:
    """One round: replace the scale codes and zero points of a strip by those at ``offsets`` and ``shifts`` that give less error."""
    candidates = offsets.size
    for place in range(0, (candidates + 1) * STRIP_ROWS, 16):
        store(scratch.errors, place, floats(0.0))
    for chunk in range(0, source.columns, TILE_INPUTS):
        load_tile(source, strip, chunk, vectors, scratch.tile)
        for lane in range(0, vectors * 16, 16):
            fitted, fitted_zero = load_int32(scratch.scale_codes, lane), load_float32(scratch.low, lane)
            for index in range(candidates + 1):
                code, zero_point = fitted, fitted_zero
                if index < candidates:
                    code = clamp_scale(numbers, fitted + ints(offsets[index]))
                    zero_point = shift_zero_point(numbers, fitted_zero, shifts[index])
                scale, place = decode_scale(numbers, code, 1.0), index * STRIP_ROWS + lane
                error = squared_error(numbers, scratch.tile, lane * TILE_INPUTS, TILE_INPUTS, scale, zero_point)
                store(scratch.errors, place, load_float32(scratch.errors, place) + error)
    for lane in range(0, vectors * 16, 16):
        fitted, fitted_zero = load_int32(scratch.scale_codes, lane), load_float32(scratch.low, lane)
        unit, error = decode_scale(numbers, fitted, 1.0), load_float32(scratch.errors, candidates * STRIP_ROWS + lane)
        best, chosen = select(unit > floats(SMALLEST_SEARCHED), error, floats(0.0)), fitted  # nothing is better than 0
        zero_point = fitted_zero
        for index in range(candidates):
            code = clamp_scale(numbers, fitted + ints(offsets[index]))
            ratio = decode_scale(numbers, code, 1.0) / unit
            error = load_float32(scratch.errors, index * STRIP_ROWS + lane) * ratio * ratio
            better = error < best
            best, chosen = select(better, error, best), select(better, code, chosen)
            zero_point = select(better, shift_zero_point(numbers, fitted_zero, shifts[index]), zero_point)
        store(scratch.scale_codes, lane, chosen)
        store(scratch.low, lane, zero_point)


@compiled
def use_scale(scratch: Scratch, code: int) -> None:
    """Leave one symmetric scale for all rows where ``fit_strip`` leaves those that it finds."""
    for lane in range(0, STRIP_ROWS, 16):
        store(scratch.scale_codes, lane, ints(code))
        store(scratch.low, lane, floats(0.0))


@kernel
def candidate_errors(numbers: Numbers, source: Source, scratch: Scratch, codes: Any, errors: Any) -> None:
    """Add to ``errors``, float64, the squared error of a matrix under each of the scale ``codes``, int64, used for all its rows."""
    height = strip_rows(source)
    for strip in range(0, source.rows, height):
        vectors = min(height, source.rows - strip) // 16
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, scratch.tile)
            for index in range(codes.size):
                scale, total = decode_scale(numbers, ints(codes[index]), 1.0), doubles(0.0)
                for lane in range(0, vectors * 16, 16):
                    total = total + doubles(
                        squared_error(numbers, scratch.tile, lane * TILE_INPUTS, TILE_INPUTS, scale, floats(0.0))
                    )
                errors[index] += lane_sum(total * doubles(scale) * doubles(scale))


@kernel
def quantize_rows(
    numbers: Numbers, source: Source, target: Target, scratch: Scratch, search: Search, given: int
) -> tuple[float, float, int, int]:
    """Quantize a matrix; arguments and results as of ``quantize_groups``.

    given: a scale code for all rows, which is not searched, and then no largest magnitude is returned; 0 for a scale of each row.
    """
    errors, weights, clipped, peak = doubles(0.0), doubles(0.0), ints(0), ints(0)
    height = strip_rows(source)
    for strip in range(0, source.rows, height):
        vectors = min(height, source.rows - strip) // 16
        if given:
            use_scale(scratch, given)
        else:
            peak = maximum(peak, fit_strip(numbers, source, strip, vectors, scratch))
        first = 0
        for end in search.ends:
            search_strip(numbers, source, strip, vectors, scratch, search.offsets[first:end], search.shifts[first:end])
            first = end
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, scratch.tile)
            for lane in range(0, vectors * 16, 16):
                code, zero_point = load_int32(scratch.scale_codes, lane), load_float32(scratch.low, lane)
                scale = decode_scale(numbers, code, 1.0)
                error, weight, beyond = round_tile(
                    numbers, scratch.tile, lane * TILE_INPUTS, TILE_INPUTS, scale, zero_point, scratch.words, 0
                )
                squared_scale = doubles(scale) * doubles(scale)
                errors, weights = errors + doubles(error) * squared_scale, weights + doubles(weight) * squared_scale
                clipped = clipped + beyond
                store_codes(scratch.words, target.codes, strip + lane, chunk, source.columns)
        for lane in range(0, vectors * 16, 16):
            code, zero_point = load_int32(scratch.scale_codes, lane), load_float32(scratch.low, lane)
            store_scales(numbers, target, strip + lane, 1, code, zero_point)
    return lane_sum(errors), lane_sum(weights), lane_sum(clipped), largest_lane(peak)
