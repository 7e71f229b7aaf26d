"""Searching for the scales of ggml's types on a CUDA GPU: what all have in common, and the types without a minimum.

A program takes a tile of rows by 256 inputs as a tensor ``[rows, groups, inputs of a group]``; every row stands for itself.  Where
the CPU tries a short list of candidates that were chosen with care, here all of a grid are tried, each with its real error: a GPU
has arithmetic to spare while weights stay in its registers.  The steps are those of ``ggml_blocks`` and ``ggml_minimum_groups``:

* A scale (and a minimum) for every group by itself: weights are rounded from many starts, and the best scale for these codes is
  solved for.
* Types with groups: scales of the block around the one that suits its extreme group; for each of them whole multiples for the
  groups, neighbours included; and least squares for the block's scale with multiples and codes fixed.
* Codes, rounded against what is stored.

Sums over the inputs of a group are added in the GPU's order, so results are as good as the CPU's, not the same.  Weights are
divided by a power of two near the largest of their row in the tile, so that squares neither overflow nor vanish.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(256)  # inputs of a program: a block of a type with groups, eight of one without
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers near it are whole
LARGE = tl.constexpr(3e38)

# ------------------------------------------------------------------------------------------------------------ preparation


@triton.jit
def reciprocal(value):
    """1 / value, and 0 for what is too small."""
    usable = tl.abs(value) > 1e-30
    return tl.where(usable, 1.0 / tl.where(usable, value, 1.0), 0.0)


@triton.jit
def whole(value, lowest, highest):
    """The nearest whole number of a range."""
    return tl.minimum(tl.maximum((value + _WHOLE) - _WHOLE, lowest), highest)


@triton.jit
def stored_scale(value, unit, inverse_unit):
    """What FP16 makes of a scale in units; the smallest number that it has instead of nothing."""
    value *= unit
    half = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    least = tl.where(value < 0.0, -(2.0**-24), 2.0**-24)
    vanishes = (tl.abs(value) > 2.0**-27) & (half == 0.0)
    return tl.where(vanishes, least, half) * inverse_unit


@triton.jit
def places_of(rows, columns, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``[ROWS]``, groups ``[groups]`` and inputs ``[groups, GROUP]`` of a program, and which weights there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (row[:, None, None] < rows) & (column[None, :, :] < columns)
    return row.to(tl.int64), group, column, inside


@triton.jit
def units(weight):
    """The power of two below the largest magnitude of each row, and its reciprocal."""
    bits = tl.max(tl.max(tl.abs(weight), 2), 1).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 27 << 23), 253 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def add_up(sums, row, rows, columns, weight, miss, exact, unit):
    """Store squared errors and squared weights of a tile, plain and weighted, float64 ``[rows, tiles, 4]``."""
    place = sums + (row * tl.cdiv(columns, TILE) + tl.program_id(1)) * 4
    square = unit.to(tl.float64) * unit.to(tl.float64)
    error, power = miss * miss, weight * weight
    tl.store(place, tl.sum(tl.sum(error, 2), 1).to(tl.float64) * square, row < rows)
    tl.store(place + 1, tl.sum(tl.sum(power, 2), 1).to(tl.float64) * square, row < rows)
    tl.store(place + 2, tl.sum(tl.sum(error * exact, 2), 1).to(tl.float64) * square, row < rows)
    tl.store(place + 3, tl.sum(tl.sum(power * exact, 2), 1).to(tl.float64) * square, row < rows)


# --------------------------------------------------------------------------------------------------- types without minimum


@triton.jit
def _level(steps, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, LEVELS: tl.constexpr):
    """The level nearest to a weight in steps; LEVELS in rising order, or None where levels are whole numbers."""
    if LEVELS is None:
        level = whole(steps, LOWEST, HIGHEST)
    else:
        level = tl.full(steps.shape, LEVELS[0], tl.float32)
        for number in tl.static_range(1, len(LEVELS)):
            level = tl.where(steps > (LEVELS[number - 1] + LEVELS[number]) / 2, LEVELS[number], level)
    return level


@triton.jit
def _code(level, OFFSET: tl.constexpr, LEVELS: tl.constexpr):
    """The code of a level."""
    if LEVELS is None:
        code = level.to(tl.int32) + OFFSET
    else:
        code = tl.zeros(level.shape, tl.int32)
        for number in tl.static_range(1, len(LEVELS)):
            code += (level >= LEVELS[number]).to(tl.int32)
    return code


@triton.jit
def _error(weight, share, step, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, LEVELS: tl.constexpr):
    """Weighted squared error of each group ``[rows, groups]`` for its step."""
    miss = weight - step[:, :, None] * _level(weight * reciprocal(step)[:, :, None], LOWEST, HIGHEST, LEVELS)
    return tl.sum(share * miss * miss, 2)


@triton.jit
def _refit(weight, share, inverse, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, LEVELS: tl.constexpr):
    """Levels for a step whose reciprocal is given; and over each group sum(w x level) and sum(w level^2)."""
    level = _level(weight * inverse[:, :, None], LOWEST, HIGHEST, LEVELS)
    return level, tl.sum(share * level * weight, 2), tl.sum(share * level * level, 2)


@triton.jit
def _extreme(low, high):
    return tl.where(-low > high, low, high)


@triton.jit
def _multiples(weight, share, fits, scale, LEAST: tl.constexpr, MOST: tl.constexpr, LOWEST, HIGHEST, LEVELS: tl.constexpr):
    """For every group the best multiple of the block's scale, next to its fit; and the error of each row."""
    middle = whole(fits * reciprocal(scale)[:, None], LEAST, MOST)
    multiples, least = middle, tl.full(middle.shape, LARGE, tl.float32)
    for offset in range(3):
        multiple = whole(middle + offset - 1.0, LEAST, MOST)
        error = _error(weight, share, scale[:, None] * multiple, LOWEST, HIGHEST, LEVELS)
        better = error < least
        multiples, least = tl.where(better, multiple, multiples), tl.where(better, error, least)
    return multiples, tl.sum(least, 1)


@triton.jit
def quantize_symmetric(
    weights,
    shares,
    exact,
    codes,
    scales,
    group_scales,
    sums,
    rows,
    columns,
    GROUP: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    OFFSET: tl.constexpr,
    LEVELS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    SPANNING: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    COUNT: tl.constexpr,
    SIGNS: tl.constexpr,
    COMMONS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of a type without minimum; COMMONS is 0 where there are no groups inside blocks.  See ``methods.blocks_gpu``."""
    row, group, column, inside = places_of(rows, columns, GROUP, ROWS)
    place = row[:, None, None] * columns + column[None, :, :]
    weight = tl.load(weights + place, inside, 0.0).to(tl.float32)
    share = tl.load(shares + column, column < columns, 0.0)[None, :, :]
    unit, inverse_unit = units(weight)
    weight *= inverse_unit[:, None, None]
    inverse_top = reciprocal(_extreme(tl.min(weight, 2), tl.max(weight, 2)))
    fits, least = tl.zeros(inverse_top.shape, tl.float32), tl.full(inverse_top.shape, LARGE, tl.float32)
    for number in range(COUNT * SIGNS + 2):  # first what just spans the range, last once more from the best
        ratio = NARROW + (WIDE - NARROW) / (COUNT - 1) * ((number - 1) % COUNT)
        ratio = tl.where(number == 0, 1.0, tl.where(number > COUNT, -ratio, ratio))
        inverse = tl.where(number == COUNT * SIGNS + 1, reciprocal(fits), inverse_top * (ratio * SPANNING))
        level, along, square = _refit(weight, share, inverse, LOWEST, HIGHEST, LEVELS)
        fit = along * reciprocal(square)
        if COMMONS == 0:
            fit = stored_scale(fit, unit[:, None], inverse_unit[:, None])
        miss = weight - fit[:, :, None] * level
        error = tl.sum(share * miss * miss, 2)
        better = error < least
        fits, least = tl.where(better, fit, fits), tl.where(better, error, least)
    groups_of_row = columns // GROUP
    outside = row[:, None] * groups_of_row + group[None, :]
    stored = (row[:, None] < rows) & (group[None, :] < groups_of_row)
    if COMMONS == 0:
        step = fits
        tl.store(scales + outside, (step * unit[:, None]).to(tl.float16), stored)
    else:
        inverse_top = reciprocal(_extreme(tl.min(fits, 1), tl.max(fits, 1)))
        scale, all_least = tl.zeros(unit.shape, tl.float32), tl.full(unit.shape, LARGE, tl.float32)
        multiples = tl.zeros(fits.shape, tl.float32)
        for number in range(2 * COMMONS + 3):
            ratio = 0.86 + 0.2 / (COMMONS - 1) * ((number - 1) % COMMONS)
            ratio = tl.where(number == 0, 1.0, tl.where(number > COMMONS, -ratio, ratio))
            other = reciprocal(inverse_top) * (1.0 / (LEAST * ratio))
            wanted = fits
            if number > 2 * COMMONS:  # least squares for the scale, with multiples and levels as they are
                inverse = reciprocal(scale[:, None] * multiples)
                _, along, square = _refit(weight, share, inverse, LOWEST, HIGHEST, LEVELS)
                other = tl.sum(along * multiples, 1) * reciprocal(tl.sum(square * multiples * multiples, 1))
                wanted = scale[:, None] * multiples
            other = stored_scale(other, unit, inverse_unit)
            found, error = _multiples(weight, share, wanted, other, LEAST, MOST, LOWEST, HIGHEST, LEVELS)
            better = error < all_least
            scale, all_least = tl.where(better, other, scale), tl.where(better, error, all_least)
            multiples = tl.where(better[:, None], found, multiples)
        step = scale[:, None] * multiples
        blocks = columns // TILE
        tl.store(scales + row * blocks + tl.program_id(1), (scale * unit).to(tl.float16), row < rows)
        tl.store(group_scales + outside, multiples.to(tl.int8), stored)
    level = _level(weight * reciprocal(step)[:, :, None], LOWEST, HIGHEST, LEVELS)
    tl.store(codes + place, _code(level, OFFSET, LEVELS).to(tl.int8), inside)
    wide = tl.load(exact + column, column < columns, 0.0)[None, :, :]
    add_up(sums, row, rows, columns, weight, weight - step[:, :, None] * level, wide, unit)
