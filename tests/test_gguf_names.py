"""Names in GGUF files: against the gguf package's own map of names, and there and back for whole models."""

from __future__ import annotations

from typing import Any

import gguf
import pytest

from quantkit.config import parse_config
from quantkit.errors import UnsupportedModelError
from quantkit.formats.gguf_names import PREFIX, Place, matrix_name, meaning_of, place_of, places_of
from quantkit.llama4 import SourceTensor, WeightMatrix, inventory, units
from tests.releases import release

RELEASES: dict[str, dict[str, Any]] = {
    "scout": {"num_local_experts": 16, "interleave_moe_layer_step": 1},
    "maverick": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
# What the converter names itself, without the map
EXCEPTIONS = {
    "vision_model.positional_embedding_vlm": gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_EMBD_POS] + ".weight",
    "multi_modal_projector.linear_1.weight": gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ_FC] + ".weight",
}
COUNTS = {"scout": 627, "maverick": 531}  # as llama.cpp logs them; Scout's rope_freqs comes on top


@pytest.mark.parametrize("name", list(RELEASES))
def test_as_many_tensors_as_llama_cpp_asks_for(name: str) -> None:
    tensors = inventory(parse_config(release(**RELEASES[name])))
    places = [place for tensor in tensors for place in places_of(tensor.name)]
    assert len(places) == len(set(places))
    assert sum(place.file == "text" for place in places) == COUNTS[name]


@pytest.mark.parametrize("name", list(RELEASES))
def test_names_of_the_gguf_package(name: str) -> None:
    config = parse_config(release(**RELEASES[name]))
    text = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, config.num_layers)
    vision = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 34)
    for tensor in inventory(config):
        if tensor.role == "routed_expert":
            continue  # split and renamed by the converter, before it looks into the map
        [place] = places_of(tensor.name)
        table = text if place.file == "text" else vision
        ours = tensor.name.removeprefix(PREFIX)
        if ours in EXCEPTIONS:
            theirs = EXCEPTIONS[ours]
        else:
            theirs = table.get_name(ours, try_suffixes=(".weight", ".bias")) or ""
        # the package gives two tensors this source name; the converter picks the other one for Llama 4
        assert place.tensor == theirs.replace("attn_post_norm", "ln2"), tensor.name


def test_experts() -> None:
    base = "language_model.model.layers.3.feed_forward.experts."
    assert place_of(f"{base}7.gate_proj") == Place("blk.3.ffn_gate_exps.weight", 7)
    assert place_of(f"{base}0.up_proj") == Place("blk.3.ffn_up_exps.weight", 0)
    assert place_of(f"{base.removeprefix(PREFIX)}15.down_proj") == Place("blk.3.ffn_down_exps.weight", 15)
    assert places_of(f"{base}gate_up_proj") == (Place("blk.3.ffn_gate_exps.weight"), Place("blk.3.ffn_up_exps.weight"))
    assert places_of(f"{base}down_proj") == (Place("blk.3.ffn_down_exps.weight"),)
    for fused in ("gate_up_proj", "down_proj"):
        with pytest.raises(ValueError, match="one expert"):
            place_of(base + fused)


@pytest.mark.parametrize("name", list(RELEASES))
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_there_and_back(name: str, prefix: str) -> None:
    config = parse_config(release(**RELEASES[name]))
    seen = set()
    for unit in units(config):
        if unit.expert is not None and unit.expert > 1:
            continue
        for item in unit.items:
            ours = (
                item.name
                if item.name.startswith(("vision_model.", "multi_modal_projector."))
                else prefix + item.name.removeprefix(PREFIX)
            )
            place = place_of(ours)
            assert place not in seen
            seen.add(place)
            meaning = meaning_of(place.tensor)
            assert meaning is not None and (meaning.role, meaning.tensor) == (item.role, place.tensor)
            assert matrix_name(place.tensor, place.expert, prefix) == ours.removesuffix(".weight")
            if isinstance(item, WeightMatrix):
                assert (meaning.layer, meaning.projection, meaning.stacked) == (
                    item.layer,
                    item.projection,
                    item.expert is not None,
                )
                assert meaning.source == item.tensor.removeprefix(PREFIX)
            else:
                assert isinstance(item, SourceTensor) and meaning.source == item.name.removeprefix(PREFIX)
            assert meaning.layer == item.layer or meaning.role == "vision"


def test_rotary_factors_belong_to_no_checkpoint() -> None:
    meaning = meaning_of("rope_freqs.weight")
    assert meaning is not None and meaning.role is None
    with pytest.raises(UnsupportedModelError):
        matrix_name("rope_freqs.weight")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.-1.self_attn.q_proj",
        "model.layers.01.self_attn.q_proj",
        "model.layers.0.feed_forward.experts.gate_proj",
        "model.layers.0.feed_forward.experts.x.gate_proj",
        "model.layers.0.feed_forward.experts.3.gate_up_proj",
        "vision_model.model.layers.0.self_attn.q_proj",
        "vision_model.class_embedding.weight",
        "language_model.language_model.model.norm.weight",
    ],
)
def test_names_without_a_place(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no tensor"):
        places_of(name)


@pytest.mark.parametrize(
    "tensor",
    [
        "",
        "blk.0.attn_q",
        "blk.0.attn_q.bias",
        "blk.0.attn_qkv.weight",
        "blk.x.attn_q.weight",
        "blk.00.attn_q.weight",
        "v.blk.0.ln1",
        "output",
    ],
)
def test_tensors_that_no_llama_4_has(tensor: str) -> None:
    assert meaning_of(tensor) is None
    with pytest.raises(UnsupportedModelError):
        matrix_name(tensor)


def test_an_expert_is_named_where_there_are_experts() -> None:
    with pytest.raises(ValueError, match="name an expert"):
        matrix_name("blk.0.ffn_up_exps.weight")
    with pytest.raises(ValueError, match="not stacked"):
        matrix_name("blk.0.attn_q.weight", 1)
