"""Number families on vectors of 16 rows: how a scale is encoded, how weights are rounded, what that costs.

A tile is float32 ``[lane vectors, TILE_INPUTS, 16]``: 16 neighbouring output rows side by side, input after input.  The functions
here look at ``count`` consecutive inputs of one lane vector, starting at element ``start`` of the tile, so every lane holds one
row's group.  Two families cover all schemes: whole numbers with a zero point (int2 to int8), and small floats (fp8 E4M3, fp4 E2M1),
both described by ``Numbers``.

Final codes come from a true division, as in ``grid.snap``, and equal it bit for bit.  The search, which only ranks candidates,
multiplies by a reciprocal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from quantkit.kernels.jit import compiled
from quantkit.kernels.memory import (
    load_float32,
    store,
)
from quantkit.kernels.simd import (
    bits,
    floats,
    from_bits,
    fused,
    ints,
    maximum,
    minimum,
    nearest,
    select,
)

SCALE_BF16, SCALE_FP8, SCALE_E8M0 = 0, 1, 2
SMALLEST_SEARCHED = 2.0**-120  # the reciprocal of a smaller scale, or of its neighbours, may be infinite


class Numbers(NamedTuple):
    """One number family and its scales, as plain numbers that a kernel takes.

    whole: 1 for integers, 0 for small floats.  lowest, highest: outermost values.  half_range: absmax is divided by it.
    sign_bit, mantissa_bits, smallest_normal: of small floats.  symmetric: 0 when there is a zero point.
    scale_kind: how scale codes are read.  scale_lowest, scale_highest: allowed codes.  scale_of_zeros: code for a group of zeros.
    """

    whole: int
    lowest: float
    highest: float
    half_range: float
    sign_bit: int
    mantissa_bits: int
    smallest_normal: float
    symmetric: int
    scale_kind: int
    scale_lowest: int
    scale_highest: int
    scale_of_zeros: int


# ---------------------------------------------------------------------------------------------------------------- scales


@compiled
def encode_bfloat16(value: Any) -> Any:
    """Upper half of positive float32 numbers, rounded to nearest even."""
    raw = bits(value)
    return (raw + ints(0x7FFF) + ((raw >> ints(16)) & ints(1))) >> ints(16)


@compiled
def round_small(magnitude: Any, mantissa_bits: int, smallest_normal: float) -> tuple[Any, Any]:
    """Round non-negative floats to a small float format, ties to even: (code without sign, value).

    One step of the format is 2^-mantissa_bits of the number's own power of two, and below the normal numbers it is that of the
    smallest one.  Adding 2^23 steps rounds to whole steps and leaves their number in the low bits of the sum.
    """
    smallest = bits(floats(smallest_normal))
    power = maximum(bits(magnitude) & ints(0x7F800000), smallest)
    magic = from_bits(power + ints((23 - mantissa_bits) << 23))
    shifted = magnitude + magic
    code = bits(shifted) - bits(magic) + ((power - smallest) >> ints(23 - mantissa_bits))
    return code, shifted - magic


@compiled
def encode_scale(numbers: Numbers, value: Any) -> Any:
    """Nearest allowed scale code (BF16 bits, or FP8 bits of ``value`` with the global scale applied)."""
    if numbers.scale_kind == SCALE_FP8:
        code, _ = round_small(minimum(value, floats(448.0)), 3, 2.0**-6)
    else:
        code = encode_bfloat16(value)
    return clamp_scale(numbers, code)


@compiled
def clamp_scale(numbers: Numbers, code: Any) -> Any:
    """Keep scale codes in their allowed range."""
    return minimum(maximum(code, ints(numbers.scale_lowest)), ints(numbers.scale_highest))


@compiled
def shift_zero_point(numbers: Numbers, zero_point: Any, shift: Any) -> Any:
    """Another zero point, kept in its allowed range."""
    return minimum(maximum(zero_point + floats(shift), floats(numbers.lowest)), floats(numbers.highest))


@compiled
def decode_scale(numbers: Numbers, code: Any, global_scale: float) -> Any:
    """What one code step is worth, as float32."""
    if numbers.scale_kind == SCALE_BF16:
        return from_bits(code << ints(16))
    if numbers.scale_kind == SCALE_FP8:
        normal = from_bits((code + ints(120 << 3)) << ints(20))
        return select(code < ints(8), floats(code) * floats(2.0**-9), normal) / floats(global_scale)
    return from_bits(select(code < ints(1), ints(1 << 22), code << ints(23)))


@compiled
def fit_scale(numbers: Numbers, largest: Any, global_scale: float) -> Any:
    """Scale codes that just reach the largest magnitude of each lane."""
    if numbers.scale_kind == SCALE_E8M0:
        code = clamp_scale(numbers, ((bits(largest) + ints(1 << 21)) >> ints(23)) - ints(2))
    else:
        value = largest / floats(numbers.half_range)
        if numbers.scale_kind == SCALE_FP8:
            value = floats(global_scale) * value
        code = encode_scale(numbers, value)
    return select(largest > floats(0.0), code, ints(numbers.scale_of_zeros))


@compiled
def fit_range(numbers: Numbers, low: Any, high: Any) -> tuple[Any, Any]:
    """Scale codes and zero points (as floats) that just reach the smallest and the largest weight of each lane."""
    half = floats(0.5)
    value = (high * half - low * half) / floats(numbers.half_range)
    positive = value > floats(0.0)
    code = select(positive, encode_scale(numbers, value), ints(numbers.scale_of_zeros))
    zero_point = select(positive, nearest(floats(numbers.lowest) - low / value), floats(numbers.lowest))
    return code, minimum(maximum(zero_point, floats(numbers.lowest)), floats(numbers.highest))


# --------------------------------------------------------------------------------------------------------------- weights


@compiled
def largest_magnitude(tile: Any, start: int, count: int) -> Any:
    """Bits of the largest magnitude of each lane; they order like the numbers, with infinity and NaN on top."""
    mask = ints(0x7FFFFFFF)
    largest = ints(0)
    for row in range(count):
        largest = maximum(largest, bits(load_float32(tile, start + row * 16)) & mask)
    return largest


@compiled
def smallest_and_largest(tile: Any, start: int, count: int, low: Any, high: Any) -> tuple[Any, Any]:
    """Widen the interval [low, high] of each lane to hold its weights."""
    for row in range(count):
        weight = load_float32(tile, start + row * 16)
        low, high = minimum(weight, low), maximum(weight, high)
    return low, high


@compiled
def squared_error(numbers: Numbers, tile: Any, start: int, count: int, scale: Any, zero_point: Any) -> Any:
    """Sum of squared rounding errors of each lane, in units of the squared scale, which is above SMALLEST_SEARCHED."""
    inverse = floats(1.0) / scale
    even, odd = floats(0.0), floats(0.0)  # two sums, so that additions do not wait for each other
    if numbers.whole:
        # Adding 1.5 * 2^23 rounds to whole numbers, whose bits count up with them: they are clamped as integers.
        magic = floats(12582912.0) + zero_point
        lowest, highest = bits(floats(12582912.0 + numbers.lowest)), bits(floats(12582912.0 + numbers.highest))
        for row in range(0, count, 2):
            weight = load_float32(tile, start + row * 16)
            inside = minimum(maximum(bits(fused(weight, inverse, magic)), lowest), highest)
            error = fused(weight, inverse, magic - from_bits(inside))
            even = fused(error, error, even)
            weight = load_float32(tile, start + row * 16 + 16)
            inside = minimum(maximum(bits(fused(weight, inverse, magic)), lowest), highest)
            error = fused(weight, inverse, magic - from_bits(inside))
            odd = fused(error, error, odd)
    else:
        mask, highest = ints(0x7FFFFFFF), floats(numbers.highest)
        for row in range(0, count, 2):
            steps = from_bits(bits(load_float32(tile, start + row * 16)) & mask) * inverse
            _, value = round_small(minimum(steps, highest), numbers.mantissa_bits, numbers.smallest_normal)
            error = steps - value
            even = fused(error, error, even)
            steps = from_bits(bits(load_float32(tile, start + row * 16 + 16)) & mask) * inverse
            _, value = round_small(minimum(steps, highest), numbers.mantissa_bits, numbers.smallest_normal)
            error = steps - value
            odd = fused(error, error, odd)
    return even + odd


@compiled
def best_multiple(numbers: Numbers, tile: Any, start: int, count: int, scale: Any, zero_point: Any) -> Any:
    """The scale that fits best in the least-squares sense to the whole-number codes that ``scale`` gives."""
    inverse = floats(1.0) / scale
    lowest, highest = floats(numbers.lowest), floats(numbers.highest)
    along, square = floats(0.0), floats(0.0)
    for row in range(count):
        weight = load_float32(tile, start + row * 16) * inverse
        value = maximum(minimum(nearest(weight + zero_point), highest), lowest) - zero_point
        along, square = fused(weight, value, along), fused(value, value, square)
    return scale * (along / square)


@compiled
def round_tile(
    numbers: Numbers, tile: Any, start: int, count: int, scale: Any, zero_point: Any, words: Any, first_word: int
) -> tuple[Any, Any, Any]:
    """Final codes of ``count`` inputs, four to a 32-bit word: int32 ``words[first_word : first_word + count / 4, 16]``.

    Returns, for each lane, the sums of squared errors and of squared weights in units of the squared scale, and how many weights
    lie beyond the outermost values.
    """
    lowest, highest = floats(numbers.lowest), floats(numbers.highest)
    errors, weights, clipped = floats(0.0), floats(0.0), ints(0)
    sign_bit = numbers.sign_bit
    for row in range(0, count, 4):
        word = ints(0)
        for part in range(4):
            loaded = load_float32(tile, start + (row + part) * 16)
            weight = loaded / scale
            if numbers.whole:
                steps = weight + zero_point
                inside = maximum(minimum(steps, highest), lowest)
                value = nearest(inside)
                code = ints(value) & ints(0xFF)
            else:
                steps = from_bits(bits(weight) & ints(0x7FFFFFFF))
                inside = minimum(steps, highest)
                code, value = round_small(inside, numbers.mantissa_bits, numbers.smallest_normal)
                code = code | ((bits(loaded) >> ints(31 - sign_bit)) & ints(1 << sign_bit))
            error = steps - value
            errors, weights = fused(error, error, errors), fused(weight, weight, weights)
            clipped = clipped + ints(steps != inside)
            word = word | (code << ints(8 * part))
        store(words, (first_word + row // 4) * 16, word)
    return errors, weights, clipped
