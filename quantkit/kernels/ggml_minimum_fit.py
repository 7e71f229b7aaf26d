"""Fitting ``step * code - minimum`` to a group of weights, 16 rows at a time: what the types with a minimum have in common.

Rounding weights to codes and solving for step and minimum by weighted least squares, in turn, never makes the error larger, but it
ends in the next best of very many local optima.  What decides is where it starts, and the two ends of the range matter separately:
nine starts on a square, either end moved out, left or moved in by a fraction of a step, do better than a dozen along one line.

For a group of a block (``ggml_minimum_block``) only five sums over its inputs matter: of the importance, of importance times
weight, and (for given codes) of importance times code, code squared, and code times weight.  From them the error for *any* step and
minimum follows without looking at the weights again.  Errors here leave out the sum of squared weights, which no choice changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from quantkit.kernels.ggml_minimum_block import Importance
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32
from quantkit.kernels.simd import floats, fused, maximum, minimum, nearest, select

NARROWEST = 2.0**-24  # a range below this is no range, next to the block's largest magnitude, which is at least 1
SINGULAR = 1e-5  # least squares whose determinant is a smaller part of its first term tell rounding errors, not a step


class Starts(NamedTuple):
    """From where fits start: each end of the range at ``places`` from ``outermost`` to ``innermost``, in steps inwards."""

    places: int
    outermost: float
    innermost: float


class Group(NamedTuple):
    """One group: its first input in the block and in the matrix, how many inputs it has; and for 16 rows the sum of importance,
    the reciprocal of that, and the sum of importance times weight."""

    start: int
    first: int
    size: int
    weight: Any
    share: Any
    total: Any


class Sums(NamedTuple):
    """Sums over a group, each weighted by importance: of codes, squared codes, codes times weights."""

    codes: Any
    squares: Any
    products: Any


class Fit(NamedTuple):
    """A step and a minimum, the codes' sums that they were solved for, and the error."""

    step: Any
    low: Any
    sums: Sums
    error: Any


@compiled
def measure_group(block: Any, start: int, count: int, importance: Importance, first: int) -> Any:
    """The group that starts there, its smallest and its largest weight."""
    low = high = load_float32(block, start * 16)
    total = floats(0.0)
    for index in range(count):
        weight = load_float32(block, (start + index) * 16)
        low, high = minimum(low, weight), maximum(high, weight)
        total = fused(weight, floats(importance.search[first + index]), total)
    place = first // count
    return Group(start, first, count, floats(importance.groups[place]), floats(importance.shares[place]), total), low, high


@compiled
def code_sums(block: Any, group: Group, importance: Any, inverse: Any, low: Any, highest: float) -> Any:
    """Round the weights of a group to codes ``(weight + low) * inverse`` and sum."""
    offset, top, bottom = low * inverse, floats(highest), floats(0.0)
    codes = squares = products = floats(0.0)
    for index in range(group.size):
        weight = load_float32(block, (group.start + index) * 16)
        code = maximum(minimum(nearest(fused(weight, inverse, offset)), top), bottom)
        scaled = code * floats(importance[group.first + index])
        codes = codes + scaled
        squares = fused(scaled, code, squares)
        products = fused(scaled, weight, products)
    return Sums(codes, squares, products)


@compiled
def error_of(sums: Sums, total: Any, weight: Any, step: Any, low: Any) -> Any:
    """Squared error of ``step * code - low``, less the sum of squared weights."""
    of_step = step * sums.squares - floats(2.0) * fused(low, sums.codes, sums.products)
    return fused(step, of_step, low * fused(low, weight, floats(2.0) * total))


@compiled
def solve(sums: Sums, group: Group, fallback: Any, signed: bool) -> Any:
    """Step and minimum with the least error for given codes; the minimum is not negative unless ``signed``.

    fallback: the step to keep where all codes are (nearly) the same, so that they do not tell one.  Divisions are slow, so there is
    one: whether the minimum would be negative shows before.
    """
    zero, spread = floats(0.0), group.weight * sums.squares
    determinant = spread - sums.codes * sums.codes
    sound = determinant > spread * floats(SINGULAR)
    covariance = group.weight * sums.products - sums.codes * group.total
    if signed:
        step = maximum(select(sound, covariance / select(sound, determinant, floats(1.0)), fallback), zero)
        return step, (step * sums.codes - group.total) * group.share
    tied = select(sound, group.total * determinant, group.total) > sums.codes * select(sound, covariance, fallback)
    divisor = select(tied, maximum(sums.squares, floats(NARROWEST)), select(sound, determinant, floats(1.0)))
    solved = select(tied, sums.products, covariance) / divisor
    step = maximum(select(tied, solved, select(sound, solved, fallback)), zero)
    return step, select(tied, zero, maximum((step * sums.codes - group.total) * group.share, zero))


@compiled
def select_sums(mask: Any, yes: Sums, no: Sums) -> Any:
    """Lanes of ``yes`` where the mask is set, else of ``no``."""
    codes, squares = select(mask, yes.codes, no.codes), select(mask, yes.squares, no.squares)
    return Sums(codes, squares, select(mask, yes.products, no.products))


@compiled
def better(left: Fit, right: Fit) -> Any:
    """The fit with less error, lane by lane; ``left`` where they are equal."""
    chosen = right.error < left.error
    step, low = select(chosen, right.step, left.step), select(chosen, right.low, left.low)
    return Fit(step, low, select_sums(chosen, right.sums, left.sums), select(chosen, right.error, left.error))


@compiled
def fit_codes(block: Any, group: Group, importance: Any, step: Any, inverse: Any, low: Any, highest: float, signed: bool) -> Any:
    """One turn: codes for a step (and its reciprocal) and a minimum, then the best step and minimum for these codes."""
    sums = code_sums(block, group, importance, inverse, low, highest)
    step, low = solve(sums, group, step, signed)
    return Fit(step, low, sums, error_of(sums, group.total, group.weight, step, low))


@compiled
def fit_group(
    block: Any,
    start: int,
    count: int,
    importance: Importance,
    first: int,
    highest: float,
    signed: bool,
    starts: Starts,
    searched: int,
) -> Any:
    """Fit a group from several starts.  Returns the best fit, and the group."""
    group, smallest, largest = measure_group(block, start, count, importance, first)
    if not signed:
        smallest = minimum(smallest, floats(0.0))
    unit = maximum(largest - smallest, floats(NARROWEST)) * floats(1.0 / highest)
    if searched == 0:
        zeros = floats(0.0)
        return Fit(unit, floats(0.0) - smallest, Sums(zeros, zeros, zeros), zeros), group
    inverse, weights = floats(1.0) / unit, importance.search
    best = fit_codes(block, group, weights, unit, inverse, floats(0.0) - smallest, highest, signed)
    stride = (starts.innermost - starts.outermost) / (starts.places - 1)
    for bottom_number in range(starts.places):
        bottom = starts.outermost + stride * bottom_number
        low = floats(0.0) - fused(unit, floats(bottom), smallest)
        for top_number in range(starts.places):
            narrower = 1.0 - (bottom + starts.outermost + stride * top_number) / highest
            step, inverse_step = unit * floats(narrower), inverse * floats(1.0 / narrower)
            best = better(best, fit_codes(block, group, weights, step, inverse_step, low, highest, signed))
    return best, group
