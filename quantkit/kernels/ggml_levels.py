"""Kernels for ggml's types that take their levels from a table: IQ4_NL, IQ4_XS and MXFP4.

MXFP4 has a power of two for a scale: that which ggml takes, the next below (which clips) or the next above, whichever is best.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_blocks import SINGLE_BLOCK, double_scales, no_sums, single_scales, totals, write_codes
from quantkit.kernels.ggml_grids import fp4_levels, iq4_table
from quantkit.kernels.ggml_search import divide_by_unit, prepared, units, weighted_errors
from quantkit.kernels.jit import kernel
from quantkit.kernels.memory import scatter_bytes
from quantkit.kernels.numbers import largest_magnitude
from quantkit.kernels.simd import bits, floats, ints, maximum, select
from quantkit.kernels.tiles import STRIP_ROWS, TILE_INPUTS, Source, load_tile, store_codes, strip_rows

Sums = tuple[float, float, float, float, int]  # what a kernel returns

# What the extreme weight of a group becomes, four in a visit.
CANDIDATES = np.array(
    [
        [-127, -198.6, -158.6, -146.9],
        [-138.5, -131.9, -121.9, -116.9],
        [-110.2, -101.9, -86.8, 91.7],
        [107.2, 112.9, 117.1, 121.4],
        [127, 134.1, 145.3, 167.9],
    ],
    np.float32,
)
# What the extreme scale of a block's groups becomes as a multiple of the block's scale, in equal portions.
COMMONS = np.concatenate([[-32], np.linspace(-33.9, -27.2, 23), np.linspace(28.2, 32.6, 8)]).astype(np.float32)


@kernel
def quantize_iq4_nl(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """IQ4_NL."""
    candidates, grid = CANDIDATES, iq4_table()
    return single_scales(source, target, importance, searched, first_row, last_row, candidates, candidates, -127.0, 1, grid)


@kernel
def quantize_iq4_xs(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """IQ4_XS."""
    candidates, commons, grid = CANDIDATES, COMMONS, iq4_table()
    return double_scales(
        source, target, importance, searched, first_row, last_row, 32, candidates, candidates, -127.0, commons, 4, -32.0, 31.0, grid
    )


@kernel
def quantize_mxfp4(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """MXFP4.  In units the largest weight lies between 1 and 2, so one step of the doubled levels is about 1/8."""
    tile, block = np.empty(STRIP_ROWS * TILE_INPUTS, np.float32), np.empty(SINGLE_BLOCK * 16, np.float32)
    words, weighting = np.empty(TILE_INPUTS * 4, np.float32), prepared(importance, SINGLE_BLOCK)
    blocks, height, sums, peak, grid = source.columns // SINGLE_BLOCK, strip_rows(source), no_sums(), ints(0), fp4_levels()
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
                    best, exponent = floats(0.125), ints(-2)
                    if searched:
                        scales = (floats(0.125), floats(0.0625), floats(0.25))
                        least, low, high = weighted_errors(block, 0, SINGLE_BLOCK, weighting.shares, first, scales, grid)
                        lower = low < least
                        least, best = select(lower, low, least), select(lower, scales[1], best)
                        higher = high < least
                        best = select(higher, scales[2], best)
                        exponent = select(higher, ints(-1), select(lower, ints(-3), exponent))
                    exponent = (bits(unit) >> ints(23)) + exponent
                    scatter_bytes(target.scales, row * blocks + first // SINGLE_BLOCK, blocks, exponent)
                    sums = write_codes(block, 0, SINGLE_BLOCK, weighting.scaled, first, best, unit, grid, words, offset * 4, sums)
                store_codes(words, target.codes, row, chunk, source.columns)
    return totals(sums, weighting.unit, peak)
