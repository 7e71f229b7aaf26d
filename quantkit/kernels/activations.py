"""Inputs of a weight as clients round them, for schemes that quantize activations as well.

compressed-tensors, which transformers calls and whose arithmetic vLLM and SGLang share, divides by a scale in float32, rounds to
FP8 or to whole numbers, and multiplies again.  The scale is

    fp8-channel, int8-channel   of each token: its largest magnitude / 448, or / 127.5
    fp8-block                   of each 128 neighbouring inputs of a token: the same
    fp8-tensor                  stored: ``input_scale`` of the weight

A token is a row here.  (compressed-tensors takes one scale for *all* rows of a two-dimensional input, which is what transformers
gives it inside a mixture of experts, so that a token's result depends on what else is in its batch.  Serving engines do not, and a
measure of an artifact must not.)  A scale that would be 0 is float32's epsilon, and zero has no sign afterwards: the library adds a
zero point of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantkit.grid import FP8_MAX, HALF_RANGE, INT_RANGE, QuantizedTensor
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float32, store
from quantkit.kernels.numbers import round_small
from quantkit.kernels.simd import bits, floats, from_bits, ints, largest_lane, maximum, minimum, nearest
from quantkit.kernels.weights import Weight
from quantkit.scheme import BLOCK_SIZE, Scheme

EPSILON = 2.0**-23  # the scale of a token of zeros


def rounds_inputs(weight: Weight) -> bool:
    """Whether clients quantize what is multiplied with this weight."""
    return isinstance(weight, QuantizedTensor) and (weight.scheme.dynamic_activations or weight.scheme.static_activations)


def same_inputs(one: Weight, other: Weight) -> bool:
    """Whether both weights round their inputs to the same numbers, so that rounding once serves both."""
    if not rounds_inputs(one) or not rounds_inputs(other):
        return rounds_inputs(one) == rounds_inputs(other)
    assert isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor)
    if one.scheme != other.scheme or one.scheme.dynamic_activations:
        return one.scheme == other.scheme
    assert one.input_scale is not None and other.input_scale is not None
    return torch.equal(one.input_scale, other.input_scale)


def rounded_inputs(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x [tokens, in]`` as the weight's client rounds it, ``x`` itself if it does not; computed in float32, dtype as of ``x``."""
    if not rounds_inputs(weight) or not x.numel():
        return x
    assert isinstance(weight, QuantizedTensor)
    scheme, values = weight.scheme, x.to(torch.float32).contiguous()
    if scheme.static_activations:
        assert weight.input_scale is not None
        result = _rounded(values, weight.input_scale.to(values), scheme)
    elif scheme.granularity == "block":
        groups = values.view(*values.shape[:-1], -1, BLOCK_SIZE)
        result = _rounded(groups, _scale(groups, scheme), scheme, zero_point=True).flatten(-2)
    else:
        result = _rounded(values, _scale(values, scheme), scheme, zero_point=True)
    return result.to(x.dtype)


def round_in_place(x: torch.Tensor, weight: Weight) -> None:
    """``x``, contiguous float32 ``[tokens, in]`` on the CPU, to ``rounded_inputs(x, weight)``, the same bits of finite numbers."""
    if not rounds_inputs(weight) or not x.numel():
        return
    assert isinstance(weight, QuantizedTensor)
    scheme, stored = weight.scheme, 0.0
    if scheme.static_activations:
        assert weight.input_scale is not None
        stored = float(weight.input_scale)
    low, high = (-FP8_MAX, FP8_MAX) if scheme.number == "fp8" else INT_RANGE[scheme.number]
    width = BLOCK_SIZE if scheme.granularity == "block" else x.shape[1]
    _round_rows(x.numpy(), width, stored, scheme.number == "fp8", HALF_RANGE[scheme.number], low, high)


def _scale(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What a code is worth, one for each last dimension."""
    scale = values.abs().amax(-1, keepdim=True) / HALF_RANGE[scheme.number]
    return torch.where(scale == 0, EPSILON, scale)


def _rounded(values: torch.Tensor, scale: torch.Tensor, scheme: Scheme, *, zero_point: bool = False) -> torch.Tensor:
    """The nearest stored multiples of the scale."""
    steps = values / scale
    if zero_point:
        steps += 0.0  # -0 becomes 0
    if scheme.number == "fp8":
        steps = steps.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    else:
        steps = steps.clamp_(*INT_RANGE[scheme.number]).round_()
    return steps.mul_(scale)


# ---------------------------------------------------------------------------------------------------------------- kernels


@compiled
def _nearest_step(value: Any, scale: Any, small: bool, zero: Any, low: Any, high: Any) -> Any:
    steps = minimum(maximum(value / scale + zero, low), high)
    if small:
        magnitude, sign = bits(steps) & ints(0x7FFFFFFF), bits(steps) & ints(-0x80000000)
        _, rounded = round_small(from_bits(magnitude), 3, 2.0**-6)
        return from_bits(bits(rounded) | sign) * scale
    return nearest(steps) * scale


@kernel
def _round_rows(values: Any, width: int, stored: float, small: bool, half_range: float, lowest: float, highest: float) -> None:
    """stored: the scale, 0 where each run of ``width`` has its own.  small: FP8, not whole numbers."""
    low, high, zero = floats(lowest), floats(highest), floats(-0.0 if stored else 0.0)
    whole, tail = width // 16 * 16, np.zeros(16, np.float32)
    for token in range(values.shape[0]):
        for run in range(0, values.shape[1], width):
            row = values[token, run : run + width]
            tail[:] = 0.0
            for index in range(whole, width):
                tail[index - whole] = row[index]
            scale = np.float32(stored)
            if not stored:
                largest = bits(load_float32(tail, 0)) & ints(0x7FFFFFFF)
                for index in range(0, whole, 16):
                    largest = maximum(largest, bits(load_float32(row, index)) & ints(0x7FFFFFFF))
                store(tail, 0, from_bits(ints(largest_lane(largest))))
                scale = tail[0] / np.float32(half_range)
                if scale == 0.0:
                    scale = np.float32(EPSILON)
                for index in range(whole, width):
                    tail[index - whole] = row[index]
            for index in range(0, whole, 16):
                store(row, index, _nearest_step(load_float32(row, index), floats(scale), small, zero, low, high))
            if whole < width:
                store(tail, 0, _nearest_step(load_float32(tail, 0), floats(scale), small, zero, low, high))
                for index in range(whole, width):
                    row[index] = tail[index - whole]
