"""Static activation ranges and KV-cache scales: in transformers, in the files, in verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from benchmarks.client_check import load, logits, token_ids, without_activations
from quantkit.convert import plan
from quantkit.errors import ArtifactError, RecipeError
from quantkit.formats import compressed_tensors
from quantkit.formats.compressed_tensors_clients import SGLANG, TRANSFORMERS_4_57, TRANSFORMERS_5_17, TRANSFORMERS_5_23, VLLM
from quantkit.inspection import inspect
from quantkit.llama4 import parse_config, units
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS, Recipe, Rule, parse_recipe
from quantkit.verify import verify
from tests.artifact_files import sign_again
from tests.calibrated_artifact import peaks, write_calibrated
from tests.tiny_models import write_tiny_model

STATIC = PRESETS["fp8-static"]
STATIC_KV = Recipe("static-kv", STATIC.rules, kv_cache="fp8")
INT4_KV = Recipe("int4-kv", PRESETS["w4a16-rtn"].rules, kv_cache="fp8")
EVERYTHING = Rule("fp8-tensor-static", (*FEED_FORWARD_ROLES, "attention"))
ATTENTION = Recipe("static-attention", (EVERYTHING, Rule("keep")), kv_cache="fp8")
RECIPES = {recipe.name: recipe for recipe in (STATIC, STATIC_KV, INT4_KV, ATTENTION)}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_tiny_model(directory, "maverick", seed=3)
    return directory


@pytest.fixture(scope="module")
def artifacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts")
    for recipe in RECIPES.values():
        write_calibrated(source, recipe, output, max_shard_bytes=2_000_000)
    return output


def stored(artifact: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(artifact.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is left of float32 values that pass through FP8 numbers of that scale."""
    steps = (values / scale.float()).clamp(-448, 448)
    return steps.to(torch.float8_e4m3fn).float() * scale.float()


# ------------------------------------------------------------------------------------------------------------ transformers


def test_transformers_rounds_activations_with_the_stored_scales(artifacts: Path, tmp_path: Path) -> None:
    """The oracle rounds the input of every quantized module itself; that its weights are right is tested in test_clients."""
    artifact = artifacts / STATIC.name
    model, problems = load(artifact, torch.float32)
    assert problems == {}
    ids = token_ids(model)
    served = logits(model, ids)
    oracle, _ = load(without_activations(artifact, tmp_path), torch.float32)
    tensors, seen = stored(artifact), []

    def rounding(scale: torch.Tensor) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            seen.append(module)
            return (rounded(inputs[0], scale),)

        return hook

    plain = logits(oracle, ids)
    for name, module in oracle.named_modules():
        if f"{name}.input_scale" in tensors:
            module.register_forward_pre_hook(rounding(tensors[f"{name}.input_scale"]))
    assert torch.equal(logits(oracle, ids), served)
    assert len(set(seen)) > 3 and not torch.equal(plain, served)


@pytest.mark.parametrize("name", [STATIC_KV.name, INT4_KV.name])
def test_transformers_rounds_keys_and_values_with_the_stored_scales(name: str, artifacts: Path, tmp_path: Path) -> None:
    artifact = artifacts / name
    model, problems = load(artifact, torch.float32)
    # As client_notes say: the library wants scales for the vision tower too, where it never uses them.
    assert all("vision_model" in key and key.endswith(("k_scale", "v_scale")) for key in problems.pop("missing_keys"))
    assert problems == {}
    tensors = stored(artifact)

    class RoundingCache(DynamicCache):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *rest: Any, **options: Any) -> Any:
            base = f"language_model.model.layers.{layer_idx}.self_attn"
            keys, values = rounded(keys, tensors[f"{base}.k_scale"]), rounded(values, tensors[f"{base}.v_scale"])
            return super().update(keys, values, layer_idx, *rest, **options)

    directory = tmp_path / "plain"
    shutil.copytree(artifact, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (directory / "config.json").write_text(json.dumps(config))
    oracle, _ = load(directory, torch.float32)
    ids = token_ids(model)
    with torch.no_grad():
        served = model(input_ids=ids, use_cache=True).logits
        plain = oracle(input_ids=ids, use_cache=True).logits
        expected = oracle(input_ids=ids, past_key_values=RoundingCache(config=oracle.config.get_text_config())).logits
        assert torch.equal(served, expected) and not torch.equal(served, plain)
        assert model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
        with pytest.raises(AttributeError, match="get_seq_length"):  # as client_notes say
            model(input_ids=ids, use_cache=False)


# --------------------------------------------------------------------------------------------------------------- the files


def test_scales_cover_what_was_seen_and_are_shared_by_what_clients_fuse(source: Path, artifacts: Path) -> None:
    tensors = stored(artifacts / ATTENTION.name)
    work = [unit for unit in units(parse_config(json.loads((source / "config.json").read_text()))) if unit.matrices]
    for unit in work:
        seen, value_peak = peaks(unit).tolist()
        for part in ("weight_scale", "input_scale"):
            values = {float(tensors[f"{matrix.name}.{part}"]) for matrix in unit.matrices}
            assert len(values) == 1, (unit.key, part)
        assert seen <= 448 * values.pop() < seen * 1.01
        if unit.key.endswith(".o_proj"):  # with which keys and values are known
            base = unit.key.removesuffix(".o_proj")
            assert seen <= 448 * float(tensors[f"{base}.k_scale"]) < seen * 1.01
            assert value_peak <= 448 * float(tensors[f"{base}.v_scale"]) < value_peak * 1.01
    assert len([name for name in tensors if name.endswith(("k_scale", "v_scale"))]) == 2 * len({unit.layer for unit in work})


def test_the_section_is_what_the_library_means_and_reads_back(artifacts: Path) -> None:
    section = json.loads((artifacts / STATIC_KV.name / "config.json").read_text())["quantization_config"]
    cache = QuantizationConfig.model_validate(section).kv_cache_scheme
    assert (cache.num_bits, cache.type, cache.strategy, cache.symmetric, cache.dynamic) == (8, "float", "tensor", True, False)
    assert compressed_tensors.kv_cache_of(section) == "fp8"
    section["kv_cache_scheme"] |= {"observer": "minmax", "group_size": None}
    assert compressed_tensors.kv_cache_of(section) == "fp8"
    section["kv_cache_scheme"]["num_bits"] = 4
    with pytest.raises(ArtifactError, match=r"kv_cache_scheme: .* is nothing that quantkit writes"):
        compressed_tensors.kv_cache_of(section)
    assert compressed_tensors.kv_cache_of({}) is None


@pytest.mark.parametrize("name", RECIPES)
def test_verification_and_inspection(name: str, source: Path, artifacts: Path) -> None:
    result = verify(artifacts / name, source, sample=1000)
    assert all(check.ok for check in result.checks)
    schemes = {row.role: row.schemes for row in inspect(artifacts / name).roles}
    expected = "int4-g128" if name == INT4_KV.name else "fp8-tensor-static"
    assert schemes["routed_expert"] == (expected,)
    assert schemes["attention"] == (("fp8-tensor-static",) if name == ATTENTION.name else ("BF16",))


EXPERT = "language_model.model.layers.1.feed_forward.experts.4.down_proj"
CACHE = "language_model.model.layers.1.self_attn.k_scale"


@pytest.mark.parametrize("name", [f"{EXPERT}.input_scale", f"{EXPERT}.weight_scale", CACHE])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_verification_finds_a_wrong_or_missing_scale(name: str, value: float | None, artifacts: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(artifacts / STATIC_KV.name, tmp_path / "copy"))
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop(name, None) is not None:
            if value is not None:
                tensors[name] = torch.tensor([value]).bfloat16()
            save_file(tensors, path, metadata={"format": "pt"})
    if value is None:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    sign_again(directory)
    with pytest.raises(ArtifactError, match=f"{name} " + ("is missing" if value is None else "holds a scale that is not finite")):
        verify(directory)


# ------------------------------------------------------------------------------------------------------------- plan, recipe


def test_the_plan_keeps_the_order_of_the_units(source: Path) -> None:
    """The scales of a KV cache come last, so the data of packed weights stays aligned in the order in which it is written."""
    [artifact] = plan(source, [INT4_KV]).artifacts
    planned = [tensor.name for file in artifact.files for tensor in file.tensors]
    caches = [name for name in planned if name.endswith(("k_scale", "v_scale"))]
    assert planned[-len(caches) :] == caches
    for file in artifact.files:
        names = [tensor.name for tensor in file.tensors]
        assert sorted(names, key=file.offsets.__getitem__) == names
    assert {name for tensors in artifact.outputs.values() for name in (tensor.name for tensor in tensors)} == set(planned)
    keys = {key for key, tensors in artifact.outputs.items() if any(tensor.name in caches for tensor in tensors)}
    assert keys == {f"language_model.model.layers.{layer}.self_attn.o_proj" for layer in range(len(caches) // 2)}


def test_recipes_state_the_cache_and_whether_they_need_calibration() -> None:
    rules = '[[rules]]\nroles = ["routed_expert"]\nscheme = "int4-g128"\n[[rules]]\nscheme = "keep"\n'
    plain, cached = parse_recipe(rules, "x"), parse_recipe('kv_cache = "fp8"\n' + rules, "x")
    assert (plain.kv_cache, cached.kv_cache) == (None, "fp8")
    assert cached.to_dict()["kv_cache"] == "fp8"
    assert cached.needs_calibration and not plain.needs_calibration
    assert PRESETS["fp8-static"].needs_calibration and not PRESETS["fp8-dynamic"].needs_calibration
    for wrong in ('"fp4"', "true", "8", "[]"):
        with pytest.raises(RecipeError, match=r"x: kv_cache is .*; expected one of fp8"):
            parse_recipe(f"kv_cache = {wrong}\n{rules}", "x")


def test_notes_say_what_each_client_does(source: Path) -> None:
    def notes(recipe: Recipe) -> dict[str, tuple[bool, str]]:
        [artifact] = plan(source, [recipe]).artifacts
        return {note.client: (note.loads, note.why) for note in artifact.notes}

    static, cached, attention = notes(STATIC), notes(INT4_KV), notes(ATTENTION)
    for client in (VLLM, SGLANG):
        assert static[client] == (True, "experts of a layer all quantize activations with the largest of their scales")
    assert "whatever --kv-cache-dtype says" in cached[VLLM][1] and "does not use the stored scales" in cached[SGLANG][1]
    assert "without a cache fails" in cached[TRANSFORMERS_5_23][1] and "without a cache fails" in cached[TRANSFORMERS_5_17][1]
    assert "leaves keys and values" in cached[TRANSFORMERS_4_57][1]
    assert attention[SGLANG][0] and "q_proj" not in attention[VLLM][1]  # one scale for all rows needs no reordering
