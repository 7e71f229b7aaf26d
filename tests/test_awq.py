"""AWQ's search for scales against a plain walk over the same candidates in float64, and against round to nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from calibrated_methods import assert_same, assert_threads_change_nothing, evidence_of, output_error
from matrices import correlated, gaussian, heavy_tailed

from quantkit import grid
from quantkit.errors import CalibrationError, RecipeError, WeightError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics, QuantizedTensor
from quantkit.methods import awq, rtn
from quantkit.recipe import PRESETS, Rule
from quantkit.scheme import Scheme, parse_scheme
from quantkit.team import Team
from quantkit.workspace import Workspace

NAMES = (
    *("int4-g128", "int4-g64", "int4-g32", "int4-g128-asym", "int4-g32-asym", "int8-g128", "int8-g32"),
    *("int2-g32", "int2-g64-asym", "int3-g128", "int3-g32-asym", "int5-g32", "int6-g64"),
)
SCHEMES = [scheme for name in NAMES if (scheme := parse_scheme(name))]
INT4 = SCHEMES[0]

by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


# ------------------------------------------------------------------------------------------------------------------- parts


def quantize(
    weights: list[torch.Tensor], scheme: Scheme, evidence: Evidence, threads: int = 2
) -> list[tuple[QuantizedTensor, QuantizationStatistics]]:
    with Team(threads) as members:
        return awq.quantize(weights, scheme, clip_search=True, workspace=Workspace(), evidence=evidence, team=members)


def one(weight: torch.Tensor, scheme: Scheme, evidence: Evidence) -> tuple[QuantizedTensor, QuantizationStatistics]:
    ((quantized, statistics),) = quantize([weight], scheme, evidence)
    return quantized, statistics


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    ((quantized, _),) = rtn.quantize([weight], scheme, clip_search=True, workspace=Workspace())
    return quantized


# -------------------------------------------------------------------------------------------------------------- the oracle


class Walk:
    """The search, one row and one candidate after the other.  Every candidate is judged by the outputs of the whole row."""

    def __init__(self, weight: torch.Tensor, scheme: Scheme, rows: torch.Tensor, lacking: torch.Tensor | None) -> None:
        self.scheme, self.weight, self.rows = scheme, weight.to(torch.float64), rows.to(torch.float64)
        self.lacking = torch.zeros(len(rows), len(weight), dtype=torch.float64) if lacking is None else lacking
        start = rounded(weight, scheme)
        self.scale = start.scale.clone()
        self.zero = None if start.zero_point is None else start.zero_point.clone()

    def stored(self, row: int, group: int, scale: int, zero: int) -> torch.Tensor:
        step = float(torch.tensor([scale], dtype=torch.int16).view(torch.bfloat16))
        size = self.scheme.group_size
        low, high = grid.INT_RANGE[self.scheme.number]
        steps = self.weight[row, group * size : (group + 1) * size].to(torch.float32) / step + zero
        return ((steps.round().clamp(low, high) - zero) * step).to(torch.float64)

    def run(self, sweeps: int) -> None:
        size, (low, high) = self.scheme.group_size, grid.INT_RANGE[self.scheme.number]
        codes = self.scale.view(torch.int16)
        for row in range(len(self.weight)):
            errors = torch.zeros(self.weight.shape[1], dtype=torch.float64)
            for _ in range(sweeps):
                for group in range(codes.shape[1]):
                    inside = slice(group * size, (group + 1) * size)

                    def judge(scale: int, zero: int, row: int = row, group: int = group, inside: slice = inside) -> float:
                        tried = errors.clone()  # noqa: B023
                        tried[inside] = self.weight[row, inside] - self.stored(row, group, scale, zero)
                        return float((self.rows @ tried + self.lacking[:, row]).square().mean())

                    scale, zero = int(codes[row, group]), 0 if self.zero is None else int(self.zero[row, group])
                    best = judge(scale, zero)
                    for offsets in awq.SEARCH_OF_FEW if self.scheme.bits < 4 else awq.SEARCH:
                        middle = scale
                        for offset in offsets:
                            cost = judge(middle + offset, zero)
                            scale, best = (middle + offset, cost) if cost < best else (scale, best)
                    if self.zero is not None:
                        middle = zero
                        for shift in (-1, 1):
                            tried_zero = min(max(middle + shift, low), high)
                            cost = judge(scale, tried_zero)
                            zero, best = (tried_zero, cost) if cost < best else (zero, best)
                        self.zero[row, group] = zero
                    codes[row, group] = scale
                    errors[inside] = self.weight[row, inside] - self.stored(row, group, scale, zero)


@by_name
@pytest.mark.parametrize("lacks", [False, True], ids=["", "lacking"])
def test_scales_are_those_of_a_walk_over_all_candidates(scheme: Scheme, lacks: bool) -> None:
    weight, rows = heavy_tailed(6, 256, 1), correlated(500, 256, 2)
    lacking, missing = None, None
    if lacks:
        lacking = rows.to(torch.float64)[:, :6] * 0.01
        missing = (lacking.t() @ rows.to(torch.float64) / len(rows)).to(torch.float32)
    walk = Walk(weight, scheme, rows, lacking)
    walk.run(awq.SWEEPS)
    quantized, _ = one(weight, scheme, evidence_of(rows, missing))
    same = (quantized.scale == walk.scale).all(1)
    if quantized.zero_point is not None and walk.zero is not None:
        same &= (quantized.zero_point == walk.zero).all(1)
    assert int(same.sum()) >= 5  # float32 and float64 may see two candidates the other way round, and then a row goes its own way
    assert not torch.equal(quantized.scale, rounded(weight, scheme).scale)


@by_name
def test_codes_are_the_nearest(scheme: Scheme) -> None:
    weight = heavy_tailed(70, 384, 3)
    quantized, _ = one(weight, scheme, evidence_of(correlated(900, 384, 4)))
    nearest = grid.snap(weight, scheme, quantized.scale, quantized.zero_point)
    assert torch.equal(quantized.codes, nearest.codes)


def test_inputs_that_have_nothing_to_do_with_each_other_are_judged_by_their_weights() -> None:
    """With the unit matrix for H outputs err as weights do, so nothing is worse than round to nearest with its own search."""
    weight, evidence = gaussian(96, 256, 5), replace(evidence_of(correlated(300, 256, 6)), hessian=torch.eye(256))
    plain = grid.measure(weight, rounded(weight, INT4)).squared_error
    assert 0.97 * plain < one(weight, INT4, evidence)[1].squared_error <= plain


# ------------------------------------------------------------------------------------------------- independence, and bytes


def test_matrices_that_share_their_input_come_out_as_alone() -> None:
    weights, evidence = (
        [gaussian(96, 256, 7), heavy_tailed(40, 256, 8), gaussian(33, 256, 9)],
        evidence_of(correlated(400, 256, 10)),
    )
    for weight, result in zip(weights, quantize(weights, INT4, evidence), strict=True):
        assert_same(result, one(weight, INT4, evidence))


@pytest.mark.parametrize(("rows", "inputs"), [(1, 128), (31, 256), (40, 640)])
@pytest.mark.parametrize("part", [32, 512])
def test_rows_do_not_depend_on_their_neighbours(rows: int, inputs: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "PART", part)
    weight, evidence = gaussian(rows, inputs, 11), evidence_of(correlated(2 * inputs, inputs, 12))
    quantized, _ = one(weight, INT4, evidence)
    whole, _ = one(torch.cat([weight, gaussian(50, inputs, 13)]), INT4, evidence)
    assert torch.equal(quantized.scale, whole.scale[:rows])
    assert torch.equal(quantized.codes, whole.codes[:rows])


def test_a_strided_weight_gives_the_bytes_of_a_contiguous_one() -> None:
    weight, evidence = gaussian(104, 384, 14), evidence_of(correlated(500, 384, 15))
    for scheme in SCHEMES:
        left, right = one(weight.t().contiguous().t(), scheme, evidence), one(weight, scheme, evidence)
        assert torch.equal(left[0].codes, right[0].codes)
        assert torch.equal(left[0].scale, right[0].scale)


def test_only_the_upper_triangle_is_read() -> None:
    weight, evidence = gaussian(64, 256, 16), evidence_of(correlated(500, 256, 17))
    assert evidence.hessian is not None
    upper = torch.where(torch.ones(256, 256).triu().bool(), evidence.hessian, torch.nan)
    assert_same(one(weight, INT4, evidence), one(weight, INT4, replace(evidence, hessian=upper)))


@pytest.mark.parametrize("lacks", [False, True])
def test_bytes_do_not_depend_on_the_number_of_threads(lacks: bool) -> None:
    evidence = evidence_of(correlated(900, 640, 18), gaussian(1500, 640, 19).to(torch.float32) * 0.01 if lacks else None)
    weights = [gaussian(1500, 640, 20), *([] if lacks else [heavy_tailed(700, 640, 21)])]
    assert_threads_change_nothing(lambda threads: quantize(weights, INT4, evidence, threads=threads))


# ------------------------------------------------------------------------------------------------------------- what it gains


@by_name
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_outputs_are_nearer_than_rounded_ones(scheme: Scheme, make: Callable[..., torch.Tensor]) -> None:
    """On the inputs that it learned from, and on others of the same kind."""
    weight, rows = make(128, 512, 22), correlated(4096, 512, 23)
    quantized, _ = one(weight, scheme, evidence_of(rows[:2048]))
    plain, share = rounded(weight, scheme), 0.95 if scheme.number == "int4" else 0.98
    for part in rows.split(2048):
        assert output_error(weight, quantized, part) < share * output_error(weight, plain, part)


def test_little_evidence_does_no_harm() -> None:
    """Fewer rows than inputs: others of the same kind are still served better than by round to nearest."""
    weight, rows = gaussian(128, 512, 24), correlated(2200, 512, 25)
    quantized, _ = one(weight, INT4, evidence_of(rows[:200]))
    assert output_error(weight, quantized, rows[200:]) < output_error(weight, rounded(weight, INT4), rows[200:])


def test_what_is_reported_is_true() -> None:
    rows, weight = correlated(800, 256, 26), heavy_tailed(96, 256, 27)
    for scheme in SCHEMES:
        quantized, statistics = one(weight, scheme, evidence_of(rows))
        expected = grid.measure(weight, quantized)
        assert statistics.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
        assert statistics.squared_weight == pytest.approx(expected.squared_weight, rel=1e-6)
        assert statistics.clipped == expected.clipped
        assert (statistics.scale_minimum, statistics.scale_maximum) == (expected.scale_minimum, expected.scale_maximum)
        assert statistics.output_error == pytest.approx(output_error(weight, quantized, rows), rel=2e-3)


def test_the_reported_error_of_many_inputs_and_rows_is_near_the_true_one() -> None:
    """It is taken from a sample of the rows, and from the Hessian in parts."""
    weight, rows = gaussian(700, 1408, 34), correlated(1000, 1408, 35)
    quantized, statistics = one(weight, INT4, evidence_of(rows))
    assert statistics.output_error == pytest.approx(output_error(weight, quantized, rows), rel=0.03)


# ------------------------------------------------------------------------------------------------------------ odd evidence


@pytest.mark.parametrize("exponent", [-100, 90])
def test_the_size_of_weights_and_inputs_does_not_matter(exponent: int) -> None:
    """Also where squares would leave the range of float32."""
    weight, evidence = gaussian(32, 256, 28), evidence_of(correlated(500, 256, 29))
    assert evidence.hessian is not None
    quantized, _ = one(weight, INT4, evidence)
    scaled, _ = one(weight * 2.0**exponent, INT4, replace(evidence, hessian=evidence.hessian * 2.0 ** (exponent // 4)))
    assert torch.equal(scaled.codes, quantized.codes)
    assert torch.equal(scaled.scale, quantized.scale * 2.0**exponent)


def test_the_smallest_weights_there_are_keep_their_scales() -> None:
    weight = gaussian(32, 256, 28) * 2.0**-125
    assert torch.equal(one(weight, INT4, evidence_of(correlated(500, 256, 29)))[0].scale, rounded(weight, INT4).scale)


def test_a_group_of_zeros_and_inputs_never_active() -> None:
    weight, rows = gaussian(40, 384, 30), correlated(500, 384, 31)
    weight[:, 128:256] = 0
    rows[:, 256:] = 0
    quantized, statistics = one(weight, INT4, evidence_of(rows))
    plain = rounded(weight, INT4)
    assert not quantized.codes[:, 128:256].any()
    assert torch.equal(quantized.scale[:, 1:], plain.scale[:, 1:])
    assert statistics.output_error == pytest.approx(output_error(weight, quantized, rows), rel=2e-3)


def test_errors() -> None:
    weight, evidence = gaussian(32, 256, 32), evidence_of(correlated(500, 256, 33))
    with pytest.raises(RecipeError, match="AWQ needs calibration"):
        awq.quantize([weight], INT4, clip_search=True, workspace=Workspace())
    for hessian in (torch.zeros(256, 256), torch.full((256, 256), torch.nan)):
        with pytest.raises(CalibrationError, match="mean square of the inputs is"):
            one(weight, INT4, replace(evidence, hessian=hessian))
    damaged = weight.clone()
    damaged[3, 5] = torch.inf
    with pytest.raises(WeightError, match="row 3, column 5"):
        one(damaged, INT4, evidence)


def test_rules_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match=r"awq is for schemes of integers with groups; fp8-block-dynamic takes method rtn"):
        Rule("fp8-block-dynamic", method="awq")
    with pytest.raises(RecipeError, match=r"awq is for schemes of integers with groups; int4-channel takes method rtn"):
        Rule("int4-channel", method="awq")
    with pytest.raises(RecipeError, match="awq is a search for scales"):
        Rule("int4-g128", method="awq", clip_search=False)
    assert PRESETS["w4a16-awq"].needs_hessians
