"""Searching for the scales and minimums of Q4_K, Q5_K and Q2_K on a CUDA GPU; see ``ggml_triton``.

Weights are rounded from starts on a square, either end of a group's range moved for itself, as on the CPU.  What multiples and
minimums of the block cost is then told by their real error.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.ggml_triton import LARGE, TILE, add_up, places_of, reciprocal, stored_scale, units, whole

_NARROWEST = tl.constexpr(2.0**-24)  # a range below this is no range, beside the largest weight, which is at least 1
_SINGULAR = tl.constexpr(1e-5)  # determinants that are a smaller part of their first term tell rounding errors


@triton.jit
def _codes(weight, step, low, HIGHEST: tl.constexpr):
    """Codes for ``step * code - low``, both ``[rows, groups]``."""
    return whole((weight + low[:, :, None]) * reciprocal(step)[:, :, None], 0.0, HIGHEST)


@triton.jit
def _miss(weight, share, step, low, HIGHEST: tl.constexpr):
    """Weighted squared error of each group."""
    miss = weight - (step[:, :, None] * _codes(weight, step, low, HIGHEST) - low[:, :, None])
    return tl.sum(share * miss * miss, 2)


@triton.jit
def _code_sums(weight, share, codes):
    """Over each group: of codes, squared codes, and codes times weights, weighted."""
    scaled = share * codes
    return tl.sum(scaled, 2), tl.sum(scaled * codes, 2), tl.sum(scaled * weight, 2)


@triton.jit
def _solve(count, squares, products, total, width, fallback):
    """Step and minimum with the least error for given codes, not negative.  count, total, width: of codes, weights, shares."""
    determinant = width * squares - count * count
    sound = determinant > width * squares * _SINGULAR
    step = tl.where(sound, (width * products - count * total) * reciprocal(tl.where(sound, determinant, 1.0)), fallback)
    low = (step * count - total) * reciprocal(width)
    step = tl.where(low < 0.0, products * reciprocal(squares), step)
    return tl.maximum(step, 0.0), tl.maximum(low, 0.0)


@triton.jit
def _refit_pair(multiple, low_multiple, count, squares, products, total, width, scale, lift):
    """Least squares for scale and minimum of the block; those there are where that says nothing."""
    one_one, one_other = tl.sum(multiple * multiple * squares, 1), tl.sum(multiple * low_multiple * count, 1)
    other_other = tl.sum(low_multiple * low_multiple * width, 1)
    one, other = tl.sum(multiple * products, 1), tl.sum(low_multiple * total, 1)
    determinant = one_one * other_other - one_other * one_other
    sound = determinant > one_one * other_other * _SINGULAR
    together = (one * other_other - other * one_other) * reciprocal(tl.where(sound, determinant, 1.0))
    alone = tl.where(one_one > 0.0, (one + lift * one_other) * reciprocal(one_one), scale)
    scale = tl.maximum(tl.where(sound, together, alone), 0.0)
    lift = tl.where(other_other > 0.0, (scale * one_other - other) * reciprocal(other_other), lift)
    return scale, tl.maximum(lift, 0.0)


@triton.jit
def quantize_minimum(
    weights,
    shares,
    exact,
    codes,
    scales,
    minimums,
    group_scales,
    group_minimums,
    sums,
    rows,
    columns,
    GROUP: tl.constexpr,
    HIGHEST: tl.constexpr,
    MOST: tl.constexpr,
    PLACES: tl.constexpr,
    OUTERMOST: tl.constexpr,
    INNERMOST: tl.constexpr,
    TRIALS: tl.constexpr,
    SPREAD: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of a type with scales and minimums.  See ``methods.blocks_gpu``."""
    row, group, column, inside = places_of(rows, columns, GROUP, ROWS)
    place = row[:, None, None] * columns + column[None, :, :]
    weight = tl.load(weights + place, inside, 0.0).to(tl.float32)
    share = tl.load(shares + column)[None, :, :]
    unit, inverse_unit = units(weight)
    weight *= inverse_unit[:, None, None]
    total, width = tl.sum(share * weight, 2), tl.sum(share, 2)
    smallest = tl.minimum(tl.min(weight, 2), 0.0)
    span = tl.maximum(tl.max(weight, 2) - smallest, _NARROWEST) * (1.0 / HIGHEST)

    # Each group by itself.
    steps, lows, least = span, -smallest, _miss(weight, share, span, -smallest, HIGHEST)
    for number in range(PLACES * PLACES + 1):  # the first from the whole range
        stride = (INNERMOST - OUTERMOST) / (PLACES - 1)
        bottom = tl.where(number == 0, 0.0, OUTERMOST + stride * ((number - 1) // PLACES))
        top = tl.where(number == 0, 0.0, OUTERMOST + stride * ((number - 1) % PLACES))
        step = span * (1.0 - (bottom + top) / HIGHEST)
        chosen = _codes(weight, step, -(smallest + span * bottom), HIGHEST)
        count, squares, products = _code_sums(weight, share, chosen)
        step, low = _solve(count, squares, products, total, width, step)
        miss = weight - (step[:, :, None] * chosen - low[:, :, None])
        error = tl.sum(share * miss * miss, 2)
        better = error < least
        steps, lows, least = tl.where(better, step, steps), tl.where(better, low, lows), tl.where(better, error, least)

    # Scale and minimum of the block: those whose multiples cost least, by the codes of the groups.
    count, squares, products = _code_sums(weight, share, _codes(weight, steps, lows, HIGHEST))
    reached, lowered = tl.max(steps, 1), tl.max(lows, 1)
    scale, lift = tl.zeros(unit.shape, tl.float32), tl.zeros(unit.shape, tl.float32)
    all_least = tl.full(unit.shape, LARGE, tl.float32)
    for number in range(TRIALS * TRIALS):
        one = 1.0 + SPREAD * (2.0 / (TRIALS - 1) * (number // TRIALS) - 1.0)
        other = 1.0 + SPREAD * (2.0 / (TRIALS - 1) * (number % TRIALS) - 1.0)
        its_scale = stored_scale(reached * (one / MOST), unit, inverse_unit)
        its_lift = stored_scale(lowered * (other / MOST), unit, inverse_unit)
        step = whole(steps * reciprocal(its_scale)[:, None], 0.0, MOST) * its_scale[:, None]
        wanted = (step * count - total) * reciprocal(width)
        missed = whole(wanted * reciprocal(its_lift)[:, None], 0.0, MOST) * its_lift[:, None] - wanted
        of_step = step * (step * squares - 2.0 * products) - (step * count - total) * wanted
        error = tl.sum(of_step + missed * missed * width, 1)
        better = error < all_least
        scale, lift = tl.where(better, its_scale, scale), tl.where(better, its_lift, lift)
        all_least = tl.where(better, error, all_least)

    # Multiples by their real error; then scale and minimum once more, with multiples and codes as they are.
    best_scale, best_lift, all_least = scale, lift, tl.full(unit.shape, LARGE, tl.float32)
    best_step, best_low = tl.zeros(steps.shape, tl.float32), tl.zeros(steps.shape, tl.float32)
    for _turn in range(3):
        middle = whole(steps * reciprocal(scale)[:, None], 0.0, MOST)
        least = tl.full(steps.shape, LARGE, tl.float32)
        multiple, low_multiple = middle, middle
        for number in range(3 * (2 * REACH + 1)):
            one = whole(middle + (number // 3 - REACH), 0.0, MOST)
            step = one * scale[:, None]
            wanted = (step * count - total) * reciprocal(width) * reciprocal(lift)[:, None]
            other = whole(wanted + (number % 3 - 1), 0.0, MOST)
            error = _miss(weight, share, step, other * lift[:, None], HIGHEST)
            better = error < least
            multiple, low_multiple = tl.where(better, one, multiple), tl.where(better, other, low_multiple)
            least = tl.where(better, error, least)
        error = tl.sum(least, 1)
        better = error < all_least
        all_least = tl.where(better, error, all_least)
        best_scale, best_lift = tl.where(better, scale, best_scale), tl.where(better, lift, best_lift)
        best_step = tl.where(better[:, None], multiple, best_step)
        best_low = tl.where(better[:, None], low_multiple, best_low)
        steps = multiple * scale[:, None]
        count, squares, products = _code_sums(weight, share, _codes(weight, steps, low_multiple * lift[:, None], HIGHEST))
        scale, lift = _refit_pair(multiple, low_multiple, count, squares, products, total, width, scale, lift)
        scale, lift = stored_scale(scale, unit, inverse_unit), stored_scale(lift, unit, inverse_unit)

    groups_of_row, blocks = columns // GROUP, columns // TILE
    outside, stored = row[:, None] * groups_of_row + group[None, :], row[:, None] < rows
    tl.store(group_scales + outside, best_step.to(tl.int8), stored)
    tl.store(group_minimums + outside, best_low.to(tl.int8), stored)
    tl.store(scales + row * blocks + tl.program_id(1), (best_scale * unit).to(tl.float16), row < rows)
    tl.store(minimums + row * blocks + tl.program_id(1), (best_lift * unit).to(tl.float16), row < rows)
    step, low = best_step * best_scale[:, None], best_low * best_lift[:, None]
    chosen = _codes(weight, step, low, HIGHEST)
    tl.store(codes + place, chosen.to(tl.int8), inside)
    wide = tl.load(exact + column)[None, :, :]
    add_up(sums, row, rows, columns, weight, weight - (step[:, :, None] * chosen - low[:, :, None]), wide, unit)
