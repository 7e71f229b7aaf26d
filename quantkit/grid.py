"""QuantizedTensor: codes and scales of one weight matrix, free of any file layout.

A method returns one, a format encodes it, a decoder gives it back, and ``dequantize`` says what it means.  The functions here
are the plain torch statement of every number family: the oracle for the fused kernels, and the decoder used by verification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.scheme import Scheme

INT_RANGE = {"int4": (-8, 7), "int8": (-128, 127)}
FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one weight ``[out, in]``.

    codes: ``[out, in]``; int8 for int4 and int8 (values in range, one per byte), float8_e4m3fn for fp8, uint8 for fp4 (E2M1 code
        0..15, sign in bit 3, one per byte).
    scale: ``scheme.scale_shape``; bfloat16, or float8_e4m3fn (nvfp4), or uint8 exponent + 127 (mxfp4).
    zero_point: int8, shape of scale, only when the scheme is not symmetric.
    global_scale: float32 ``[1]``, a divisor, only when the scheme has one.
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class QuantizationStatistics:
    """What quantizing one matrix did to it; goes to the ledger.

    squared_error: sum of (weight - stored value)^2.  squared_weight: sum of weight^2.  clipped: number of weights beyond the
    largest stored value of their scale.  scale_minimum, scale_maximum: over effective scales (global scale applied).
    """

    squared_error: float
    squared_weight: float
    clipped: int
    scale_minimum: float
    scale_maximum: float

    @property
    def relative_error(self) -> float:
        """Relative L2 error; 0 for an all-zero matrix."""
        return (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0
