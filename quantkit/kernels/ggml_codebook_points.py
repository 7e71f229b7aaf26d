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
from quantkit.kernels.simd import bits, floats, from_bits, fused, ints, maximum, minimum, select

BLOCK = 256
HALF_BITS = 8  # of a payload: digits of the second half, then those of the first, then whether levels are moved down
SHIFT_BIT = 16
MOST = 1e38  # more than any cost


class Scratch(NamedTuple):
    """Memory for one block of 16 rows; float32, some hold bits of integers; 16 rows are the innermost axis unless told.

    weights: ``[256]``, as they come.  magnitudes: ``[256]``, what the levels are fitted to, relative to the largest of the block.
    linear, square: ``[256 * levels]``, not by row: -importance * level and importance * level^2.
    sums: ``[4, 9 or 8, 2]``, for two runs side by side, costs of pairs of weights, or of weights where points have 4. seconds:
    ``[81, 2]``, costs of second halves.
    chosen, tried, other: ``[64]``, payloads of all runs.  For moved levels, of each run: shifts: ``[32]``, by how much; tilts:
    ``[32]``, sums of importance * magnitude; shares: ``[32]``, not by row, sums of importance.  power, steps, curvature:
    ``[16]``, of each group.  group_codes: ``[16]``, their scales as stored.  words: ``[64]``, codes.
    """

    weights: Any
    magnitudes: Any
    linear: Any
    square: Any
    sums: Any
    seconds: Any
    chosen: Any
    tried: Any
    other: Any
    shifts: Any
    tilts: Any
    shares: Any
    power: Any
    steps: Any
    curvature: Any
    group_codes: Any
    words: Any


@compiled
def _sum_marked(source: Any, left: int, right: int, count: int, payloads: Any, out: Any) -> None:
    """All sums of an entry of one table and one of another, the second one fastest, with payloads in the lowest bits."""
    for i in range(count):
        one, other = load_float32(source, left + i * 32), load_float32(source, left + i * 32 + 16)
        for j in range(count):
            _store_sum(source, right + j * 32, one, other, payloads[i * count + j], out, (i * count + j) * 32)


@compiled
def _store_sum(source: Any, entry: int, one: Any, other: Any, payload: int, out: Any, place: int) -> None:
    keep, mark = ints(-256), ints(payload)
    store(out, place, (bits(one + load_float32(source, entry)) & keep) | mark)
    store(out, place + 16, (bits(other + load_float32(source, entry + 16)) & keep) | mark)


@compiled
def _cost(scratch: Scratch, place: int, value: Any) -> Any:
    return fused(floats(scratch.linear[place]), value, floats(scratch.square[place]))


@compiled
def _fill_eights(scratch: Scratch, run: int, inverse: Any, count: int) -> None:
    """Costs of the eight levels of every weight of two runs of 4; ``inverse`` is 2 / step."""
    for k in range(4):
        first, second = run * 4 + k, run * 4 + 4 + k
        one = load_float32(scratch.magnitudes, first * 16) * inverse
        other = load_float32(scratch.magnitudes, second * 16) * inverse
        for digit in range(count):
            store(scratch.sums, (k * count + digit) * 32, _cost(scratch, first * count + digit, one))
            store(scratch.sums, (k * count + digit) * 32 + 16, _cost(scratch, second * count + digit, other))


@compiled
def _fill_threes(scratch: Scratch, run: int, inverse: Any, lift: Any) -> None:
    """Costs of the nine combinations of levels of all pairs of weights of a run of 8, see :func:`nearest_points`."""
    for pair in range(4):
        k = run * 8 + 2 * pair
        place, target = 3 * k, pair * 9 * 32 + (run & 1) * 16
        value = fused(load_float32(scratch.magnitudes, k * 16), inverse, lift)
        low, middle, high = _cost(scratch, place, value), _cost(scratch, place + 1, value), _cost(scratch, place + 2, value)
        value = fused(load_float32(scratch.magnitudes, k * 16 + 16), inverse, lift)
        for digit in range(3):
            cost = _cost(scratch, place + 3 + digit, value)
            store(scratch.sums, target + digit * 32, low + cost)
            store(scratch.sums, target + digit * 32 + 96, middle + cost)
            store(scratch.sums, target + digit * 32 + 192, high + cost)


@compiled
def nearest_points(grid: Grid, scratch: Scratch, run: int, inverse: Any, shift: Any, other_shift: Any) -> tuple[Any, Any, Any, Any]:
    """Least costs of the runs ``run``, which is even, and ``run + 1``, and the payloads of their points.

    inverse: 2 / step.  shift, other_shift: by how much the levels of each run are moved.  A moved level costs what the level itself
    would cost if the weight were moved the other way, and something that is the same for all levels; that is left out.
    """
    if grid.length == 4:
        count = grid.digits
        _fill_eights(scratch, run, inverse, count)
    else:
        count = grid.digits * grid.digits
        _fill_threes(scratch, run, inverse, floats(-2.0) * shift)
        _fill_threes(scratch, run + 1, inverse, floats(-2.0) * other_shift)
    _sum_marked(scratch.sums, 2 * count * 32, 3 * count * 32, count, grid.payloads, scratch.seconds)
    one, other, payload, other_payload = _scan(grid, scratch.sums, 0, count * 32, scratch.seconds)
    if grid.shifted:
        down, up = ints(1 << SHIFT_BIT), ints(0)
        payload = payload | select(shift < floats(0.0), down, up)
        other_payload = other_payload | select(other_shift < floats(0.0), down, up)
    return one, other, payload, other_payload


@compiled
def _scan(grid: Grid, source: Any, left: int, right: int, seconds: Any) -> tuple[Any, Any, Any, Any]:
    """The least sums of a first half, which is itself a sum of entries of two tables, and of a second half that goes with it."""
    best, other_best = floats(MOST), floats(MOST)
    second, other_second = bits(best), bits(best)
    first, other_first = ints(-1), ints(-1)
    for place in range(grid.lefts.size):
        low, other_low = floats(MOST), floats(MOST)
        for partner in range(grid.starts[place], grid.starts[place + 1]):
            entry = grid.partners[partner]
            low = minimum(load_float32(seconds, entry), low)
            other_low = minimum(load_float32(seconds, entry + 16), other_low)
        one, other = left + grid.lefts[place], right + grid.rights[place]
        total = low + (load_float32(source, one) + load_float32(source, other))
        other_total = other_low + (load_float32(source, one + 16) + load_float32(source, other + 16))
        better, other_better, half = total < best, other_total < other_best, ints(grid.first_payloads[place])
        best, other_best = select(better, total, best), select(other_better, other_total, other_best)
        second, other_second = select(better, bits(low), second), select(other_better, bits(other_low), other_second)
        first, other_first = select(better, half, first), select(other_better, half, other_first)
    mark, none = ints(255), ints(0)
    payload, other_payload = first | (second & mark), other_first | (other_second & mark)
    usual = ints(grid.usual)  # where costs are too large to be compared
    return best, other_best, select(payload < none, usual, payload), select(other_payload < none, usual, other_payload)


@compiled
def _assign_runs(grid: Grid, scratch: Scratch, run: int, inverse: Any, shift: Any, other_shift: Any) -> tuple[Any, Any, Any, Any]:
    """:func:`nearest_points` of moved levels with all that they cost: importance * shift * (shift - 2 m / step) more."""
    one, other, payload, other_payload = nearest_points(grid, scratch, run, inverse, shift, other_shift)
    tilt, other_tilt = load_float32(scratch.tilts, run * 16) * inverse, load_float32(scratch.tilts, run * 16 + 16) * inverse
    one = one + (floats(scratch.shares[run]) - shift * tilt)
    other = other + (floats(scratch.shares[run + 1]) - other_shift * other_tilt)
    return one, other, payload, other_payload


@compiled
def assign_group(grid: Grid, scratch: Scratch, group: int, inverse: Any, payloads: Any, exact: bool) -> Any:
    """Nearest points of a group, left in ``payloads``; their cost, in units of the squared step.

    exact: compare both directions in which levels may be moved; else take that of ``scratch.shifts``.
    """
    first, last = group * grid.group // grid.length, (group + 1) * grid.group // grid.length
    total, still, up, down = floats(0.0), floats(0.0), floats(1.0), floats(-1.0)
    if grid.shifted == 0:
        for run in range(first, last, 2):
            one, other, payload, other_payload = nearest_points(grid, scratch, run, inverse, still, still)
            store(payloads, run * 16, payload)
            store(payloads, run * 16 + 16, other_payload)
            total = total + (one + other)
        return total
    if not exact:
        for run in range(first, last, 2):
            shift, other_shift = load_float32(scratch.shifts, run * 16), load_float32(scratch.shifts, run * 16 + 16)
            one, other, payload, other_payload = _assign_runs(grid, scratch, run, inverse, shift, other_shift)
            store(payloads, run * 16, payload)
            store(payloads, run * 16 + 16, other_payload)
            total = total + (one + other)
        return total
    second_total, apart = floats(0.0), grid.shifted == grid.length
    for run in range(first, last, 2):
        one, other, payload, other_payload = _assign_runs(grid, scratch, run, inverse, up, up)
        low, other_low, second, other_second = _assign_runs(grid, scratch, run, inverse, down, down)
        if apart:  # each run for itself
            payload, other_payload = select(low < one, second, payload), select(other_low < other, other_second, other_payload)
            one, other = minimum(low, one), minimum(other_low, other)
        store(payloads, run * 16, payload)
        store(payloads, run * 16 + 16, other_payload)
        store(scratch.other, run * 16, second)
        store(scratch.other, run * 16 + 16, other_second)
        total, second_total = total + (one + other), second_total + (low + other_low)
    if apart:
        return total
    copy_payloads(grid, group, second_total < total, scratch.other, payloads)
    return minimum(second_total, total)


@compiled
def choose_shifts(grid: Grid, scratch: Scratch, group: int, inverse: Any, importance: Any, first_input: int) -> None:
    """Guess which way levels are best moved: as if every combination of levels were allowed."""
    first, last = group * grid.group, (group + 1) * grid.group
    for start in range(first, last, grid.shifted):
        difference = floats(0.0)
        for k in range(start, start + grid.shifted):
            value = load_float32(scratch.magnitudes, k * 16) * inverse
            magnitude = from_bits(bits(value) & ints(0x7FFFFFFF))
            bend = minimum(maximum(fused(magnitude, floats(8.0), floats(-48.0)), floats(0.0)), floats(32.0))
            bend = from_bits(bits(bend) | (bits(value) & ints(-(2**31))))
            difference = fused(fused(value, floats(-2.0), bend), floats(importance[first_input + k]), difference)
        shift = select(difference > floats(0.0), floats(-1.0), floats(1.0))
        for run in range(start // grid.length, (start + grid.shifted) // grid.length):
            store(scratch.shifts, run * 16, shift)


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
    if grid.shifted:
        level = level + floats(1.0) - floats((payload >> ints(SHIFT_BIT - 1)) & ints(2))
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
