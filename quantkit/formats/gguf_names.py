"""Names of tensors in GGUF files: from a checkpoint's names and back.

A GGUF file has the routed experts of a layer in three stacked tensors, ``[experts, out, in]`` each, where the checkpoint has two
fused ones, input-major.  So one matrix of ours is a whole tensor there, or one expert of it: a ``Place``.  The vision tower and the
projector go into a file of their own, with its own names.  Names that begin with ``language_model.`` and names of text-only models
mean the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import UnsupportedModelError
from quantkit.llama4 import Role
from quantkit.strict_json import brief

PREFIX = "language_model."
ROPE_FREQS = "rope_freqs.weight"  # generated from the config; no checkpoint has it
OUTPUT = "output.weight"
TOKEN_EMBEDDING = "token_embd.weight"

# module -> (GGUF's name without .weight, role)
_TOP: dict[str, tuple[str, Role]] = {
    "model.embed_tokens": ("token_embd", "embedding"),
    "model.norm": ("output_norm", "norm"),
    "lm_head": ("output", "lm_head"),
}
_LAYER: dict[str, tuple[str, Role]] = {
    "input_layernorm": ("attn_norm", "norm"),
    "self_attn.q_proj": ("attn_q", "attention"),
    "self_attn.k_proj": ("attn_k", "attention"),
    "self_attn.v_proj": ("attn_v", "attention"),
    "self_attn.o_proj": ("attn_output", "attention"),
    "post_attention_layernorm": ("ffn_norm", "norm"),
    "feed_forward.router": ("ffn_gate_inp", "router"),
    "feed_forward.gate_proj": ("ffn_gate", "dense_mlp"),
    "feed_forward.up_proj": ("ffn_up", "dense_mlp"),
    "feed_forward.down_proj": ("ffn_down", "dense_mlp"),
    "feed_forward.shared_expert.gate_proj": ("ffn_gate_shexp", "shared_expert"),
    "feed_forward.shared_expert.up_proj": ("ffn_up_shexp", "shared_expert"),
    "feed_forward.shared_expert.down_proj": ("ffn_down_shexp", "shared_expert"),
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_FUSED = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
# Names of the vision file, with the suffix they have here and there.
_VISION_TOP = {
    "vision_model.patch_embedding.linear.weight": "v.patch_embd.weight",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.layernorm_pre.weight": "v.pre_ln.weight",
    "vision_model.layernorm_pre.bias": "v.pre_ln.bias",
    "vision_model.layernorm_post.weight": "v.post_ln.weight",
    "vision_model.layernorm_post.bias": "v.post_ln.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "mm.model.mlp.1.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "mm.model.mlp.2.weight",
    "multi_modal_projector.linear_1.weight": "mm.model.fc.weight",
}
_VISION_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

_NUMBER = "(0|[1-9][0-9]{0,5})"
_OUR_LAYER = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)")
_OUR_EXPERT = re.compile(rf"feed_forward\.experts\.(?:{_NUMBER}\.)?(gate_up_proj|gate_proj|up_proj|down_proj)")
_OUR_VISION_LAYER = re.compile(rf"vision_model\.model\.layers\.{_NUMBER}\.(.+)\.(weight|bias)")
_THEIR_LAYER = re.compile(rf"blk\.{_NUMBER}\.([a-z_]+)\.weight")
_THEIR_VISION_LAYER = re.compile(rf"v\.blk\.{_NUMBER}\.([a-z0-9_]+)\.(weight|bias)")

_TOP_BACK = {stem: (module, role) for module, (stem, role) in _TOP.items()}
_LAYER_BACK = {stem: (module, role) for module, (stem, role) in _LAYER.items()}
_EXPERT_BACK = {stem: projection for projection, stem in _EXPERT.items()}
_VISION_TOP_BACK = {theirs: ours for ours, theirs in _VISION_TOP.items()}
_VISION_LAYER_BACK = {theirs: ours for ours, theirs in _VISION_LAYER.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix or tensor lies in GGUF files.  expert: its index in a stacked tensor, else None.  file: which of the two."""

    tensor: str
    expert: int | None = None
    file: Literal["text", "vision"] = "text"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a tensor of a GGUF file is.

    role: None for the rotary factors, which no checkpoint has.  layer: None outside of layers.  projection: last part of the name
    of the module.  source: the checkpoint's tensor without ``language_model.``, for stacked experts the fused tensor they come
    from.
    """

    tensor: str
    role: Role | None
    layer: int | None
    projection: str
    source: str
    stacked: bool = False


def place_of(name: str) -> Place:
    """Where a ``WeightMatrix`` goes, or a ``SourceTensor`` that is not fused.

    Raises UnsupportedModelError for names that GGUF has no place for, and ValueError for a fused tensor.
    """
    place = places_of(name)[0]
    meaning = meaning_of(place.tensor)
    if meaning is not None and meaning.stacked and place.expert is None:
        raise ValueError(f"tensor {brief(name)} holds all experts of a layer; ask for one expert's matrices")
    return place


def places_of(name: str) -> tuple[Place, ...]:
    """Where a ``WeightMatrix`` or any ``SourceTensor`` goes; a fused gate_up_proj goes to two stacked tensors.

    Raises UnsupportedModelError for names that GGUF has no place for.
    """
    if name in _VISION_TOP:
        return (Place(_VISION_TOP[name], file="vision"),)
    if found := _OUR_VISION_LAYER.fullmatch(name):
        layer, module, suffix = found.groups()
        if module in _VISION_LAYER:
            return (Place(f"v.blk.{layer}.{_VISION_LAYER[module]}.{suffix}", file="vision"),)
    module = name.removeprefix(PREFIX).removesuffix(".weight")
    if module in _TOP:
        return (Place(f"{_TOP[module][0]}.weight"),)
    if found := _OUR_LAYER.fullmatch(module):
        layer, module = found.groups()
        if module in _LAYER:
            return (Place(f"blk.{layer}.{_LAYER[module][0]}.weight"),)
        if found := _OUR_EXPERT.fullmatch(module):
            expert, projection = found.groups()
            if expert is None and projection in _FUSED:
                return tuple(Place(f"blk.{layer}.{stem}.weight") for stem in _FUSED[projection])
            if expert is not None and projection in _EXPERT:
                return (Place(f"blk.{layer}.{_EXPERT[projection]}.weight", int(expert)),)
    raise UnsupportedModelError(
        f"llama.cpp's Llama 4 has no tensor for {brief(name)}. Choose another format, or leave the tensor out of the checkpoint."
    )


def meaning_of(tensor: str) -> Meaning | None:
    """What a tensor of a Llama 4 GGUF file is, text or vision; None for names that such a file does not have."""
    if tensor == ROPE_FREQS:
        return Meaning(tensor, None, None, "rope_freqs", "")
    stem = tensor.removesuffix(".weight")
    if tensor.endswith(".weight") and stem in _TOP_BACK:
        module, role = _TOP_BACK[stem]
        return Meaning(tensor, role, None, module.rsplit(".", 1)[-1], f"{module}.weight")
    if found := _THEIR_LAYER.fullmatch(tensor):
        number, stem = found.groups()
        layer, base = int(number), f"model.layers.{number}."
        if stem in _LAYER_BACK:
            module, role = _LAYER_BACK[stem]
            return Meaning(tensor, role, layer, module.rsplit(".", 1)[-1], f"{base}{module}.weight")
        if stem in _EXPERT_BACK:
            projection = _EXPERT_BACK[stem]
            fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
            return Meaning(tensor, "routed_expert", layer, projection, f"{base}feed_forward.experts.{fused}", stacked=True)
    return _vision_meaning(tensor)


def _vision_meaning(tensor: str) -> Meaning | None:
    if ours := _VISION_TOP_BACK.get(tensor):
        role: Role = "projector" if ours.startswith("multi_modal_projector.") else "vision"
        return Meaning(tensor, role, None, ours.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1], ours)
    if found := _THEIR_VISION_LAYER.fullmatch(tensor):
        number, stem, suffix = found.groups()
        if module := _VISION_LAYER_BACK.get(stem):
            ours = f"vision_model.model.layers.{number}.{module}.{suffix}"
            return Meaning(tensor, "vision", int(number), module.rsplit(".", 1)[-1], ours)
    return None


def matrix_name(tensor: str, expert: int | None = None, prefix: str = PREFIX) -> str:
    """The name that a ``WeightMatrix`` has, or the module of any other tensor; the reverse of ``place_of``.

    Raises UnsupportedModelError when no Llama 4 file has the tensor, and ValueError when ``expert`` is missing or superfluous.
    """
    meaning = meaning_of(tensor)
    if meaning is None or meaning.role is None:
        raise UnsupportedModelError(f"tensor {brief(tensor)} belongs to no checkpoint of a Llama 4.")
    if meaning.stacked is (expert is None):
        raise ValueError(f"{tensor} {'is stacked: name an expert' if meaning.stacked else 'is not stacked by expert'}")
    if meaning.role in ("vision", "projector"):
        return meaning.source.removesuffix(".weight") if meaning.source.endswith(".weight") else meaning.source
    if meaning.stacked:
        return f"{prefix}model.layers.{meaning.layer}.feed_forward.experts.{expert}.{meaning.projection}"
    return prefix + meaning.source.removesuffix(".weight")
