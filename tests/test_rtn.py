"""Round to nearest: the fused kernels against the torch oracle, against compressed-tensors, and under hostile weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_rtn import library_quantize

from quantkit import grid
from quantkit.errors import RecipeError, WeightError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.methods import METHODS
from quantkit.methods.rtn import quantize
from quantkit.scheme import KEEP, Scheme, parse_scheme, scheme_names
from quantkit.workspace import Workspace

SCHEMES = [scheme for name in scheme_names() if name != KEEP and (scheme := parse_scheme(name))]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
searching = pytest.mark.parametrize("clip_search", [False, True], ids=["fitted", "searched"])

# One row, one group, rows that fill no vector or no strip, inputs that fill no tile, and more than one strip of each order.
SHAPES = [(1, 128), (8, 256), (24, 96), (72, 384), (176, 640), (16, 1024)]


SEEN = Evidence(
    tokens=1, mean_square=torch.tensor([4.0]), peak=torch.tensor([3.0])
)  # only schemes with static activations look at it


def quantize_all(
    weights: list[torch.Tensor], scheme: Scheme, clip_search: bool, workspace: Workspace
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    return quantize(weights, scheme, clip_search=clip_search, workspace=workspace, evidence=SEEN)


def one(weight: torch.Tensor, scheme: Scheme, clip_search: bool) -> tuple[QuantizedTensor, QuantizationStatistics]:
    ((quantized, statistics),) = quantize_all([weight], scheme, clip_search, Workspace())
    return quantized, statistics


def fitted_by_oracle(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    global_scale = grid.fit_global_scale(float(weight.abs().max())) if scheme.global_scale else None
    scale, zero_point = grid.fit(weight, scheme, global_scale)
    return snapped(weight, scheme, scale, zero_point, global_scale)


def snapped(weight: torch.Tensor, scheme: Scheme, *scales: torch.Tensor | None) -> QuantizedTensor:
    quantized = grid.snap(weight, scheme, *scales)
    input_scale = torch.tensor([3.0 / 448]).bfloat16() + 2.0**-15 if scheme.static_activations else None  # 3 / 448 is rounded down
    return replace(quantized, input_scale=input_scale)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert left.scheme == right.scheme
    for name in ("scale", "zero_point", "global_scale", "input_scale", "codes"):
        mine, other = getattr(left, name), getattr(right, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
            assert mine.is_contiguous(), name
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name


def weights_of(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(shape) * 0.02
    if kind == "laplace":
        return torch.distributions.Laplace(0.0, 0.02).sample(shape)
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


@by_name
@searching
@pytest.mark.parametrize("order", ["row-major", "input-major"])
def test_kernels_equal_the_oracle(scheme: Scheme, clip_search: bool, order: str) -> None:
    shapes = [(128, 256), (384, 128)] if scheme.granularity == "block" else SHAPES
    for seed, shape in enumerate(shapes):
        if scheme.misfit(*shape):
            continue
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = weights_of("student", shape, seed).to(dtype)
            if order == "input-major":  # half of a fused tensor, as gate and up are
                weight = torch.cat([weight.t(), weight.t()], 1)[:, shape[0] :].t()
            quantized, statistics = one(weight, scheme, clip_search)
            fitted = fitted_by_oracle(weight, scheme)
            if clip_search:
                scales = quantized.scale, quantized.zero_point, quantized.global_scale
                assert_same(quantized, snapped(weight, scheme, *scales))
            else:
                assert_same(quantized, fitted)
            expected = grid.measure(weight, quantized)
            assert statistics.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
            assert statistics.squared_weight == pytest.approx(expected.squared_weight, rel=1e-5)
            assert statistics.clipped == expected.clipped
            assert statistics.scale_minimum == expected.scale_minimum
            assert statistics.scale_maximum == expected.scale_maximum
            assert expected.squared_error <= grid.measure(weight, fitted).squared_error * (1 + 1e-6)


@by_name
@pytest.mark.parametrize("kind", ["gaussian", "student", "laplace"])
def test_error_is_never_above_the_librarys(scheme: Scheme, kind: str) -> None:
    weight = weights_of(kind, (256, 1024)).bfloat16()
    fitted, searched = one(weight, scheme, False), one(weight, scheme, True)
    exact = library_quantize(weight.float(), scheme)
    assert_same(fitted[0], replace(exact, input_scale=fitted[0].input_scale))
    error = grid.measure(weight, searched[0]).relative_error
    assert error < grid.measure(weight, exact).relative_error
    rounded = grid.measure(weight, library_quantize(weight, scheme)).relative_error
    assert error < rounded
    # For NVFP4 the library's BF16 arithmetic yields another global scale, for better or worse; with 2 or 3 bits its codes are off
    # in so many places that some of them happen to be better.
    if scheme.name != "nvfp4" and scheme.number not in ("int2", "int3"):
        assert grid.measure(weight, fitted[0]).relative_error <= rounded * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "student", "laplace"])
def test_clip_search_gains_three_percent_for_int4(kind: str) -> None:
    weight = weights_of(kind, (512, 2048)).bfloat16()
    for name in ("int4-g32", "int4-g64", "int4-g128", "int4-channel", "nvfp4"):
        scheme = parse_scheme(name)
        assert scheme is not None
        library = grid.measure(weight, library_quantize(weight.float(), scheme)).relative_error
        assert one(weight, scheme, True)[1].relative_error <= 0.97 * library


def test_clip_search_gets_close_to_the_best_scale_there_is() -> None:
    weight, scheme = weights_of("gaussian", (16, 256)), parse_scheme("int4-g128")
    assert scheme is not None
    fitted, _ = grid.fit(weight, scheme)
    best = torch.full(fitted.shape, torch.inf, dtype=torch.float64)
    for offset in range(-160, 60):  # every stored scale from a third to the double
        scale = (fitted.view(torch.int16) + offset).view(torch.bfloat16)
        values = grid.dequantize(grid.snap(weight, scheme, scale))
        best = torch.minimum(best, (weight.double() - values).square().reshape(16, 2, 128).sum(-1))
    assert one(weight, scheme, True)[1].squared_error <= 1.005 * float(best.sum())


@by_name
@searching
def test_result_does_not_depend_on_orders_threads_or_earlier_work(scheme: Scheme, clip_search: bool) -> None:
    weights = [weights_of("student", (256, 384), seed).bfloat16() for seed in range(2)]
    expected = quantize_all(weights, scheme, clip_search, Workspace())

    def again(_: int) -> bool:
        workspace = Workspace()
        dirt = np.random.default_rng(0)
        quantize_all([weights_of("laplace", (384, 640)) * 1e30], scheme, True, workspace)
        for name, buffer in workspace._buffers.items():
            assert name
            buffer[:] = dirt.integers(0, 256, buffer.size)
        swapped = [weights[1].t().contiguous().t(), weights[0]]
        results = quantize_all(swapped, scheme, clip_search, workspace)[::-1]
        for (mine, statistics), (other, others) in zip(results, expected, strict=True):
            assert_same(mine, other)
            assert statistics.clipped == others.clipped
            assert statistics.squared_error == pytest.approx(others.squared_error)
        return True

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(again, range(3)))


@searching
def test_nvfp4_shares_its_global_scale(clip_search: bool) -> None:
    scheme = parse_scheme("nvfp4")
    assert scheme is not None
    small, large = weights_of("gaussian", (64, 128)), weights_of("gaussian", (32, 128), 1) * 8
    results = quantize_all([small, large], scheme, clip_search, Workspace())
    divisor = 448 * 6 / large.abs().max()
    assert all(torch.equal(quantized.global_scale, divisor.reshape(1)) for quantized, _ in results)


@searching
def test_one_scale_for_a_unit(clip_search: bool) -> None:
    """Codes and scale are those of all matrices one below the other, and the search finds nearly the best scale of the unit."""
    scheme = parse_scheme("fp8-tensor-static")
    assert scheme is not None
    weights = [weights_of("student", (200, 384)).bfloat16(), weights_of("gaussian", (128, 384), 1).bfloat16() * 3]
    results = [quantized for quantized, _ in quantize_all(weights, scheme, clip_search, Workspace())]
    whole = torch.cat(weights)
    errors = {}
    fitted, _ = grid.fit(whole, scheme)
    for offset in range(-70, 70):
        scale = (fitted.view(torch.int16) + offset).view(torch.bfloat16)
        errors[float(scale)] = grid.measure(whole, grid.snap(whole, scheme, scale)).squared_error
    found = float(results[0].scale)
    if clip_search:
        assert errors[found] <= 1.02 * min(errors.values()) and errors[found] < errors[float(fitted)]
    else:
        assert_same(replace(library_quantize(whole.float(), scheme), input_scale=None), grid.snap(whole, scheme, fitted))
        assert found == float(fitted)
    together = snapped(whole, scheme, results[0].scale)
    for quantized, codes in zip(results, together.codes.split([200, 128]), strict=True):
        assert_same(quantized, replace(together, codes=codes.contiguous()))


@pytest.mark.parametrize("clip_search", [False, True])
def test_static_activations_need_evidence(clip_search: bool) -> None:
    scheme = parse_scheme("fp8-tensor-static")
    assert scheme is not None
    with pytest.raises(RecipeError, match=r"fp8-tensor-static .* needs calibration"):
        quantize([torch.ones(16, 128)], scheme, clip_search=clip_search, workspace=Workspace())
    peak = torch.tensor([1.0, float("nan")])
    with pytest.raises(WeightError, match="seen in calibration is nan"):
        quantize([torch.ones(16, 128)], scheme, clip_search=False, workspace=Workspace(), evidence=Evidence(1, peak, peak))


@given(peak=st.floats(0.0, 2.0**127, width=32))
def test_the_scale_of_activations_is_the_least_that_covers_their_peak(peak: float) -> None:
    scale = grid.cover_peak(peak)
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
    assert float(scale) > 0 and float(scale) * 448 >= peak
    smaller = (scale.view(torch.int16) - 1).view(torch.bfloat16)
    assert not peak or float(smaller) * 448 < peak or float(smaller) == 0


@by_name
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_that_is_not_finite_is_named(scheme: Scheme, value: float, dtype: torch.dtype) -> None:
    for row, column in ((0, 0), (127, 383), (77, 130)):
        for transposed in (False, True):
            weights = [weights_of("gaussian", (128, 384), seed).to(dtype) for seed in range(2)]
            weights[1][row, column] = value
            if transposed:
                weights[1] = weights[1].t().contiguous().t()
            with pytest.raises(WeightError, match=f"matrix 1, row {row}, column {column}: weight is {value}"):
                quantize_all(weights, scheme, True, Workspace())


@by_name
@searching
def test_zeros_stay_zeros(scheme: Scheme, clip_search: bool) -> None:
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    quantized, statistics = one(weight, scheme, clip_search)
    assert_same(quantized, fitted_by_oracle(weight, scheme))
    assert torch.equal(grid.dequantize(quantized), weight.float())
    assert statistics.relative_error == 0.0
    assert statistics.clipped == 0
    assert 2.0**-126 < statistics.scale_minimum <= statistics.scale_maximum < 2.0


@by_name
@searching
@pytest.mark.parametrize("magnitude", [3.3895e38, 1e-30, 1e-38, 1e-40])
def test_extreme_weights(scheme: Scheme, clip_search: bool, magnitude: float) -> None:
    weight = (weights_of("student", (128, 256)).clamp(-0.08, 0.08) / 0.08 * magnitude).to(torch.bfloat16)
    weight[3] = weights_of("gaussian", (1, 256))[0] * magnitude
    quantized, statistics = one(weight, scheme, clip_search)
    assert bool(torch.isfinite(grid.dequantize(quantized).bfloat16()).all())
    assert 0.0 < statistics.scale_minimum <= statistics.scale_maximum < float("inf")
    assert np.isfinite([statistics.squared_error, statistics.squared_weight]).all()
    fitted = grid.measure(weight, fitted_by_oracle(weight, scheme))
    assert grid.measure(weight, quantized).squared_error <= fitted.squared_error * (1 + 1e-6)


@st.composite
def finite_matrices(draw: st.DrawFn) -> torch.Tensor:
    """Finite weights over the whole range of exponents, with rows of zeros, and with many zeros, outliers or denormal numbers."""
    rows, columns = draw(st.sampled_from([(128, 128), (128, 256)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lowest, highest = (0, 254) if dtype != torch.float16 else (103, 141)  # biased exponents of float32
    low = draw(st.integers(lowest, highest))
    high = draw(st.integers(low, min(highest, low + draw(st.sampled_from([0, 2, 8, 254])))))
    bits = random.integers(0, 2, (rows, columns)) << 31 | random.integers(low, high + 1, (rows, columns)) << 23
    bits |= random.integers(0, 1 << 23, (rows, columns))
    rare = draw(st.sampled_from([0, 0x80000000, highest << 23, 1 << 16]))
    bits[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.1, 0.95]))] = rare
    bits[random.random(rows) < 0.1] = 0
    if dtype == torch.bfloat16:
        bits &= 0xFFFF0000
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(weight=finite_matrices(), scheme=st.sampled_from(SCHEMES), transposed=st.booleans())
def test_any_finite_weights(weight: torch.Tensor, scheme: Scheme, transposed: bool) -> None:
    fitted_by_torch = fitted_by_oracle(weight, scheme)
    source = weight.t().contiguous().t() if transposed else weight
    fitted, searched = one(source, scheme, False), one(source, scheme, True)
    assert_same(fitted[0], fitted_by_torch)
    assert_same(searched[0], snapped(weight, scheme, searched[0].scale, searched[0].zero_point, searched[0].global_scale))
    for quantized, statistics in (fitted, searched):
        scale = grid.effective_scale(scheme, quantized.scale, quantized.global_scale)
        assert bool(((scale > 0) & torch.isfinite(scale)).all())
        assert bool(torch.isfinite(grid.dequantize(quantized)).all())
        if scheme.number in grid.INT_RANGE:
            lowest, highest = grid.INT_RANGE[scheme.number]
            assert lowest <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= highest
        if scheme.number == "fp4":
            assert int(quantized.codes.max()) < 16
        if scheme.number == "fp8":
            assert not bool(quantized.codes.float().isnan().any())
        assert np.isfinite([statistics.squared_error, statistics.squared_weight]).all()
        assert statistics.clipped == grid.measure(weight, quantized).clipped
    before, after = grid.measure(weight, fitted[0]), grid.measure(weight, searched[0])
    assert after.squared_error <= before.squared_error * (1 + 1e-5)


def test_methods_lists_round_to_nearest() -> None:
    assert METHODS["rtn"] is quantize
