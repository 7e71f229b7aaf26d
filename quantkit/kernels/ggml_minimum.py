"""ggml's types with a scale and a minimum: Q4_K, Q5_K, Q2_K, and Q4_1 and Q5_1, which have no groups inside their blocks.

Here are the loops over a matrix and the entry points.  Rows are worked on 16 at a time, one row per lane: a strip of rows is loaded
for 128 inputs (256 for the K types), and each block is scaled, fitted and written before the next, so that it stays in the
first-level cache.  What is minimized is the squared error of the numbers as stored, weighted by the importance of the inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_minimum_block import (
    Errors,
    Importance,
    add_errors,
    copy_inputs,
    no_errors,
    prepare_importance,
    reciprocal,
    scale_block,
    stored,
    write_group,
)
from quantkit.kernels.ggml_minimum_fit import Starts, error_of, fit_codes, fit_group
from quantkit.kernels.ggml_minimum_groups import Layout, fit_block, new_groups
from quantkit.kernels.halves import to_half
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float32, scatter_bytes, scatter_halves
from quantkit.kernels.simd import floats, ints, lane_sum, largest_lane, maximum, select
from quantkit.kernels.tiles import STRIP_ROWS, TILE_INPUTS, Source, load_tile, store_codes, strip_rows

# How each type is searched was tuned on the error for about ten times ggml's speed without importance; see benchmarks/LOG.md.
Q4_K = Layout(block=256, group=32, highest=15.0, highest_scale=63.0, starts=Starts(4, -0.5, 0.75), spread=0.03, trials=7, reach=2)
Q5_K = Layout(block=256, group=32, highest=31.0, highest_scale=63.0, starts=Starts(3, -0.25, 0.5), spread=0.03, trials=7, reach=3)
Q2_K = Layout(block=256, group=16, highest=3.0, highest_scale=15.0, starts=Starts(4, -0.25, 0.75), spread=0.1, trials=7, reach=1)
SINGLE = Starts(5, -0.5, 0.75)


@compiled
def results(totals: Errors, divisor: float, peak: Any) -> Any:
    """What a kernel returns."""
    return (
        lane_sum(totals.squared),
        lane_sum(totals.power),
        lane_sum(totals.weighted) * divisor,
        lane_sum(totals.weighted_power) * divisor,
        largest_lane(peak),
    )


# -------------------------------------------------------------------------------------------------------- types with groups


@compiled
def quantize_groups(
    source: Source, target: BlockTarget, given: Any, layout: Layout, searched: int, first_row: int, last_row: int
) -> Any:
    """A type with groups inside its blocks of 256."""
    importance, kept = prepare_importance(given, layout.block, layout.group), new_groups(layout.block // layout.group)
    tile, other_tile = np.empty(STRIP_ROWS * TILE_INPUTS, np.float32), np.empty(STRIP_ROWS * TILE_INPUTS, np.float32)
    block, words = np.empty(layout.block * 16, np.float32), np.empty(TILE_INPUTS * 4, np.int32)
    totals, peak, height, columns = no_errors(), ints(0), strip_rows(source), source.columns
    blocks_of_row, groups_of_row = columns // layout.block, columns // layout.group
    for strip in range(first_row, last_row, height):
        vectors = min(height, last_row - strip) // 16
        for first_input in range(0, columns, layout.block):
            load_tile(source, strip, first_input, vectors, tile)
            load_tile(source, strip, first_input + TILE_INPUTS, vectors, other_tile)
            for vector in range(vectors):
                row, origin = strip + vector * 16, vector * TILE_INPUTS * 16
                largest = copy_inputs(tile, origin, TILE_INPUTS, block, 0)
                largest = maximum(largest, copy_inputs(other_tile, origin, TILE_INPUTS, block, TILE_INPUTS))
                peak = maximum(peak, largest)
                unit, inverse_unit = scale_block(block, layout.block, largest)
                scale, low = fit_block(kept, block, importance, first_input, layout, unit, inverse_unit, searched)
                errors = no_errors()
                for start in range(0, layout.block, layout.group):
                    lane = start // layout.group * 16
                    group_scale, group_low = load_float32(kept.scales, lane), load_float32(kept.minimums, lane)
                    step, lift, exact = group_scale * scale, group_low * low, importance.exact
                    errors = write_group(
                        block, start, layout.group, exact, first_input + start, step, lift, layout.highest, words, errors
                    )
                    place = row * groups_of_row + (first_input + start) // layout.group
                    scatter_bytes(target.group_scales, place, groups_of_row, ints(group_scale))
                    scatter_bytes(target.group_minimums, place, groups_of_row, ints(group_low))
                    end = start + layout.group
                    if end % TILE_INPUTS == 0:
                        store_codes(words, target.codes, row, first_input + end - TILE_INPUTS, columns)
                totals = add_errors(totals, errors, unit)
                place = row * blocks_of_row + first_input // layout.block
                scatter_halves(target.scales, place, blocks_of_row, to_half(scale * unit))
                scatter_halves(target.minimums, place, blocks_of_row, to_half(low * unit))
    return results(totals, importance.divisor, peak)


@kernel
def quantize_q4_k(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Any:
    """Q4_K: 16 codes, groups of 32."""
    return quantize_groups(source, target, importance, Q4_K, searched, first_row, last_row)


@kernel
def quantize_q5_k(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Any:
    """Q5_K: 32 codes, groups of 32."""
    return quantize_groups(source, target, importance, Q5_K, searched, first_row, last_row)


@kernel
def quantize_q2_k(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Any:
    """Q2_K: 4 codes, groups of 16."""
    return quantize_groups(source, target, importance, Q2_K, searched, first_row, last_row)


# ----------------------------------------------------------------------------------------------------- types without groups


@compiled
def fit_single(
    block: Any, importance: Importance, first: int, size: int, highest: float, unit: Any, inverse_unit: Any, searched: int
) -> Any:
    """FP16 step and minimum (subtracted) of a block without groups."""
    fit, group = fit_group(block, 0, size, importance, first, highest, True, SINGLE, searched)
    step, low = stored(fit.step, unit, inverse_unit), stored(fit.low, unit, inverse_unit)
    if searched == 0:
        return step, low
    low = stored((step * fit.sums.codes - group.total) * group.share, unit, inverse_unit)
    again = fit_codes(block, group, importance.search, step, reciprocal(step), low, highest, True)
    other = stored(again.step, unit, inverse_unit)
    other_low = stored((other * again.sums.codes - group.total) * group.share, unit, inverse_unit)
    error = error_of(again.sums, group.total, group.weight, step, low)
    improved = error_of(again.sums, group.total, group.weight, other, other_low) < error
    return select(improved, other, step), select(improved, other_low, low)


@compiled
def quantize_single(
    source: Source, target: BlockTarget, given: Any, size: int, highest: float, searched: int, first_row: int, last_row: int
) -> Any:
    """A type with blocks of 32 and nothing inside them."""
    importance = prepare_importance(given, size, size)
    tile, block = np.empty(STRIP_ROWS * TILE_INPUTS, np.float32), np.empty(size * 16, np.float32)
    words = np.empty(TILE_INPUTS * 4, np.int32)
    totals, peak, height, columns = no_errors(), ints(0), strip_rows(source), source.columns
    blocks_of_row = columns // size
    for strip in range(first_row, last_row, height):
        vectors = min(height, last_row - strip) // 16
        for chunk in range(0, columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, tile)
            for vector in range(vectors):
                row = strip + vector * 16
                for start in range(0, TILE_INPUTS, size):
                    first, place = chunk + start, row * blocks_of_row + (chunk + start) // size
                    largest = copy_inputs(tile, (vector * TILE_INPUTS + start) * 16, size, block, 0)
                    peak = maximum(peak, largest)
                    unit, inverse_unit = scale_block(block, size, largest)
                    step, low = fit_single(block, importance, first, size, highest, unit, inverse_unit, searched)
                    errors = write_group(block, 0, size, importance.exact, first, step, low, highest, words, no_errors())
                    totals = add_errors(totals, errors, unit)
                    scatter_halves(target.scales, place, blocks_of_row, to_half(step * unit))
                    scatter_halves(target.minimums, place, blocks_of_row, to_half(floats(0.0) - low * unit))
                store_codes(words, target.codes, row, chunk, columns)
    return results(totals, importance.divisor, peak)


@kernel
def quantize_q4_1(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Any:
    """Q4_1: 16 codes."""
    return quantize_single(source, target, importance, 32, 15.0, searched, first_row, last_row)


@kernel
def quantize_q5_1(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Any:
    """Q5_1: 32 codes."""
    return quantize_single(source, target, importance, 32, 31.0, searched, first_row, last_row)
