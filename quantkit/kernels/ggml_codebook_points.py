"""The nearest points of a codebook's grid, for two neighbouring runs of weights of 16 rows at a time.

A weight ``m`` that is stored as ``step * level`` costs ``importance * (m - step * level)^2``.  Less the part that does not
depend on the level, and in units of the squared step, that is ``importance * level * (level - 2 m / step)``: one multiplication
and addition for each level, with constants that all rows share.  Tables of these costs, of their sums over two weights, and over
halves of a run lead to the exact minimum over the grid, see :mod:`quantkit.kernels.ggml_codebook_tables`.

Which point it was is carried in the lowest eight bits of the tables' floats, so that a minimum is one instruction; a cost is known
to 15 bits, and points that are nearer to each other than that are as good as each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from quantkit.kernels.ggml_codebook_tables import Grid
from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import load_float32, load_int32, store
from quantkit.kernels.simd import bits, floats, fused, ints, minimum, select

BLOCK = 256
HALF_BITS = 8  # of a payload: digits of the second half, then those of the first, then the trial
TRIAL_BIT = 16
MOST = 1e38  # more than any cost


class Scratch(NamedTuple):
    """Memory for one block of 16 rows; float32, some hold bits of integers; 16 rows are the innermost axis unless told.

    weights: ``[256]``, as they come.  magnitudes: ``[256]``, what the levels are fitted to, relative to the largest of the block.
    linear, square: ``[256 * levels]``, not by row: -importance * level and importance * level^2.
    costs: ``[length, digits, 2]`` of two runs side by side, pairs: ``[2, 9, 2]``, firsts, seconds: ``[81, 2]``, sums of costs.
    chosen, tried, other: ``[64]``, payloads of all runs.
    power, best, steps, curvature: ``[16]``, of each group.  group_codes: ``[16]``, their scales as stored.  words: ``[64]``, codes.
    """

    weights: Any
    magnitudes: Any
    linear: Any
    square: Any
    costs: Any
    pairs: Any
    firsts: Any
    seconds: Any
    chosen: Any
    tried: Any
    other: Any
    power: Any
    best: Any
    steps: Any
    curvature: Any
    group_codes: Any
    words: Any


@compiled
def _sum_tables(source: Any, left: int, lefts: int, right: int, rights: int, out: Any, start: int) -> None:
    """All sums of an entry of one table and one of another, the second one fastest; entries are of two runs."""
    place = start
    for i in range(lefts):
        one, other = load_float32(source, left + i * 32), load_float32(source, left + i * 32 + 16)
        for j in range(rights):
            store(out, place, one + load_float32(source, right + j * 32))
            store(out, place + 16, other + load_float32(source, right + j * 32 + 16))
            place += 32


@compiled
def _sum_marked(source: Any, left: int, lefts: int, right: int, rights: int, payloads: Any, out: Any) -> None:
    """:func:`_sum_tables` with payloads in the lowest bits."""
    keep, place = ints(-256), 0
    for i in range(lefts):
        one, other = load_float32(source, left + i * 32), load_float32(source, left + i * 32 + 16)
        for j in range(rights):
            mark = ints(payloads[i * rights + j])
            store(out, place, (bits(one + load_float32(source, right + j * 32)) & keep) | mark)
            store(out, place + 16, (bits(other + load_float32(source, right + j * 32 + 16)) & keep) | mark)
            place += 32


@compiled
def _fill_costs(grid: Grid, scratch: Scratch, run: int, inverse: Any, trial: int) -> None:
    """Costs of every level of every weight of two runs; ``inverse`` is 2 / step."""
    levels = grid.trials * grid.digits
    for k in range(grid.length):
        first, second = run * grid.length + k, (run + 1) * grid.length + k
        one = load_float32(scratch.magnitudes, first * 16) * inverse
        other = load_float32(scratch.magnitudes, second * 16) * inverse
        for digit in range(grid.digits):
            constant, place = trial * grid.digits + digit, (k * grid.digits + digit) * 32
            a, b = first * levels + constant, second * levels + constant
            store(scratch.costs, place, fused(floats(scratch.linear[a]), one, floats(scratch.square[a])))
            store(scratch.costs, place + 16, fused(floats(scratch.linear[b]), other, floats(scratch.square[b])))


@compiled
def nearest_points(grid: Grid, scratch: Scratch, run: int, inverse: Any, trial: int) -> tuple[Any, Any, Any, Any]:
    """Least costs of two neighbouring runs, and the payloads of their points."""
    _fill_costs(grid, scratch, run, inverse, trial)
    digits, weight = grid.digits, grid.digits * 32
    if grid.length == 4:
        _sum_tables(scratch.costs, 0, digits, weight, digits, scratch.firsts, 0)
        _sum_marked(scratch.costs, 2 * weight, digits, 3 * weight, digits, grid.second_payloads, scratch.seconds)
    else:
        many = digits * digits
        _sum_tables(scratch.costs, 0, digits, weight, digits, scratch.pairs, 0)
        _sum_tables(scratch.costs, 2 * weight, digits, 3 * weight, digits, scratch.pairs, many * 32)
        _sum_tables(scratch.pairs, 0, many, many * 32, many, scratch.firsts, 0)
        _sum_tables(scratch.costs, 4 * weight, digits, 5 * weight, digits, scratch.pairs, 0)
        _sum_tables(scratch.costs, 6 * weight, digits, 7 * weight, digits, scratch.pairs, many * 32)
        _sum_marked(scratch.pairs, 0, many, many * 32, many, grid.second_payloads, scratch.seconds)
    mark = ints(255)
    usual = ints(grid.first_payloads[0] << HALF_BITS | grid.second_payloads[grid.partners[0]])
    best, other_best, payload, other_payload = floats(MOST), floats(MOST), usual, usual
    for place in range(grid.firsts.size):
        low, other_low = floats(MOST), floats(MOST)
        for partner in range(grid.starts[place], grid.starts[place + 1]):
            entry = grid.partners[partner] * 32
            low = minimum(load_float32(scratch.seconds, entry), low)
            other_low = minimum(load_float32(scratch.seconds, entry + 16), other_low)
        entry, first = grid.firsts[place] * 32, ints(grid.first_payloads[place] << HALF_BITS)
        total = low + load_float32(scratch.firsts, entry)
        other_total = other_low + load_float32(scratch.firsts, entry + 16)
        better, other_better = total < best, other_total < other_best
        best, other_best = select(better, total, best), select(other_better, other_total, other_best)
        payload = select(better, (bits(low) & mark) | first, payload)
        other_payload = select(other_better, (bits(other_low) & mark) | first, other_payload)
    shift = ints(trial << TRIAL_BIT)
    return best, other_best, payload | shift, other_payload | shift


@compiled
def assign_group(grid: Grid, scratch: Scratch, group: int, inverse: Any, payloads: Any) -> Any:
    """Nearest points of a group, left in ``payloads``; their cost, in units of the squared step."""
    runs, total = grid.group // grid.length, floats(0.0)
    for run in range(group * runs, (group + 1) * runs, 2):
        one, other, payload, other_payload = nearest_points(grid, scratch, run, inverse, 0)
        if grid.trials == 2 and grid.shifted == grid.length:  # each run for itself
            low, other_low, second, other_second = nearest_points(grid, scratch, run, inverse, 1)
            payload = select(low < one, second, payload)
            other_payload = select(other_low < other, other_second, other_payload)
            one, other = minimum(low, one), minimum(other_low, other)
        store(payloads, run * 16, payload)
        store(payloads, run * 16 + 16, other_payload)
        total = total + (one + other)
    if grid.trials == 2 and grid.shifted > grid.length:  # the group as a whole
        second_total = floats(0.0)
        for run in range(group * runs, (group + 1) * runs, 2):
            one, other, payload, other_payload = nearest_points(grid, scratch, run, inverse, 1)
            store(scratch.other, run * 16, payload)
            store(scratch.other, run * 16 + 16, other_payload)
            second_total = second_total + (one + other)
        better = second_total < total
        copy_payloads(grid, group, better, scratch.other, payloads)
        total = minimum(second_total, total)
    return total


@compiled
def copy_payloads(grid: Grid, group: int, where: Any, source: Any, out: Any) -> None:
    """Take the payloads of a group from ``source`` in the rows where the mask is set."""
    runs = grid.group // grid.length
    for run in range(group * runs, (group + 1) * runs):
        store(out, run * 16, select(where, load_int32(source, run * 16), load_int32(out, run * 16)))


@compiled
def level_of(grid: Grid, payload: Any, k: int) -> Any:
    """Level of weight ``k`` of a run."""
    half = grid.length // 2
    shift = HALF_BITS + k * grid.digit_bits if k < half else (k - half) * grid.digit_bits
    digit = floats((payload >> ints(shift)) & ints((1 << grid.digit_bits) - 1))
    level = fused(digit, floats(grid.step), floats(grid.base))
    level = level + select(digit > floats(grid.digits - 1.5), floats(grid.extra), floats(0.0))
    if grid.trials == 2:
        level = level - floats((payload >> ints(TRIAL_BIT - 1)) & ints(2))
    return level


@compiled
def moments(grid: Grid, scratch: Scratch, group: int, importance: Any, first_input: int, payloads: Any) -> tuple[Any, Any]:
    """Sums over a group of importance * level * magnitude and of importance * level^2."""
    product, square = floats(0.0), floats(0.0)
    for start in range(group * grid.group, (group + 1) * grid.group, grid.length):
        payload = load_int32(payloads, start // grid.length * 16)
        for k in range(grid.length):
            level = level_of(grid, payload, k)
            weighted = level * floats(importance[first_input + start + k])
            product = fused(weighted, load_float32(scratch.magnitudes, (start + k) * 16), product)
            square = fused(weighted, level, square)
    return product, square
