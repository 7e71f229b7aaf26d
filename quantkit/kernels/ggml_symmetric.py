"""Kernels for ggml's types whose levels are whole numbers around zero: Q8_0, Q4_0, Q5_0, Q3_K and Q6_K.

The arguments are those of every kernel of :mod:`quantkit.methods.blocks`.  All but Q8_0 reach one step further below zero than
above, so the extreme weight of a group is mapped to the lowest level, or near it, or with a scale of the other sign to the highest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_blocks import double_scales, single_scales
from quantkit.kernels.ggml_grids import whole_numbers
from quantkit.kernels.jit import kernel
from quantkit.kernels.tiles import Source

Sums = tuple[float, float, float, float, int]  # what a kernel returns

# What the extreme weight of a group becomes, four in a visit: where inputs are equally important (FEW), and where not (MANY).
# The lowest level comes first: what it represents exactly, as weights that are all the same, shall stay exact.
Q8_0_CANDIDATES = np.array([[127, 126, 125, 123]], np.float32)
Q4_0_FEW = np.array([[-8, -9.07, -8.71, -8.44], [-8.18, -7.73, -7.11, -6.04]], np.float32)
Q4_0_MANY = np.array(
    [
        [-8, -14.3, -12, -10.6],
        [-10, -9.46, -9.04, -8.73],
        [-8.52, -8.25, -7.78, -7.36],
        [-7.05, -6.73, -6.1, -5.16],
        [8, 8.52, 9.36, 10.83],
    ],
    np.float32,
)
Q5_0_FEW = np.array([[-16, -16.8, -16.45, -15.7], [-15.15, -14.75, -14.1, -13]], np.float32)
Q5_0_MANY = np.array(
    [
        [-16, -22.4, -20.2, -18.9],
        [-18.1, -17.6, -17.2, -16.8],
        [-16.4, -15.65, -15.3, -15],
        [-14.8, -14.25, -13.9, -13.2],
        [-12.8, -12.1, -11, 16.8],
    ],
    np.float32,
)
Q3_K_FEW = np.array([[-4, -4.95, -4.65, -4.42], [-4.19, -3.73, -3.28, -2.97]], np.float32)
Q3_K_MANY = np.array(
    [[-4, -8.63, -7.34, -6.37], [-5.56, -4.99, -4.59, -4.27], [-3.62, -2.09, 2.9, 3.24], [4.09, 4.59, 5.36, 6.72]], np.float32
)
Q6_K_CANDIDATES = np.array(
    [
        [-32, -33.7, -32.8, -31.5],
        [-31, -30.6, -30.3, -29.9],
        [-29.1, -28.7, -28.1, -27.7],
        [-27, -26, -25, -24],
        [-23.1, -21.9, -20.9, -19.2],
    ],
    np.float32,
)
# What the extreme scale of a block's groups becomes as a multiple of the block's scale, in equal portions.
Q3_K_COMMONS = np.concatenate([[-32], np.linspace(-33.6, -28.8, 7), np.linspace(28.8, 32.6, 8)]).astype(np.float32)
Q6_K_COMMONS = np.concatenate([[-128], np.linspace(-135.7, -108.8, 23), np.linspace(112.6, 130.6, 8)]).astype(np.float32)


@kernel
def quantize_q8_0(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """Q8_0; see ``ggml_search.luckiest_scale``."""
    few, many, grid = Q8_0_CANDIDATES, Q8_0_CANDIDATES, whole_numbers(-127.0, 127.0, 0)
    return single_scales(source, target, importance, searched, first_row, last_row, few, many, 127.0, 0, grid)


@kernel
def quantize_q4_0(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """Q4_0."""
    few, many, grid = Q4_0_FEW, Q4_0_MANY, whole_numbers(-8.0, 7.0, 8)
    return single_scales(source, target, importance, searched, first_row, last_row, few, many, -8.0, 1, grid)


@kernel
def quantize_q5_0(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """Q5_0."""
    few, many, grid = Q5_0_FEW, Q5_0_MANY, whole_numbers(-16.0, 15.0, 16)
    return single_scales(source, target, importance, searched, first_row, last_row, few, many, -16.0, 1, grid)


@kernel
def quantize_q3_k(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """Q3_K."""
    few, many, commons, grid = Q3_K_FEW, Q3_K_MANY, Q3_K_COMMONS, whole_numbers(-4.0, 3.0, 4)
    return double_scales(
        source, target, importance, searched, first_row, last_row, 16, few, many, -4.0, commons, 1, -32.0, 31.0, grid
    )


@kernel
def quantize_q6_k(source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """Q6_K."""
    few, many, commons, grid = Q6_K_CANDIDATES, Q6_K_CANDIDATES, Q6_K_COMMONS, whole_numbers(-32.0, 31.0, 32)
    return double_scales(
        source, target, importance, searched, first_row, last_row, 16, few, many, -32.0, commons, 4, -128.0, 127.0, grid
    )
