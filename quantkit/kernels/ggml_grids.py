"""Rounding to the levels of ggml's types without a minimum: whole numbers, the IQ4 table, FP4.

``nearest_code(value, inverse scale, grid)`` means another function for every class of grid, chosen when a kernel is compiled, so
that searches and loops are written once.  (Functions as arguments would do, but kernels that pass them cannot be kept on disk.)

The nearest of the 16 IQ4 levels is found without branches.  A parabola sends the 15 midpoints between neighbouring levels close to
the whole numbers 0..14 (0.07 off at most), so rounding it names the one midpoint that can lie near a number, and one comparison
with that midpoint decides between two levels.  Midpoints and levels are looked up in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from quantkit.ggml import IQ4_LEVELS
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32
from quantkit.kernels.numbers import round_small
from quantkit.kernels.simd import bits, floats, from_bits, fused, ints, lookup, maximum, minimum, select

MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to whole numbers, which then stand in the low bits
_LINEAR, _CURVED, _SHIFT = 0.0905, -0.0002375, 7.35  # the parabola; it rises up to 190
_TURN = 150.0  # beyond every level, below 190: from here on it goes on as a straight line
_IQ4 = np.array(IQ4_LEVELS, np.float32)
_IQ4_MIDPOINTS = np.append((_IQ4[1:] + _IQ4[:-1]) / 2, np.float32(3e38)).astype(np.float32)


class WholeGrid(NamedTuple):
    """Whole numbers.  lowest, highest: outermost levels as bits of ``MAGIC + level``; zero: the same of the level with code 0."""

    lowest: Any
    highest: Any
    zero: Any


class TableGrid(NamedTuple):
    """The IQ4 table.  levels; midpoints: between each and the next; first, last: of the midpoints, as bits of ``MAGIC + place``."""

    levels: Any
    midpoints: Any
    first: Any
    last: Any


class SmallFloatGrid(NamedTuple):
    """FP4 E2M1, doubled so that levels are whole.  largest: the largest level."""

    largest: Any


@compiled
def whole_numbers(lowest: float, highest: float, offset: int) -> WholeGrid:
    """Levels ``lowest..highest``, with codes that are larger by ``offset``."""
    magic = floats(MAGIC)
    return WholeGrid(bits(magic + floats(lowest)), bits(magic + floats(highest)), bits(magic) - ints(offset))


@compiled
def iq4_table() -> TableGrid:
    """The levels of IQ4_NL and IQ4_XS."""
    return TableGrid(load_float32(_IQ4, 0), load_float32(_IQ4_MIDPOINTS, 0), bits(floats(MAGIC)), bits(floats(MAGIC + 14.0)))


@compiled
def fp4_levels() -> SmallFloatGrid:
    """The levels of MXFP4."""
    return SmallFloatGrid(floats(12.0))


@compiled
def _whole_code(value: Any, inverse: Any, grid: WholeGrid) -> tuple[Any, Any]:
    inside = minimum(maximum(bits(fused(value, inverse, floats(MAGIC))), grid.lowest), grid.highest)
    return inside - grid.zero, from_bits(inside) - floats(MAGIC)


@compiled
def _table_code(value: Any, inverse: Any, grid: TableGrid) -> tuple[Any, Any]:
    steps = value * inverse
    size = minimum(from_bits(bits(steps) & ints(0x7FFFFFFF)), floats(_TURN))
    place = bits(fused(fused(size, floats(_CURVED), floats(_LINEAR)), steps, floats(MAGIC + _SHIFT)))
    place = minimum(maximum(place, grid.first), grid.last)
    code = place + ints(steps > lookup(grid.midpoints, place))
    return code & ints(15), lookup(grid.levels, code)


@compiled
def _small_float_code(value: Any, inverse: Any, grid: SmallFloatGrid) -> tuple[Any, Any]:
    steps = value * inverse
    size = minimum(from_bits(bits(steps) & ints(0x7FFFFFFF)), grid.largest)
    code, level = round_small(size * floats(0.5), 1, 1.0)
    negative = (bits(steps) >> ints(28)) & ints(8)
    sign = bits(steps) & ints(-(1 << 31))
    return code + select(code > ints(0), negative, ints(0)), from_bits(bits(level + level) | sign)  # zero is code 0


def nearest_code(value: Any, inverse: Any, grid: Any) -> tuple[Any, Any]:
    """Code and level (as Floats) nearest to ``value * inverse``."""
    raise NotImplementedError("only inside kernels")


@overload(nearest_code, jit_options={"nogil": True, "error_model": "numpy"})  # type: ignore[untyped-decorator]
def _nearest_code(value: Any, inverse: Any, grid: Any) -> Callable[..., Any]:
    def whole(value: Any, inverse: Any, grid: Any) -> Any:
        return _whole_code(value, inverse, grid)

    def table(value: Any, inverse: Any, grid: Any) -> Any:
        return _table_code(value, inverse, grid)

    def small_float(value: Any, inverse: Any, grid: Any) -> Any:
        return _small_float_code(value, inverse, grid)

    return {WholeGrid: whole, TableGrid: table, SmallFloatGrid: small_float}[grid.instance_class]


@compiled
def nearest_level(value: Any, inverse: Any, grid: Any) -> Any:
    """The level nearest to ``value * inverse``."""
    return nearest_code(value, inverse, grid)[1]
