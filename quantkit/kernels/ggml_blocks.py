"""The way of a matrix through the search for ggml's types without a minimum: tiles in, scales and codes out.

Two loops: ``single_scales`` for one FP16 scale per 32 weights, ``double_scales`` for blocks of 256 whose groups have whole
multiples of the block's scale.  The type's levels are a ``grid`` of :mod:`quantkit.kernels.ggml_grids`.

A block of 256 goes through these steps: the best scale of every group by itself; a few common scales whose multiples come close to
these, and for each of them the best multiples by their real error, of which the best is kept; one refit of the common scale; the
multiples once more.  Codes are rounded last, against what is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_grids import nearest_code
from quantkit.kernels.ggml_search import (
    best_multiples,
    best_scale,
    clamped,
    common_scale,
    divide_by_unit,
    extreme,
    fitted_scale,
    luckiest_scale,
    nearest_scale,
    prepared,
    reciprocal,
    refitted_common,
    scale_not_below,
    units,
)
from quantkit.kernels.halves import from_half
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32, scatter_bytes, scatter_halves, store
from quantkit.kernels.numbers import largest_magnitude
from quantkit.kernels.simd import doubles, floats, fused, ints, lane_sum, largest_lane, maximum, nearest, select
from quantkit.kernels.tiles import STRIP_ROWS, TILE_INPUTS, Source, load_tile, store_codes, strip_rows

SINGLE_BLOCK, DOUBLE_BLOCK = 32, 256
HALF_TILE = STRIP_ROWS * TILE_INPUTS  # weights of a strip that one tile holds; a block of 256 takes two


class Sums(NamedTuple):
    """What a kernel adds up, by lane, as Doubles: squares of errors and of weights, plain and weighted by importance."""

    error: Any
    power: Any
    weighted_error: Any
    weighted_power: Any


class BlockScratch(NamedTuple):
    """Memory for one block of 256 x 16 rows; float32.  Arrays by group are ``[16, 16]``.

    block: the weights in units.  words: four codes each.  fits, squares: of every group's own best scale.
    multiples: the best so far.  others: those of another common scale.
    """

    block: Any
    words: Any
    fits: Any
    squares: Any
    multiples: Any
    others: Any


@compiled
def no_sums() -> Sums:
    """Sums of nothing."""
    return Sums(doubles(0.0), doubles(0.0), doubles(0.0), doubles(0.0))


@compiled
def totals(sums: Sums, unit: float, peak: Any) -> tuple[float, float, float, float, int]:
    """The sums over all lanes, weighted ones times the unit of importance, and the bits of the largest magnitude."""
    weighted, weighted_power = lane_sum(sums.weighted_error) * unit, lane_sum(sums.weighted_power) * unit
    return lane_sum(sums.error), lane_sum(sums.power), weighted, weighted_power, largest_lane(peak)


@compiled
def write_codes(
    block: Any,
    start: int,
    count: int,
    importance: Any,
    first: int,
    scale: Any,
    unit: Any,
    grid: Any,
    words: Any,
    word: int,
    sums: Sums,
) -> Sums:
    """Round ``count`` inputs against the stored scale, four codes to a word, and add up what that costs."""
    inverse = reciprocal(scale)
    error, power, weighted, weighted_power = floats(0.0), floats(0.0), floats(0.0), floats(0.0)
    for step in range(0, count, 4):
        packed = ints(0)
        for part in range(4):
            value, weight = load_float32(block, start + (step + part) * 16), floats(importance[first + step + part])
            number, level = nearest_code(value, inverse, grid)
            miss = value - scale * level
            squared, square = miss * miss, value * value
            error, power = error + squared, power + square
            weighted, weighted_power = fused(weight, squared, weighted), fused(weight, square, weighted_power)
            packed = packed | ((number & ints(0xFF)) << ints(8 * part))
        store(words, word + step * 4, packed)
    wide = doubles(unit) * doubles(unit)
    return Sums(
        sums.error + doubles(error) * wide,
        sums.power + doubles(power) * wide,
        sums.weighted_error + doubles(weighted) * wide,
        sums.weighted_power + doubles(weighted_power) * wide,
    )


@compiled
def single_scales(
    source: Source,
    target: BlockTarget,
    importance: Any,
    searched: int,
    first_row: int,
    last_row: int,
    few: Any,
    many: Any,
    spanning: float,
    clips: int,
    grid: Any,
) -> tuple[float, float, float, float, int]:
    """Quantize rows to a type with one scale per 32 weights.

    few, many: candidates where inputs are equally important, and where not.  spanning: what the extreme weight becomes without a
    search.  clips: 0 for levels so many that no
    candidate clips.
    """
    tile, block = np.empty(HALF_TILE, np.float32), np.empty(SINGLE_BLOCK * 16, np.float32)
    words, weighting = np.empty(TILE_INPUTS * 4, np.float32), prepared(importance, SINGLE_BLOCK)
    candidates = few if weighting.uniform else many
    blocks, height, sums = source.columns // SINGLE_BLOCK, strip_rows(source), no_sums()
    peak = ints(0)
    for strip in range(first_row, last_row, height):
        vectors = min(height, last_row - strip) // 16
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, tile)
            for vector in range(vectors):
                row = strip + vector * 16
                for offset in range(0, TILE_INPUTS, SINGLE_BLOCK):
                    start, first = (vector * TILE_INPUTS + offset) * 16, chunk + offset
                    largest = largest_magnitude(tile, start, SINGLE_BLOCK)
                    peak = maximum(peak, largest)
                    unit, inverse_unit = units(largest)
                    divide_by_unit(tile, start, SINGLE_BLOCK, inverse_unit, block, 0)
                    top = extreme(block, 0, SINGLE_BLOCK)
                    if searched:
                        if clips:
                            scale = fitted_scale(block, 0, SINGLE_BLOCK, weighting.shares, first, candidates, top, grid)
                        else:
                            scale = luckiest_scale(block, 0, SINGLE_BLOCK, weighting.shares, first, candidates, top)
                    else:
                        scale = top / floats(spanning)
                    if clips:
                        half, scale = nearest_scale(scale, unit, inverse_unit)
                    else:
                        half, scale = scale_not_below(scale, unit, inverse_unit)
                    scatter_halves(target.scales, row * blocks + first // SINGLE_BLOCK, blocks, half)
                    sums = write_codes(block, 0, SINGLE_BLOCK, weighting.scaled, first, scale, unit, grid, words, offset * 4, sums)
                store_codes(words, target.codes, row, chunk, source.columns)
    return totals(sums, weighting.unit, peak)


@compiled
def search_block(
    scratch: BlockScratch,
    shares: Any,
    first: int,
    group: int,
    unit: Any,
    inverse_unit: Any,
    candidates: Any,
    commons: Any,
    portions: int,
    lowest: float,
    highest: float,
    grid: Any,
) -> Any:
    """Leave the best multiples of the groups; return the FP16 bits of the block's scale.  ``portions`` as in ``double_scales``."""
    groups, share = DOUBLE_BLOCK // group, commons.size // portions
    for number in range(groups):
        start, column = number * group * 16, first + number * group
        top = extreme(scratch.block, start, group)
        fit, square = best_scale(scratch.block, start, group, shares, column, candidates, top, grid)
        store(scratch.fits, number * 16, fit)
        store(scratch.squares, number * 16, square)
    half, scale, least = ints(0), floats(0.0), floats(np.inf)
    for portion in range(portions):
        some = commons[portion * share : (portion + 1) * share]
        common = common_scale(scratch.fits, scratch.squares, groups, some, lowest, highest)
        its_half, common = scale_not_below(common, unit, inverse_unit)
        error = best_multiples(
            scratch.block, group, groups, shares, first, common, scratch.fits, common, lowest, highest, grid, scratch.others
        )
        better = error < least
        least, scale, half = select(better, error, least), select(better, common, scale), select(better, its_half, half)
        for place in range(0, groups * 16, 16):
            kept = select(better, load_float32(scratch.others, place), load_float32(scratch.multiples, place))
            store(scratch.multiples, place, kept)
    scale = refitted_common(scratch.block, group, groups, shares, first, scale, scratch.multiples, grid)
    half, scale = nearest_scale(scale, unit, inverse_unit)
    one = floats(1.0)
    best_multiples(
        scratch.block, group, groups, shares, first, scale, scratch.multiples, one, lowest, highest, grid, scratch.multiples
    )
    return half


@compiled
def span_block(
    scratch: BlockScratch, group: int, unit: Any, inverse_unit: Any, spanning: float, lowest: float, highest: float
) -> Any:
    """As ``search_block``, without a search: scales just reach the extreme weight of every group."""
    groups, extreme_fit, size = DOUBLE_BLOCK // group, floats(0.0), floats(0.0)
    for number in range(groups):
        fit = extreme(scratch.block, number * group * 16, group) / floats(spanning)
        store(scratch.fits, number * 16, fit)
        longer = fit * fit > size
        extreme_fit, size = select(longer, fit, extreme_fit), select(longer, fit * fit, size)
    half, scale = scale_not_below(extreme_fit / floats(lowest), unit, inverse_unit)
    inverse = reciprocal(scale)
    for number in range(groups):
        multiple = clamped(nearest(load_float32(scratch.fits, number * 16) * inverse), lowest, highest)
        store(scratch.multiples, number * 16, multiple)
    return half


@compiled
def double_scales(
    source: Source,
    target: BlockTarget,
    importance: Any,
    searched: int,
    first_row: int,
    last_row: int,
    group: int,
    few: Any,
    many: Any,
    spanning: float,
    commons: Any,
    portions: int,
    lowest: float,
    highest: float,
    grid: Any,
) -> tuple[float, float, float, float, int]:
    """Quantize rows to a type with blocks of 256; arguments as of ``single_scales``.

    commons: what the extreme scale of a block's groups may become as a multiple; in each of ``portions`` equal parts of them the
    best is found by an estimate, and these are compared by their real errors.  lowest, highest: of multiples.
    """
    tile, weighting = np.empty(2 * HALF_TILE, np.float32), prepared(importance, DOUBLE_BLOCK)
    scratch = BlockScratch(
        np.empty(DOUBLE_BLOCK * 16, np.float32),
        np.empty(DOUBLE_BLOCK * 4, np.float32),
        np.empty(256, np.float32),
        np.empty(256, np.float32),
        np.zeros(256, np.float32),
        np.empty(256, np.float32),
    )
    candidates = few if weighting.uniform else many
    blocks, groups, height, sums = source.columns // DOUBLE_BLOCK, DOUBLE_BLOCK // group, strip_rows(source), no_sums()
    peak = ints(0)
    for strip in range(first_row, last_row, height):
        vectors = min(height, last_row - strip) // 16
        for chunk in range(0, source.columns, DOUBLE_BLOCK):
            load_tile(source, strip, chunk, vectors, tile)
            load_tile(source, strip, chunk + TILE_INPUTS, vectors, tile[HALF_TILE:])
            for vector in range(vectors):
                row, near, far = strip + vector * 16, vector * TILE_INPUTS * 16, HALF_TILE + vector * TILE_INPUTS * 16
                largest = maximum(largest_magnitude(tile, near, TILE_INPUTS), largest_magnitude(tile, far, TILE_INPUTS))
                peak = maximum(peak, largest)
                unit, inverse_unit = units(largest)
                divide_by_unit(tile, near, TILE_INPUTS, inverse_unit, scratch.block, 0)
                divide_by_unit(tile, far, TILE_INPUTS, inverse_unit, scratch.block, TILE_INPUTS * 16)
                if searched:
                    half = search_block(
                        scratch,
                        weighting.shares,
                        chunk,
                        group,
                        unit,
                        inverse_unit,
                        candidates,
                        commons,
                        portions,
                        lowest,
                        highest,
                        grid,
                    )
                else:
                    half = span_block(scratch, group, unit, inverse_unit, spanning, lowest, highest)
                place = row * blocks + chunk // DOUBLE_BLOCK
                scatter_halves(target.scales, place, blocks, half)
                scale = from_half(half) * inverse_unit
                for number in range(groups):
                    multiple, offset = load_float32(scratch.multiples, number * 16), number * group
                    scatter_bytes(target.group_scales, place * groups + number, blocks * groups, ints(multiple))
                    sums = write_codes(
                        scratch.block,
                        offset * 16,
                        group,
                        weighting.scaled,
                        chunk + offset,
                        scale * multiple,
                        unit,
                        grid,
                        scratch.words,
                        offset * 4,
                        sums,
                    )
                store_codes(scratch.words, target.codes, row, chunk, source.columns)
                store_codes(scratch.words[TILE_INPUTS * 4 :], target.codes, row, chunk + TILE_INPUTS, source.columns)
    return totals(sums, weighting.unit, peak)
