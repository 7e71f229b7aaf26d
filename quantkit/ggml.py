"""The numbers that llama.cpp's tensor types store.  Data only.

A type cuts each row into blocks of ``block`` weights, stored in ``nbytes`` bytes.  In the types with two levels of scales ("K"
types and most "IQ" ones) a block of 256 is cut again into groups, each with a small integer that multiplies the block's
scale.  With the names that :class:`quantkit.grid.QuantizedTensor` uses the stored value of a weight is

    scale * level                                                     Q8_0, Q4_0, Q5_0, IQ4_NL, MXFP4
    scale * level + minimum                                           Q4_1, Q5_1
    (scale * group_scale) * level                                     Q3_K, Q6_K, IQ4_XS
    (scale * group_scale) * level - minimum * group_minimum           Q2_K, Q4_K, Q5_K

where ``level = levels[code]`` for types with a table, else ``code - offset``.  ``scale`` and ``minimum`` are FP16, one per block
(MXFP4: a power of two).  The types that take their levels from a codebook, several weights at once, stand in
:mod:`quantkit.codebooks`.  Source: ggml's ``ggml-common.h`` and ``ggml-quants.c``.
"""

from __future__ import annotations

from dataclasses import dataclass

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, so that they are whole; the scale is halved


@dataclass(frozen=True)
class BlockType:
    """One tensor type.

    name, id: as ggml has them.  block, nbytes: weights and bytes of a block.  group: weights that share a group scale, 0 where
    there is only the block's scale.  codes: lowest and highest code.  offset: what is subtracted from a code.  levels: what codes
    stand for, None where that is ``code - offset``.  group_scales: lowest and highest.  minimum: whether a second number per block
    (and group) is stored.  codebook: levels are taken several at once.  floating: a float format without scales.
    """

    name: str
    id: int
    block: int
    nbytes: int
    group: int = 0
    codes: tuple[int, int] = (0, 0)
    offset: int = 0
    levels: tuple[int, ...] | None = None
    group_scales: tuple[int, int] = (0, 0)
    minimum: bool = False
    codebook: bool = False
    floating: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.nbytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights, a multiple of ``block``."""
        return columns // self.block * self.nbytes


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, floating=True),
        BlockType("F16", 1, 1, 2, floating=True),
        BlockType("BF16", 30, 1, 2, floating=True),
        BlockType("Q4_0", 2, 32, 18, codes=(0, 15), offset=8),
        BlockType("Q4_1", 3, 32, 20, codes=(0, 15), minimum=True),
        BlockType("Q5_0", 6, 32, 22, codes=(0, 31), offset=16),
        BlockType("Q5_1", 7, 32, 24, codes=(0, 31), minimum=True),
        BlockType("Q8_0", 8, 32, 34, codes=(-127, 127)),
        BlockType("Q2_K", 10, 256, 84, 16, (0, 3), group_scales=(0, 15), minimum=True),
        BlockType("Q3_K", 11, 256, 110, 16, (0, 7), 4, group_scales=(-32, 31)),
        BlockType("Q4_K", 12, 256, 144, 32, (0, 15), group_scales=(0, 63), minimum=True),
        BlockType("Q5_K", 13, 256, 176, 32, (0, 31), group_scales=(0, 63), minimum=True),
        BlockType("Q6_K", 14, 256, 210, 16, (0, 63), 32, group_scales=(-128, 127)),
        BlockType("IQ4_NL", 20, 32, 18, codes=(0, 15), levels=IQ4_LEVELS),
        BlockType("IQ4_XS", 23, 256, 136, 32, (0, 15), levels=IQ4_LEVELS, group_scales=(-32, 31)),
        BlockType("MXFP4", 39, 32, 17, codes=(0, 15), levels=FP4_LEVELS),
        BlockType("IQ2_XXS", 16, 256, 66, 32, codebook=True),
        BlockType("IQ2_XS", 17, 256, 74, 16, codebook=True),
        BlockType("IQ2_S", 22, 256, 82, 16, codebook=True),
        BlockType("IQ3_XXS", 18, 256, 98, 32, codebook=True),
        BlockType("IQ3_S", 21, 256, 110, 32, codebook=True),
        BlockType("IQ1_S", 19, 256, 50, 32, codebook=True),
        BlockType("IQ1_M", 29, 256, 56, 16, codebook=True),
    )
}

# What is taken instead where rows are not a multiple of the block, as llama.cpp does; F16 where that does not fit either.
FALLBACKS = {
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
