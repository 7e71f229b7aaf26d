"""Smoothing: exact in arithmetic, undone by verify, and better where activations have outliers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from speaking_models import write_random_texts, write_speaking_model

from quantkit import ArtifactError, CalibrationError, CalibrationOptions, Recipe, RecipeError, Rule, convert, verify
from quantkit.evidence import Evidence
from quantkit.recipe import FEED_FORWARD_ROLES
from quantkit.smoothing import found_factors, smooth, smoothing_factors


def test_factors_are_powers_of_two_that_level_the_peaks() -> None:
    peak = torch.tensor([0.0, 0.5, 1.0, 4.0, 64.0, 1e9])
    factors = smoothing_factors(peak)
    assert torch.equal(torch.log2(factors), torch.log2(factors).round())
    assert float(factors[0]) == float(factors[1])  # never active: like the least active
    assert bool((factors[1:] >= factors[:-1]).all()) and float(factors.max()) <= 256
    smoothed = peak[1:5] / factors[1:5]
    assert float(smoothed.max() / smoothed.min()) < float(peak[4] / peak[1]) / 4
    assert torch.equal(smoothing_factors(torch.zeros(4)), torch.ones(4))


def test_outputs_stay_what_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(24, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    down = torch.randn(24, 16, generator=generator).to(torch.bfloat16).t()  # as experts are stored
    rows = torch.randn(50, 16, generator=generator, dtype=torch.float64)

    def inner(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(rows @ gate.double().t()) * (rows @ up.double().t())

    middle = inner(gate, up)
    hessian = (middle.t() @ middle / 50).float()
    evidence = Evidence(50, middle.square().mean(0).float(), middle.abs().amax(0).float(), hessian, rows=50.0)
    factors = smoothing_factors(evidence.peak)
    assert float(factors.max()) > float(factors.min())
    (same, other), unchanged = smooth([gate, up], ["gate_proj", "up_proj"], factors, evidence)
    (narrow,), changed = smooth([down], ["down_proj"], factors, evidence)
    assert unchanged is evidence and torch.equal(same, gate) and other.dtype == narrow.dtype == torch.bfloat16
    assert torch.equal(inner(same, other) @ narrow.double().t(), middle @ down.double().t())
    smoothed = inner(same, other)
    torch.testing.assert_close(changed.hessian, (smoothed.t() @ smoothed / 50).float())
    torch.testing.assert_close(changed.peak, smoothed.abs().amax(0).float())
    torch.testing.assert_close(changed.mean_square, smoothed.square().mean(0).float())
    assert torch.equal(found_factors(up, other * 1.05), 1 / factors)  # whatever rounding does to it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoothing") / "model"
    write_speaking_model(path, "maverick")
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    texts = write_random_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")
    return CalibrationOptions(texts, samples=4, sequence_length=64)


def test_a_smoothed_artifact_verifies_and_a_tampered_one_does_not(
    source: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    [made] = convert(source, "w8a8", tmp_path, calibration=options).artifacts
    entries = json.loads((made.directory / "ledger.json").read_text())["tensors"]
    assert {entry["smooth"] for entry in entries if entry["applied"] == "int8-channel-dynamic"} == {True}
    assert verify(made.directory, source=source, sample=1000).sampled > 50
    [file] = made.directory.glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("experts.0.up_proj.weight_scale"))
    tensors[name] = tensors[name].clone()
    tensors[name][3] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="relative error to the source"):
        verify(made.directory, source=source, sample=1000)


def test_smoothing_is_for_whole_mlps_and_for_passes_that_know_what_comes(
    source: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    attention = Recipe("attention", (Rule("int8-channel-dynamic", roles=("attention",), smooth=True), Rule("keep")))
    half = Recipe(
        "half",
        (
            Rule("int8-channel-dynamic", name="up_proj", smooth=True),
            Rule("int8-channel-dynamic", roles=FEED_FORWARD_ROLES),
            Rule("keep"),
        ),
    )
    for recipe, message in ((attention, "for gate, up and down projections only"), (half, "smooth both or neither")):
        with pytest.raises(RecipeError, match=message):
            convert(source, recipe, tmp_path, calibration=options)
    assert not any(tmp_path.iterdir())
    sequential = CalibrationOptions(options.corpus, samples=4, sequence_length=64, sequential=True)
    with pytest.raises(CalibrationError, match="leave out --sequential"):
        convert(source, "w8a8", tmp_path / "sequential", calibration=sequential)
    with pytest.raises(RecipeError, match="keeps them as they are"):
        Rule("keep", smooth=True)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_outliers_of_activations_cost_less(method: str, source: Path, options: CalibrationOptions, tmp_path: Path) -> None:
    """Against float64 outputs, with activations rounded to INT8 per token as clients do."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 64, generator=generator) * torch.exp(1.5 * torch.randn(64, generator=generator))
    down = torch.randn(48, 64, generator=generator)
    factors = smoothing_factors(rows.abs().amax(0))

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(1, keepdim=True) / 127.5
        return (values / scale).round().clamp(-128, 127) * scale

    plain = rounded(rows) @ rounded(down).t()
    smoothed = rounded(rows / factors) @ rounded(down * factors).t()
    exact = rows.double() @ down.double().t()
    assert float((smoothed - exact).norm()) < 0.8 * float((plain - exact).norm())
    scheme = "int8-channel" if method == "rtn" else "int4-g128"
    recipe = Recipe("smooth", (Rule(scheme, roles=FEED_FORWARD_ROLES, method=method, smooth=True), Rule("keep")))
    [made] = convert(source, recipe, tmp_path, calibration=options).artifacts
    assert all(check.ok for check in verify(made.directory, source=source, sample=1000).checks)
