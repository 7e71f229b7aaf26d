"""GPTQ against the usual form of the paper in float64: inverse Hessian, its Cholesky factor, one column after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated_methods import assert_same, assert_threads_change_nothing, evidence_of, output_error
from matrices import correlated, gaussian, heavy_tailed
from paper_gptq import TIE, activation_order, damped, one, paper, quantize

from quantkit import grid, team
from quantkit.errors import CalibrationError, RecipeError, WeightError
from quantkit.evidence import Evidence
from quantkit.grid import QuantizedTensor
from quantkit.methods import gptq, rtn
from quantkit.scheme import Scheme, parse_scheme
from quantkit.workspace import Workspace

SCHEMES = [
    scheme
    for name in (
        "int4-g128",
        "int4-g64",
        "int4-g32",
        "int4-channel",
        "int4-g128-asym",
        "int4-g32-asym",
        "int4-channel-asym",
        "int8-g128",
        "int8-g32",
        "int8-channel",
        "int8-channel-dynamic",
        "int2-g32",
        "int2-g64-asym",
        "int3-g128",
        "int3-channel-asym",
        "int5-g64",
        "int6-channel",
    )
    if (scheme := parse_scheme(name))
]
INT4 = SCHEMES[0]

by_name = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


# ------------------------------------------------------------------------------------------------------------------- parts


def rounded(weight: torch.Tensor, scheme: Scheme, *, clip_search: bool = False) -> QuantizedTensor:
    ((quantized, _),) = rtn.quantize([weight], scheme, clip_search=clip_search, workspace=Workspace())
    return quantized


def assert_is_the_paper_s(weight: torch.Tensor, scheme: Scheme, rows: torch.Tensor, *, clip_search: bool = False) -> None:
    evidence = evidence_of(rows)
    assert evidence.hessian is not None
    quantized, statistics = one(weight, scheme, evidence, clip_search=clip_search)
    scales = rounded(weight, scheme, clip_search=clip_search)
    assert torch.equal(quantized.scale, scales.scale)
    assert (quantized.zero_point is None) == scheme.symmetric
    if quantized.zero_point is not None and scales.zero_point is not None:
        assert torch.equal(quantized.zero_point, scales.zero_point)
    order = activation_order(evidence.hessian)
    oracle = paper(weight, quantized, damped(evidence.hessian, statistics.damping), order)
    assert oracle.excess < TIE
    differing = (oracle.codes != quantized.codes).any(1)  # after a tie that falls the other way a row goes its own way
    assert int(differing.sum()) <= max(2, len(weight) // 20)
    assert not torch.equal(quantized.codes, scales.codes)


# ------------------------------------------------------------------------------------------------------------- the algorithm


@by_name
@pytest.mark.parametrize("clip_search", [False, True], ids=["fitted", "searched"])
def test_codes_are_those_of_the_paper(scheme: Scheme, clip_search: bool) -> None:
    assert_is_the_paper_s(heavy_tailed(72, 384, 1), scheme, correlated(900, 384, 2), clip_search=clip_search)


@pytest.mark.parametrize(("rows", "inputs"), [(1, 128), (31, 256), (40, 640), (200, 128)])
def test_shapes_that_fill_no_strip_and_no_panel(rows: int, inputs: int) -> None:
    assert_is_the_paper_s(gaussian(rows, inputs, 3), INT4, correlated(2 * inputs, inputs, 4))


@pytest.mark.parametrize(
    ("panel", "block", "part", "tile"), [(48, 16, 32, 40), (40, 64, 64, 100), (128, 128, 32, 1024), (7, 3, 96, 9)]
)
def test_blocks_change_nothing(panel: int, block: int, part: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that divide neither each other nor the inputs; part: rows that a thread takes."""
    monkeypatch.setattr(gptq, "PANEL", panel)
    monkeypatch.setattr(gptq, "BLOCK", block)
    monkeypatch.setattr(gptq, "TILE", tile)
    monkeypatch.setattr(team, "FACTOR_BLOCK", tile)
    monkeypatch.setattr(gptq, "spans", lambda count, size=part: team.spans(count, max(1, size)))
    assert_is_the_paper_s(gaussian(150, 320, 5), SCHEMES[2], correlated(700, 320, 6))


def test_matrices_that_share_their_input_come_out_as_alone() -> None:
    weights, evidence = (
        [gaussian(96, 256, 7), heavy_tailed(40, 256, 8), gaussian(33, 256, 9)],
        evidence_of(correlated(400, 256, 10)),
    )
    together = quantize(weights, INT4, evidence)
    for weight, result in zip(weights, together, strict=True):
        assert_same(result, one(weight, INT4, evidence))


def test_a_strided_weight_gives_the_codes_of_a_contiguous_one() -> None:
    weight, evidence = gaussian(104, 384, 11), evidence_of(correlated(500, 384, 12))
    input_major = weight.t().contiguous().t()
    assert input_major.stride() == (1, 104)
    for scheme in SCHEMES:
        left, right = one(input_major, scheme, evidence), one(weight, scheme, evidence)
        assert torch.equal(left[0].codes, right[0].codes)
        assert left[1].output_error == pytest.approx(right[1].output_error, rel=1e-6)


def test_the_dtype_of_the_weights_does_not_matter() -> None:
    weight, evidence = gaussian(64, 256, 13), evidence_of(correlated(500, 256, 14))
    assert_same(one(weight, INT4, evidence), one(weight.to(torch.float32), INT4, evidence))


def test_only_the_upper_triangle_is_read() -> None:
    weight, evidence = gaussian(64, 256, 15), evidence_of(correlated(500, 256, 16))
    assert evidence.hessian is not None
    upper = torch.where(torch.ones(256, 256).triu().bool(), evidence.hessian, torch.nan)
    assert_same(one(weight, INT4, evidence), one(weight, INT4, replace(evidence, hessian=upper)))


@pytest.mark.parametrize("missing", [False, True])
def test_bytes_do_not_depend_on_the_number_of_threads(missing: bool) -> None:
    weights, evidence = [gaussian(1500, 640, 17), gaussian(1100, 640, 18)], evidence_of(correlated(900, 640, 19), counted=900.0)
    if missing:
        weights, evidence = weights[:1], replace(evidence, missing=gaussian(1500, 640, 20).to(torch.float32) * 0.01)
    assert_threads_change_nothing(lambda threads: quantize(weights, INT4, evidence, threads=threads))


# ------------------------------------------------------------------------------------------------------------- what it gains


@by_name
@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
def test_outputs_are_nearer_than_rounded_ones(scheme: Scheme, make: object) -> None:
    """On the inputs that it learned from, and on others of the same kind."""
    weight, rows = make(128, 256, 21), correlated(4096, 256, 22)  # type: ignore[operator]
    quantized, _ = one(weight, scheme, evidence_of(rows[:2048]), clip_search=True)
    plain = rounded(weight, scheme, clip_search=True)
    share = 0.85 if scheme.number == "int2" else 0.75  # what so few codes cannot make up for
    for part in rows.split(2048):
        assert output_error(weight, quantized, part) < share * output_error(weight, plain, part)


def test_what_is_reported_is_true() -> None:
    rows = correlated(800, 256, 23)
    for scheme in SCHEMES:
        weight = heavy_tailed(96, 256, 24)
        quantized, statistics = one(weight, scheme, evidence_of(rows))
        stored = grid.dequantize(quantized).to(torch.float64)
        assert statistics.squared_error == pytest.approx(float((weight - stored).square().sum()), rel=1e-5)
        assert statistics.squared_weight == pytest.approx(float(weight.to(torch.float64).square().sum()), rel=1e-6)
        assert statistics.output_error == pytest.approx(output_error(weight, quantized, rows), rel=2e-3)
        assert statistics.damping == gptq.DAMPING
        scales = grid.effective_scale(scheme, quantized.scale)
        assert (statistics.scale_minimum, statistics.scale_maximum) == (float(scales.min()), float(scales.max()))


def test_the_reported_error_of_many_rows_is_near_the_true_one() -> None:
    """The outputs' own power is taken from a sample of the rows."""
    weight, rows = gaussian(700, 128, 25), correlated(500, 128, 26)
    quantized, statistics = one(weight, INT4, evidence_of(rows))
    assert statistics.output_error == pytest.approx(output_error(weight, quantized, rows), rel=0.05)


def test_codes_beyond_the_range_are_counted() -> None:
    """Inputs that have nothing to do with each other are rounded to nearest, so it is known what lies beyond."""
    weight, evidence = heavy_tailed(96, 256, 27), evidence_of(correlated(800, 256, 28))
    quantized, statistics = one(weight, INT4, replace(evidence, hessian=torch.eye(256)), clip_search=True)
    steps = (weight.to(torch.float32) / quantized.scale.to(torch.float32).repeat_interleave(128, 1)).round()
    assert statistics.clipped == int(((steps < -8) | (steps > 7)).sum()) > 0
    assert torch.equal(quantized.codes, rounded(weight, INT4, clip_search=True).codes)


# ------------------------------------------------------------------------------------------- making up for something missing


def missing_of(rows: torch.Tensor, outputs: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What outputs lack, float64 ``[tokens, out]``, in part a linear function of the inputs; mean of d x^T."""
    generator = torch.Generator().manual_seed(77)
    linear = torch.randn(outputs, rows.shape[1], generator=generator, dtype=torch.float64) * 0.002
    other = torch.randn(len(rows), outputs, generator=generator, dtype=torch.float64) * 0.01
    lacking = share * (rows.to(torch.float64) @ linear.t()) + (1 - share) * other
    return lacking, (lacking.t() @ rows.to(torch.float64) / len(rows)).to(torch.float32)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[5], SCHEMES[9]], ids=lambda scheme: scheme.name)
def test_what_is_missing_is_made_up_for(scheme: Scheme) -> None:
    """The result is GPTQ on the damped least squares solution, W + M (H + damping)^-1, with the scales of W."""
    weight, rows = gaussian(96, 256, 29), correlated(2000, 256, 30)
    lacking, missing = missing_of(rows, 96, 0.8)
    evidence = evidence_of(rows, missing)
    assert evidence.hessian is not None
    quantized, statistics = one(weight, scheme, evidence)
    hessian = damped(evidence.hessian, statistics.damping)
    target = weight.to(torch.float64) + missing.to(torch.float64) @ torch.linalg.inv(hessian)
    oracle = paper(target, quantized, hessian, activation_order(evidence.hessian))
    assert oracle.excess < 5 * TIE
    assert int((oracle.codes != quantized.codes).any(1).sum()) <= 8

    plain, _ = one(weight, scheme, evidence_of(rows))

    def short(candidate: torch.Tensor) -> float:
        """Mean square of what outputs still lack."""
        return float(((weight - candidate.to(torch.float64)) @ rows.to(torch.float64).t() + lacking.t()).square().mean())

    best, now, before = (short(values) for values in (target, grid.dequantize(quantized), grid.dequantize(plain)))
    assert best < now < before
    assert now - best < 0.5 * (before - best)


def test_the_reported_error_is_that_against_what_was_asked_for() -> None:
    """With the share of the damping, so it is an upper bound."""
    weight, rows = gaussian(64, 128, 31), correlated(1000, 128, 32)
    _, missing = missing_of(rows, 64, 0.5)
    evidence = evidence_of(rows, missing)
    assert evidence.hessian is not None
    quantized, statistics = one(weight, INT4, evidence)
    hessian, exact = damped(evidence.hessian, statistics.damping), weight.to(torch.float64)
    short = exact + missing.to(torch.float64) @ torch.linalg.inv(hessian) - grid.dequantize(quantized)
    noise, power = torch.trace(short @ hessian @ short.t()), torch.trace(exact @ evidence.hessian.to(torch.float64) @ exact.t())
    assert statistics.output_error == pytest.approx(float(noise / power) ** 0.5, rel=5e-3)
    assert statistics.output_error > float(
        (short @ rows.to(torch.float64).t()).norm() / (exact @ rows.to(torch.float64).t()).norm()
    )


def test_nothing_missing_is_the_same_as_no_missing() -> None:
    weight, evidence = gaussian(64, 256, 33), evidence_of(correlated(500, 256, 34))
    with_zeros, without = one(weight, INT4, replace(evidence, missing=torch.zeros(64, 256))), one(weight, INT4, evidence)
    assert torch.equal(with_zeros[0].codes, without[0].codes)


@pytest.mark.parametrize("factor", [0.1, 10.0, 1e4])
def test_outputs_that_are_small_beside_what_is_missing_are_not_bent_out_of_shape(factor: float) -> None:
    """What is made up for is at most a quarter of the outputs' own size: the target is W + t M (H + damping)^-1 with t <= 1."""
    weight, rows = gaussian(64, 256, 54), correlated(2000, 256, 55)
    _, missing = missing_of(rows, 64, 0.8)
    evidence = evidence_of(rows, factor * missing)
    assert evidence.hessian is not None
    quantized, statistics = one(weight, INT4, evidence)
    hessian = damped(evidence.hessian, statistics.damping)
    exact, wanted = weight.to(torch.float64), factor * missing.to(torch.float64)
    power, added = (
        torch.trace(exact @ evidence.hessian.to(torch.float64) @ exact.t()),
        torch.trace(wanted @ torch.linalg.inv(hessian) @ wanted.t()),
    )
    share = min(1.0, 0.25 * float((power / added).sqrt()))
    assert (share < 1) == (factor > 1)
    target = exact + share * wanted @ torch.linalg.inv(hessian)
    assert paper(target, quantized, hessian, activation_order(evidence.hessian)).excess < 5 * TIE
    assert statistics.relative_error < 0.5


# ------------------------------------------------------------------------------------------------------- difficult evidence


def test_little_evidence_is_damped_more_where_something_is_missing() -> None:
    weight, rows = gaussian(64, 256, 35), correlated(1000, 256, 36)
    for counted in (1.0, 64.0, 1000.0):
        evidence = evidence_of(rows, counted=counted)
        assert one(weight, INT4, evidence)[1].damping == pytest.approx(0.01 + 0.3 * max(0.0, 256 / counted - 1))
        _, statistics = one(weight, INT4, replace(evidence, missing=torch.zeros(64, 256)))
        assert statistics.damping == pytest.approx(0.01 + 0.3 * 256 / counted)


@pytest.mark.parametrize(("lowered", "factor"), [(0.005, 1), (0.02, 3), (0.08, 10), (0.2, 30), (0.45, 100)])
def test_damping_grows_until_the_hessian_can_be_factored(lowered: float, factor: int) -> None:
    """Of deficient rank, less ``lowered`` on the diagonal: its least eigenvalue is -lowered / (1 - lowered) of the mean."""
    rows = correlated(100, 256, 37)
    evidence = evidence_of(rows / rows.square().mean(0).sqrt())
    assert evidence.hessian is not None
    evidence.hessian.diagonal().sub_(lowered)
    quantized, statistics = one(gaussian(64, 256, 38), INT4, evidence)
    assert statistics.damping == pytest.approx(gptq.DAMPING * factor)
    assert bool(grid.dequantize(quantized).isfinite().all())


def test_a_hessian_that_no_damping_helps_is_an_error() -> None:
    hessian = torch.eye(128)
    hessian[3, 5] = 4.0
    with pytest.raises(CalibrationError, match=r"128 inputs is not positive definite even with damping 1"):
        one(gaussian(32, 128, 39), INT4, replace(evidence_of(correlated(9, 128)), hessian=hessian))


@pytest.mark.parametrize("place", [(0, 0), (127, 127), (0, 127), (60, 61)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_hessian_that_is_not_finite_is_an_error(place: tuple[int, int], value: float) -> None:
    evidence = evidence_of(correlated(500, 128, 40))
    assert evidence.hessian is not None
    evidence.hessian[place] = value
    with pytest.raises(CalibrationError):
        one(gaussian(32, 128, 41), INT4, evidence)


def test_no_inputs_at_all_are_an_error_of_their_own() -> None:
    with pytest.raises(CalibrationError, match="not all zero"):
        one(gaussian(32, 128, 42), INT4, Evidence(5, torch.zeros(128), torch.zeros(128), torch.zeros(128, 128), rows=5.0))


@pytest.mark.parametrize("counted", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_dependent_tokens_give_finite_weights_and_better_outputs(tokens: int, counted: float) -> None:
    """One token, again and again: the Hessian has rank 1."""
    token = correlated(1, 256, 43)
    weight, rows = gaussian(64, 256, 44), token.expand(tokens, -1).contiguous()
    quantized, statistics = one(weight, INT4, evidence_of(rows, counted=counted))
    assert bool(grid.dequantize(quantized).isfinite().all())
    assert statistics.damping >= 0.01
    assert output_error(weight, quantized, rows) < output_error(weight, rounded(weight, INT4), rows)


def test_inputs_that_are_never_active_are_rounded_to_nearest() -> None:
    rows, dead = correlated(500, 256, 45), torch.tensor([0, 5, 130, 255])
    rows[:, dead] = 0.0
    weight = gaussian(64, 256, 46)
    assert_is_the_paper_s(weight, INT4, rows)
    quantized, _ = one(weight, INT4, evidence_of(rows))
    plain = rounded(weight, INT4)
    assert torch.equal(quantized.codes[:, dead], plain.codes[:, dead])
    assert not torch.equal(quantized.codes, plain.codes)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_size_of_the_inputs_does_not_matter(factor: float) -> None:
    """For any power of two not even rounding differs."""
    weight, evidence = gaussian(64, 256, 47), evidence_of(correlated(500, 256, 48))
    assert evidence.hessian is not None
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    other = replace(evidence, hessian=evidence.hessian * power)
    assert torch.equal(one(weight, INT4, evidence)[0].codes, one(weight, INT4, other)[0].codes)


def test_weights_of_zeros_stay_zeros() -> None:
    quantized, statistics = one(torch.zeros(32, 128, dtype=torch.bfloat16), INT4, evidence_of(correlated(500, 128, 49)))
    assert not grid.dequantize(quantized).any()
    assert (statistics.output_error, statistics.squared_error) == (0.0, 0.0)


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = gaussian(32, 128, 50)
    weight[7, 9] = torch.nan
    with pytest.raises(WeightError, match="row 7, column 9"):
        one(weight, INT4, evidence_of(correlated(500, 128, 51)))


def test_without_a_hessian_there_is_no_gptq() -> None:
    evidence = replace(evidence_of(correlated(50, 128, 52)), hessian=None)
    with pytest.raises(RecipeError, match="needs calibration"):
        one(gaussian(32, 128, 53), INT4, evidence)
    with pytest.raises(RecipeError, match="needs calibration"):
        gptq.quantize([gaussian(32, 128, 53)], INT4, clip_search=False, workspace=Workspace())
