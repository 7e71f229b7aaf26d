"""What ggml's codebook types store: points of a grid, several weights at once.

In the types ``IQ1`` to ``IQ3`` a short run of weights (8, or 4 in ``IQ3``) is stored as the index of one point of a fixed list, the
grid: so many levels, but only some of their combinations, those that occur most.  Unpacked, a code is the level of one weight with
its sign, a small whole number, and every type is one formula:

    value = scale * (2 * group_scale + 1) * fraction * code

* ``IQ3_S``, ``IQ3_XXS``, ``IQ2_S``, ``IQ2_XS``, ``IQ2_XXS``: the grid holds magnitudes, signs are stored beside it: for each
  weight, or (``XS``, ``XXS``) 7 bits for 8 weights, so that an even number of them is negative.
* ``IQ1_S``, ``IQ1_M``: the grid holds -1, 0 and 1, and all are moved by an eighth, up or down: for 32 weights or for 8.  A code is
  eight times the sum, -9, -7, -1, 1, 7 or 9; which way it was moved can be read from it, so nothing else need be kept.

``group_scale`` is the stored whole number, 0 .. 15 (7 in ``IQ1``), and ``scale`` the block's FP16 number.  All products are
exact in float32, so they may be taken in any order and equal ggml's.  Grids are constants of the formats; they come from the
``gguf`` package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from gguf import quants
from numpy.typing import NDArray

Signs = Literal["free", "even", "none"]

IQ2_LEVELS = (8, 25, 43)
IQ3_XXS_LEVELS = (4, 12, 20, 28, 36, 44, 52, 62)
IQ3_S_LEVELS = (1, 3, 5, 7, 9, 11, 13, 15)
IQ1_LEVELS = (-8, 0, 8)  # in eighths


@dataclass(frozen=True)
class Codebook:
    """One type.

    levels: what the digits of a point stand for.  length: weights of a point.  group: weights that share a group scale.
    highest: largest group scale.  fraction: factor of the formula, a power of two.  signs: ``free`` for each weight, ``even`` where
    every 8 weights hold an even number of negative ones, ``none`` where the levels have signs themselves.  shifted: how many
    weights are moved the same way by one, 0 where levels are not moved.
    """

    name: str
    levels: tuple[int, ...]
    length: int
    group: int
    highest: int
    fraction: float
    signs: Signs
    shifted: int = 0

    @property
    def digit_bits(self) -> int:
        """Bits for one digit, where the digits of a point are packed side by side."""
        return 3 if len(self.levels) == 8 else 2


CODEBOOKS: dict[str, Codebook] = {
    book.name: book
    for book in (
        Codebook("IQ3_S", IQ3_S_LEVELS, 4, 32, 15, 1.0, "free"),
        Codebook("IQ3_XXS", IQ3_XXS_LEVELS, 4, 32, 15, 0.25, "even"),
        Codebook("IQ2_S", IQ2_LEVELS, 8, 16, 15, 0.125, "free"),
        Codebook("IQ2_XS", IQ2_LEVELS, 8, 16, 15, 0.125, "even"),
        Codebook("IQ2_XXS", IQ2_LEVELS, 8, 32, 15, 0.125, "even"),
        Codebook("IQ1_S", IQ1_LEVELS, 8, 32, 7, 0.125, "none", shifted=32),
        Codebook("IQ1_M", IQ1_LEVELS, 8, 16, 7, 0.125, "none", shifted=8),
    )
}


@functools.cache
def grid_digits(name: str) -> NDArray[np.uint8]:
    """The points of a type's grid in the order of their indices: uint8 ``[points, length]``, places in ``levels``."""
    packed = getattr(quants, name)
    packed.init_grid()
    values = np.asarray(packed.grid).reshape(packed.grid_shape)
    digits: NDArray[np.uint8] = np.searchsorted(np.array(packed.grid_map, np.float32), values).astype(np.uint8)
    digits.setflags(write=False)
    return digits


def dequantize_codebook(name: str, codes: torch.Tensor, scale: torch.Tensor, group_scale: torch.Tensor) -> torch.Tensor:
    """The stored values, float32 ``[out, in]``.

    codes: int8 ``[out, in]``.  scale: float16 ``[out, in / 256]``.  group_scale: int8 ``[out, in / group]``.
    """
    book = CODEBOOKS[name]
    odd = 2.0 * group_scale.to(torch.float32) + 1.0
    step = scale.to(torch.float32).repeat_interleave(group_scale.shape[1] // max(scale.shape[1], 1), 1) * odd * book.fraction
    return step.repeat_interleave(book.group, 1) * codes.to(torch.float32)
