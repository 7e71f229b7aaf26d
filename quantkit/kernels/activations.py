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

import torch

from quantkit.grid import FP8_MAX, HALF_RANGE, INT_RANGE, QuantizedTensor
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
