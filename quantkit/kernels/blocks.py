"""One scale for each block of 128 x 128 weights: a tile is one block, and all its lanes share what was found."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.numbers import (
    SMALLEST_SEARCHED,
    Numbers,
    clamp_scale,
    decode_scale,
    fit_scale,
    largest_magnitude,
    round_tile,
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
)
from quantkit.kernels.tiles import (
    STRIP_ROWS,
    STRIP_VECTORS,
    TILE_INPUTS,
    Scratch,
    Search,
    Source,
    Target,
    load_tile,
    store_codes,
    store_scales,
)

SMALLEST_SEARCHED_BITS = int(np.float32(SMALLEST_SEARCHED * 512).view(np.int32))  # of the largest weight; a scale is 1/448 of it


@compiled
def block_error(numbers: Numbers, tile: Any, code: Any) -> Any:
    """Sum of squared rounding errors of a block whose scale code stands in every lane."""
    scale = decode_scale(numbers, code, 1.0)
    total = doubles(0.0)
    for vector in range(STRIP_VECTORS):
        start = vector * TILE_INPUTS * 16
        total = total + doubles(squared_error(numbers, tile, start, TILE_INPUTS, scale, floats(0.0)))
    return lane_sum(total * doubles(scale) * doubles(scale))


@kernel
def quantize_blocks(
    numbers: Numbers, source: Source, target: Target, scratch: Scratch, search: Search
) -> tuple[float, float, int, int]:
    """Quantize a matrix; arguments and results as of ``quantize_groups``."""
    errors, weights, clipped, peak = doubles(0.0), doubles(0.0), ints(0), ints(0)
    for strip in range(0, source.rows, STRIP_ROWS):
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, STRIP_VECTORS, scratch.tile)
            largest = ints(largest_lane(largest_magnitude(scratch.tile, 0, STRIP_VECTORS * TILE_INPUTS)))
            peak = maximum(peak, largest)
            code = fit_scale(numbers, from_bits(largest), 1.0)
            if search.ends.size and largest_lane(largest) > SMALLEST_SEARCHED_BITS:
                best, first = block_error(numbers, scratch.tile, code), 0
                for end in search.ends:
                    middle = code
                    for offset in search.offsets[first:end]:
                        candidate = clamp_scale(numbers, middle + ints(offset))
                        total = block_error(numbers, scratch.tile, candidate)
                        if total < best:
                            best, code = total, candidate
                    first = end
            scale = decode_scale(numbers, code, 1.0)
            squared_scale = doubles(scale) * doubles(scale)
            for vector in range(STRIP_VECTORS):
                start = vector * TILE_INPUTS * 16
                error, weight, beyond = round_tile(numbers, scratch.tile, start, TILE_INPUTS, scale, floats(0.0), scratch.words, 0)
                errors, weights = errors + doubles(error) * squared_scale, weights + doubles(weight) * squared_scale
                clipped = clipped + beyond
                store_codes(scratch.words, target.codes, strip + vector * 16, chunk, source.columns)
            place = (strip // STRIP_ROWS) * (source.columns // TILE_INPUTS) + chunk // TILE_INPUTS
            store_scales(numbers, target, place, 0, code, floats(0.0))  # every lane stores the same scale at the same place
    return lane_sum(errors), lane_sum(weights), lane_sum(clipped), largest_lane(peak)
