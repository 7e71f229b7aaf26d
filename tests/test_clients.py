"""Finished artifacts in the hands of clients: transformers runs them; vLLM's and SGLang's rules are checked on the files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.client_check import check
from benchmarks.client_reference import write_reference
from quantkit.convert import convert, plan
from quantkit.formats import compressed_tensors
from quantkit.formats.compressed_tensors_clients import SGLANG, TGI, TRANSFORMERS_4_57, TRANSFORMERS_5_17, TRANSFORMERS_5_23, VLLM
from quantkit.grid import dequantize
from quantkit.llama4 import WeightMatrix, parse_config, units
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS, Recipe, Rule
from quantkit.scheme import Scheme
from tests.calibrated_artifact import write_calibrated
from tests.numpy_decoder import as_numpy, numpy_weight
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
TOLERANCE = 1e-3

INT4, KEEP_REST = Rule("int4-g128", FEED_FORWARD_ROLES), Rule("keep")
MIXED = {
    "int8-layer": Recipe("int8-layer", (Rule("int8-g128", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    "fp8-layer": Recipe("fp8-layer", (Rule("fp8-channel-dynamic", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    "kept-layer": Recipe("kept-layer", (Rule("keep", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    "int8-shared": Recipe("int8-shared", (Rule("int8-g128", ("shared_expert",)), INT4, KEEP_REST)),
    "int8-down": Recipe("int8-down", (Rule("int8-g128", ("shared_expert", "dense_mlp"), name=r"down_proj$"), INT4, KEEP_REST)),
    "attention": Recipe("attention", (Rule("fp8-channel-dynamic", (*FEED_FORWARD_ROLES, "attention")), KEEP_REST)),
    "static-attention": Recipe("static-attention", (Rule("fp8-tensor-static", (*FEED_FORWARD_ROLES, "attention")), KEEP_REST)),
    "output-only": Recipe("output-only", (Rule("int8-g128", ("attention",), name="o_proj"), INT4, KEEP_REST)),
}
RECIPES = {**PRESETS, **MIXED}
NAMES = {"scout": list(PRESETS), "maverick": list(RECIPES)}
every_artifact = pytest.mark.parametrize(("model", "name"), [(model, name) for model, names in NAMES.items() for name in names])

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Models:
    """Sources and the artifacts made from them, one directory per recipe."""

    sources: dict[str, Path]
    output: Path

    def artifact(self, model: str, name: str) -> Path:
        return self.output / model / name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    output = tmp_path_factory.mktemp("clients")
    write_tiny_model(output / "maverick-source", "maverick", seed=3)
    made = Models({"scout": DEMO, "maverick": output / "maverick-source"}, output)
    for model, source in made.sources.items():
        recipes = [RECIPES[name] for name in NAMES[model]]
        convert(source, [recipe for recipe in recipes if not recipe.needs_calibration], output / model, max_shard_bytes=4_000_000)
        for recipe in (recipe for recipe in recipes if recipe.needs_calibration):
            write_calibrated(source, recipe, output / model)
    return made


# ------------------------------------------------------------------------------------------------------------ transformers


@every_artifact
def test_transformers_loads_every_weight_and_computes_the_same(model: str, name: str, models: Models, tmp_path: Path) -> None:
    artifact = models.artifact(model, name)
    write_reference(artifact, models.sources[model], tmp_path)
    if name == "w4a16-rtn-asym" and version("compressed-tensors").startswith("0.20."):
        with pytest.raises(RuntimeError, match="mismatched"):  # as client_notes announce
            check(artifact, tmp_path)
        return
    result = check(artifact, tmp_path)
    assert result["problems"] == {}
    assert result["logits"] <= TOLERANCE
    if result["activations"] is not None:  # rounded at run time, by the client's own rule: near, and not the same
        assert 0 < result["activations"] < 0.5


def test_the_comparison_sees_experts_in_the_wrong_order(models: Models, tmp_path: Path) -> None:
    artifact = models.artifact("maverick", "w8a16")
    write_reference(artifact, models.sources["maverick"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
    tensors[name] = tensors[name].roll(1, dims=0)  # each expert gets the weights of its neighbour
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert check(artifact, tmp_path)["logits"] > TOLERANCE


# ------------------------------------------------------------------------------------------------- every stored matrix decoded


def load_artifact(artifact: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((artifact / "config.json").read_text())
    return config, {name: tensor for path in sorted(artifact.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def matrices(source: Path) -> list[WeightMatrix]:
    return [matrix for unit in units(parse_config(json.loads((source / "config.json").read_text()))) for matrix in unit.matrices]


@every_artifact
def test_decoders_agree_on_every_matrix(model: str, name: str, models: Models) -> None:
    """quantkit's decoder, the tests' own and the library's, on the bytes of the files."""
    config, stored = load_artifact(models.artifact(model, name))
    section = config["quantization_config"]
    groups = QuantizationConfig.model_validate(section).config_groups
    seen = set()
    for matrix in matrices(models.sources[model]):
        scheme = compressed_tensors.scheme_of(section, matrix.name)
        parts = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.rpartition(".")[0] == matrix.name}
        seen.update(f"{matrix.name}.{part}" for part in parts)
        if scheme is None:
            assert list(parts) == ["weight"] and tuple(parts["weight"].shape) == matrix.shape
            continue
        weight = dequantize(compressed_tensors.decode(matrix.name, stored, scheme))
        group = next(key for key, group in section["config_groups"].items() if scheme == group_scheme(group, matrix))
        own = numpy_weight(as_numpy(parts), section["config_groups"][group]["weights"])
        assert np.array_equal(own.view(np.uint32), weight.numpy().view(np.uint32)), matrix.name
        if matrix.layer is not None and matrix.layer <= 1:  # the same code path for every layer; the library is slow
            compressor = BaseCompressor.get_value_from_registry(groups[group].format or section["format"])
            assert torch.equal(compressor.decompress(parts, groups[group])["weight"], weight.to(torch.bfloat16)), matrix.name
    others = {key for key in stored if key not in seen}
    source: dict[str, torch.Tensor] = {}
    for path in models.sources[model].glob("*.safetensors"):
        source |= load_file(path)
    linear = re.compile(r"(?!vision_model\.).*(experts\.\w+|_proj\.weight)$")
    assert others == {key for key in source if not linear.match(key)}
    assert all(torch.equal(stored[key], source[key]) for key in others)


def group_scheme(group: dict[str, Any], matrix: WeightMatrix) -> Scheme | None:
    return compressed_tensors.scheme_of({"config_groups": {"only": {**group, "targets": ["Linear"]}}}, matrix.name)


# --------------------------------------------------------------------------------------------------- rules of vLLM and SGLang

GROUP_FIELDS = {"targets", "weights", "input_activations", "format"}
ARGUMENT_FIELDS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"}
SECTION_FIELDS = {"quant_method", "format", "quantization_status", "config_groups", "ignore"}
UNQUANTIZED = re.compile(r"router|vision_model|multi_modal_projector|lm_head|embed_tokens|norm")
EXPERT = re.compile(r"(?P<block>.*\.layers\.\d+\.feed_forward\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<part>\w+)$")
LAYOUTS = {  # parts of a module and their dtypes: what the loaders of both clients register
    "packed": {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"},
    "asymmetric": {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64", "weight_zero_point": "I32"},
    "fp8": {"weight": "F8_E4M3", "weight_scale": "BF16"},
    "fp8-static": {"weight": "F8_E4M3", "weight_scale": "BF16", "input_scale": "BF16"},
    "int8": {"weight": "I8", "weight_scale": "BF16"},
    "nvfp4": {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
    "mxfp4": {"weight_packed": "U8", "weight_scale": "U8"},
    "plain": {"weight": "BF16"},
}


@dataclass(frozen=True)
class Stored:
    """An artifact as a loader sees it: config, and dtype and shape of every tensor; values on demand."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    values: dict[str, torch.Tensor]

    @property
    def section(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config["quantization_config"]
        return section

    def layout(self, module: str) -> str:
        parts = {name.rpartition(".")[2]: dtype for name, (dtype, _) in self.tensors.items() if name.rpartition(".")[0] == module}
        return next((layout for layout, wanted in LAYOUTS.items() if wanted == parts), f"unknown {sorted(parts.items())}")


def read(artifact: Path) -> Stored:
    config, values = load_artifact(artifact)
    tensors = {}
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                tensors[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    return Stored(config, tensors, values)


def common_faults(stored: Stored) -> Iterator[str]:
    """What both clients need of any artifact."""
    text = stored.config.get("text_config", stored.config)
    hidden, width = text["hidden_size"], text["intermediate_size"]
    section = stored.section
    if not section.keys() <= SECTION_FIELDS or not all(group.keys() <= GROUP_FIELDS for group in section["config_groups"].values()):
        yield "a field that some client's model forbids"
    for group in section["config_groups"].values():
        if any(not group.get(part, {}).keys() <= ARGUMENT_FIELDS for part in ("weights", "input_activations")):
            yield "an argument that some client's model forbids"
    if not any("Linear" in group["targets"] for group in section["config_groups"].values()):
        yield "no group targets the literal Linear"
    experts: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    modules = {name.rpartition(".")[0] for name in stored.tensors}
    for name, (dtype, shape) in stored.tensors.items():
        if re.search(r"experts\.(gate_up_proj|down_proj)", name):
            yield f"{name} is fused, and one fused name turns the whole loader"
        if UNQUANTIZED.search(name) and dtype != "BF16":
            yield f"{name} is quantized, but built without quantization"
        if match := EXPERT.match(name):
            wanted = (hidden, width) if match["projection"] == "down_proj" else (width, hidden)
            factor = {"weight_packed": {"I32": 32, "U8": 8}.get(dtype, 0), "weight": 1}.get(match["part"])
            if factor == 1 and shape != wanted:
                yield f"{name} has {shape}, not [out, in] {wanted}"
            if match["part"] == "weight_shape" and tuple(stored.values[name].tolist()) != wanted:
                yield f"{name} says {stored.values[name].tolist()}, not {wanted}"
            if match["part"] == "weight_packed" and (shape[0] != wanted[0] or wanted[1] * 4 % shape[1] or wanted[1] <= shape[1]):
                yield f"{name} has {shape}, which is no packing of {wanted}"
            module = name.rpartition(".")[0]
            experts[match["block"]][int(match["expert"])][match["projection"]] = stored.layout(module)
        if name.endswith("_scale"):
            value = stored.values[name].float()
            if not torch.isfinite(value).all() or (value <= 0).any():
                yield f"{name} holds a scale that is not positive and finite"
    for block, found in experts.items():
        if sorted(found) != list(range(text["num_local_experts"])):
            yield f"{block} lacks experts"
        if any(set(projections) != {"gate_proj", "up_proj", "down_proj"} for projections in found.values()):
            yield f"{block} lacks projections"
        if len({layout for projections in found.values() for layout in projections.values()}) > 1:
            yield f"{block} mixes layouts, and the scheme is that of expert 0"
    for module in modules:
        for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if module.endswith(f".{first}") and "vision_model" not in module:
                fused = [module, *(module.replace(first, other) for other in others)]
                if len({stored.layout(part) for part in fused}) > 1:
                    yield f"{module} and its neighbours are merged, but have different layouts"
                divisors = {float(stored.values[f"{part}.weight_global_scale"]) for part in fused if stored.layout(part) == "nvfp4"}
                if len(divisors) > 1:
                    yield f"{module} and its neighbours have different global scales"
                static = [part for part in fused if stored.layout(part) == "fp8-static"]
                if len({float(stored.values[f"{part}.weight_scale"]) for part in static}) > 1:
                    yield f"{module} and its neighbours have different scales, and one is used for all"
        if stored.layout(module).startswith("unknown") and module.endswith("_proj") and "vision_model" not in module:
            yield f"{module} has the layout {stored.layout(module)}"


def query_key_layouts(stored: Stored) -> set[str]:
    modules = {name.rpartition(".")[0] for name in stored.tensors if not name.startswith("vision_model.")}
    # One scale for all rows needs no reordering.
    return {stored.layout(module) for module in modules if module.endswith((".q_proj", ".k_proj"))} - {"plain", "fp8-static"}


def vllm_faults(stored: Stored) -> Iterator[str]:
    yield from common_faults(stored)
    if "asymmetric" in query_key_layouts(stored):
        yield "zero points of q_proj and k_proj are not reordered"
    for group in stored.section["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations")
        kind = (weights["type"], weights["num_bits"], weights["strategy"])
        activations = (inputs["strategy"], inputs["dynamic"]) if inputs else None
        known = {
            ("int", 4, "group"): None,
            ("int", 4, "channel"): None,
            ("int", 8, "group"): None,
            ("int", 8, "channel"): ("token", True) if inputs else None,
            ("float", 8, "channel"): ("token", True),
            ("float", 8, "block"): ("group", True),
            ("float", 8, "tensor"): ("tensor", False),
            ("float", 4, "tensor_group"): None,
            ("float", 4, "group"): None,
        }
        if kind not in known or known[kind] != activations:
            yield f"no scheme for {weights} with {inputs}"


def sglang_faults(stored: Stored) -> Iterator[str]:
    yield from common_faults(stored)
    if query_key_layouts(stored):
        yield "scales of q_proj and k_proj are not reordered"
    mixed = stored.section["format"] == "mixed-precision"
    blocks: dict[str, str] = {}
    for name in stored.tensors:
        if match := EXPERT.match(name):
            blocks.setdefault(match["block"], name.rpartition(".")[0])
    for expert in blocks.values():
        layout = stored.layout(expert)
        if layout in ("packed", "asymmetric"):
            _, inputs = stored.values[f"{expert}.weight_shape"].tolist()
            bits = 32 * stored.tensors[f"{expert}.weight_packed"][1][1] // inputs
            group = inputs // stored.tensors[f"{expert}.weight_scale"][1][1]
            channel = any(group["weights"]["strategy"] == "channel" for group in stored.section["config_groups"].values())
            if mixed:
                yield f"{expert} is packed, but the top-level format is mixed-precision"
            if layout == "asymmetric":
                yield f"{expert} has zero points, which are read in AWQ's order"
            if bits != 4 or group not in (32, 128) or channel:
                yield f"{expert} runs on Marlin only, which scales the output of an expert"
        if layout == "nvfp4":
            yield f"{expert} runs on Marlin only, which scales the output of an expert"
        if layout == "int8":
            yield f"{expert} has INT8 activations, which run on NPUs only"
        if layout == "mxfp4":
            yield f"{expert} is MXFP4, which has no linear scheme"


@every_artifact
def test_rules_of_vllm_and_sglang_hold_on_the_files_as_the_notes_say(model: str, name: str, models: Models) -> None:
    stored = read(models.artifact(model, name))
    assert list(common_faults(stored)) == []
    [artifact] = plan(models.sources[model], [RECIPES[name]]).artifacts
    notes = {note.client: note for note in artifact.notes}
    for client, faults in ((VLLM, vllm_faults), (SGLANG, sglang_faults)):
        found = list(faults(stored))
        assert notes[client].loads == (not found), (client, found, notes[client].why)


def test_the_rules_see_a_fault(models: Models) -> None:
    stored, static = read(models.artifact("maverick", "nvfp4a16")), read(models.artifact("maverick", "fp8-static"))
    expert = "language_model.model.layers.1.feed_forward.experts"
    router = expert.replace("experts", "router.weight")
    cases: dict[str, dict[str, Any]] = {
        "fused": {"tensors": {**stored.tensors, f"{expert}.gate_up_proj": ("BF16", (1,))}},
        "built without quantization": {"tensors": {**stored.tensors, router: ("U8", (1,))}},
        "lacks experts": {"tensors": {key: value for key, value in stored.tensors.items() if not key.startswith(f"{expert}.5.")}},
        "global scales": {"values": {**stored.values, f"{expert}.2.up_proj.weight_global_scale": torch.tensor([3.0])}},
        "no packing": {"tensors": {**stored.tensors, f"{expert}.2.up_proj.weight_packed": ("U8", (128, 128))}},
        "one is used for all": {
            "values": {**static.values, f"{expert}.2.up_proj.weight_scale": torch.tensor([3.0])},
            "tensors": static.tensors,
        },
        "positive and finite": {"values": {**stored.values, f"{expert}.2.up_proj.weight_scale": torch.tensor([0.0])}},
    }
    for fault, change in cases.items():
        changed = Stored(**{"config": stored.config, "tensors": stored.tensors, "values": stored.values, **change})
        assert any(fault in found for found in common_faults(changed)), fault


# ------------------------------------------------------------------------------------------------------------- client notes


@pytest.mark.parametrize(
    ("name", "refusing", "reason"),
    [
        ("fp8-dynamic", set(), ""),
        ("fp8-static", set(), ""),
        ("static-attention", set(), ""),
        ("w4a16-rtn", set(), ""),
        ("w4a16-rtn-asym", {SGLANG, TRANSFORMERS_5_23, TRANSFORMERS_4_57}, "zero points"),
        ("mxfp4a16", {SGLANG, TRANSFORMERS_4_57}, "(?i)mxfp4"),
        ("w8a8", {SGLANG}, "NPU"),
        ("w8a16", {SGLANG}, "router score"),
        ("fp8-layer", {SGLANG, TRANSFORMERS_4_57}, "mixe"),
        ("attention", {SGLANG}, "q_proj and k_proj"),
        ("output-only", set(), ""),
    ],
)
def test_notes_name_the_clients_that_cannot_load_an_artifact(name: str, refusing: set[str], reason: str) -> None:
    [artifact] = plan(DEMO, [RECIPES[name]]).artifacts
    notes = {note.client: note for note in artifact.notes}
    assert list(notes) == [VLLM, SGLANG, TGI, TRANSFORMERS_5_23, TRANSFORMERS_5_17, TRANSFORMERS_4_57]
    assert {client for client, note in notes.items() if not note.loads} == {*refusing, TGI}
    assert all(re.search(reason, notes[client].why) for client in refusing)
    assert all(note.why for note in notes.values() if not note.loads)


def test_notes_on_quantized_attention_name_what_goes_wrong() -> None:
    def note(client: str, scheme: str) -> str:
        recipe = Recipe("attention", (Rule(scheme, ("attention",)), KEEP_REST))
        [artifact] = plan(DEMO, [recipe]).artifacts
        found = next(note for note in artifact.notes if note.client == client)
        return f"{found.loads} {found.why}"

    assert "blocks do not allow" in note(VLLM, "fp8-block-dynamic") and note(VLLM, "fp8-block-dynamic").startswith("False")
    assert "not their zero points" in note(VLLM, "int4-g128-asym") and note(VLLM, "int4-g128-asym").startswith("False")
    assert note(VLLM, "int8-channel").startswith("True quantized q_proj and k_proj need")
    assert all(note(SGLANG, scheme).startswith("False") for scheme in ("int8-channel", "fp8-channel-dynamic", "int4-g128"))
    assert note(TRANSFORMERS_4_57, "fp8-block-dynamic").startswith("False")  # k_proj is one block high in the tiny model
