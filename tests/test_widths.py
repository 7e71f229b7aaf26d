"""Integers of 2, 3, 5 and 6 bits against plain numpy: scales, nearest codes, the best scale there is, and what theory allows.

Nothing here is computed with ``quantkit.grid``; it is compared with the same arithmetic, written down once more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from calibrated_methods import evidence_of
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import correlated, gaussian, heavy_tailed
from numpy.typing import NDArray

from quantkit.assignment import MAXIMUM_ERROR
from quantkit.errors import RecipeError
from quantkit.grid import QuantizationStatistics, QuantizedTensor, dequantize
from quantkit.llama4 import parse_config
from quantkit.methods import METHODS
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import IN_WORDS, Scheme, parse_scheme, scheme_names
from quantkit.team import Team
from quantkit.workspace import Workspace
from tests.tiny_models import tiny_config

BITS = {"int2": 2, "int3": 3, "int5": 5, "int6": 6}
SCHEMES = [scheme for name in scheme_names() if name.split("-")[0] in BITS and (scheme := parse_scheme(name))]
by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
searching = pytest.mark.parametrize("clip_search", [False, True], ids=["fitted", "searched"])
# Relative error of Gaussian numbers under the best single scale of the codes -2^(b-1) .. 2^(b-1) - 1; the well-known optimum of
# Max (1960), whose levels lie on both sides of zero alike, is 0.3447, 0.1935, 0.0591 and 0.0322.
OPTIMUM = {"int2": 0.38656, "int3": 0.20159, "int5": 0.05938, "int6": 0.03229}

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


# -------------------------------------------------------------------------------------------------------------- the oracle


def code_range(scheme: Scheme) -> tuple[int, int]:
    half = 2 ** (BITS[scheme.number] - 1)
    return -half, half - 1


def bfloat16(values: Floats) -> Floats:
    """Rounded to nearest even, by bits."""
    raw = values.astype(np.float32).view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def grouped(weight: torch.Tensor, scheme: Scheme) -> Floats:
    """float32 ``[groups, weights of a group]``, group after group of row after row."""
    values: Floats = weight.to(torch.float32).contiguous().numpy()
    return values.reshape(-1, scheme.group_size or weight.shape[1])


@dataclass(frozen=True)
class Stored:
    """What was stored, group by group: float64 ``[groups, ...]``."""

    codes: Doubles
    scale: Doubles
    zero_point: Doubles

    @property
    def values(self) -> Doubles:
        return (self.codes - self.zero_point[:, None]) * self.scale[:, None]


def stored(quantized: QuantizedTensor) -> Stored:
    codes = quantized.codes.numpy().astype(np.float64)
    scale = quantized.scale.to(torch.float64).numpy().reshape(-1)
    given = quantized.zero_point
    zero_point = np.zeros_like(scale) if given is None else given.numpy().reshape(-1).astype(np.float64)
    return Stored(codes.reshape(len(scale), -1), scale, zero_point)


def squared_error(weights: Floats, scale: Floats, zero_point: Any, lowest: int, highest: int) -> Doubles:
    """Of every group under its scale, float64 ``[groups]``; scale: of numbers in BF16."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        steps = np.rint(weights / scale[:, None] + np.float32(zero_point))
        values = (np.clip(steps, lowest, highest) - zero_point).astype(np.float64) * scale[:, None]
    total: Doubles = ((weights - values) ** 2).sum(1)
    return total


def best_errors(weights: Floats, scheme: Scheme, step: int = 1) -> Doubles:
    """The least squared error of every group over stored scales from a 64th to the quadruple of its largest weight's share, and
    over all zero points."""
    lowest, highest = code_range(scheme)
    share = bfloat16(np.abs(weights).max(1) / np.float32(highest + 0.5)).view(np.uint32).astype(np.int64) >> 16
    best = np.full(len(weights), np.inf)
    for offset in range(-6 * 128, 2 * 128, step):
        scale = ((share + offset) << 16).astype(np.uint32).view(np.float32)
        for zero_point in (0,) if scheme.symmetric else range(lowest, highest + 1):
            best = np.minimum(best, squared_error(weights, scale, zero_point, lowest, highest))
    return best


def quantize(
    weight: torch.Tensor, scheme: Scheme, clip_search: bool, method: str = "rtn", rows: torch.Tensor | None = None
) -> tuple[QuantizedTensor, QuantizationStatistics]:
    evidence = None if rows is None else evidence_of(rows)
    with Team(1) as team:
        [result] = METHODS[method]([weight], scheme, clip_search=clip_search, workspace=Workspace(), evidence=evidence, team=team)
    return result


def relative_error(weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    exact = grouped(weight, quantized.scheme).astype(np.float64)
    return float(np.linalg.norm(exact - stored(quantized).values) / np.linalg.norm(exact))


def output_error(weight: torch.Tensor, quantized: QuantizedTensor, rows: torch.Tensor) -> float:
    exact = weight.to(torch.float64).numpy()
    inputs = rows.to(torch.float64).numpy().T
    difference = exact - stored(quantized).values.reshape(exact.shape)
    return float(np.linalg.norm(difference @ inputs) / np.linalg.norm(exact @ inputs))


# ------------------------------------------------------------------------------------------------------------------- names


def test_every_name() -> None:
    sizes = ("g32", "g64", "g128", "channel")
    expected = {f"{number}-{size}" for number in BITS for size in sizes}
    expected |= {f"{number}-{size}-asym" for number in ("int2", "int3") for size in sizes}
    assert {scheme.name for scheme in SCHEMES} == expected
    for scheme in SCHEMES:
        number, size, *rest = scheme.name.split("-")
        assert (scheme.number, scheme.bits, scheme.symmetric) == (number, BITS[number], rest == [])
        assert (scheme.granularity, scheme.group_size) == (("channel", 0) if size == "channel" else ("group", int(size[1:])))
        assert scheme.number in MAXIMUM_ERROR


@pytest.mark.parametrize("name", ["int5-g128-asym", "int8-g32-asym", "int7-g128", "int1-g32", "int2", "int3-g16"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(RecipeError, match=r"zero point is supported for int2, int3, int4 only|unknown scheme|group size 16"):
        parse_scheme(name)


@by_name
def test_only_groups_must_fit(scheme: Scheme) -> None:
    """No words of 32 bits to fill: rows and channels may be of any size."""
    size = scheme.group_size
    assert scheme.misfit(3, 5 * size if size else 37) is None
    if size:
        assert scheme.misfit(3, 5 * size + 8) == f"input size {5 * size + 8} is not a multiple of the group size {size}"


def test_the_bounds_lie_above_what_heavy_tails_cost() -> None:
    weight = torch.distributions.StudentT(3.0).sample((32, 4096)) * 0.02
    for scheme in SCHEMES:
        assert quantize(weight, scheme, True)[1].relative_error < MAXIMUM_ERROR[scheme.number]


# --------------------------------------------------------------------------------------------------------- scales and codes


@by_name
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_fitted_scales_reach_the_largest_weight(scheme: Scheme, make: Callable[..., torch.Tensor]) -> None:
    weight = make(40, 384, 1)
    found, weights, (lowest, highest) = stored(quantize(weight, scheme, False)[0]), grouped(weight, scheme), code_range(scheme)
    half = np.float32((highest - lowest) / 2)
    if scheme.symmetric:
        expected = np.abs(weights).max(1) / half
    else:
        low, high = np.minimum(weights.min(1), 0), np.maximum(weights.max(1), 0)
        expected = (high / 2 - low / 2) / half
        assert np.array_equal(found.zero_point, np.clip(np.rint(lowest - low / expected), lowest, highest))
    assert np.array_equal(found.scale, bfloat16(expected))


@by_name
@searching
@pytest.mark.parametrize(("rows", "inputs"), [(1, 128), (24, 384), (130, 128), (5, 1152)])
def test_every_code_is_the_nearest(scheme: Scheme, clip_search: bool, rows: int, inputs: int) -> None:
    """Of all codes there are, tried one after the other; and what is reported is so."""
    weight = heavy_tailed(rows, inputs, 2)
    quantized, statistics = quantize(weight, scheme, clip_search)
    found, weights, (lowest, highest) = stored(quantized), grouped(weight, scheme).astype(np.float64), code_range(scheme)
    assert lowest <= found.codes.min() and found.codes.max() <= highest
    assert lowest <= found.zero_point.min() and found.zero_point.max() <= highest
    codes = np.arange(lowest, highest + 1)
    possible = (codes - found.zero_point[:, None]) * found.scale[:, None]
    nearest = np.abs(weights[..., None] - possible[:, None, :]).min(-1)
    errors = np.abs(weights - found.values)
    assert np.all(errors <= nearest + 1e-6 * found.scale[:, None] * len(codes))
    assert np.array_equal(dequantize(quantized).numpy().reshape(weights.shape), found.values.astype(np.float32))
    assert statistics.squared_error == pytest.approx((errors**2).sum(), rel=1e-5)
    beyond = (weights > possible.max(1)[:, None]) | (weights < possible.min(1)[:, None])
    assert statistics.clipped == beyond.sum()


@by_name
def test_codes_of_stored_values_are_themselves(scheme: Scheme) -> None:
    """What was rounded once stays, up to a rounding of its scale, which rows find less exactly than groups do."""
    lowest, highest = code_range(scheme)
    random = np.random.default_rng(3)
    codes = random.integers(lowest, highest + 1, (16, 256))
    codes[:, ::16], codes[:, 1::16] = lowest, highest
    weight = torch.from_numpy((codes * 0.0078125).astype(np.float32))
    first, _ = quantize(weight, scheme, True)
    moved = 0.004 if scheme.granularity == "group" else 0.025
    assert relative_error(weight, first) < moved
    again, _ = quantize(dequantize(first), scheme, True)
    assert scheme.granularity == "channel" or torch.equal(again.codes, first.codes)
    assert relative_error(dequantize(first), again) < moved


@by_name
@searching
def test_groups_of_zeros(scheme: Scheme, clip_search: bool) -> None:
    weight = gaussian(8, 256, 4)
    weight[2] = 0
    weight[:, :128] *= torch.arange(8)[:, None] % 2
    quantized, _ = quantize(weight, scheme, clip_search)
    values = dequantize(quantized)
    assert not values[2].any()
    assert scheme.granularity == "channel" or not values[::2, :128].any()
    assert float(quantized.scale.min()) > 2.0**-126
    assert values[1].any()


@by_name
@searching
@pytest.mark.parametrize("magnitude", [3.3895e38, 1e-30, 1e-38, 1e-40, 9.2e-41])
def test_extreme_weights(scheme: Scheme, clip_search: bool, magnitude: float) -> None:
    weight = (gaussian(16, 128, 5).to(torch.float32).clamp(-0.05, 0.05) / 0.05 * magnitude).to(torch.bfloat16)
    weight[0, 0], weight[1, 0] = magnitude, -magnitude
    quantized, statistics = quantize(weight, scheme, clip_search)
    lowest, highest = code_range(scheme)
    found = stored(quantized)
    assert np.all(found.scale > 0) and np.all(np.isfinite(found.scale))
    for code in (lowest, highest):  # even those that no weight has taken
        assert np.all(np.abs(code - found.zero_point) * found.scale <= 255 * 2.0**120)
    assert math.isfinite(statistics.squared_error)
    assert np.abs(grouped(weight, scheme) - found.values).max() <= 1.01 * magnitude


# -------------------------------------------------------------------------------------------------------------- the search


@by_name
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_the_search_comes_close_to_the_best_scale_there_is(scheme: Scheme, make: Callable[..., torch.Tensor]) -> None:
    weight = make(16, 256, 6)
    found, _ = quantize(weight, scheme, True)
    weights = grouped(weight, scheme)
    errors, best = ((weights - stored(found).values) ** 2).sum(1), best_errors(weights, scheme, 1 if scheme.symmetric else 2)
    # In groups the last step, by least squares, may lie between the scales that were tried, so it may even be a little better.
    assert 0.99 * best.sum() < errors.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("name", ["int2-channel-asym", "int3-channel-asym", "int2-g128-asym", "int3-g128-asym"])
def test_one_weight_far_out_does_not_spoil_the_zero_point(name: str) -> None:
    """The ends of a range are a poor guide where it has to be cut to a fraction."""
    scheme = parse_scheme(name)
    assert scheme is not None
    weight = gaussian(16, 256, 7)
    weight[:, 40] = torch.tensor([0.2, -0.2, 0.15, -0.3]).repeat(4)
    weights = grouped(weight, scheme)
    errors = ((weights - stored(quantize(weight, scheme, True)[0]).values) ** 2).sum(1)
    assert errors.sum() <= 1.03 * best_errors(weights, scheme, 3).sum()


@by_name
def test_gaussian_rows_reach_what_theory_allows(scheme: Scheme) -> None:
    """One scale for many numbers comes near the optimum of one scale for all; what is chosen for few fits these better."""
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(64, 4096, generator=generator) * 0.02
    error = quantize(weight, scheme, True)[1].relative_error
    optimum = OPTIMUM[scheme.number]
    if scheme.granularity == "channel":
        assert 0.96 * optimum < error < 1.005 * optimum
    else:
        assert 0.6 * optimum < error < 1.02 * optimum
    assert error < 0.97 * quantize(weight, scheme, False)[1].relative_error


@st.composite
def odd_matrices(draw: st.DrawFn) -> torch.Tensor:
    """Finite weights of few magnitudes, one-sided, all alike, on a lattice, or over the whole range of exponents."""
    rows, inputs = draw(st.sampled_from([(1, 128), (3, 128), (17, 256)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["one-sided", "equal", "lattice", "signs", "exponents"]))
    values = random.normal(size=(rows, inputs))
    if kind == "one-sided":
        values = np.abs(values)
    elif kind == "equal":
        values = np.broadcast_to(values[:, :1], values.shape).copy()
    elif kind == "lattice":
        values = random.integers(-9, 10, values.shape).astype(np.float64)
    elif kind == "signs":
        values = np.sign(values)
    else:
        values = values * 2.0 ** random.integers(-120, 120, values.shape)
    values[random.random(values.shape) < draw(st.sampled_from([0.0, 0.5, 0.97]))] = 0.0
    return torch.from_numpy(values * 2.0 ** draw(st.sampled_from([-130, -40, 0, 6]))).to(
        draw(st.sampled_from([torch.bfloat16, torch.float32]))
    )


@settings(max_examples=120, deadline=None)
@given(weight=odd_matrices(), scheme=st.sampled_from(SCHEMES), transposed=st.booleans())
def test_the_search_is_never_worse_than_none(weight: torch.Tensor, scheme: Scheme, transposed: bool) -> None:
    source = weight.t().contiguous().t() if transposed else weight
    weights = grouped(weight, scheme).astype(np.float64)
    lowest, highest = code_range(scheme)
    errors = []
    for clip_search in (False, True):
        quantized, _ = quantize(source, scheme, clip_search)
        found = stored(quantized)
        assert np.all(found.scale > 0) and lowest <= found.codes.min() and found.codes.max() <= highest
        errors.append(((weights - found.values) ** 2).sum(1))
    assert np.all(errors[1] <= errors[0] * (1 + 1e-4))


# ----------------------------------------------------------------------------------------------------- methods with evidence


@by_name
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_gptq_beats_round_to_nearest(scheme: Scheme, make: Callable[..., torch.Tensor]) -> None:
    """On other inputs than those that it learned from; on the same scales."""
    weight, rows = make(64, 256, 9), correlated(3072, 256, 10)
    learned, others = rows[:2048], rows[2048:]
    plain, _ = quantize(weight, scheme, True)
    plain = QuantizedTensor(scheme, plain.codes.clone(), plain.scale.clone(), plain.zero_point)
    chosen, statistics = quantize(weight, scheme, True, "gptq", learned)
    assert torch.equal(chosen.scale, plain.scale)
    assert output_error(weight, chosen, others) < 0.9 * output_error(weight, plain, others)
    assert statistics.output_error == pytest.approx(output_error(weight, chosen, learned), rel=0.01)
    lowest, highest = code_range(scheme)
    assert lowest <= int(chosen.codes.min()) and int(chosen.codes.max()) <= highest


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.group_size], ids=lambda scheme: scheme.name)
def test_awq_beats_round_to_nearest(scheme: Scheme) -> None:
    weight, rows = heavy_tailed(64, 256, 11), correlated(3072, 256, 12)
    plain, chosen = quantize(weight, scheme, True)[0], quantize(weight, scheme, True, "awq", rows[:2048])[0]
    assert output_error(weight, chosen, rows[2048:]) < output_error(weight, plain, rows[2048:])


@pytest.mark.parametrize("name", ["int2-channel", "int6-channel"])
def test_awq_needs_groups(name: str) -> None:
    with pytest.raises(RecipeError, match=f"awq is for schemes of integers with groups; {name} takes method rtn"):
        Rule(name, method="awq")


# ------------------------------------------------------------------------------------------------------------------ formats


def plan_of(name: str, form: str) -> Plan:
    config = tiny_config()
    recipe = Recipe("own", (Rule(name, ("routed_expert", "shared_expert")), Rule("keep")), format=form)
    return make_plan(json.dumps(config), parse_config(config), [recipe])


@by_name
def test_compressed_tensors_says_which_format_to_take(scheme: Scheme) -> None:
    """When it is planned, in one error."""
    expected = (
        rf"cannot hold this recipe:\n  no client computes with {scheme.number}, which {scheme.name} is; say format = 'packed'"
    )
    with pytest.raises(RecipeError, match=expected) as caught:
        plan_of(scheme.name, "compressed-tensors")
    assert str(caught.value).count("'packed'") == 1


@pytest.mark.parametrize("number", IN_WORDS)
def test_compressed_tensors_holds_the_others(number: str) -> None:
    [artifact] = plan_of(f"{number}-g32", "compressed-tensors").artifacts
    planned = {tensor.name: (tensor.dtype, tensor.shape) for outputs in artifact.outputs.values() for tensor in outputs}
    down = "language_model.model.layers.0.feed_forward.experts.0.down_proj"  # [128, 256]
    packed = 256 * {"int4": 4, "int8": 8}[number] // 32
    assert planned[f"{down}.weight_packed"] == ("I32", (128, packed))
    assert planned[f"{down}.weight_scale"] == ("BF16", (128, 256 // 32))


def test_gguf_holds_none_of_them() -> None:
    with pytest.raises(RecipeError, match="int3-g64, which is no type of GGUF files"):
        plan_of("int3-g64", "gguf")
