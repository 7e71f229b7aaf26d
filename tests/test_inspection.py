"""Inspection of sources, artifacts and single files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.convert import convert
from quantkit.errors import ArtifactError, CheckpointError, QuantkitError
from quantkit.inspection import inspect, role_of
from quantkit.llama4 import inventory, parse_config
from quantkit.packed_header import BlockContent
from tests.mutated_json import any_json, places
from tests.test_packed_header import write_file

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"


def test_roles_by_name_agree_with_the_inventory() -> None:
    for tensor in inventory(parse_config(json.loads((DEMO / "config.json").read_text()))):
        assert role_of(tensor.name) == tensor.role, tensor.name
    assert role_of("language_model.model.layers.3.feed_forward.experts.7.up_proj.weight_scale") == "routed_expert"
    assert role_of("something.else") is None


def test_source() -> None:
    result = inspect(DEMO)
    assert (result.kind, result.format, result.parameters) == ("source", "safetensors", 15_443_968)
    rows = {row.role: row for row in result.roles}
    assert rows["routed_expert"].schemes == ("BF16",)
    assert rows["routed_expert"].bits_per_weight == 16
    assert len(result.files) == 3


def test_artifact(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["w4a16-rtn"], tmp_path).artifacts
    result = inspect(made.directory)
    rows = {row.role: row for row in result.roles}
    assert (result.kind, result.format, result.parameters) == ("artifact", "pack-quantized", 15_443_968)
    assert rows["routed_expert"].schemes == ("int4-g128",)
    assert rows["attention"].schemes == ("BF16",)
    assert 4.125 <= rows["routed_expert"].bits_per_weight < 4.13
    assert result.notes == ()
    [file] = made.directory.glob("*.safetensors")
    alone = inspect(file)
    assert alone.files == ((file.name, file.stat().st_size),)
    (made.directory / "manifest.json").unlink()
    assert any("no manifest" in note for note in inspect(made.directory).notes)


@pytest.mark.parametrize("preset", ["w4a16-rtn", "w8a16", "fp8-dynamic", "nvfp4a16", "asymmetric"])
def test_shards_tell_their_parts_of_the_whole(preset: str, tmp_path: Path) -> None:
    target = preset
    if preset == "asymmetric":
        target = str(tmp_path / "asymmetric.toml")
        Path(target).write_text(RECIPE)
    [made] = convert(DEMO, [target], tmp_path, max_shard_bytes=3_000_000).artifacts
    whole = {row.role: row for row in inspect(made.directory).roles}
    shards = [inspect(file) for file in sorted(made.directory.glob("*.safetensors"))]
    assert len(shards) > 2
    for role, row in whole.items():
        parts = [part for shard in shards for part in shard.roles if part.role == role]
        assert sum(part.parameters for part in parts) == row.parameters, role
        assert sum(part.bytes for part in parts) == row.bytes
        assert all(set(part.schemes) <= set(row.schemes) for part in parts)
        assert any(part.bits_per_weight == pytest.approx(row.bits_per_weight, rel=0.02) for part in parts)
    for shard in shards:
        assert (shard.kind, shard.format) == ("artifact", inspect(made.directory).format)
        assert shard.model == inspect(DEMO).model and shard.notes == ("a single file: what is counted lies in it",)


RECIPE = """
name = "asymmetric"
[[rules]]
roles = ["routed_expert"]
scheme = "int4-g64-asym"
method = "rtn"
[[rules]]
roles = ["shared_expert"]
scheme = "int8-channel"
method = "rtn"
[[rules]]
scheme = "keep"
"""


def test_scales_of_a_kv_cache_are_no_weights(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["fp8-dynamic"], tmp_path).artifacts
    shutil.copy(made.directory / "config.json", tmp_path)
    base = "language_model.model.layers.0.self_attn"
    tensors = {f"{base}.q_proj.weight": torch.zeros(256, 256), f"{base}.k_scale": torch.ones(1), f"{base}.v_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "attention.safetensors")
    assert inspect(tmp_path / "attention.safetensors").parameters == 256 * 256


def test_a_shard_without_its_config_tells_what_it_counts(tmp_path: Path) -> None:
    [made] = convert(DEMO, ["w4a16-rtn"], tmp_path).artifacts
    alone = Path(shutil.copy(made.directory / "model.safetensors", tmp_path / "alone.safetensors"))
    elements = "stored elements are counted, of which one may hold several weights"
    found = inspect(alone)
    assert (found.kind, found.format, found.model) == ("artifact", "safetensors", "unknown (no config.json)")
    assert found.notes == (f"a single file without config.json beside it: {elements}",)
    assert found.parameters == sum(tensor.numel() for tensor in load_file(alone).values())
    for config, why in (
        ("{", "config.json"),
        ('{"model_type": "other"}', "other"),
        ('{"quantization_config": 5}', "expected an object"),
    ):
        (tmp_path / "config.json").write_text(config)
        [note] = inspect(alone).notes
        assert note.startswith(f"a single file: {elements}, since the config.json beside it cannot be used: ") and why in note
        assert inspect(alone).parameters == found.parameters
    config = json.loads((made.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    other = inspect(alone)
    assert other.format == "gptq" and other.notes == (f"a single file of another quantizer: {elements}",)


def test_what_cannot_be_read_is_a_documented_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json. Give the directory of a Llama 4 checkpoint"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory aaa"):
        inspect("a" * 300)
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(QuantkitError, match=r"config.json"):
        inspect(broken)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        inspect(tmp_path / "x.safetensors")


def test_a_packed_file_of_a_newer_version_is_inspected_with_a_note(tmp_path: Path) -> None:
    name = "language_model.model.layers.0.feed_forward.experts.0"
    tensors = [("gate_proj.codes", "I32", (4, 64)), ("gate_proj.scale", "BF16", (1, 4)), ("up_proj.codes", "I32", (4, 64))]
    schemes = {"gate_proj": "ternary-g7", "up_proj": "int4-channel"}
    file = write_file(tmp_path / "model.packed", [BlockContent(name, schemes, tensors)])
    result = inspect(file)
    assert any(note.startswith("a scheme quantkit does not know: 'ternary-g7'") for note in result.notes)
    assert result.parameters == 4 * 64 + 4 * 512  # as stored; 64 words of 8 codes
    only = write_file(tmp_path / "scale.packed", [BlockContent(name, schemes, tensors[1:2])])
    assert inspect(only).roles[0].bits_per_weight > 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose config the tests below overwrite."""
    [made] = convert(DEMO, ["fp8-dynamic"], tmp_path_factory.mktemp("inspected")).artifacts
    shutil.copy(made.directory / "config.json", made.directory.parent / "config.json")
    return made.directory


def with_section(artifact: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The artifact with a changed config."""
    config = json.loads((artifact.parent / "config.json").read_text())
    change(config)
    (artifact / "config.json").write_text(json.dumps(config))
    return artifact


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]
    return found


def _fp8_static(config: dict[str, Any]) -> None:
    """As FP8 checkpoints with static activations, but a scale for each row, state it."""
    group(config)["input_activations"] |= {"strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_fp8_static, "'strategy': 'tensor'"),
        (lambda config: group(config)["weights"].update(num_bits=3), "'num_bits': 3"),
        (lambda config: group(config)["weights"].update(strategy="attn_head"), "'attn_head'"),
        (lambda config: group(config)["weights"].update(num_bits={"a": [[[[1]]]]}), "'num_bits'"),
        (lambda config: group(config).update(output_activations={"num_bits": 8}), "output_activations"),
    ],
)
def test_schemes_of_others_are_inspected_with_a_note(
    artifact: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    result = inspect(with_section(artifact, change))
    assert {row.role: row.schemes for row in result.roles}["routed_expert"] == ("unknown (F8_E4M3)",)
    [note] = result.notes
    assert note.startswith("a scheme quantkit does not know:") and words in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(quantization_config=5), "quantization_config: expected an object, found 5"),
        (lambda config: config["quantization_config"].update(ignore=5), "ignore: expected a list of names, found 5"),
        (lambda config: config["quantization_config"].update(ignore=[5]), r"ignore: expected a list of names, found \[5\]"),
        (lambda config: config["quantization_config"].update(ignore=["re:("]), "not a regular expression"),
        (lambda config: config["quantization_config"].update(ignore=["re:a{99999999999999999999}"]), "not a regular expression"),
        (lambda config: config["quantization_config"].update(ignore=["re:" + "(" * 9999]), "not a regular expression"),
        (lambda config: config["quantization_config"].update(config_groups=[1]), "config_groups: expected an object"),
        (lambda config: config["quantization_config"].update(config_groups={"a": [1]}), "config_groups, 'a': expected an object"),
        (lambda config: group(config).update(targets=7), "targets: expected a list of names, found 7"),
        (lambda config: group(config).update(targets="Linear"), "targets: expected a list of names"),
        (lambda config: group(config).update(targets=[None]), "targets: expected a list of names"),
        (lambda config: group(config).update(weights=[1]), r"weights: expected an object, found \[1\]"),
        (lambda config: group(config).update(input_activations="x"), "input_activations: expected an object, found 'x'"),
    ],
)
def test_a_malformed_section_is_named(artifact: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        inspect(with_section(artifact, change))


def test_a_directory_of_another_quantizer_is_inspected(artifact: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "fbgemm_fp8", "ignore": 5}

    result = inspect(with_section(artifact, change))
    assert (result.kind, result.format) == ("artifact", "fbgemm_fp8")


_json = any_json("re:(", "re:.*", "Linear", 10**400)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mutated_section_is_inspected_or_refused_and_nothing_else(artifact: Path, data: st.DataObject) -> None:
    def change(config: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            section = config["quantization_config"]
            container, key = data.draw(st.sampled_from(places(section) or [(config, "quantization_config")]))
            container[key] = data.draw(_json)

    try:
        result = inspect(with_section(artifact, change))
    except QuantkitError:
        return
    assert {row.role for row in result.roles} >= {"routed_expert", "attention"}
