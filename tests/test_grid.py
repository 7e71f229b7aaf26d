"""The torch oracle against compressed-tensors and against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from library_rtn import library_arguments, library_quantize

from quantkit import grid
from quantkit.grid import QuantizedTensor
from quantkit.scheme import KEEP, Scheme, parse_scheme, scheme_names

SCHEMES = [scheme for name in scheme_names() if name != KEEP and (scheme := parse_scheme(name))]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    global_scale = grid.fit_global_scale(float(weight.abs().max())) if scheme.global_scale else None
    scale, zero_point = grid.fit(weight, scheme, global_scale)
    return grid.snap(weight, scheme, scale, zero_point, global_scale)


def equal_bits(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@by_name
def test_equals_the_library_bit_for_bit(scheme: Scheme) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(128, 256) * 0.02, torch.distributions.StudentT(3.0).sample((256, 384))):
        weight = weight.bfloat16().float()
        ours, library = round_to_nearest(weight, scheme), library_quantize(weight, scheme)
        assert equal_bits(ours.scale, library.scale)
        assert equal_bits(ours.zero_point, library.zero_point)
        assert equal_bits(ours.global_scale, library.global_scale)
        assert equal_bits(ours.codes, library.codes)


@by_name
def test_dequantize_means_what_the_library_means(scheme: Scheme) -> None:
    torch.manual_seed(1)
    quantized = round_to_nearest(torch.randn(128, 256), scheme)
    if scheme.number == "fp4":
        table = torch.tensor([*grid.FP4_VALUES, *(-value for value in grid.FP4_VALUES)])
        values = table[quantized.codes.long()]
    else:
        values = quantized.codes.float()
    scale = 2.0 ** (quantized.scale.float() - 127) if scheme.scale_number == "e8m0" else quantized.scale.float()
    zero_point = None if quantized.zero_point is None else quantized.zero_point.float()
    expected = library_dequantize(values, scale, zero_point, library_arguments(scheme), global_scale=quantized.global_scale)
    assert torch.equal(grid.dequantize(quantized), expected)


def test_every_fp8_code_and_every_fp4_code() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).reshape(1, -1)  # all but NaN
    eight = QuantizedTensor(parse_scheme("fp8-channel-dynamic"), codes, torch.tensor([[0.5]], dtype=torch.bfloat16))
    assert torch.equal(grid.dequantize(eight), codes.float() * 0.5)
    codes = torch.arange(16).to(torch.uint8).repeat(2).reshape(1, 32)
    four = QuantizedTensor(parse_scheme("mxfp4"), codes, torch.tensor([[128]], dtype=torch.uint8))
    magnitude = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert grid.dequantize(four)[0, :16].tolist() == magnitude + [-value for value in magnitude]


def test_every_e8m0_scale_is_a_power_of_two() -> None:
    codes = torch.arange(grid.E8M0_CODES[0], grid.E8M0_CODES[1] + 1).to(torch.uint8)
    scale = grid.effective_scale(parse_scheme("mxfp4"), codes)
    assert scale.double().tolist() == [2.0 ** (code - 127) for code in codes.tolist()]


def test_fp4_ties_go_to_the_even_code() -> None:
    scheme = parse_scheme("mxfp4")
    midpoints = torch.tensor(grid.FP4_MIDPOINTS)
    values = torch.cat([midpoints, midpoints.nextafter(torch.tensor(9.0)), midpoints.nextafter(torch.tensor(0.0))])
    weight = torch.zeros(1, 64)
    weight[0, :21], weight[0, 32:53] = values, -values
    codes = grid.snap(weight, scheme, torch.tensor([[127, 127]], dtype=torch.uint8)).codes
    expected = [0, 2, 2, 4, 4, 6, 6, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]
    assert codes[0, :21].tolist() == expected
    assert codes[0, 32:53].tolist() == [code + 8 for code in expected]


@by_name
def test_zeros(scheme: Scheme) -> None:
    weight = torch.zeros(128, 256)
    quantized = round_to_nearest(weight, scheme)
    assert torch.equal(grid.dequantize(quantized), weight)
    assert float(grid.effective_scale(scheme, quantized.scale, quantized.global_scale).min()) > 2.0**-126
    assert grid.measure(weight, quantized).relative_error == 0.0


@by_name
@pytest.mark.parametrize("magnitude", [3.3895e38, 1e38, 1e-37, 1e-39, 1e-40, 1.4e-45])
def test_extreme_weights_have_finite_scales_and_values(scheme: Scheme, magnitude: float) -> None:
    torch.manual_seed(2)
    weight = (torch.rand(128, 256) * 2 - 1).clamp(-1, 1) * magnitude
    weight[0, 0], weight[0, 1] = magnitude, -magnitude
    quantized = round_to_nearest(weight, scheme)
    scale = grid.effective_scale(scheme, quantized.scale, quantized.global_scale)
    assert bool(((scale > 0) & torch.isfinite(scale)).all())
    values = grid.dequantize(quantized)
    assert bool(torch.isfinite(values.bfloat16()).all())
    # The worst is a number too small to be represented: its error is its own size.
    assert float((values.double() - weight.double()).abs().max()) <= 1.01 * magnitude


@by_name
def test_measure_is_the_plain_definition(scheme: Scheme) -> None:
    torch.manual_seed(3)
    weight = torch.randn(128, 256).bfloat16()
    quantized = round_to_nearest(weight, scheme)
    values = grid.dequantize(quantized).double()
    statistics = grid.measure(weight, quantized)
    assert statistics.squared_error == pytest.approx(float((weight.double() - values).square().sum()))
    assert statistics.relative_error == pytest.approx(float((weight.double() - values).norm() / weight.double().norm()))
    scale = grid.effective_scale(scheme, quantized.scale, quantized.global_scale)
    assert (statistics.scale_minimum, statistics.scale_maximum) == (float(scale.min()), float(scale.max()))
    group = weight.numel() // scale.numel() if scheme.granularity != "block" else 128
    spread = scale.double().repeat_interleave(min(group, weight.shape[1]), 1)
    lowest, highest = grid.INT_RANGE.get(scheme.number, (-grid.HALF_RANGE[scheme.number], grid.HALF_RANGE[scheme.number]))
    shift = 0 if quantized.zero_point is None else quantized.zero_point.double().repeat_interleave(group, 1)
    clipped = (weight.double() > (highest - shift) * spread) | (weight.double() < (lowest - shift) * spread)
    assert statistics.clipped == int(clipped.sum())
