"""The two levels of scales of Q4_K, Q5_K and Q2_K: integers for groups, FP16 scale and minimum for a block of 256.

The weight of a K type is ``(scale * group_scale) * code - minimum * group_minimum``; the integers have 4 or 6 bits.  Once each
group has been fitted with any step and minimum (``ggml_minimum_fit``) a block goes through these stages:

1. Scale and minimum of the block: candidates around "the largest group takes the largest integer" are tried on the fits' sums.
   What the integers cost depends so much on the luck of rounding that trying is worth more than any rule.
2. Each group takes the pair of integers with the least error among some fifteen, with codes rounded for each.  The two are chosen
   together: an error of the step is partly made up for by the minimum.
3. Scale and minimum of the block are solved for by least squares with all codes and integers fixed.

Each stage keeps what has the least importance-weighted squared error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantkit.kernels.ggml_minimum_block import SMALLEST_STEP, Importance, reciprocal, stored
from quantkit.kernels.ggml_minimum_fit import SINGULAR, Group, Starts, Sums, code_sums, error_of, fit_group, select_sums, solve
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32, store
from quantkit.kernels.simd import floats, fused, maximum, minimum, nearest, select


class Layout(NamedTuple):
    """Numbers of one type, and how it is searched.

    highest, highest_scale: largest code, and largest integer of a group.  spread, trials: the block's scale and minimum are tried
    so many times each, within (1 - spread, 1 + spread) times the plain one.  reach: group scales tried to either side.
    """

    block: int
    group: int
    highest: float
    highest_scale: float
    starts: Starts
    spread: float
    trials: int
    reach: int


class Groups(NamedTuple):
    """What is kept of each group while a block is worked on, float32 ``[groups, 16]``.

    step, low: the fit; codes, squares and products: its sums (``ggml_minimum_fit.Sums``); total: the weighted sum of the weights.
    wanted: the minimum that fits a step best.  scales, minimums: the integers.
    """

    step: Any
    low: Any
    codes: Any
    squares: Any
    products: Any
    total: Any
    wanted: Any
    scales: Any
    minimums: Any


@compiled
def new_groups(count: int) -> Any:
    """Memory for the groups of a block."""
    lanes = count * 16
    return Groups(
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
        np.empty(lanes, np.float32),
    )


@compiled
def sums_of(kept: Groups, place: int) -> Any:
    """The sums of one group."""
    return Sums(load_float32(kept.codes, place), load_float32(kept.squares, place), load_float32(kept.products, place))


@compiled
def keep_sums(kept: Groups, place: int, sums: Sums) -> None:
    """Store the sums of one group."""
    store(kept.codes, place, sums.codes)
    store(kept.squares, place, sums.squares)
    store(kept.products, place, sums.products)


@compiled
def whole(value: Any, highest: float) -> Any:
    """The nearest integer within 0 to ``highest``."""
    return maximum(minimum(nearest(value), floats(highest)), floats(0.0))


@compiled
def group_of(kept: Groups, place: int, importance: Importance, first_input: int, layout: Layout) -> Any:
    """A group of the block, as it was measured."""
    start = place // 16 * layout.group
    first = first_input + start
    weight, share = importance.groups[first // layout.group], importance.shares[first // layout.group]
    return Group(start, first, layout.group, floats(weight), floats(share), load_float32(kept.total, place))


@compiled
def choose_integers(
    sums: Sums, group: Group, free: Any, layout: Layout, scale: Any, inverse: Any, low: Any, inverse_low: Any
) -> Any:
    """Group scale, group minimum and error, the best for given codes.  free: the step that these codes would like best.

    Three scales are tried, each with the minimum that suits it.
    """
    middle = nearest(free * inverse)
    best, best_scale, best_low = floats(np.inf), floats(0.0), floats(0.0)
    for offset in range(-1, 2):
        group_scale = whole(middle + floats(offset), layout.highest_scale)
        step = group_scale * scale
        group_low = whole((step * sums.codes - group.total) * group.share * inverse_low, layout.highest_scale)
        error = error_of(sums, group.total, group.weight, step, group_low * low)
        lower = error < best
        best, best_scale = select(lower, error, best), select(lower, group_scale, best_scale)
        best_low = select(lower, group_low, best_low)
    return best_scale, best_low, best


@compiled
def search_integers(
    kept: Groups, place: int, block: Any, group: Group, importance: Any, layout: Layout, scale: Any, low: Any
) -> Any:
    """Integers of a group: of all pairs around the one that suits the fit's codes, the one with the least error after rounding.

    Leaves integers and sums in ``kept``.
    """
    fitted, inverse_scale, inverse_low = sums_of(kept, place), reciprocal(scale), reciprocal(low)
    free = load_float32(kept.step, place)
    middle, _, _ = choose_integers(fitted, group, free, layout, scale, inverse_scale, low, inverse_low)
    best, best_scale, best_low, best_sums = floats(np.inf), floats(0.0), floats(0.0), fitted
    for offset in range(-layout.reach, layout.reach + 1):
        group_scale = whole(middle + floats(offset), layout.highest_scale)
        step = group_scale * scale
        inverse, wanted = reciprocal(step), nearest((step * fitted.codes - group.total) * group.share * inverse_low)
        for other in range(-1, 2):
            group_low = whole(wanted + floats(other), layout.highest_scale)
            lift = group_low * low
            sums = code_sums(block, group, importance, inverse, lift, layout.highest)
            error = error_of(sums, group.total, group.weight, step, lift)
            lower = error < best
            best, best_scale = select(lower, error, best), select(lower, group_scale, best_scale)
            best_low, best_sums = select(lower, group_low, best_low), select_sums(lower, sums, best_sums)
    free, _ = solve(best_sums, group, best_scale * scale, False)
    group_scale, group_low, error = choose_integers(best_sums, group, free, layout, scale, inverse_scale, low, inverse_low)
    lower = error < best
    store(kept.scales, place, select(lower, group_scale, best_scale))
    store(kept.minimums, place, select(lower, group_low, best_low))
    keep_sums(kept, place, best_sums)


@compiled
def trial(layout: Layout, number: int) -> float:
    """Factors around 1."""
    return 1.0 + layout.spread * (2.0 * number / (layout.trials - 1) - 1.0)


@compiled
def at_least_a_half(plain: Any, largest: Any, inverse_unit: Any) -> Any:
    """The smallest FP16 number instead of a smaller scale, where one or more of it are nearer to what groups need than 0 is."""
    return maximum(plain, select(largest > floats(2.0**-25) * inverse_unit, floats(2.0**-24) * inverse_unit, floats(0.0)))


@compiled
def choose_scales(
    kept: Groups, importance: Importance, first_group: int, layout: Layout, unit: Any, inverse_unit: Any, searched: int
) -> Any:
    """Scale and minimum of the block for the fits of its groups."""
    groups = layout.block // layout.group
    largest_step = largest_low = floats(0.0)
    for group in range(groups):
        largest_step = maximum(largest_step, load_float32(kept.step, group * 16))
        largest_low = maximum(largest_low, load_float32(kept.low, group * 16))
    plain_scale = at_least_a_half(largest_step * floats(1.0 / layout.highest_scale), largest_step, inverse_unit)
    plain_low = at_least_a_half(largest_low * floats(1.0 / layout.highest_scale), largest_low, inverse_unit)
    scale, low = stored(plain_scale, unit, inverse_unit), stored(plain_low, unit, inverse_unit)
    if searched == 0:
        return scale, low
    best = floats(np.inf)
    for scale_number in range(layout.trials):
        candidate = stored(plain_scale * floats(trial(layout, scale_number)), unit, inverse_unit)
        inverse, base = reciprocal(candidate), floats(0.0)
        for group in range(groups):
            place, sums = group * 16, sums_of(kept, group * 16)
            step = whole(load_float32(kept.step, place) * inverse, layout.highest_scale) * candidate
            missing = fused(step, sums.codes, floats(0.0) - load_float32(kept.total, place))
            wanted = missing * floats(importance.shares[first_group + group])
            store(kept.wanted, place, wanted)
            of_step = step * fused(step, sums.squares, floats(-2.0) * sums.products)
            base = base + (of_step - missing * wanted)
        for low_number in range(layout.trials):
            candidate_low = stored(plain_low * floats(trial(layout, low_number)), unit, inverse_unit)
            inverse_low, error = reciprocal(candidate_low), base
            for group in range(groups):
                wanted = load_float32(kept.wanted, group * 16)
                missed = whole(wanted * inverse_low, layout.highest_scale) * candidate_low - wanted
                error = fused(missed * missed, floats(importance.groups[first_group + group]), error)
            lower = error < best
            best, scale = select(lower, error, best), select(lower, candidate, scale)
            low = select(lower, candidate_low, low)
    return scale, low


@compiled
def refit_scales(
    kept: Groups, weights: Any, first_group: int, layout: Layout, unit: Any, inverse_unit: Any, scale: Any, low: Any
) -> Any:
    """Solve for scale and minimum of the block with codes and integers fixed; the old ones where that is no better."""
    zero = floats(0.0)
    scale_scale = scale_low = low_low = scale_weight = low_weight = zero
    for group in range(layout.block // layout.group):
        place, weight = group * 16, floats(weights[first_group + group])
        sums, total = sums_of(kept, place), load_float32(kept.total, place)
        step, lift = load_float32(kept.scales, place), load_float32(kept.minimums, place)
        scale_scale = fused(step * step, sums.squares, scale_scale)
        scale_low = fused(step * lift, sums.codes, scale_low)
        low_low = fused(lift * lift, weight, low_low)
        scale_weight = fused(step, sums.products, scale_weight)
        low_weight = fused(lift, total, low_weight)
    determinant = scale_scale * low_low - scale_low * scale_low
    sound = determinant > scale_scale * low_low * floats(SINGULAR)
    divisor = select(sound, determinant, floats(1.0))
    together = (scale_weight * low_low - low_weight * scale_low) / divisor
    alone = select(scale_scale > zero, fused(low, scale_low, scale_weight) / maximum(scale_scale, floats(SMALLEST_STEP)), scale)
    new_scale = stored(maximum(select(sound, together, alone), zero), unit, inverse_unit)
    for_scale = fused(new_scale, scale_low, zero - low_weight) / maximum(low_low, floats(SMALLEST_STEP))
    new_low = stored(maximum(select(low_low > zero, for_scale, low), zero), unit, inverse_unit)
    sums = Sums(scale_low, scale_scale, scale_weight)
    improved = error_of(sums, low_weight, low_low, new_scale, new_low) < error_of(sums, low_weight, low_low, scale, low)
    return select(improved, new_scale, scale), select(improved, new_low, low)


@compiled
def fit_block(
    kept: Groups,
    block: Any,
    importance: Importance,
    first_input: int,
    layout: Layout,
    unit: Any,
    inverse_unit: Any,
    searched: int,
) -> Any:
    """Leave the integers of the groups in scales and minimums; return scale and minimum of the block."""
    groups, first_group, size = layout.block // layout.group, first_input // layout.group, layout.group
    for place in range(0, groups * 16, 16):
        start = place // 16 * size
        fit, group = fit_group(block, start, size, importance, first_input + start, layout.highest, False, layout.starts, searched)
        store(kept.step, place, fit.step)
        store(kept.low, place, fit.low)
        store(kept.total, place, group.total)
        keep_sums(kept, place, fit.sums)
    scale, low = choose_scales(kept, importance, first_group, layout, unit, inverse_unit, searched)
    if searched == 0:
        inverse, inverse_low = reciprocal(scale), reciprocal(low)
        for place in range(0, groups * 16, 16):
            store(kept.scales, place, whole(load_float32(kept.step, place) * inverse, layout.highest_scale))
            store(kept.minimums, place, whole(load_float32(kept.low, place) * inverse_low, layout.highest_scale))
        return scale, low
    for place in range(0, groups * 16, 16):
        group = group_of(kept, place, importance, first_input, layout)
        search_integers(kept, place, block, group, importance.search, layout, scale, low)
    return refit_scales(kept, importance.groups, first_group, layout, unit, inverse_unit, scale, low)
