"""Rounded activations against compressed-tensors itself, bit for bit, and inside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.client_check import load, logits, token_ids, without_activations
from quantkit.formats.compressed_tensors_config import quantization_config
from quantkit.grid import QuantizedTensor, cover_peak, fit, snap
from quantkit.kernels.activations import round_in_place, rounded_inputs, rounds_inputs, same_inputs
from quantkit.llama4 import WeightMatrix
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS, Recipe, Rule
from quantkit.scheme import parse_scheme, scheme_names
from tests.calibrated_artifact import write_calibrated
from tests.test_static_activations import stored
from tests.tiny_models import write_tiny_model

DYNAMIC = ("fp8-channel-dynamic", "int8-channel-dynamic", "fp8-block-dynamic")
STATIC = "fp8-tensor-static"
KINDS = ("normal", "heavy", "zeros", "tiny", "denormal", "huge", "signed zeros", "halves")


def weight_of(name: str, columns: int = 256, peak: float = 4.0) -> QuantizedTensor:
    scheme = parse_scheme(name)
    assert scheme is not None
    values = torch.randn(128, columns, generator=torch.Generator().manual_seed(columns))
    scale, zero_point = fit(values, scheme)
    quantized = snap(values, scheme, scale, zero_point)
    if not scheme.static_activations:
        return quantized
    return QuantizedTensor(scheme, quantized.codes, scale, input_scale=cover_peak(peak))


def inputs_of(kind: str, tokens: int, columns: int, seed: int) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "heavy":
        return x**5
    if kind == "halves":  # ties between two codes of every family
        return (x * 64).round() / 2
    return x * {"zeros": 0.0, "tiny": 1e-30, "denormal": 1e-42, "huge": 1e37, "signed zeros": -0.0}.get(kind, 1.0)


def library(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """What compressed-tensors makes of one sequence of tokens, under the config that we write."""
    matrix = WeightMatrix("model.q_proj", (128, x.shape[-1]), "attention", 0, "q_proj", "model.q_proj.weight")
    section = quantization_config({matrix: weight.scheme})
    [group] = section["config_groups"].values()
    module: Any = torch.nn.Linear(x.shape[-1], 128)
    module.quantization_status = QuantizationStatus.FROZEN
    if weight.input_scale is not None:
        module.input_scale = weight.input_scale.float()  # parameters have the dtype of the model
    result: torch.Tensor = forward_quantize(module, x[None], "input", QuantizationArgs(**group["input_activations"]))
    return result[0]


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.int32), wanted.contiguous().view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*DYNAMIC, STATIC])
def test_equals_the_library(name: str, kind: str) -> None:
    weight, x = weight_of(name), inputs_of(kind, 9, 256, 1)
    before = x.clone()
    assert same_bits(rounded_inputs(x, weight), library(x, weight))
    assert same_bits(x, before)
    round_in_place(x, weight)
    assert same_bits(x, library(before, weight))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*DYNAMIC, STATIC]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.integers(-126, 126),
    st.floats(2.0**-100, 2.0**100),
)
def test_equals_the_library_for_any_size(name: str, tokens: int, blocks: int, seed: int, exponent: int, peak: float) -> None:
    x = torch.randn(tokens, 128 * blocks, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = weight_of(name, 128 * blocks, peak)
    wanted = library(x, weight)
    assert same_bits(rounded_inputs(x, weight), wanted)
    round_in_place(x, weight)
    assert same_bits(x, wanted)


@pytest.mark.parametrize("columns", [1, 15, 16, 37])
@pytest.mark.parametrize("name", [*DYNAMIC[:2], STATIC])
def test_rows_of_any_length(name: str, columns: int) -> None:
    x, weight = inputs_of("heavy", 5, columns, 1), weight_of(name, columns)
    wanted = library(x, weight)
    assert same_bits(rounded_inputs(x, weight), wanted)
    round_in_place(x, weight)
    assert same_bits(x, wanted)


def test_a_token_does_not_depend_on_others() -> None:
    x = inputs_of("heavy", 5, 256, 3)
    for name in DYNAMIC:
        weight = weight_of(name)
        together = rounded_inputs(x, weight)
        assert all(same_bits(rounded_inputs(x[row : row + 1], weight)[0], together[row]) for row in range(5))


def test_other_weights_take_inputs_as_they_are() -> None:
    x = torch.randn(2, 256)
    plain = [name for name in scheme_names() if name not in (*DYNAMIC, STATIC, "keep", "nvfp4", "mxfp4")]
    for weight in [weight_of(name) for name in plain] + [torch.randn(128, 256).bfloat16()]:
        assert not rounds_inputs(weight) and rounded_inputs(x, weight) is x
    assert rounded_inputs(x[:0], weight_of(DYNAMIC[0])).shape == (0, 256)
    assert rounded_inputs(x.bfloat16(), weight_of(DYNAMIC[0])).dtype == torch.bfloat16


def test_which_weights_share_rounded_inputs() -> None:
    token, block, static, other = weight_of(DYNAMIC[0]), weight_of(DYNAMIC[2]), weight_of(STATIC), weight_of(STATIC, peak=9.0)
    plain, floating = weight_of("int4-g128"), torch.zeros(128, 256)
    assert same_inputs(token, token) and same_inputs(static, weight_of(STATIC)) and same_inputs(plain, floating)
    assert not same_inputs(token, block) and not same_inputs(static, other) and not same_inputs(token, floating)
    assert not same_inputs(plain, static)


SERVED = {
    "fp8-channel": Recipe("fp8-channel", (Rule("fp8-channel-dynamic", FEED_FORWARD_ROLES), Rule("keep"))),
    "int8-channel": Recipe("int8-channel", (Rule("int8-channel-dynamic", FEED_FORWARD_ROLES), Rule("keep"))),
    "fp8-block": PRESETS["fp8-block"],
    "fp8-static": PRESETS["fp8-static"],
}


@pytest.mark.parametrize("name", SERVED)
def test_inside_transformers(name: str, tmp_path: Path) -> None:
    """The model as served gives the same logits as one that has plain weights and inputs rounded here.

    Inputs of experts get a dimension for the batch first, so that the library takes a scale for each token.
    """
    source = tmp_path / "source"
    source.mkdir()
    write_tiny_model(source, "maverick", seed=3)
    artifact = write_calibrated(source, SERVED[name], tmp_path)
    scheme = parse_scheme(SERVED[name].rules[0].scheme)
    assert scheme is not None
    (tmp_path / "plain").mkdir()
    model, problems = load(artifact, torch.float32)
    assert problems == {}
    oracle, _ = load(without_activations(artifact, tmp_path / "plain"), torch.float32)
    scales = {key: value for key, value in stored(artifact).items() if key.endswith(".input_scale")}
    seen: set[str] = set()

    def as_batch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].view(-1, *inputs[0].shape[-2:]),)

    def as_rows(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output[0]

    def rounding(module_name: str) -> Any:
        weight = QuantizedTensor(scheme, torch.empty(0), torch.empty(0), input_scale=scales.get(f"{module_name}.input_scale"))

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen.add(module_name)
            return (rounded_inputs(inputs[0], weight),)

        return hook

    for module_name, module in model.named_modules():
        if hasattr(module, "quantization_scheme") and "expert" in module_name:
            module.register_forward_pre_hook(as_batch)
            module.register_forward_hook(as_rows)
    for module_name, module in oracle.named_modules():
        if hasattr(module, "quantization_scheme"):
            module.register_forward_pre_hook(rounding(module_name))
    ids = token_ids(model)
    assert torch.equal(logits(oracle, ids), logits(model, ids))
    assert len(seen) > 3
