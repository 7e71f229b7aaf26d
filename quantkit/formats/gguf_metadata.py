"""The hyperparameters of a Llama 4 as llama.cpp wants them, and what it cannot express.

Most of what ``config.json`` says has a key of its own.  The rest llama.cpp has built in: which layers rotate, the attention
chunk, the temperature of long contexts, and whether queries and keys are normalized (it goes by the number of experts).
``inexpressible`` compares these with the config, and says why a model would run wrongly; a difference that cannot show within the
model's context is none.

Rotary scaling has no key either: it becomes a tensor of divisors, one for each frequency.  ``config_from_metadata`` reads a
finished file and cannot undo that: the config it returns has a scaling by 1 where the file has such a tensor, which says that
there is one; its values are compared with ``rope_freqs`` of the source's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_VERSION, Keys

from quantkit.config import MAX_EXPERTS, MAX_LAYERS, Llama4Config, RopeScaling
from quantkit.errors import ArtifactError
from quantkit.formats.gguf_general import computed_label, count, flag, general_metadata, real
from quantkit.formats.gguf_names import OUTPUT, ROPE_FREQS, TOKEN_EMBEDDING
from quantkit.gguf_header import GGUFValueType, MetadataEntry
from quantkit.strict_json import brief

ARCHITECTURE = "llama4"
# What llama.cpp has built in for this architecture
NO_ROPE_INTERVAL = 4
ATTENTION_CHUNK = 8192
FLOOR_SCALE = 8192.0
ATTENTION_SCALE = 0.1
EXPERTS_WITHOUT_QK_NORM = 128
MOST_LAYERS = 512
MOST_EXPERTS = 1024
# Read by versions of Ollama before 0.30 only
USE_QK_NORM = f"{ARCHITECTURE}.use_qk_norm"
CHUNK_SIZE = f"{ARCHITECTURE}.attention.chunk_size"


def _key(template: str) -> str:
    return template.format(arch=ARCHITECTURE)


_INTERLEAVE = _key(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP)


def text_metadata(
    config: Llama4Config,
    *,
    model_name: str,
    file_type: int,
    tokenizer: Sequence[MetadataEntry] = (),
    source: Path | None = None,
    extra: Sequence[MetadataEntry] = (),
) -> list[MetadataEntry]:
    """All keys of a text model's file, in the converter's order.

    model_name: as on the hub.  file_type: number of the mixture (``FILE_TYPES``).  tokenizer: from ``tokenizer_metadata``.
    source: directory of the checkpoint, for its model card.  extra: put at the end.
    Only for a config that ``inexpressible`` has nothing against.
    """
    step = moe_step(config)
    assert step is not None, "the caller refuses what is inexpressible"
    return [
        *general_metadata(model_name, architecture=ARCHITECTURE, source=source, label=computed_label(config)),
        count(_key(Keys.LLM.BLOCK_COUNT), config.num_layers),
        count(_key(Keys.LLM.CONTEXT_LENGTH), config.max_positions),
        count(_key(Keys.LLM.EMBEDDING_LENGTH), config.hidden_size),
        count(_key(Keys.LLM.FEED_FORWARD_LENGTH), config.dense_width),
        count(_key(Keys.Attention.HEAD_COUNT), config.num_heads),
        count(_key(Keys.Attention.HEAD_COUNT_KV), config.num_key_value_heads),
        real(_key(Keys.Rope.FREQ_BASE), config.rope_theta),
        real(_key(Keys.Attention.LAYERNORM_RMS_EPS), config.rms_norm_eps),
        count(_key(Keys.LLM.EXPERT_COUNT), config.num_experts),
        count(_key(Keys.LLM.EXPERT_USED_COUNT), config.experts_per_token),
        count(_key(Keys.Attention.KEY_LENGTH), config.head_dim),
        count(_key(Keys.Attention.VALUE_LENGTH), config.head_dim),
        count(Keys.General.FILE_TYPE, file_type),
        count(_key(Keys.LLM.VOCAB_SIZE), config.vocab_size),
        count(_key(Keys.Rope.DIMENSION_COUNT), config.head_dim),
        count(_INTERLEAVE, step),
        count(_key(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH), config.expert_width),
        flag(USE_QK_NORM, config.use_qk_norm),
        count(CHUNK_SIZE, config.attention_chunk_size),
        count(Keys.General.QUANTIZATION_VERSION, GGML_QUANT_VERSION),
        *tokenizer,
        *extra,
    ]


def moe_step(config: Llama4Config) -> int | None:
    """The step for which layer n has experts exactly where n + 1 is a multiple of it; None where there is no such step."""
    layers = range(config.num_layers)
    first = next((layer for layer in layers if config.moe_layers[layer]), config.num_layers)
    step = first + 1
    return step if all(config.moe_layers[layer] == ((layer + 1) % step == 0) for layer in layers) else None


def rope_freqs(config: Llama4Config) -> torch.Tensor | None:
    """Divisors of the rotary frequencies, float32 ``[head_dim / 2]``; None without scaling.

    Short wavelengths keep their frequency, that of long ones is divided by the factor, and in between it goes smoothly from one to
    the other.  The frequencies are computed in float32, as by transformers.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    context = float(scaling.original_max_position_embeddings)
    low, high = context / scaling.low_freq_factor, context / scaling.high_freq_factor
    factors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low or scaling.low_freq_factor == scaling.high_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            factors.append(1.0 / ((1.0 - smooth) / scaling.factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------- what has no key


def inexpressible(config: Llama4Config) -> str | None:
    """Why llama.cpp would compute something else than this config says; None when it computes the same."""
    reasons = [*_attention_differences(config), *_scale_differences(config)]
    norm = config.num_experts != EXPERTS_WITHOUT_QK_NORM
    if config.use_qk_norm != norm and any(config.rope_layers):
        reasons.append(
            f"use_qk_norm is {config.use_qk_norm} with {config.num_experts} experts, but llama.cpp goes by the number: it "
            f"normalizes queries and keys unless there are {EXPERTS_WITHOUT_QK_NORM}"
        )
    if config.attention_bias:
        reasons.append("attention_bias is True, but llama.cpp's Llama 4 has no biases in attention")
    if moe_step(config) is None:
        listed = [layer for layer, moe in enumerate(config.moe_layers) if moe]
        reasons.append(
            f"the layers with experts are {brief(listed)}, but llama.cpp knows only every n-th layer: those whose number, counted "
            "from 1, is a multiple of interleave_moe_layer_step"
        )
    if config.num_layers > MOST_LAYERS or config.num_experts > MOST_EXPERTS:
        reasons.append(
            f"there are {config.num_layers} layers with {config.num_experts} experts, but llama.cpp allows {MOST_LAYERS} layers "
            f"and {MOST_EXPERTS} experts"
        )
    if config.experts_per_token > config.num_experts:
        reasons.append(f"num_experts_per_tok is {config.experts_per_token}, but there are {config.num_experts} experts")
    return "; ".join(reasons) or None


def _attention_differences(config: Llama4Config) -> list[str]:
    reasons = []
    for layer, rotates in enumerate(config.rope_layers):
        if rotates != ((layer + 1) % NO_ROPE_INTERVAL != 0):
            reasons.append(
                f"layer {layer} is {'' if rotates else 'not '}given rotary positions (no_rope_layers), but in llama.cpp every "
                f"{NO_ROPE_INTERVAL}th layer has none and all others have them"
            )
            break
    chunk = config.attention_chunk_size
    if chunk != ATTENTION_CHUNK and config.max_positions > min(chunk, ATTENTION_CHUNK) and any(config.rope_layers):
        reasons.append(f"attention_chunk_size is {chunk}, but llama.cpp attends within chunks of {ATTENTION_CHUNK}")
    if config.head_dim % 2:
        reasons.append(f"head_dim is {config.head_dim}, but llama.cpp rotates pairs, so it must be even")
    if config.num_heads % config.num_key_value_heads:
        reasons.append(
            f"num_attention_heads is {config.num_heads}, but must be a multiple of the {config.num_key_value_heads} key_value heads"
        )
    return reasons


def _scale_differences(config: Llama4Config) -> list[str]:
    """Differences in the temperature, which grows with the position in the layers without rotary embedding."""
    shown = config.max_positions >= FLOOR_SCALE and not all(config.rope_layers)  # below, llama.cpp multiplies by 1
    if not config.temperature_tuning:
        return [f"attn_temperature_tuning is off, but llama.cpp tunes from position {FLOOR_SCALE:.0f} on"] if shown else []
    reasons = []
    if config.floor_scale != FLOOR_SCALE and (
        shown or (config.max_positions >= config.floor_scale and not all(config.rope_layers))
    ):
        reasons.append(f"floor_scale is {config.floor_scale:g}, but llama.cpp has {FLOOR_SCALE:g} built in")
    if config.attn_scale != ATTENTION_SCALE and shown:
        reasons.append(f"attn_scale is {config.attn_scale:g}, but llama.cpp has {ATTENTION_SCALE:g} built in")
    return reasons


# ------------------------------------------------------------------------------------------------------------- reading


def config_from_metadata(
    metadata: Mapping[str, MetadataEntry], shapes: Mapping[str, tuple[int, ...]], where: str = "the GGUF file"
) -> Llama4Config:
    """The config that a finished file of the text model stands for, as llama.cpp reads it.

    shapes: of all tensors, of all files of a split model, in torch's order.  What llama.cpp has built in is filled in;
    the vision tower stands in another file, so ``vision`` is None and the prefix is empty.  Raises ArtifactError when a key is
    missing or has another type than llama.cpp reads.
    """
    read = MetadataReader(metadata, where)
    architecture = read.value(Keys.General.ARCHITECTURE, GGUFValueType.STRING)
    if architecture != ARCHITECTURE:
        raise ArtifactError(f"{where}: general.architecture is {brief(architecture)}; expected {ARCHITECTURE!r}.")
    if len(shapes.get(TOKEN_EMBEDDING, ())) != 2:
        raise ArtifactError(
            f"{where} has no matrix {TOKEN_EMBEDDING}. Name the first file of a split model, with all others beside it."
        )
    layers, experts, step = read.count(Keys.LLM.BLOCK_COUNT), read.count(Keys.LLM.EXPERT_COUNT), read.count(_INTERLEAVE)
    if layers > MAX_LAYERS or layers * experts > MAX_EXPERTS:
        raise ArtifactError(f"{where}: {layers:,} layers with {experts:,} experts cannot be. Convert the model again.")
    hidden, heads = read.count(Keys.LLM.EMBEDDING_LENGTH), read.count(Keys.Attention.HEAD_COUNT)
    return Llama4Config(
        hidden_size=hidden,
        expert_width=read.count(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
        dense_width=read.count(Keys.LLM.FEED_FORWARD_LENGTH),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=read.count(Keys.Attention.HEAD_COUNT_KV),
        head_dim=read.count(Keys.Attention.KEY_LENGTH, hidden // heads),
        vocab_size=shapes[TOKEN_EMBEDDING][0],
        num_experts=experts,
        experts_per_token=read.count(Keys.LLM.EXPERT_USED_COUNT),
        moe_layers=tuple((layer + 1) % step == 0 for layer in range(layers)),
        rope_layers=tuple((layer + 1) % NO_ROPE_INTERVAL != 0 for layer in range(layers)),
        rope_theta=read.real(Keys.Rope.FREQ_BASE),
        rope_scaling=RopeScaling(1.0, 1.0, 1.0, 1) if ROPE_FREQS in shapes else None,
        attention_chunk_size=ATTENTION_CHUNK,
        use_qk_norm=experts != EXPERTS_WITHOUT_QK_NORM,
        attention_bias=False,
        temperature_tuning=True,
        floor_scale=FLOOR_SCALE,
        attn_scale=ATTENTION_SCALE,
        rms_norm_eps=read.real(Keys.Attention.LAYERNORM_RMS_EPS),
        max_positions=read.count(Keys.LLM.CONTEXT_LENGTH),
        tie_word_embeddings=OUTPUT not in shapes,
        dtype="BF16",
        prefix="",
        vision=None,
    )


class MetadataReader:
    """Typed access to the keys of one file.  Raises ArtifactError for a key that is missing, mistyped or out of range."""

    def __init__(self, metadata: Mapping[str, MetadataEntry], where: str):
        self.metadata, self.where = metadata, where

    def value(self, template: str, kind: GGUFValueType) -> Any:
        key = _key(template)
        entry = self.metadata.get(key)
        if entry is None:
            raise ArtifactError(f"{self.where} has no key {key}. Convert the model again.")
        if entry.type is not kind:
            raise ArtifactError(
                f"{self.where}: {key} is {entry.type.name}; llama.cpp reads {kind.name} only. Convert the model again."
            )
        return entry.value

    def count(self, template: str, default: int | None = None) -> int:
        if default is not None and _key(template) not in self.metadata:
            return default
        value = self.value(template, GGUFValueType.UINT32)
        if not isinstance(value, int) or value < 1:
            raise ArtifactError(
                f"{self.where}: {_key(template)} is {brief(value)}; expected a positive number. Convert the model again."
            )
        return value

    def real(self, template: str) -> float:
        return float(self.value(template, GGUFValueType.FLOAT32))
