"""QuantizedTensor: codes and scales of one weight matrix, free of any file layout.

A method returns one, a format encodes it, a decoder gives it back, and ``dequantize`` says what it means.  The functions here
are the plain torch statement of every number family: ``fit`` (the scale that just reaches the largest weight), ``snap`` (the
nearest codes for given scales), ``dequantize`` and ``measure``.  They are the oracle for the fused kernels, which must give the
same bits, and the decoder used by verification.

Rules, the same as compressed-tensors uses, computed in float32:

* integers     scale = absmax / 7.5 for int4, / 127.5 for int8 and so on (half the number of codes less a half)
* asymmetric   scale = (max - min) / (number of codes - 1) with zero inside the range; zero point = lowest code - min / scale,
               before that scale is rounded
* fp8          scale = absmax / 448
* mxfp4        scale = 2^e with e from absmax rounded to the next power of two from mantissa 1.75 on, less 2
* activations  scale = peak / 448, rounded up, so that the largest value that was seen is not clipped
* nvfp4        global scale = 448 * 6 / (absmax of all matrices that share it); scale = fp8(global scale * absmax / 6)

Scales are rounded to their stored dtype before codes are computed.  They are positive, also for groups of zeros and for weights so
small that the library's scale rounds to 0, and small enough that no code stands for an infinite value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit import codebooks
from quantkit.errors import WeightError
from quantkit.scheme import BLOCK_SIZE, INTEGERS, Scheme

INTEGER_BITS: dict[str, int] = {number: int(number.removeprefix("int")) for number in INTEGERS}
INT_RANGE = {number: (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for number, bits in INTEGER_BITS.items()}
FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# Half the distance between the outermost codes: absmax is divided by it.
HALF_RANGE = {**{number: (highest - lowest) / 2 for number, (lowest, highest) in INT_RANGE.items()}, "fp8": FP8_MAX, "fp4": FP4_MAX}
# Smallest and largest stored scale.  The smallest is the least positive BF16 number; the largest keeps the outermost code finite,
# which is the lowest one, or with a zero point the number of codes less one.
BF16_SCALE_MINIMUM = 2.0**-133
BF16_SCALE_MAXIMUM = {
    **{(number, True): 255 * 2.0 ** (121 - bits) for number, bits in INTEGER_BITS.items()},
    ("int2", False): 170 * 2.0**119,
    ("int3", False): 145 * 2.0**118,
    ("int4", False): 136 * 2.0**117,
    ("fp8", True): 145 * 2.0**112,
}
E8M0_BIAS = 127
E8M0_CODES = (0, E8M0_BIAS + 125)
FP8_SCALE_CODES = (1, 126)  # 2^-9 .. 448, as bits of a float8_e4m3fn
GLOBAL_SCALE_MAXIMUM = 2.0**126
FLOAT32_MAXIMUM = float(torch.finfo(torch.float32).max)
# Codes of the scale of a group of zeros: 2^-7, 2^-3 and 2^-7.  Any number would do; a denormal one would be slow to divide by.
SCALE_OF_ZEROS = {"bf16": 0x3C00, "fp8": 0x20, "e8m0": E8M0_BIAS - 7}

FLOATING = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # llama.cpp's types without scales


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one weight ``[out, in]``.

    codes: ``[out, in]``; int8 for integers (values in range, one per byte), float8_e4m3fn for fp8, uint8 for fp4 (E2M1 code
        0..15, sign in bit 3, one per byte).
    scale: ``scheme.scale_shape``; bfloat16, or float8_e4m3fn (nvfp4), or uint8 exponent + 127 (mxfp4).
    zero_point: int8, shape of scale, only when the scheme is not symmetric.
    global_scale: float32 ``[1]``, a divisor, only when the scheme has one.
    input_scale: bfloat16 ``[1]``, what one step of an activation is worth, only when the scheme has static activations.

    Of llama.cpp's types (:mod:`quantkit.ggml`, which has the formula): codes: int8, as stored, so not yet without offset; for
    floating types the numbers themselves.  scale: float16 ``[out, in / block]``, uint8 exponent for MXFP4.  group_scale: int8
    ``[out, in / group]``.  minimum: float16, shape of scale.  group_minimum: int8, shape of group_scale.
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    group_scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    group_minimum: torch.Tensor | None = None


@dataclass(frozen=True)
class QuantizationStatistics:
    """What quantizing one matrix did to it; goes to the ledger.

    squared_error: sum of (weight - stored value)^2.  squared_weight: sum of weight^2.  clipped: number of weights beyond the
    largest stored value of their scale.  scale_minimum, scale_maximum: over effective scales (global scale applied). output_error:
    relative L2 error of the outputs for the inputs seen in calibration; against what they were asked for where that is more than
    the weights give, and then with the damping's own share, so at most that.  damping: what a method added to the diagonal of the
    Hessian, relative to its mean.  Both are 0 where calibration played no part.
    """

    squared_error: float
    squared_weight: float
    clipped: int
    scale_minimum: float
    scale_maximum: float
    output_error: float = 0.0
    damping: float = 0.0

    @property
    def relative_error(self) -> float:
        """Relative L2 error; 0 for an all-zero matrix."""
        return (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0


def bf16_scale_limits(scheme: Scheme) -> tuple[float, float]:
    """Smallest and largest stored scale of a scheme with BF16 scales."""
    return BF16_SCALE_MINIMUM, BF16_SCALE_MAXIMUM[scheme.number, scheme.symmetric]


def effective_scale(scheme: Scheme, scale: torch.Tensor, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """What one code step is worth: float32, shape of ``scale``."""
    if scheme.scale_number == "e8m0":
        return torch.ldexp(torch.ones(scale.shape), scale.to(torch.int32) - E8M0_BIAS)
    value = scale.to(torch.float32)
    return value if global_scale is None else value / global_scale


def dequantize(quantized: QuantizedTensor) -> torch.Tensor:
    """The stored values, float32 ``[out, in]``."""
    scheme, codes = quantized.scheme, quantized.codes
    if scheme.number == "ggml":
        return dequantize_blocks(quantized)
    if scheme.number == "fp4":
        magnitude = torch.tensor(FP4_VALUES, dtype=torch.float32)
        values = torch.cat([magnitude, -magnitude])[codes.to(torch.int32)]
    else:
        values = codes.to(torch.float32)
    if quantized.zero_point is not None:
        values -= _spread(scheme, quantized.zero_point, codes.shape)
    values *= _spread(scheme, effective_scale(scheme, quantized.scale, quantized.global_scale), codes.shape)
    return values


def dequantize_blocks(quantized: QuantizedTensor) -> torch.Tensor:
    """The stored values of one of llama.cpp's types, float32 ``[out, in]``, with its own order of operations."""
    kind, codes = quantized.scheme.block_type, quantized.codes
    if kind.floating:
        return codes.to(torch.float32)
    if kind.codebook:
        assert quantized.group_scale is not None
        return codebooks.dequantize_codebook(kind.name, codes, quantized.scale, quantized.group_scale)
    if kind.levels is not None:
        level = torch.tensor(kind.levels, dtype=torch.float32)[codes.to(torch.int64)]
    else:
        level = codes.to(torch.float32) - kind.offset
    step, minimum = block_steps(quantized)
    columns = codes.shape[1]
    values = step.repeat_interleave(columns // step.shape[1], 1) * level
    return values if minimum is None else values - minimum.repeat_interleave(columns // minimum.shape[1], 1)


def level_steps(quantized: QuantizedTensor) -> torch.Tensor:
    """What one level is worth, float32 ``[out, groups]``; per block in types without groups."""
    kind = quantized.scheme.block_type
    if quantized.scheme.scale_number == "e8m0":  # levels are doubled, so half the power of two
        return torch.ldexp(torch.ones(quantized.scale.shape), quantized.scale.to(torch.int32) - E8M0_BIAS - 1)
    step = quantized.scale.to(torch.float32)
    if quantized.group_scale is None:
        return step
    return step.repeat_interleave(kind.block // kind.group, 1) * quantized.group_scale.to(torch.float32)


def block_steps(quantized: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``level_steps``, and what is subtracted from every value, of the same shape."""
    kind, minimum = quantized.scheme.block_type, None
    if quantized.minimum is not None:
        minimum = quantized.minimum.to(torch.float32)
        if quantized.group_minimum is None:
            minimum = -minimum  # these types add it
        else:
            minimum = minimum.repeat_interleave(kind.block // kind.group, 1) * quantized.group_minimum.to(torch.float32)
    return level_steps(quantized), minimum


def fit_global_scale(largest: float) -> torch.Tensor:
    """The nvfp4 divisor float32 ``[1]`` for matrices whose largest magnitude that is: both number ranges are used in full."""
    if not largest:
        return torch.ones(1)
    return (FP8_MAX * FP4_MAX / torch.tensor([largest])).clamp(max=GLOBAL_SCALE_MAXIMUM)


def cover_peak(peak: float) -> torch.Tensor:
    """The least BF16 scale ``[1]`` with which FP8 numbers reach ``peak``, finite and not negative: of activations, keys or values.

    Where nothing but zeros was seen it is ``SCALE_OF_ZEROS``: positive, and as good as any other.  Raises WeightError when what was
    seen is not a finite number.
    """
    if not 0 <= peak <= FLOAT32_MAXIMUM:
        raise WeightError(f"the largest magnitude seen in calibration is {peak}, not a finite number; the source is damaged")
    if not peak:
        return torch.tensor([SCALE_OF_ZEROS["bf16"]], dtype=torch.int16).view(torch.bfloat16)
    code = torch.tensor([peak / FP8_MAX], dtype=torch.float32).view(torch.int32) >> 16  # the scale rounded down
    scale = code.clamp(min=1).to(torch.int16).view(torch.bfloat16)
    return scale if float(scale) * FP8_MAX >= peak else (scale.view(torch.int16) + 1).view(torch.bfloat16)


def fit(weight: torch.Tensor, scheme: Scheme, global_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale and zero point that just reach the largest weight of each group (no clip search).

    weight: finite, ``[out, in]``, any floating dtype; for a scale per tensor all matrices that share it, one below the other.
    Returns (scale, zero point or None) as ``QuantizedTensor`` holds them.
    """
    grouped = _grouped(scheme, weight.to(torch.float32))
    zeros = SCALE_OF_ZEROS[scheme.scale_number]
    if not scheme.symmetric:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        lowest, highest = INT_RANGE[scheme.number]
        value = (high / 2 - low / 2) / HALF_RANGE[scheme.number]
        scale = value.to(torch.bfloat16).clamp(*bf16_scale_limits(scheme))
        scale = torch.where(value > 0, scale.view(torch.int16), zeros).view(torch.bfloat16)
        zero_point = torch.where(value > 0, (lowest - low / value).round().clamp(lowest, highest), lowest)
        return scale, zero_point.to(torch.int8)
    largest = grouped.abs().amax(-1)
    if scheme.scale_number == "e8m0":
        # Adding a quarter of the mantissa's range carries into the exponent from mantissa 1.75 on.
        exponent = ((largest.view(torch.int32) + (1 << 21)) >> 23) - 2
        return torch.where(largest > 0, exponent.clamp(*E8M0_CODES), zeros).to(torch.uint8), None
    value = largest / HALF_RANGE[scheme.number]
    if scheme.scale_number == "fp8":
        assert global_scale is not None
        codes = (global_scale * value).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = torch.where(largest > 0, codes.clamp(*FP8_SCALE_CODES), zeros)
        return codes.to(torch.uint8).view(torch.float8_e4m3fn), None
    scale = value.to(torch.bfloat16).clamp(*bf16_scale_limits(scheme))
    return torch.where(largest > 0, scale.view(torch.int16), zeros).view(torch.bfloat16), None


def snap(
    weight: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """The nearest code of every weight (ties to even) for given stored scales."""
    steps = _steps(weight, scheme, scale, zero_point, global_scale)
    if scheme.number == "fp8":
        codes = steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    elif scheme.number == "fp4":
        # Of two equally near values the one with the even code wins: midpoints 0, 2, 4, 6 belong to the value below.
        magnitude = steps.abs()
        code = torch.zeros(steps.shape, dtype=torch.uint8)
        for index, midpoint in enumerate(FP4_MIDPOINTS):
            code += (magnitude > midpoint) if index % 2 == 0 else (magnitude >= midpoint)
        codes = code | (torch.signbit(weight).to(torch.uint8) << 3)
    else:
        codes = steps.clamp(*INT_RANGE[scheme.number]).round().to(torch.int8)
    return QuantizedTensor(scheme, codes, scale, zero_point, global_scale)


def measure(weight: torch.Tensor, quantized: QuantizedTensor) -> QuantizationStatistics:
    """Error, clipping and scale range of a quantized weight against its source, in float64."""
    scheme = quantized.scheme
    steps = _steps(weight, scheme, quantized.scale, quantized.zero_point, quantized.global_scale)
    lowest, highest = INT_RANGE.get(scheme.number, (-HALF_RANGE[scheme.number], HALF_RANGE[scheme.number]))
    source = weight.to(torch.float64)
    scale = effective_scale(scheme, quantized.scale, quantized.global_scale)
    return QuantizationStatistics(
        squared_error=float((source - dequantize(quantized)).square().sum()),
        squared_weight=float(source.square().sum()),
        clipped=int(((steps > highest) | (steps < lowest)).sum()),
        scale_minimum=float(scale.min()),
        scale_maximum=float(scale.max()),
    )


def _steps(
    weight: torch.Tensor,
    scheme: Scheme,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    global_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Weights in units of their scale, zero point added, not rounded: float32 ``[out, in]``."""
    steps = weight.to(torch.float32) / _spread(scheme, effective_scale(scheme, scale, global_scale), weight.shape)
    if zero_point is not None:
        steps += _spread(scheme, zero_point.to(torch.float32), weight.shape)
    return steps


def _grouped(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """View of ``[out, in]`` as ``[*scale_shape, weights per scale]``."""
    rows, columns = scheme.scale_shape(*weight.shape)
    if scheme.granularity == "block":
        blocks = weight.reshape(rows, BLOCK_SIZE, columns, BLOCK_SIZE).transpose(1, 2)
        return blocks.reshape(rows, columns, BLOCK_SIZE * BLOCK_SIZE)
    return weight.reshape(rows, columns, -1)


def _spread(scheme: Scheme, per_scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeat one value per scale over the weights ``[out, in]`` that share it."""
    columns = per_scale.shape[1]
    if scheme.granularity == "block":
        per_scale = per_scale.repeat_interleave(BLOCK_SIZE, 0)
    return per_scale.repeat_interleave(shape[1] // columns, 1)
