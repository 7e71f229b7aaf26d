"""The exponential on vectors of 16, to about one unit in the last place, the same on every CPU.

exp(x) = 2^n exp(r) with n whole and \\|r\\| at most half of log 2; the polynomial for exp(r) is that of the Cephes library.
"""

from __future__ import annotations

from typing import Any

from quantkit.kernels.jit import compiled
from quantkit.kernels.simd import bits, floats, from_bits, fused, ints, maximum, minimum, nearest, select

LOWEST, HIGHEST = -86.6, 88.0  # 2.5e-38, below which the result is 0, and 1.6e38, which it does not exceed

_LOG2_E = 1.44269504088896341
_LOG_2_HIGH, _LOG_2_LOW = 0.693359375, -2.12194440e-4


@compiled
def exponential(value: Any) -> Any:
    """exp of each float; 0 below ``LOWEST``, that of ``HIGHEST`` above it."""
    inside = minimum(maximum(value, floats(LOWEST)), floats(HIGHEST))
    power = nearest(inside * floats(_LOG2_E))
    rest = fused(power, floats(-_LOG_2_LOW), fused(power, floats(-_LOG_2_HIGH), inside))
    result = fused(floats(1.9875691500e-4), rest, floats(1.3981999507e-3))
    result = fused(result, rest, floats(8.3334519073e-3))
    result = fused(result, rest, floats(4.1665795894e-2))
    result = fused(result, rest, floats(1.6666665459e-1))
    result = fused(result, rest, floats(5.0000001201e-1))
    result = fused(result, rest * rest, rest) + floats(1.0)
    result = from_bits(bits(result) + (ints(power) << ints(23)))
    return select(value < floats(LOWEST), floats(0.0), result)
