"""FP16 numbers on vectors of 16, by integer arithmetic.

ggml's blocks hold their scales as FP16.  Processors without an instruction for the conversion would call a library for it, and some
of those round twice, so it is spelled out here and gives the same bits everywhere.  Numbers beyond the range become the largest
finite one: a stored scale is never infinite.
"""

from __future__ import annotations

from typing import Any

from quantkit.kernels.jit import compiled
from quantkit.kernels.simd import bits, floats, from_bits, ints, minimum, nearest, select

LARGEST_HALF = 65504.0
_LARGEST = 0x477FE000  # its bits as float32
_SMALLEST_NORMAL = 0x38800000  # 2**-14
_BIAS = (127 - 15) << 10  # of the exponent, once it stands where FP16 has it


@compiled
def to_half(value: Any) -> Any:
    """Bits of the nearest FP16 numbers, ties to even, at most +-65504 and also that for NaN; the sign is kept."""
    sign = (bits(value) >> ints(16)) & ints(0x8000)
    magnitude = minimum(bits(value) & ints(0x7FFFFFFF), ints(_LARGEST))
    odd = (magnitude >> ints(13)) & ints(1)
    normal = ((magnitude + ints(0xFFF) + odd) >> ints(13)) - ints(_BIAS)
    small = ints(nearest(from_bits(minimum(magnitude, ints(_SMALLEST_NORMAL))) * floats(2.0**24)))
    return sign | select(magnitude < ints(_SMALLEST_NORMAL), small, normal)


@compiled
def from_half(half: Any) -> Any:
    """FP16 bits as float32, exactly."""
    sign = (half & ints(0x8000)) << ints(16)
    magnitude = half & ints(0x7FFF)
    normal = (magnitude + ints(_BIAS)) << ints(13)
    infinite = normal + ints(_BIAS << 13)  # infinity and NaN
    small = bits(floats(magnitude) * floats(2.0**-24))
    value = select(magnitude < ints(0x400), small, select(magnitude > ints(0x7BFF), infinite, normal))
    return from_bits(value | sign)
