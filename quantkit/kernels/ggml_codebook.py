"""Quantizing to ggml's codebook types: points of a grid for runs of weights, scales of groups, one FP16 scale for a block of 256.

The error that is minimized is the sum of importance * (weight - stored value)^2.  For a given scale the nearest points are found
exactly, so what remains is the choice of scales:

1. Each group for itself: the best of some scales around what its size suggests, then the least squares scale of those points.
2. The block's scale: candidates are compared by what rounding the groups' scales to its odd multiples would cost.
3. Each group again, with the nearest multiples as they will be stored; then the least squares scale of the block.

Signs: where only an even number of 8 may be negative, the weight for which it costs least takes the wrong sign where needed.  That
is decided beforehand, and the search then sees a negative magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from quantkit.codebooks import CODEBOOKS
from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_codebook_points import BLOCK, Scratch, assign_group, choose_shifts, copy_payloads, level_of, moments
from quantkit.kernels.ggml_codebook_tables import Grid, Search, grid_tables, search_plan
from quantkit.kernels.halves import from_half, to_half
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float32, load_int32, scatter_bytes, scatter_halves, store
from quantkit.kernels.simd import (
    bits,
    doubles,
    floats,
    from_bits,
    fused,
    ints,
    lane_sum,
    largest_lane,
    maximum,
    minimum,
    nearest,
    root,
    select,
)
from quantkit.kernels.tiles import Source, load_tile, store_codes

Sums = tuple[float, float, float, float, int]
LEAST_IMPORTANCE = 1e-7  # relative to the largest of a block: what matters to nobody still takes the nearest numbers
MOST_ERROR = 1e38
SMALLEST = 1e-30  # a step or a peak that is at least this has a finite reciprocal


@compiled
def _scratch(grid: Grid) -> Scratch:
    return Scratch(
        weights=np.empty(BLOCK * 16, np.float32),
        magnitudes=np.empty(BLOCK * 16, np.float32),
        linear=np.empty(BLOCK * grid.digits, np.float32),
        square=np.empty(BLOCK * grid.digits, np.float32),
        sums=np.empty(4 * 9 * 32, np.float32),
        seconds=np.empty(81 * 32, np.float32),
        chosen=np.empty(64 * 16, np.float32),
        tried=np.empty(64 * 16, np.float32),
        other=np.empty(64 * 16, np.float32),
        shifts=np.empty(32 * 16, np.float32),
        tilts=np.empty(32 * 16, np.float32),
        shares=np.empty(32, np.float32),
        power=np.empty(16 * 16, np.float32),
        steps=np.empty(16 * 16, np.float32),
        curvature=np.empty(16 * 16, np.float32),
        group_codes=np.empty(16 * 16, np.float32),
        words=np.empty(64 * 16, np.float32),
    )


@compiled
def _prepare_levels(grid: Grid, scratch: Scratch, importance: Any, first_input: int) -> None:
    levels = grid.levels.size
    if grid.shifted:
        for run in range(BLOCK // grid.length):
            scratch.shares[run] = importance[first_input + run * grid.length : first_input + (run + 1) * grid.length].sum()
    for k in range(BLOCK):
        for level in range(levels):
            linear = importance[first_input + k] * grid.levels[level]
            scratch.linear[k * levels + level] = -linear
            scratch.square[k * levels + level] = linear * grid.levels[level]


@compiled
def _prepare_signs(scratch: Scratch, importance: Any, first_input: int) -> None:
    """Give one magnitude of 8 a sign where an odd number of weights is negative: the one that costs least."""
    for start in range(0, BLOCK, 8):
        count, least, where = ints(0), floats(MOST_ERROR), ints(0)
        for k in range(8):
            place = (start + k) * 16
            count = count - (bits(load_float32(scratch.weights, place)) >> ints(31))
            cost = load_float32(scratch.magnitudes, place) * floats(importance[first_input + start + k])
            less = cost < least
            least, where = select(less, cost, least), select(less, ints(k), where)
        flip = select((count & ints(1)) > ints(0), where, ints(-1))
        for k in range(8):
            place = (start + k) * 16
            magnitude = bits(load_float32(scratch.magnitudes, place))
            store(scratch.magnitudes, place, select(flip != ints(k), magnitude, magnitude | ints(-(2**31))))


@compiled
def _prepare_tilts(grid: Grid, scratch: Scratch, importance: Any, first_input: int) -> None:
    """What moving the levels of a run adds to the cost of all its points."""
    for start in range(0, BLOCK, grid.length):
        tilt = floats(0.0)
        for k in range(start, start + grid.length):
            tilt = fused(load_float32(scratch.magnitudes, k * 16), floats(importance[first_input + k]), tilt)
        store(scratch.tilts, start // grid.length * 16, tilt)


@compiled
def _prepare(grid: Grid, source: Source, row: int, importance: Any, first_input: int, scratch: Scratch) -> tuple[Any, Any]:
    """Load a block of 16 rows; bits of the largest magnitude of each, and by what magnitudes were divided."""
    load_tile(source, row, first_input, 1, scratch.weights)
    load_tile(source, row, first_input + BLOCK // 2, 1, scratch.weights[BLOCK * 8 :])
    mask, peak = ints(0x7FFFFFFF), ints(0)
    for k in range(0, BLOCK * 16, 16):
        peak = maximum(peak, bits(load_float32(scratch.weights, k)) & mask)
    unit = maximum(from_bits(peak), floats(SMALLEST))
    factor = floats(1.0) / unit
    for group in range(BLOCK // grid.group):
        power = floats(0.0)
        for k in range(group * grid.group, (group + 1) * grid.group):
            value = load_float32(scratch.weights, k * 16) * factor
            if grid.signs:
                value = from_bits(bits(value) & mask)
            store(scratch.magnitudes, k * 16, value)
            power = fused(value * value, floats(importance[first_input + k]), power)
        store(scratch.power, group * 16, power)
    if grid.shifted:
        _prepare_tilts(grid, scratch, importance, first_input)
    if grid.signs == 2:
        _prepare_signs(scratch, importance, first_input)
    return peak, unit


@compiled
def _inverse(step: Any) -> Any:
    return floats(2.0) / maximum(step, floats(SMALLEST))


@compiled
def _reference(grid: Grid, scratch: Scratch, group: int, importance: Any, first_input: int, mix: float) -> Any:
    """A step of about the right size: between one with which the group's weighted mean square is that of all points of the grid,
    and one with which the highest level is the group's largest magnitude."""
    total, largest = np.float32(0.0), ints(0)
    for k in range(group * grid.group, (group + 1) * grid.group):
        total += importance[first_input + k]
        largest = maximum(largest, bits(load_float32(scratch.magnitudes, k * 16)) & ints(0x7FFFFFFF))
    typical = root(load_float32(scratch.power, group * 16) / floats(total)) / floats(grid.rms)
    return fused(from_bits(largest), floats(mix / grid.levels.max()), typical * floats(1.0 - mix))


@compiled
def _fit_groups(grid: Grid, scratch: Scratch, importance: Any, first_input: int, mix: float, factors: Any) -> None:
    """The best step of each group on its own, and how the error grows beside it."""
    for group in range(BLOCK // grid.group):
        power = load_float32(scratch.power, group * 16)
        reference = _reference(grid, scratch, group, importance, first_input, mix)
        best, step = floats(MOST_ERROR), reference
        for factor in factors:
            trial = reference * floats(factor)
            if grid.shifted:
                choose_shifts(grid, scratch, group, _inverse(trial), importance, first_input)
            cost = assign_group(grid, scratch, group, _inverse(trial), scratch.tried, False)
            error = fused(trial * trial, cost, power)
            better = error < best
            best, step = select(better, error, best), select(better, trial, step)
            copy_payloads(grid, group, better, scratch.tried, scratch.chosen)
        product, square = moments(grid, scratch, group, importance, first_input, scratch.chosen)
        fitted = product / maximum(square, floats(SMALLEST))
        store(scratch.steps, group * 16, select(fitted > floats(0.0), fitted, step))
        store(scratch.curvature, group * 16, square)


@compiled
def _stored(value: Any, unit: Any) -> tuple[Any, Any]:
    """A block's scale as FP16 bits, and what these are worth in units of the block."""
    half = to_half(value * unit)
    return half, from_half(half) / unit


@compiled
def _choose_scale(grid: Grid, scratch: Scratch, unit: Any, multiples: Any) -> tuple[Any, Any]:
    """The block's scale for which rounding the groups' steps costs least."""
    largest = floats(0.0)
    groups = BLOCK // grid.group
    for group in range(groups):
        largest = maximum(load_float32(scratch.steps, group * 16), largest)
    least, best_half, best = floats(MOST_ERROR), ints(0), floats(0.0)
    for multiple in multiples:
        half, scale = _stored(largest / floats(multiple * grid.fraction), unit)
        inverse = _inverse(scale * floats(2.0 * grid.fraction)) * floats(0.5)
        loss = floats(0.0)
        for group in range(groups):
            step = load_float32(scratch.steps, group * 16)
            code = _nearest_code(grid, step, inverse)
            gap = step - _step_of(grid, scale, code)
            loss = fused(gap * gap, load_float32(scratch.curvature, group * 16), loss)
        better = loss < least
        least, best_half, best = select(better, loss, least), select(better, half, best_half), select(better, scale, best)
    return best_half, best


@compiled
def _nearest_code(grid: Grid, step: Any, inverse: Any) -> Any:
    """Whole number code for which ``(2 code + 1) * scale * fraction`` is nearest; ``inverse`` is 1 / (2 scale * fraction)."""
    code = nearest(fused(step, inverse, floats(-0.5)))
    return minimum(maximum(code, floats(0.0)), floats(grid.highest))


@compiled
def _step_of(grid: Grid, scale: Any, code: Any) -> Any:
    return scale * fused(code, floats(2.0 * grid.fraction), floats(grid.fraction))


@compiled
def _assign(grid: Grid, scratch: Scratch, importance: Any, first_input: int, unit: Any, half: Any, scale: Any, offsets: Any) -> Any:
    """Codes of all groups and points of all runs for the block's scale as it is stored; then the scale that suits these best."""
    inverse = _inverse(scale * floats(2.0 * grid.fraction)) * floats(0.5)
    products, squares = floats(0.0), floats(0.0)
    for group in range(BLOCK // grid.group):
        power = load_float32(scratch.power, group * 16)
        middle = _nearest_code(grid, load_float32(scratch.steps, group * 16), inverse)
        best, chosen = floats(MOST_ERROR), middle
        for offset in offsets:
            code = minimum(maximum(middle + floats(offset), floats(0.0)), floats(grid.highest))
            step = _step_of(grid, scale, code)
            cost = assign_group(grid, scratch, group, _inverse(step), scratch.tried, True)
            error = fused(step * step, cost, power)
            better = error < best
            best, chosen = select(better, error, best), select(better, code, chosen)
            copy_payloads(grid, group, better, scratch.tried, scratch.chosen)
        product, square = moments(grid, scratch, group, importance, first_input, scratch.chosen)
        multiple = fused(chosen, floats(2.0 * grid.fraction), floats(grid.fraction))
        products = fused(multiple, product, products)
        squares = fused(multiple * multiple, square, squares)
        store(scratch.group_codes, group * 16, chosen)
    fitted_half, fitted = _stored(maximum(products, floats(0.0)) / maximum(squares, floats(SMALLEST)), unit)
    old = scale * (scale * squares - (products + products))
    new = fitted * (fitted * squares - (products + products))
    return select(new < old, fitted_half, half)


@compiled
def _finish(grid: Grid, scratch: Scratch, target: BlockTarget, row: int, columns: int, first_input: int, half: Any) -> None:
    """Codes and scales to where they belong."""
    block = row * (columns // BLOCK) + first_input // BLOCK
    scatter_halves(target.scales, block, columns // BLOCK, half)
    per_row = columns // grid.group
    for group in range(BLOCK // grid.group):
        place = row * per_row + first_input // grid.group + group
        scatter_bytes(target.group_scales, place, per_row, ints(load_float32(scratch.group_codes, group * 16)))
    for part in range(0, BLOCK, BLOCK // 2):
        store_codes(scratch.words[part * 4 :], target.codes, row, first_input + part, columns)


@compiled
def _signed_codes(grid: Grid, scratch: Scratch, importance: Any, first_input: int, half: Any) -> tuple[Any, Any, Any, Any]:
    """Codes as words of four; sums of squared errors and weights, and of the same times importance."""
    scale = from_half(half)
    errors, powers, weighted_errors, weighted_powers = doubles(0.0), doubles(0.0), doubles(0.0), doubles(0.0)
    for start in range(0, BLOCK, 4):
        payload = load_int32(scratch.chosen, start // grid.length * 16)
        step = _step_of(grid, scale, load_float32(scratch.group_codes, start // grid.group * 16))
        word = ints(0)
        for k in range(4):
            place = (start + k) * 16
            weight, level = load_float32(scratch.weights, place), level_of(grid, payload, (start + k) % grid.length)
            if grid.signs:
                sign = ((bits(weight) >> ints(31)) + (bits(load_float32(scratch.magnitudes, place)) >> ints(31))) & ints(1)
                level = select(sign > ints(0), floats(0.0) - level, level)
            word = word | ((ints(level) & ints(255)) << ints(8 * k))
            gap = weight - step * level
            error, power = doubles(gap) * doubles(gap), doubles(weight) * doubles(weight)
            errors, powers = errors + error, powers + power
            emphasis = doubles(importance[first_input + start + k])
            weighted_errors, weighted_powers = weighted_errors + emphasis * error, weighted_powers + emphasis * power
        store(scratch.words, start * 4, word)
    return errors, powers, weighted_errors, weighted_powers


@compiled
def _relative_importance(importance: Any) -> Any:
    """Importance with the largest of each block being 1: sums of products then stay within the range of float32."""
    relative = np.empty(importance.size, np.float32)
    for start in range(0, importance.size, BLOCK):
        largest = np.float32(0.0)
        for k in range(start, start + BLOCK):
            largest = max(largest, importance[k])
        for k in range(start, start + BLOCK):
            share = importance[k] / largest if largest > 0 else np.float32(1.0)
            relative[k] = max(share, np.float32(LEAST_IMPORTANCE))
    return relative


@kernel
def quantize_blocks(
    grid: Grid,
    search: Search,
    source: Source,
    target: BlockTarget,
    importance: Any,
    first_row: int,
    last_row: int,
) -> Sums:
    """Quantize the rows ``first_row .. last_row``, multiples of 16, of a matrix with whole blocks of columns.

    importance: float32 ``[columns]``, not negative.  Returns sums over these rows: squared errors and squared weights, both also
    times importance, and the bits of the largest magnitude, which tell whether a weight is infinite or NaN; then nothing else means
    anything.
    """
    scratch, relative = _scratch(grid), _relative_importance(importance)
    peak = ints(0)
    errors, powers, weighted_errors, weighted_powers = doubles(0.0), doubles(0.0), doubles(0.0), doubles(0.0)
    for first_input in range(0, source.columns, BLOCK):
        _prepare_levels(grid, scratch, relative, first_input)
        for row in range(first_row, last_row, 16):
            largest, unit = _prepare(grid, source, row, relative, first_input, scratch)
            peak = maximum(peak, largest)
            _fit_groups(grid, scratch, relative, first_input, search.mix, search.factors)
            half, scale = _choose_scale(grid, scratch, unit, search.multiples)
            half = _assign(grid, scratch, relative, first_input, unit, half, scale, search.offsets)
            error, power, weighted_error, weighted_power = _signed_codes(grid, scratch, importance, first_input, half)
            errors, powers = errors + error, powers + power
            weighted_errors, weighted_powers = weighted_errors + weighted_error, weighted_powers + weighted_power
            _finish(grid, scratch, target, row, source.columns, first_input, half)
    return lane_sum(errors), lane_sum(powers), lane_sum(weighted_errors), lane_sum(weighted_powers), largest_lane(peak)


def quantize(name: str, source: Source, target: BlockTarget, importance: Any, searched: int, first_row: int, last_row: int) -> Sums:
    """:func:`quantize_blocks` for the type of that name; without search scales only follow from the size of what they are for."""
    return quantize_blocks(
        grid_tables(name), search_plan(name, int(bool(searched))), source, target, importance, first_row, last_row
    )


KERNELS: dict[str, Callable[..., Sums]] = {name: functools.partial(quantize, name) for name in CODEBOOKS}
