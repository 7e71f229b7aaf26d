"""Tensors, packing, files and config of the compressed-tensors format, against a decoder of its own and against the library."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quantkit.errors import ArtifactError, RecipeError
from quantkit.formats import compressed_tensors as form
from quantkit.formats.base import OutputTensor
from quantkit.formats.compressed_tensors_config import format_name, held
from quantkit.grid import QuantizedTensor, dequantize
from quantkit.llama4 import WeightMatrix, parse_config, units
from quantkit.scheme import BLOCK_SIZE, Scheme, parse_scheme, scheme_names
from quantkit.workspace import Workspace
from tests.numpy_decoder import as_numpy, numpy_weight
from tests.tiny_models import tiny_config

SCHEMES = [scheme for scheme in map(parse_scheme, scheme_names()) if scheme is not None and held(scheme)]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
NAME = "language_model.model.layers.0.feed_forward.experts.3.gate_proj"
SHAPE = (256, 384)


def matrix(shape: tuple[int, int]) -> WeightMatrix:
    return WeightMatrix(NAME, shape, "routed_expert", 0, "gate_proj", "fused", 3, (0, shape[0]))


def random_quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Every code and every kind of scale, drawn at random."""
    random = torch.Generator().manual_seed(seed)
    scale_shape = scheme.scale_shape(*shape)
    if scheme.number == "fp8":
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x7E  # no NaN
        codes = codes.view(torch.float8_e4m3fn)
    elif scheme.number == "fp4":
        codes = torch.randint(0, 16, shape, generator=random, dtype=torch.uint8)
    else:
        low, high = {"int4": (-8, 8), "int8": (-128, 128)}[scheme.number]
        codes = torch.randint(low, high, shape, generator=random, dtype=torch.int8)
    if scheme.scale_number == "e8m0":
        scale = torch.randint(100, 140, scale_shape, generator=random, dtype=torch.uint8)
    else:
        scale = torch.rand(scale_shape, generator=random) + 0.01
        scale = (scale * 400).to(torch.float8_e4m3fn) if scheme.scale_number == "fp8" else scale.to(torch.bfloat16)
    zero_point = None if scheme.symmetric else torch.randint(-8, 8, scale_shape, generator=random, dtype=torch.int8)
    input_scale = torch.tensor([0.4375]).bfloat16() if scheme.static_activations else None
    return QuantizedTensor(scheme, codes, scale, zero_point, torch.tensor([137.25]) if scheme.global_scale else None, input_scale)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------------------------------- against the decoder of the tests


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = form.quantization_config({matrix(SHAPE): scheme})["config_groups"]["group_0"]["weights"]
    return weights


@every_scheme
def test_an_independent_decoder_reads_the_same_values(scheme: Scheme) -> None:
    quantized = random_quantized(scheme, SHAPE)
    found = numpy_weight(as_numpy(form.encode(NAME, quantized)), weight_arguments(scheme))
    assert np.array_equal(found.view(np.uint32), dequantize(quantized).numpy().view(np.uint32))


# ------------------------------------------------------------------------------------------------------ encode and decode


@every_scheme
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 1000))
def test_decode_is_the_reverse_of_encode(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    quantized = random_quantized(scheme, (rows * 128, columns * 128), seed)
    found = form.decode(NAME, form.encode(NAME, quantized), scheme)
    assert torch.equal(raw(found.codes), raw(quantized.codes)) and found.codes.dtype == quantized.codes.dtype
    assert torch.equal(raw(found.scale), raw(quantized.scale))
    for field in ("zero_point", "global_scale", "input_scale"):
        wanted, got = getattr(quantized, field), getattr(found, field)
        assert (wanted is None) == (got is None) and (wanted is None or torch.equal(wanted, got))


@every_scheme
@pytest.mark.parametrize("shape", [(128, 128), SHAPE, (640, 256)])
def test_encode_writes_what_was_planned(scheme: Scheme, shape: tuple[int, int]) -> None:
    planned = {tensor.name: tensor for tensor in form.output_tensors(matrix(shape), scheme, "BF16")}
    encoded = form.encode(NAME, random_quantized(scheme, shape))
    assert encoded.keys() == planned.keys()
    for name, tensor in encoded.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (form.TORCH_DTYPES[planned[name].dtype], planned[name].shape)
        assert tensor.is_contiguous() and tensor.nbytes == planned[name].nbytes
        assert re.match(rf"{re.escape(NAME)}\.(weight|input_scale)", name)


@pytest.mark.parametrize("name", ["int4-g128", "int8-channel", "nvfp4"])
def test_encode_reuses_a_workspace_and_takes_any_layout_of_codes(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme is not None
    quantized = random_quantized(scheme, SHAPE)
    strided = QuantizedTensor(scheme, quantized.codes.t().contiguous().t(), quantized.scale, None, quantized.global_scale)
    workspace = Workspace()
    expected, found = form.encode(NAME, quantized), form.encode(NAME, strided, workspace)
    assert all(torch.equal(raw(expected[key]), raw(found[key])) for key in expected)
    assert workspace.nbytes == expected[f"{NAME}.weight_packed"].nbytes
    again = form.encode(NAME, quantized, workspace)
    assert again[f"{NAME}.weight_packed"].data_ptr() == found[f"{NAME}.weight_packed"].data_ptr()


def test_a_kept_matrix_is_stored_as_it_is() -> None:
    assert form.output_tensors(matrix(SHAPE), None, "F16") == [OutputTensor(f"{NAME}.weight", "F16", SHAPE)]


def test_layouts_are_those_of_the_public_releases() -> None:
    def layout(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = form.output_tensors(matrix((256, 512)), parse_scheme(name), "BF16")
        return {tensor.name.rpartition(".")[2]: (tensor.dtype, tensor.shape) for tensor in tensors}

    packed = {"weight_packed": ("I32", (256, 64)), "weight_scale": ("BF16", (256, 4)), "weight_shape": ("I64", (2,))}
    assert layout("int4-g128") == packed
    assert layout("int4-g128-asym") == {**packed, "weight_zero_point": ("I32", (32, 4))}
    assert layout("int8-g128") == {**packed, "weight_packed": ("I32", (256, 128))}
    assert layout("fp8-channel-dynamic") == {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("BF16", (256, 1))}
    assert layout("fp8-block-dynamic") == {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("BF16", (2, 4))}
    static = {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("BF16", (1,)), "input_scale": ("BF16", (1,))}
    assert layout("fp8-tensor-static") == static
    assert layout("int8-channel-dynamic") == {"weight": ("I8", (256, 512)), "weight_scale": ("BF16", (256, 1))}
    fp4 = {"weight_packed": ("U8", (256, 256)), "weight_scale": ("F8_E4M3", (256, 32)), "weight_global_scale": ("F32", (1,))}
    assert layout("nvfp4") == fp4
    assert layout("mxfp4") == {"weight_packed": ("U8", (256, 256)), "weight_scale": ("U8", (256, 16))}


@every_scheme
def test_decode_names_what_is_wrong(scheme: Scheme) -> None:
    good = form.encode(NAME, random_quantized(scheme, SHAPE))
    for name, tensor in good.items():
        with pytest.raises(ArtifactError, match=re.escape(name)):
            form.decode(NAME, {key: value for key, value in good.items() if key != name}, scheme)
        for wrong in (tensor.view(torch.uint8).to(torch.float64), tensor.reshape(-1)[:1].reshape(1, 1, 1)):
            with pytest.raises(ArtifactError, match=re.escape(NAME)):
                form.decode(NAME, {**good, name: wrong}, scheme)


def test_decode_refuses_a_weight_shape_that_lies() -> None:
    scheme = parse_scheme("int4-g128")
    assert scheme is not None
    good = form.encode(NAME, random_quantized(scheme, SHAPE))
    with pytest.raises(ArtifactError, match=r"weight_shape says \[256, 256\]"):
        form.decode(NAME, {**good, f"{NAME}.weight_shape": torch.tensor([256, 256])}, scheme)


# ------------------------------------------------------------------------------------------------------------ the library


def library(scheme: Scheme) -> tuple[Any, Any]:
    """The library's compressor and its scheme, built from our own config."""
    config = QuantizationConfig.model_validate(form.quantization_config({matrix(SHAPE): scheme}))
    return BaseCompressor.get_value_from_registry(config.format), config.config_groups["group_0"]


@every_scheme
def test_the_library_decompresses_to_the_same_values(scheme: Scheme) -> None:
    quantized = random_quantized(scheme, SHAPE)
    stored = {name.rpartition(".")[2]: tensor for name, tensor in form.encode(NAME, quantized).items()}
    compressor, arguments = library(scheme)
    found = compressor.decompress(stored, arguments)["weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dequantize(quantized).to(torch.bfloat16))


@every_scheme
def test_the_library_packs_the_same_bits(scheme: Scheme) -> None:
    quantized = random_quantized(scheme, SHAPE)
    if scheme.number == "fp4":
        quantized.codes[quantized.codes == 8] = 0  # on a CPU the library turns minus zero into zero
    ours = {name.rpartition(".")[2]: tensor for name, tensor in form.encode(NAME, quantized).items()}
    scale = torch.exp2(quantized.scale.float() - 127) if scheme.scale_number == "e8m0" else quantized.scale.float()
    state = {"weight": dequantize(quantized), "weight_scale": scale.reshape(ours["weight_scale"].shape)}
    if quantized.zero_point is not None:
        state["weight_zero_point"] = quantized.zero_point
    if quantized.global_scale is not None:
        state["weight_global_scale"] = quantized.global_scale
    compressor, arguments = library(scheme)
    theirs = compressor.compress(state, arguments)
    for name in ours.keys() - {"weight_scale", "input_scale"}:
        assert torch.equal(raw(theirs[name]), raw(ours[name])), name
    assert torch.equal(theirs["weight_scale"].float(), ours["weight_scale"].float())


# ------------------------------------------------------------------------------------------------------------------ files


def tensor_list(count: int, rows: int) -> list[OutputTensor]:
    scheme = parse_scheme("int4-g128")
    names = [NAME.replace("experts.3", f"experts.{number}") for number in range(count)]
    shapes = [(rows * (1 + number % 3), 128) for number in range(count)]
    return [
        tensor
        for name, shape in zip(names, shapes, strict=True)
        for tensor in form.output_tensors(WeightMatrix(name, shape, "routed_expert", 0, "gate_proj", "fused"), scheme, "BF16")
    ]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), rows=st.integers(1, 40), limit=st.integers(1, 200_000))
def test_files_hold_every_tensor_once_within_the_limit(count: int, rows: int, limit: int) -> None:
    tensors = tensor_list(count, rows)
    files = form.place(tensors, limit)
    assert [tensor for file in files for tensor in file.tensors] == tensors
    numbered = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert [file.name for file in files] == (numbered if len(files) > 1 else ["model.safetensors"])
    modules = [{tensor.name.rpartition(".")[0] for tensor in file.tensors} for file in files]
    assert sum(map(len, modules)) == count  # no module is cut in two
    for file, module in zip(files, modules, strict=True):
        assert file.size <= limit or len(module) == 1
        assert file.size == len(file.header) + sum(tensor.nbytes for tensor in file.tensors)


def test_files_are_filled_before_the_next_is_begun() -> None:
    tensors = tensor_list(30, 64)
    limit = 40_000
    files = form.place(tensors, limit)
    assert len(files) > 3
    for file, following in itertools.pairwise(files):
        first = following.tensors[0].name.rpartition(".")[0]
        module = [tensor for tensor in following.tensors if tensor.name.startswith(first)]
        assert file.size + sum(tensor.nbytes + 300 for tensor in module) > limit


def test_planned_files_are_safetensors_files(tmp_path: Path) -> None:
    [file] = form.place(tensor_list(5, 8), 10**9)
    (tmp_path / file.name).write_bytes(file.header + bytes(file.size - len(file.header)))
    with safe_open(tmp_path / file.name, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {tensor.name for tensor in file.tensors}
        for tensor in file.tensors:
            assert opened.get_slice(tensor.name).get_shape() == list(tensor.shape)


def test_index_names_every_tensor_and_the_total_size() -> None:
    assert form.index_text(form.place(tensor_list(3, 8), 10**9)) is None
    tensors = tensor_list(12, 64)
    files = form.place(tensors, 30_000)
    index = json.loads(form.index_text(files) or "")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors)}
    assert index["weight_map"] == {tensor.name: file.name for file in files for tensor in file.tensors}


# ----------------------------------------------------------------------------------------------------------------- config

VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4)
STYLES = st.tuples(st.sampled_from([None, 0, 1, 2, 4, "\t"]), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\n", " \n"]))


@settings(max_examples=150, deadline=None)
@given(source=st.dictionaries(st.text(max_size=6), VALUES, max_size=5), style=STYLES)
def test_config_text_adds_one_member_and_changes_nothing_else(source: dict[str, Any], style: tuple[Any, str, str]) -> None:
    source.pop("quantization_config", None)
    indent, newline, end = style
    text = json.dumps(source, indent=indent).replace("\n", newline) + end
    section = {"format": "pack-quantized", "ignore": ["re:.*lm_head"]}
    result = form.config_text(text, section)
    assert json.loads(result) == {**source, "quantization_config": section}
    assert list(json.loads(result)) == [*source, "quantization_config"]
    if source:
        kept = text.rstrip()[:-1].rstrip()  # up to the end of the last member
        assert result.startswith(kept) and result.endswith(text[len(kept) :])


def test_config_text_keeps_spelling_and_style() -> None:
    text = '{\n  "rope_theta": 500000.0,\n  "eps": 1e-05,\n  "big": 1E400\n}\n'
    assert form.config_text(text, {"format": "x"}) == (
        '{\n  "rope_theta": 500000.0,\n  "eps": 1e-05,\n  "big": 1E400,\n  "quantization_config": {\n    "format": "x"\n  }\n}\n'
    )
    replaced = form.config_text('{"a": 1, "quantization_config": null, "b": 2}', {"format": "x"})
    assert replaced == '{"a": 1, "quantization_config": {"format": "x"}, "b": 2}'


BASE_IGNORE = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
GROUPS: dict[str, tuple[str, int, str, dict[str, Any], dict[str, Any] | None]] = {  # what three generations of clients load
    "int4-g128": ("pack-quantized", 4, "int", {"strategy": "group", "group_size": 128}, None),
    "int4-channel": ("pack-quantized", 4, "int", {"strategy": "channel"}, None),
    "int8-g128": ("pack-quantized", 8, "int", {"strategy": "group", "group_size": 128}, None),
    "int8-channel-dynamic": ("int-quantized", 8, "int", {"strategy": "channel"}, {"strategy": "token"}),
    "fp8-channel-dynamic": ("float-quantized", 8, "float", {"strategy": "channel"}, {"strategy": "token"}),
    "fp8-block-dynamic": ("float-quantized", 8, "float", BLOCK, {"strategy": "group", "group_size": 128}),
    "fp8-tensor-static": ("float-quantized", 8, "float", {"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
    "nvfp4": ("nvfp4-pack-quantized", 4, "float", {"strategy": "tensor_group", "group_size": 16}, None),
    "mxfp4": ("mxfp4-pack-quantized", 4, "float", {"strategy": "group", "group_size": 32}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_config_is_the_minimal_one(name: str) -> None:
    format_text, bits, kind, weights, inputs = GROUPS[name]
    number = {"num_bits": bits, "type": kind, "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**number, **weights, "dynamic": False}}
    if inputs:
        group["input_activations"] = {**number, "dynamic": True, **inputs}
    assert form.quantization_config({matrix(SHAPE): parse_scheme(name)}) == {
        "quant_method": "compressed-tensors",
        "format": format_text,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": BASE_IGNORE,
    }


@every_scheme
def test_scheme_of_reads_back_every_scheme_and_what_other_tools_add(scheme: Scheme) -> None:
    config = form.quantization_config({matrix(SHAPE): scheme})
    assert form.scheme_of(config, NAME) == scheme
    for other in ("lm_head", "language_model.model.layers.0.self_attn.q_proj", "vision_model.model.layers.0.mlp.fc1"):
        assert form.scheme_of(config, other) is None
    for other in ("embed_tokens", "norm", "layers.0.input_layernorm"):
        assert form.scheme_of(config, f"language_model.model.{other}") is None
    config["config_groups"]["group_0"]["weights"] |= {"observer": "mse", "actorder": None, "scale_dtype": None, "zp_dtype": None}
    assert form.scheme_of(config, NAME) == scheme
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    with pytest.raises(ArtifactError, match="no scheme of quantkit"):
        form.scheme_of(config, NAME)


def test_scheme_of_refuses_a_broken_config() -> None:
    with pytest.raises(ArtifactError, match="config_groups"):
        form.scheme_of({}, NAME)
    with pytest.raises(ArtifactError, match="not a regular expression"):
        form.scheme_of({"ignore": ["re:("]}, NAME)


# ------------------------------------------------------------------------- mixed schemes: what each client resolves by name

CONFIG = parse_config(tiny_config("maverick", num_hidden_layers=5))
MATRICES = [item for unit in units(CONFIG) for item in unit.matrices]
CHOICES = [None, *(parse_scheme(name) for name in ("int4-g128", "int8-channel", "fp8-channel-dynamic", "int4-g32", "int8-g128"))]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # of vLLM and SGLang alike


def fused_part(item: WeightMatrix) -> tuple[int | None, str]:
    """What must have one scheme: all experts of a layer, q/k/v, gate/up."""
    if item.role == "routed_expert":
        return item.layer, "experts"
    name = next((fused for fused, parts in FUSED.items() if item.projection in parts), item.projection)
    return item.layer, item.name.rpartition(".")[0] + "." + name


PARTS = sorted({fused_part(item) for item in MATRICES}, key=str)


@settings(max_examples=60, deadline=None)
@given(chosen=st.lists(st.sampled_from(CHOICES), min_size=len(PARTS), max_size=len(PARTS)).filter(lambda chosen: any(chosen)))
def test_every_client_resolves_every_module_to_its_scheme(chosen: list[Scheme | None]) -> None:
    by_part = dict(zip(PARTS, chosen, strict=True))
    schemes = {item: by_part[fused_part(item)] for item in MATRICES}
    config = form.quantization_config(schemes)
    groups = config["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]  # older vLLM looks for this literal
    formats = {format_name(scheme) for scheme in chosen if scheme is not None}
    assert config["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")
    assert all(("format" in group) == (config["format"] == "mixed-precision") for group in groups.values())
    assert QuantizationConfig.model_validate(config)
    for item, scheme in schemes.items():
        assert form.scheme_of(config, item.name) == scheme
        assert resolved(config, library_group(config, item.name)) == scheme
        name = item.name
        if item.role != "routed_expert":
            fused = next((fused for fused, parts in FUSED.items() if item.projection in parts), None)
            name = name.replace(item.projection, fused) if fused else name
        assert resolved(config, vllm_group(config, name)) == scheme, name
        assert resolved(config, sglang_group(config, name)) == scheme, name
    for kept in ("lm_head", "language_model.model.layers.1.feed_forward.router", "multi_modal_projector.linear_1"):
        assert library_group(config, kept) is None
    for kept in ("self_attn.q_proj", "self_attn.qkv_proj", "self_attn.proj", "mlp.fc1"):
        assert library_group(config, f"vision_model.model.layers.0.{kept}") is None
        assert sglang_group(config, f"vision_model.model.layers.0.{kept}") is None


def resolved(config: dict[str, Any], group: dict[str, Any] | None) -> Scheme | None:
    """The scheme whose group, written on its own, is this one."""
    if group is None:
        return None
    bare = {key: value for key, value in group.items() if key not in ("targets", "format")}
    for scheme in SCHEMES:
        own = form.quantization_config({matrix(SHAPE): scheme})
        if {key: value for key, value in own["config_groups"]["group_0"].items() if key != "targets"} == bare:
            assert group.get("format", config["format"]) == own["format"]
            return scheme
    raise AssertionError(f"no scheme for {group}")


def library_group(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """transformers: ignore, then exact names and regexes in sorted order, then the class name."""
    if any(match_name(name, target) for target in config["ignore"]):
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    matched = [target for target in groups if match_name(name, target)]
    assert len(matched) <= 1  # the order of regexes must not matter
    return groups[matched[0] if matched else "Linear"]


def first_match(name: str, targets: list[str]) -> str | None:
    return next((target for target in targets if target == name or (target.startswith("re:") and re.match(target[3:], name))), None)


def shards(name: str) -> list[str]:
    fused = name.rpartition(".")[2]
    return [name.replace(fused, part) for part in FUSED.get(fused, [fused])]


def ignored(config: dict[str, Any], name: str) -> bool:
    """vLLM and SGLang: all parts of a fused weight or none, else they refuse to start."""
    found = {first_match(part, config["ignore"]) is not None for part in shards(name)}
    assert len(found) == 1
    return found.pop()


def vllm_group(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The name, then all parts of a fused weight (the first decides), then the class."""
    if ignored(config, name):
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    parts = [first_match(part, list(groups)) for part in shards(name)]
    return groups[first_match(name, list(groups)) or (parts[0] if all(parts) else None) or "Linear"]


def sglang_group(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The name, then the class, and only then the parts of a fused weight: which ``Linear`` never lets happen."""
    if ignored(config, name):
        return None
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    return groups[first_match(name, list(groups)) or "Linear"]


def test_patterns_are_short_for_whole_layers() -> None:
    int4, int8 = parse_scheme("int4-g128"), parse_scheme("int8-g128")
    schemes = {item: None if item.role == "attention" else int8 if item.layer in (0, 2) else int4 for item in MATRICES}
    schemes |= {item: None for item in MATRICES if item.layer == 4 and item.role != "attention"}
    config = form.quantization_config(schemes)
    assert config["config_groups"]["group_1"]["targets"] == [r"re:.*layers\.(?:0|2)\.feed_forward\..*"]
    assert config["ignore"] == [*BASE_IGNORE, r"re:.*layers\.4\.feed_forward\..*"]
    shared = {item: int8 if item.role == "shared_expert" else None if item.role == "attention" else int4 for item in MATRICES}
    assert form.quantization_config(shared)["config_groups"]["group_1"]["targets"] == [
        r"re:.*layers\.\d+\.feed_forward\.shared_expert\..*"
    ]


def test_what_the_format_cannot_hold_is_one_error_with_every_problem() -> None:
    int4, int8, block = (parse_scheme(name) for name in ("int4-g128", "int8-g128", "fp8-block-dynamic"))
    schemes: dict[WeightMatrix, Scheme | None] = dict.fromkeys(MATRICES, int4)
    expert = next(item for item in MATRICES if item.expert == 2 and item.projection == "up_proj")
    query = next(item for item in MATRICES if item.projection == "q_proj")
    schemes |= {expert: int8, query: None}
    layers = "language_model.model.layers"
    router = WeightMatrix(f"{layers}.1.feed_forward.router", (128, 128), "router", 1, "router", "router.weight")
    narrow = WeightMatrix(f"{layers}.9.self_attn.o_proj", (BLOCK_SIZE, 200), "attention", 9, "o_proj", "o_proj.weight")
    with pytest.raises(RecipeError) as caught:
        form.quantization_config(schemes | {router: int4, narrow: block})
    message = str(caught.value)
    for part in (expert.name, query.name, router.name, narrow.name, "one scheme", "must stay", "not a multiple of 128 x 128"):
        assert part in message
    with pytest.raises(RecipeError, match="quantizes no weight"):
        form.quantization_config(dict.fromkeys(MATRICES, None))
