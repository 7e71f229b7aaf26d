"""What a GGUF file says of a model: keys and value types, what is refused, and the config back from the keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from quantkit.assignment import vision_type
from quantkit.config import Llama4Config, RopeScaling, VisionConfig, parse_config
from quantkit.errors import ArtifactError, CheckpointError, RecipeError
from quantkit.formats.gguf_general import (
    FILE_TYPES,
    ModelCard,
    computed_label,
    file_name,
    general_metadata,
    parse_model_card,
    read_model_card,
    split_metadata,
    vision_file_name,
)
from quantkit.formats.gguf_metadata import config_from_metadata, inexpressible, moe_step, rope_freqs, text_metadata
from quantkit.formats.gguf_names import places_of
from quantkit.formats.gguf_vision import modelfile, vision_inexpressible, vision_metadata
from quantkit.gguf_header import MetadataEntry, MetadataValue
from quantkit.llama4 import inventory
from tests.releases import release

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
SCOUT = release(
    attn_temperature_tuning=True,
    interleave_moe_layer_step=1,
    max_position_embeddings=10485760,
    num_local_experts=16,
    rope_scaling=LLAMA3,
    use_qk_norm=True,
)
MAVERICK = release(
    attn_temperature_tuning=4,
    interleave_moe_layer_step=2,
    max_position_embeddings=1048576,
    num_local_experts=128,
    rope_scaling=None,
    use_qk_norm=False,
)


def changed(base: dict[str, Any] = SCOUT, **text: Any) -> Llama4Config:
    return parse_config({**base, "text_config": {**base["text_config"], **text}})


def as_table(entries: list[MetadataEntry]) -> dict[str, tuple[str, MetadataValue]]:
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key: (entry.type.name, entry.value) for entry in entries}


# ------------------------------------------------------------------------------------------------------------ text model


def test_keys_of_scout_as_the_converter_writes_them() -> None:
    table = as_table(text_metadata(changed(), model_name="meta-llama/Llama-4-Scout-17B-16E-Instruct", file_type=15))
    assert list(table.items()) == [
        ("general.architecture", ("STRING", "llama4")),
        ("general.type", ("STRING", "model")),
        ("general.name", ("STRING", "Llama 4 Scout 17B 16E Instruct")),
        ("general.organization", ("STRING", "Meta Llama")),
        ("general.finetune", ("STRING", "16E-Instruct")),
        ("general.basename", ("STRING", "Llama-4-Scout")),
        ("general.size_label", ("STRING", "17B")),
        ("llama4.block_count", ("UINT32", 48)),
        ("llama4.context_length", ("UINT32", 10485760)),
        ("llama4.embedding_length", ("UINT32", 5120)),
        ("llama4.feed_forward_length", ("UINT32", 16384)),
        ("llama4.attention.head_count", ("UINT32", 40)),
        ("llama4.attention.head_count_kv", ("UINT32", 8)),
        ("llama4.rope.freq_base", ("FLOAT32", 500000.0)),
        ("llama4.attention.layer_norm_rms_epsilon", ("FLOAT32", 1e-5)),
        ("llama4.expert_count", ("UINT32", 16)),
        ("llama4.expert_used_count", ("UINT32", 1)),
        ("llama4.attention.key_length", ("UINT32", 128)),
        ("llama4.attention.value_length", ("UINT32", 128)),
        ("general.file_type", ("UINT32", 15)),
        ("llama4.vocab_size", ("UINT32", 202048)),
        ("llama4.rope.dimension_count", ("UINT32", 128)),
        ("llama4.interleave_moe_layer_step", ("UINT32", 1)),
        ("llama4.expert_feed_forward_length", ("UINT32", 8192)),
        ("llama4.use_qk_norm", ("BOOL", True)),
        ("llama4.attention.chunk_size", ("UINT32", 8192)),
        ("general.quantization_version", ("UINT32", 2)),
    ]


def test_maverick() -> None:
    config = changed(MAVERICK)
    table = as_table(text_metadata(config, model_name="Llama-4-Maverick-17B-128E-Instruct", file_type=7))
    assert table["general.finetune"] == ("STRING", "128E-Instruct")
    assert table["general.size_label"] == ("STRING", "17B")
    assert table["llama4.interleave_moe_layer_step"] == ("UINT32", 2)
    assert table["llama4.expert_count"] == ("UINT32", 128)
    assert table["llama4.use_qk_norm"] == ("BOOL", False)
    assert inexpressible(config) is None and rope_freqs(config) is None


def test_sizes_where_names_do_not_tell() -> None:
    assert computed_label(changed()) == "16x17B" and computed_label(changed(MAVERICK)) == "128x17B"
    assert as_table(text_metadata(changed(), model_name="mine", file_type=0))["general.size_label"] == ("STRING", "16x17B")


def shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for tensor in inventory(config):
        for place in places_of(tensor.name):
            if place.file == "text":
                found[place.tensor] = tensor.shape
    return found | ({} if config.rope_scaling is None else {"rope_freqs.weight": (config.head_dim // 2,)})


@pytest.mark.parametrize("base", [SCOUT, MAVERICK, release(**{**SCOUT["text_config"], "tie_word_embeddings": True})])
def test_the_config_comes_back(base: dict[str, Any]) -> None:
    config = parse_config(base)
    table = {entry.key: entry for entry in text_metadata(config, model_name="x", file_type=0)}
    found = config_from_metadata(table, shapes(config))
    neutral = None if config.rope_scaling is None else RopeScaling(1.0, 1.0, 1.0, 1)
    assert found == dataclasses.replace(config, prefix="", vision=None, rope_scaling=neutral)
    assert inexpressible(found) is None


def test_files_that_are_no_llama_4() -> None:
    config = changed()
    table = {entry.key: entry for entry in text_metadata(config, model_name="x", file_type=0)}
    known = shapes(config)
    for key in table:
        if key.startswith("llama4.") and key not in (
            "llama4.attention.key_length",
            "llama4.attention.value_length",
            "llama4.rope.dimension_count",
            "llama4.vocab_size",
            "llama4.use_qk_norm",
            "llama4.attention.chunk_size",
        ):
            with pytest.raises(ArtifactError, match=f"no key {key}"):
                config_from_metadata({name: entry for name, entry in table.items() if name != key}, known)
            wide = MetadataEntry(key, GGUFValueType.UINT64, 1)
            with pytest.raises(ArtifactError, match=f"{key} is UINT64"):
                config_from_metadata({**table, key: wide}, known)
    with pytest.raises(ArtifactError, match="positive"):
        config_from_metadata({**table, "llama4.block_count": MetadataEntry("x", GGUFValueType.UINT32, 0)}, known)
    with pytest.raises(ArtifactError, match="architecture"):
        config_from_metadata({**table, "general.architecture": MetadataEntry("x", GGUFValueType.STRING, "llama")}, known)
    with pytest.raises(ArtifactError, match="first file"):
        config_from_metadata(table, {})
    with pytest.raises(ArtifactError, match="no matrix"):
        config_from_metadata(table, {**known, "token_embd.weight": ()})
    for key in ("llama4.block_count", "llama4.expert_count"):
        with pytest.raises(ArtifactError, match="cannot be"):
            config_from_metadata({**table, key: MetadataEntry(key, GGUFValueType.UINT32, 2**32 - 1)}, known)


# ----------------------------------------------------------------------------------------------------- what has no key


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"use_qk_norm": False}, "use_qk_norm is False with 16 experts"),
        ({"num_local_experts": 128}, "use_qk_norm is True with 128 experts"),
        ({"no_rope_layer_interval": 3}, "layer 2 is not given rotary"),
        ({"no_rope_layers": [1] * 48}, "layer 3 is given rotary"),
        ({"attention_chunk_size": 4096}, "attention_chunk_size is 4096"),
        ({"attention_chunk_size": 16384}, "attention_chunk_size is 16384"),
        ({"attn_temperature_tuning": False}, "attn_temperature_tuning is off"),
        ({"floor_scale": 4096}, "floor_scale is 4096"),
        ({"attn_scale": 0.2}, "attn_scale is 0.2"),
        ({"attention_bias": True}, "biases"),
        ({"moe_layers": [0, 1, 3]}, r"\[0, 1, 3\]"),
        ({"moe_layers": [0]}, "every n-th"),
        ({"num_experts_per_tok": 17}, "17"),
        ({"num_hidden_layers": 513}, "512 layers"),
        ({"num_local_experts": 1025}, "1024 experts"),
        ({"head_dim": 127}, "head_dim is 127"),
        ({"num_key_value_heads": 7}, "multiple of the 7"),
    ],
)
def test_what_llama_cpp_cannot_express(text: dict[str, Any], named: str) -> None:
    reason = inexpressible(changed(**text))
    assert reason is not None
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(reason)


@pytest.mark.parametrize(
    "text",
    [
        {"max_position_embeddings": 4096, "attention_chunk_size": 4096},
        {"max_position_embeddings": 8192, "attention_chunk_size": 16384},
        {"max_position_embeddings": 8191, "attn_temperature_tuning": False},
        {"max_position_embeddings": 8191, "attn_scale": 0.2, "floor_scale": 9000},
        {"num_hidden_layers": 3, "attn_temperature_tuning": False},
        {"moe_layers": []},
        {"moe_layers": list(range(2, 48, 3))},
        {"no_rope_layers": [1, 1, 1, 0] * 12},
    ],
)
def test_differences_that_cannot_show(text: dict[str, Any]) -> None:
    assert inexpressible(changed(**text)) is None


@given(st.integers(1, 12), st.integers(1, 14))
def test_moe_step(layers: int, step: int) -> None:
    listed = [layer for layer in range(layers) if (layer + 1) % step == 0]
    found = moe_step(changed(num_hidden_layers=layers, moe_layers=listed))
    assert found is not None and listed == [layer for layer in range(layers) if (layer + 1) % found == 0]


# -------------------------------------------------------------------------------------------------------------- rotary


@pytest.mark.parametrize(
    ("factor", "low", "high", "context"),
    [(16.0, 1.0, 1.0, 8192), (8.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 262144), (32.0, 2.0, 3.0, 4096)],
)
def test_rotary_factors_are_what_transformers_divides_by(factor: float, low: float, high: float, context: int) -> None:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    scaling = {
        **LLAMA3,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    ours = rope_freqs(changed(rope_scaling=scaling))
    assert ours is not None and ours.dtype == torch.float32 and ours.shape == (64,)
    frequencies = []
    for parameters in (scaling, {"rope_type": "default"}):
        theirs = Llama4TextConfig(
            hidden_size=5120, num_attention_heads=40, head_dim=128, rope_parameters={**parameters, "rope_theta": 500000.0}
        )
        frequencies.append(Llama4TextRotaryEmbedding(theirs).inv_freq.double())
    torch.testing.assert_close(ours.double(), frequencies[1] / frequencies[0], rtol=2e-6, atol=0)
    assert set(ours.tolist()) == {1.0, factor} or low != high


# -------------------------------------------------------------------------------------------------- names, card, splits


CARD = """---
library_name: transformers
language:
- ar
- "no"
base_model:
  - meta-llama/Llama-4-Scout-17B-16E
tags: [facebook, 'llama-4']
extra_gated_prompt: >-
    **LLAMA 4 COMMUNITY LICENSE AGREEMENT**

    - not a tag
extra_gated_fields:
    First Name: text
    - neither
license: other  # see below
license_name: llama4
pipeline_tag: image-text-to-text
---

# Model
license: mit
"""


def test_model_card(tmp_path: Path) -> None:
    card = ModelCard(
        license="other",
        license_name="llama4",
        tags=("facebook", "llama-4", "image-text-to-text"),
        languages=("ar", "no"),
        base_models=("meta-llama/Llama-4-Scout-17B-16E",),
    )
    assert parse_model_card(CARD) == card
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": "x"}')
    table = as_table(general_metadata("Scout", architecture="llama4", source=tmp_path, label="1x1B"))
    assert list(table.items()) == [
        ("general.architecture", ("STRING", "llama4")),
        ("general.type", ("STRING", "model")),
        ("general.sampling.top_k", ("INT32", 40)),
        ("general.sampling.top_p", ("FLOAT32", 0.9)),
        ("general.sampling.temp", ("FLOAT32", 0.6)),
        ("general.name", ("STRING", "Scout")),
        ("general.size_label", ("STRING", "1x1B")),
        ("general.license", ("STRING", "other")),
        ("general.license.name", ("STRING", "llama4")),
        ("general.base_model.count", ("UINT32", 1)),
        ("general.base_model.0.name", ("STRING", "Llama 4 Scout 17B 16E")),
        ("general.base_model.0.organization", ("STRING", "Meta Llama")),
        ("general.base_model.0.repo_url", ("STRING", "https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E")),
        ("general.tags", ("ARRAY", ("facebook", "llama-4", "image-text-to-text"))),
        ("general.languages", ("ARRAY", ("ar", "no"))),
    ]


def test_the_gguf_package_reads_the_card_alike(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.replace("    - neither\n", ""), encoding="utf-8")
    theirs = gguf.Metadata.load_model_card(tmp_path)
    ours = read_model_card(tmp_path)
    assert [theirs[key] for key in ("license", "license_name")] == [ours.license, ours.license_name]
    assert tuple(theirs["language"]) == ours.languages and tuple(theirs["base_model"]) == ours.base_models
    assert (*theirs["tags"], theirs["pipeline_tag"]) == ours.tags


@pytest.mark.parametrize(
    "content", ["", "# Model\nlicense: mit\n", "---\nlicense: mit\n", "---", "---\n---\n", "\0\0", "---\n- a\n: b\n---\n"]
)
def test_without_a_card(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    assert read_model_card(tmp_path) == ModelCard()
    assert read_model_card(tmp_path / "nowhere") == ModelCard()


@given(st.text(st.sampled_from("ab:-[]|>#'\"\n ,&*!license"), max_size=200))
def test_any_card(content: str) -> None:
    card = parse_model_card(f"---\n{content}\n---\n")
    texts = (card.license_name, card.license_link, *card.license.split(","), *card.tags, *card.languages, *card.base_models)
    assert all(text in content for text in texts)  # nothing is made up


def test_a_card_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(CheckpointError, match="README"):
        read_model_card(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config"):
        general_metadata("x", architecture="llama4", source=tmp_path / "b")


def test_file_names() -> None:
    model = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    assert file_name(model, "Q4_K_M") == "Llama-4-Scout-17B-16E-Instruct-Q4_K_M.gguf"
    assert file_name("Scout", "Q8_0", (1, 3)) == "Scout-Q8_0-00002-of-00003.gguf"
    assert vision_file_name(model, "F16") == "mmproj-Llama-4-Scout-17B-16E-Instruct-F16.gguf"
    assert [file_name(name, "F32") for name in ("", "/", "a b/", "..\0/x")] == [
        "model-F32.gguf",
        "model-F32.gguf",
        "a-b-F32.gguf",
        "x-F32.gguf",
    ]
    writer = gguf.GGUFWriter(None, "llama4", split_max_tensors=1)
    writer.tensors = [{}, {}]
    assert [path.name for path in writer.format_shard_names(Path("Scout-Q8_0.gguf"))] == [
        file_name("Scout", "Q8_0", (number, 2)) for number in range(2)
    ]


def test_split_keys() -> None:
    assert as_table(split_metadata(1, 3, 628)) == {
        "split.no": ("UINT16", 1),
        "split.count": ("UINT16", 3),
        "split.tensors.count": ("INT32", 628),
    }


def test_file_types() -> None:
    assert (FILE_TYPES["F32"], FILE_TYPES["Q4_K_M"], FILE_TYPES["IQ4_XS"], FILE_TYPES["BF16"], FILE_TYPES["MXFP4_MOE"]) == (
        0,
        15,
        30,
        32,
        38,
    )


# -------------------------------------------------------------------------------------------------------------- vision


def vision(**values: Any) -> VisionConfig:
    found = parse_config({**SCOUT, "vision_config": {**SCOUT["vision_config"], **values}}).vision
    assert found is not None
    return found


def test_keys_of_the_vision_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.25, 0.5, 0], "image_std": [1, 0.5, 0.5]}))
    table = as_table(vision_metadata(changed(), model_name="Llama-4-Scout-17B-16E", file_type="BF16", source=tmp_path))
    assert {key: value for key, value in table.items() if not key.startswith("general.")} == {
        "clip.has_vision_encoder": ("BOOL", True),
        "clip.projector_type": ("STRING", "llama4"),
        "clip.use_gelu": ("BOOL", True),
        "clip.vision.attention.head_count": ("UINT32", 16),
        "clip.vision.attention.layer_norm_epsilon": ("FLOAT32", 1e-5),
        "clip.vision.block_count": ("UINT32", 34),
        "clip.vision.embedding_length": ("UINT32", 1408),
        "clip.vision.feed_forward_length": ("UINT32", 5632),
        "clip.vision.image_mean": ("ARRAY", (0.25, 0.5, 0.0)),
        "clip.vision.image_size": ("UINT32", 336),
        "clip.vision.image_std": ("ARRAY", (1.0, 0.5, 0.5)),
        "clip.vision.patch_size": ("UINT32", 14),
        "clip.vision.projection_dim": ("UINT32", 5120),
        "clip.vision.projector.scale_factor": ("UINT32", 2),
    }
    general = {key: table[key][1] for key in ("general.architecture", "general.type", "general.file_type")}
    assert general == {"general.architecture": "clip", "general.type": "mmproj", "general.file_type": 32}
    plain = as_table(vision_metadata(changed(), model_name="x", file_type="Q8_0", source=None))
    assert plain["clip.vision.image_mean"] == plain["clip.vision.image_std"] == ("ARRAY", (0.5, 0.5, 0.5))


def test_the_vision_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Q4_K"):
        vision_metadata(changed(), model_name="x", file_type="Q4_K")
    with pytest.raises(RecipeError, match="text-only"):
        vision_metadata(dataclasses.replace(changed(), vision=None), model_name="x", file_type="F16")
    for wrong in ("[0.5, 0.5]", '"x"', "[0.5, 0.5, true]", "[0, 0, 0]", "[1, 1, 1e9]"):
        (tmp_path / "preprocessor_config.json").write_text(f'{{"image_std": {wrong}}}')
        with pytest.raises(CheckpointError, match="image_std"):
            vision_metadata(changed(), model_name="x", file_type="F16", source=tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"rope_theta": 5000}, "rope_theta is 5000"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio is 0.4"),
        ({"pixel_shuffle_ratio": 2}, "pixel_shuffle_ratio is 2"),
        ({"image_size": 330}, "330 pixels"),
        ({"image_size": 350}, "350 pixels"),
        ({"num_attention_heads": 15}, "num_attention_heads, 15"),
    ],
)
def test_vision_towers_that_llama_cpp_cannot_express(values: dict[str, Any], named: str) -> None:
    assert vision_inexpressible(vision()) is None
    assert named in (vision_inexpressible(vision(**values)) or "")


def test_vision_numbers_that_a_config_may_leave_open() -> None:
    full = vision()
    left_open = ("num_attention_heads", "norm_eps", "rope_theta", "hidden_act", "pixel_shuffle_ratio")
    assert vision(**dict.fromkeys(left_open)) == full
    for key, wrong in (("hidden_act", 3), ("norm_eps", 0), ("num_attention_heads", 0.5), ("pixel_shuffle_ratio", "half")):
        with pytest.raises(CheckpointError, match=key):
            vision(**{key: wrong})


@pytest.mark.parametrize(
    ("file_type", "matrix", "patches"),
    [("F32", "F32", "F32"), ("F16", "F16", "F16"), ("BF16", "BF16", "F32"), ("Q8_0", "Q8_0", "F32")],
)
def test_types_of_vision_tensors(file_type: str, matrix: str, patches: str) -> None:
    kinds = {}
    for tensor in inventory(changed()):
        if tensor.role in ("vision", "projector"):
            [place] = places_of(tensor.name)
            kinds[place.tensor] = vision_type(tensor.name, tensor.shape, file_type) or "F32"
    assert {kinds["v.class_embd"], kinds["v.position_embd.weight"], kinds["v.blk.0.ln1.weight"], kinds["v.blk.0.attn_q.bias"]} == {
        "F32"
    }
    assert kinds["v.patch_embd.weight"] == patches
    assert {kinds["v.blk.0.attn_q.weight"], kinds["mm.model.fc.weight"], kinds["mm.model.mlp.1.weight"]} == {matrix}
    assert vision_type("vision_model.model.layers.0.self_attn.q_proj.weight", (48, 48), "Q8_0") == "F16"


def test_modelfile() -> None:
    lines = modelfile(["a.gguf"], "mmproj-a.gguf").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["FROM ./a.gguf", "FROM ./mmproj-a.gguf"]
    assert "merge" in modelfile(["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"])
