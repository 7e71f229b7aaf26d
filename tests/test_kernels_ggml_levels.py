"""Levels that ggml takes from a table: the nearest one to a number, and the best exponent of a block of FP4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import block_kernels
import numpy as np
import pytest
import torch

from quantkit.ggml import FP4_LEVELS, IQ4_LEVELS
from quantkit.kernels import ggml_grids, ggml_levels, memory, simd
from quantkit.kernels.jit import compiled


def rounding_to(table: Callable[[], Any]) -> Callable[..., None]:
    """A kernel that stores the code and the level nearest to each number."""

    @compiled
    def round_numbers(numbers: Any, codes: Any, levels: Any) -> None:
        grid = table()
        for place in range(0, numbers.size, 16):
            code, level = ggml_grids.nearest_code(memory.load_float32(numbers, place), simd.floats(1.0), grid)
            memory.store(codes, place, code)
            memory.store(levels, place, level)

    return round_numbers


@pytest.mark.parametrize(("grid", "table"), [(ggml_grids.iq4_table, IQ4_LEVELS), (ggml_grids.fp4_levels, FP4_LEVELS)])
def test_nearest_level_is_that_of_the_table(grid: Callable[[], Any], table: tuple[int, ...]) -> None:
    levels = np.array(table, np.float64)
    middles = np.unique((levels[:, None] + levels[None, :]) / 2)
    numbers = np.concatenate(
        [np.linspace(-200, 200, 1 << 16), levels, middles, middles + 1e-3, middles - 1e-3, [0.0, -0.0, 1e30, -1e30, 3e38, 1e-40]]
    ).astype(np.float32)
    numbers = np.resize(numbers, -(-numbers.size // 16) * 16)
    codes, found = np.empty(numbers.size, np.int32), np.empty(numbers.size, np.float32)
    rounding_to(grid)(numbers, codes, found)
    assert codes.min() >= 0 and codes.max() <= 15
    assert np.array_equal(found, levels[codes])
    distance = np.abs(numbers.astype(np.float64)[:, None] - levels).min(1)
    assert np.array_equal(np.abs(numbers.astype(np.float64) - found), distance)


def test_levels_of_a_table_in_a_register() -> None:
    @compiled
    def look_up(table: Any, indices: Any, found: Any) -> None:
        memory.store(found, 0, simd.lookup(memory.load_float32(table, 0), memory.load_int32(indices, 0)))

    table, found = np.arange(16, dtype=np.float32) * 3, np.empty(16, np.float32)
    indices = np.array([3, 15, 0, 0, 7, 8, 9, 31, -1, 16, 5, 4, 100, 2, 1, 12], np.int32)
    look_up(table, indices, found)
    assert np.array_equal(found, table[indices & 15])


def test_exponent_of_a_block_of_fp4_is_the_best_of_three() -> None:
    weight, importance = block_kernels.matrix("student", 16, 256), block_kernels.importance_of(256)
    blocks, weighting = weight.reshape(-1, 32).astype(np.float64), np.tile(importance.reshape(-1, 32), (16, 1))
    exponent = np.floor(np.log2(np.abs(blocks).max(1)))
    best = np.full(len(blocks), np.inf)
    for offset in (-3, -2, -1):
        scale = np.exp2(exponent + offset - 1)[:, None]
        levels = np.array(FP4_LEVELS, np.float64)
        error = np.square(blocks[..., None] - scale[..., None] * levels).min(2)
        best = np.minimum(best, (weighting * error).sum(1))
    _, sums = block_kernels.run(ggml_levels.quantize_mxfp4, "MXFP4", torch.from_numpy(weight), importance)
    assert sums[2] == pytest.approx(best.sum(), rel=1e-5)
