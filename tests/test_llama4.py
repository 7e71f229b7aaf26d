"""Config and inventory, against transformers: the same names, the same shapes, the same reading of every field."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Llama4Config as HubConfig
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from quantkit.config import RopeScaling
from quantkit.errors import AlreadyQuantizedError, QuantkitError, UnsupportedModelError
from quantkit.llama4 import ROLES, Llama4Config, inventory, parse_config, units
from quantkit.safetensors_header import read_header
from tests.releases import release

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
LLAMA3 = {
    "factor": 16.0,
    "high_freq_factor": 1.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
KINDS = ["scout", "maverick", "text"]


NO_ROPE = [1, 1, 1, 0] * 12
RELEASES = {
    "scout-instruct": release(
        interleave_moe_layer_step=1,
        max_position_embeddings=10485760,
        moe_layers=list(range(48)),
        no_rope_layers=NO_ROPE,
        num_local_experts=16,
        rope_scaling=LLAMA3,
        use_qk_norm=True,
    ),
    "scout-base": release(
        interleave_moe_layer_step=1,
        max_position_embeddings=262144,
        no_rope_layers=[],
        num_local_experts=16,
        rope_scaling={**LLAMA3, "factor": 8.0, "high_freq_factor": 4.0},
        use_qk_norm=True,
        attn_temperature_tuning=4,
        cache_implementation="hybrid",
    ),
    "maverick": release(
        interleave_moe_layer_step=2,
        max_position_embeddings=1048576,
        moe_layers=list(range(1, 48, 2)),
        no_rope_layers=NO_ROPE,
        num_local_experts=128,
        rope_scaling=None,
        use_qk_norm=False,
        attn_temperature_tuning=True,
        floor_scale=8192,
        attn_scale=0.1,
    ),
}
PARAMETERS = {"scout-instruct": 108_641_793_536, "scout-base": 108_641_793_536, "maverick": 401_583_781_376}


def read_by_transformers(config: dict[str, Any]) -> HubConfig | Llama4TextConfig:
    """The config as the newest transformers reads it; that one alone refuses the integer of early releases."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    if "attn_temperature_tuning" in text:
        text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    return (HubConfig if config["model_type"] == "llama4" else Llama4TextConfig).from_dict(config)


def built_by_transformers(config: dict[str, Any]) -> Llama4ForConditionalGeneration | Llama4ForCausalLM:
    """The model of that config, without storage."""
    read = read_by_transformers(config)
    with torch.device("meta"):
        return (Llama4ForConditionalGeneration if isinstance(read, HubConfig) else Llama4ForCausalLM)(read)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = inventory(parse_config(config))
    table = {tensor.name: tensor.shape for tensor in tensors}
    assert len(table) == len(tensors)
    return table


# ---------------------------------------------------------------------------------------------------------- inventory


@pytest.mark.parametrize("name", RELEASES)
def test_release_has_the_parameters_and_tensors_it_is_known_for(name: str) -> None:
    config = RELEASES[name]
    assert sum(tensor.elements for tensor in inventory(parse_config(config))) == PARAMETERS[name]
    model = built_by_transformers(config)
    assert shapes(config) == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        *((kind, {}) for kind in KINDS),
        ("scout", {"attention_bias": True}),
        ("text", {"attention_bias": True, "num_key_value_heads": 4}),
        ("maverick", {"num_local_experts": 128}),
        ("maverick", {"moe_layers": [0, 3]}),
        ("maverick", {"moe_layers": []}),
        ("scout", {"head_dim": 48, "hidden_size": 256, "vocab_size": 300}),
    ],
)
def test_inventory_is_the_model_that_transformers_builds(kind: str, overrides: dict[str, Any]) -> None:
    config = tiny_models.tiny_config(kind, **overrides)
    expected = {key: tuple(tensor.shape) for key, tensor in built_by_transformers(config).state_dict().items()}
    assert shapes(config) == expected
    assert dict(tiny_models.tiny_shapes(config)) == expected


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        *((kind, {}) for kind in KINDS),
        ("scout", {"attention_bias": True}),
        ("text", {"tie_word_embeddings": True}),
        ("scout", {"tie_word_embeddings": True}),
        ("maverick", {"moe_layers": ..., "no_rope_layers": ...}),
    ],
)
def test_tiny_models_load_in_transformers(kind: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    tiny_models.write_tiny_model(tmp_path, kind, **overrides)
    architecture = Llama4ForCausalLM if kind == "text" else Llama4ForConditionalGeneration
    model, info = architecture.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens).logits).all()
    stored = {name for path in tmp_path.glob("*.safetensors") for name in read_header(path).tensors}
    assert stored == set(shapes(tiny_models.tiny_config(kind, **overrides)))


def test_demo_model_is_exactly_its_inventory() -> None:
    expected = shapes(json.loads((DEMO / "config.json").read_text()))
    headers = [read_header(path) for path in sorted(DEMO.glob("*.safetensors"))]
    assert {name: entry.shape for header in headers for name, entry in header.tensors.items()} == expected


def test_tied_embeddings_follow_the_text_section() -> None:
    for top in (None, False, True):
        for inner in (None, False, True):
            config = tiny_models.tiny_config("scout")
            config["tie_word_embeddings"] = top
            config["text_config"]["tie_word_embeddings"] = inner
            content = {key: value for key, value in config.items() if value is not None}
            content["text_config"] = {key: value for key, value in config["text_config"].items() if value is not None}
            model = built_by_transformers(content)
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert parse_config(config).tie_word_embeddings == tied, (top, inner)
            assert ("language_model.lm_head.weight" not in shapes(config)) == tied


# -------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("kind", KINDS)
def test_units_cover_every_source_element_once(kind: str) -> None:
    config = parse_config(tiny_models.tiny_config(kind, attention_bias=True))
    covered: Counter[tuple[str, int | None, int]] = Counter()
    work = units(config)
    for unit in work:
        assert bool(unit.matrices) != bool(unit.copies)
        for matrix in unit.matrices:
            assert (matrix.role, matrix.layer, matrix.expert) == (unit.role, unit.layer, unit.expert)
            first, last = matrix.columns or (0, matrix.shape[0] if matrix.expert is not None else 1)
            for column in range(first, last):
                covered[matrix.tensor, matrix.expert, column] += 1
        for tensor in unit.copies:
            covered[tensor.name, None, 0] += 1
    assert set(covered.values()) == {1}
    for tensor in inventory(config):
        if tensor.role == "routed_expert":
            assert sum(key[0] == tensor.name for key in covered) == tensor.shape[0] * tensor.shape[2]
        else:
            assert (tensor.name, None, 0) in covered
    assert len({unit.key for unit in work}) == len(work)
    assert {unit.role for unit in work} <= set(ROLES)
    names = [item.name for unit in work for item in (*unit.matrices, *unit.copies)]
    assert len(set(names)) == len(names)


def test_expert_matrices_are_the_modules_of_quantized_checkpoints() -> None:
    work = units(parse_config(RELEASES["maverick"]))
    unit = next(unit for unit in work if unit.layer == 1 and unit.expert == 127)
    base = "language_model.model.layers.1.feed_forward.experts."
    assert unit.key == f"{base}127.gate_up_proj"
    gate, up = unit.matrices
    assert (gate.name, gate.shape, gate.columns) == (f"{base}127.gate_proj", (8192, 5120), (0, 8192))
    assert (up.name, up.shape, up.columns) == (f"{base}127.up_proj", (8192, 5120), (8192, 16384))
    assert gate.tensor == up.tensor == f"{base}gate_up_proj"
    (down,) = work[work.index(unit) + 1].matrices
    assert (down.name, down.shape, down.tensor, down.columns) == (f"{base}127.down_proj", (5120, 8192), f"{base}down_proj", None)
    assert sum(unit.role == "routed_expert" for unit in work) == 24 * 128 * 2


def test_two_trillion_parameters() -> None:
    config = parse_config(release(num_hidden_layers=288, num_local_experts=110, no_rope_layers=[], interleave_moe_layer_step=2))
    tensors = inventory(config)
    assert 2.0e12 < sum(tensor.elements for tensor in tensors) < 2.1e12
    assert sum(unit.role == "routed_expert" for unit in units(config)) == 144 * 110 * 2


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("name", RELEASES)
def test_fields_mean_what_transformers_takes_them_to_mean(name: str) -> None:
    config, theirs = parse_config(RELEASES[name]), read_by_transformers(RELEASES[name]).text_config
    assert [layer for layer, moe in enumerate(config.moe_layers) if moe] == list(theirs.moe_layers)
    assert list(config.rope_layers) == [bool(flag) for flag in theirs.no_rope_layers]
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    for ours, field in (
        (config.num_experts, "num_local_experts"),
        (config.experts_per_token, "num_experts_per_tok"),
        (config.attention_chunk_size, "attention_chunk_size"),
        (config.use_qk_norm, "use_qk_norm"),
        (config.attn_scale, "attn_scale"),
        (config.floor_scale, "floor_scale"),
        (config.rms_norm_eps, "rms_norm_eps"),
        (config.max_positions, "max_position_embeddings"),
        (config.temperature_tuning, "attn_temperature_tuning"),
    ):
        assert ours == getattr(theirs, field), field


def test_both_rope_spellings_are_one() -> None:
    old = tiny_models.tiny_config("scout", rope_theta=400000.0)
    new = tiny_models.tiny_config("scout", rope_theta=..., rope_scaling=..., rope_parameters={**LLAMA3, "rope_theta": 400000.0})
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    default = {"rope_type": "default", "rope_theta": 400000.0}
    plain = tiny_models.tiny_config("maverick", rope_theta=..., rope_scaling=..., rope_parameters=default)
    assert parse_config(plain).rope_scaling is None
    assert parse_config(plain).rope_theta == 400000.0


def test_a_config_rewritten_by_transformers_reads_the_same(tmp_path: Path) -> None:
    for kind in KINDS:
        config = tiny_models.tiny_config(kind)
        read_by_transformers(config).save_pretrained(tmp_path)
        rewritten = json.loads((tmp_path / "config.json").read_text())
        assert "rope_parameters" in rewritten.get("text_config", rewritten)
        assert parse_config(rewritten) == parse_config(config)


def test_what_may_be_absent_is_derived() -> None:
    absent = dict.fromkeys(["moe_layers", "no_rope_layers", "interleave_moe_layer_step", "attention_bias", "head_dim"], ...)
    config = tiny_models.tiny_config("scout", num_hidden_layers=8)
    for key in (*absent, "rope_scaling", "rope_theta", "torch_dtype"):
        config["text_config"].pop(key, None)
    parsed = parse_config(config)
    assert parsed.moe_layers == (True,) * 8
    assert parsed.rope_layers == (True, True, True, False) * 2
    assert (parsed.head_dim, parsed.rope_theta, parsed.rope_scaling, parsed.dtype) == (32, 500_000.0, None, "BF16")
    config["text_config"]["interleave_moe_layer_step"] = 3
    assert parse_config(config).moe_layers == (False, False, True, False, False, True, False, False)
    config["text_config"]["no_rope_layer_interval"] = 2
    assert parse_config(config).rope_layers == (True, False) * 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": ...}, "text_config has no hidden_size"),
        ({"hidden_size": "5120"}, "text_config: hidden_size is '5120'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 2**60}, "vocab_size is"),
        ({"num_hidden_layers": 20_000, "moe_layers": []}, "num_hidden_layers is 20000"),
        ({"num_local_experts": 600_000}, "num_local_experts is 600000"),
        ({"num_attention_heads": 7, "head_dim": ...}, "not a multiple"),
        ({"moe_layers": [0, 2]}, "moe_layers is"),
        ({"moe_layers": [0, "1"]}, "moe_layers is"),
        ({"moe_layers": "all"}, "moe_layers is 'all'"),
        ({"no_rope_layers": [1]}, "no_rope_layers is"),
        ({"no_rope_layers": [1, 2]}, "no_rope_layers is"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is"),
        ({"use_qk_norm": "yes"}, "use_qk_norm is 'yes'"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"text_config\.rope_scaling: rope_type is 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has no type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling has no factor"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters has no type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "contradict"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse_config(tiny_models.tiny_config("scout", **overrides))


def test_other_models_are_refused() -> None:
    for content, message in (
        ({"model_type": "llama", "hidden_size": 1}, "model_type 'llama'"),
        ({}, "model_type None"),
        ({"model_type": ["llama4"]}, "model_type"),
        ({"model_type": "llama4"}, "no text_config"),
        ({"model_type": "llama4", "text_config": 3}, "text_config is 3"),
        ([], "expected a JSON object"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            parse_config(content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ("odd", "of unknown method"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_quantized_configs_are_named(section: Any, named: str, inside: bool) -> None:
    config = tiny_models.tiny_config("scout")
    (config["text_config"] if inside else config)["quantization_config"] = section
    with pytest.raises(AlreadyQuantizedError, match=named):
        parse_config(config)


def test_empty_quantization_section_says_nothing() -> None:
    config = tiny_models.tiny_config("scout")
    config["quantization_config"] = {}
    assert parse_config(config) == parse_config(tiny_models.tiny_config("scout"))


# ---------------------------------------------------------------------------------------------------------- mutations

OTHER_FIELDS = ["rope_parameters", "dtype", "no_rope_layer_interval", "quantization_config"]
FIELDS = [*tiny_models.tiny_config("scout")["text_config"], *OTHER_FIELDS]
VISION_FIELDS = sorted(tiny_models.tiny_config("scout")["vision_config"])
VALUES = st.one_of(
    st.just(...),
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([10**9, 2**31, 2**32, 2**63, 10**300, 10**400, -(10**400), 9_999, 10_000, 65_536]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["x" * 100_000, "default", "llama3", "bfloat16"]),
    st.lists(st.one_of(st.integers(-1, 5), st.none(), st.text(max_size=2)), max_size=5),
    st.sampled_from([[1] * 10_000, [[[[[[]]]]]], {"rope_type": "llama3"}, {"a": {"b": {}}}]),
    st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "factor"]), st.integers(-1, 3) | st.text(max_size=3)),
)


def set_or_remove(section: dict[str, Any], key: str, value: Any) -> None:
    if value is ...:
        section.pop(key, None)
    else:
        section[key] = value


@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(VISION_FIELDS), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(["model_type", "text_config", "vision_config", "torch_dtype"]), VALUES, max_size=1),
)
@settings(max_examples=500, deadline=None)
def test_mutated_configs_parse_or_are_refused(kind: str, text: dict[str, Any], vision: dict[str, Any], top: dict[str, Any]) -> None:
    config = tiny_models.tiny_config(kind)
    for key, value in text.items():
        set_or_remove(config.get("text_config", config), key, value)
    for key, value in vision.items():
        set_or_remove(config.get("vision_config", {}), key, value)
    for key, value in top.items():
        set_or_remove(config, key, value)
    try:
        parsed = parse_config(config)
    except QuantkitError as error:
        assert len(str(error)) < 1000
        return
    assert isinstance(parsed, Llama4Config)
    tensors = inventory(parsed)
    assert len(tensors) < 400_000
    assert all(size > 0 for tensor in tensors for size in tensor.shape)
    assert sum(parsed.moe_layers) * parsed.num_experts <= 1_000_000
