"""Random tiny Llama 4 checkpoints, written as releases are: BF16 shards with an index, config, tokenizer files, licence.

Names and shapes are spelled out here once more, on purpose: they are checked against transformers, and quantkit's own inventory is
checked against them.  Every size is a multiple of 128 where a scheme cares, so that every scheme fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2_000_000

_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 256,
    "intermediate_size_mlp": 384,
    "max_position_embeddings": 32768,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 4,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 256,
}
_VISION: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": 28,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "rope_theta": 10000,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 128,
}
_SCALING = {
    "factor": 16.0,
    "high_freq_factor": 1.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_KINDS: dict[str, dict[str, Any]] = {
    "scout": {"rope_scaling": _SCALING},
    "maverick": {"interleave_moe_layer_step": 2, "num_hidden_layers": 4, "num_local_experts": 8, "use_qk_norm": False},
    "text": {"rope_scaling": _SCALING},
}


def tiny_config(kind: str = "scout", **overrides: Any) -> dict[str, Any]:
    """The content of ``config.json``.  overrides: fields of the text section; a value of ``...`` removes the field."""
    text = {**_TEXT, **_KINDS[kind], **overrides}
    layers, step = text["num_hidden_layers"], text["interleave_moe_layer_step"]
    text.setdefault("moe_layers", list(range(step - 1, layers, step)))
    text = {key: text[key] for key in sorted(text) if text[key] is not ...}
    if kind == "text":
        return {"architectures": ["Llama4ForCausalLM"], **text, "transformers_version": "4.57.6"}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200,
        "eoi_token_index": 201,
        "image_token_index": 202,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0.dev0",
        "vision_config": dict(_VISION),
    }


def tiny_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model with that config."""
    text = config.get("text_config", config)
    prefix = "language_model." if "text_config" in config else ""
    hidden, vocabulary, width, experts = (text[f] for f in ("hidden_size", "vocab_size", "intermediate_size", "num_local_experts"))
    queries, keys = (text[key] * text["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield f"{prefix}model.embed_tokens.weight", (vocabulary, hidden)
    step = text["interleave_moe_layer_step"]
    moe_layers = text.get("moe_layers", range(step - 1, text["num_hidden_layers"], step))
    for layer in range(text["num_hidden_layers"]):
        base = f"{prefix}model.layers.{layer}."
        yield f"{base}input_layernorm.weight", (hidden,)
        yield f"{base}post_attention_layernorm.weight", (hidden,)
        for projection, rows, columns in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)):
            yield f"{base}self_attn.{projection}_proj.weight", (rows, columns)
            if text.get("attention_bias"):
                yield f"{base}self_attn.{projection}_proj.bias", (rows,)
        mlp, mlp_width = f"{base}feed_forward.", text["intermediate_size_mlp"]
        if layer in moe_layers:
            yield f"{mlp}router.weight", (experts, hidden)
            yield f"{mlp}experts.gate_up_proj", (experts, hidden, 2 * width)
            yield f"{mlp}experts.down_proj", (experts, width, hidden)
            mlp, mlp_width = f"{mlp}shared_expert.", width
        yield f"{mlp}gate_proj.weight", (mlp_width, hidden)
        yield f"{mlp}up_proj.weight", (mlp_width, hidden)
        yield f"{mlp}down_proj.weight", (hidden, mlp_width)
    yield f"{prefix}model.norm.weight", (hidden,)
    if not text.get("tie_word_embeddings"):
        yield f"{prefix}lm_head.weight", (vocabulary, hidden)
    if config.get("vision_config"):
        yield from _vision_shapes(config["vision_config"])
        yield "multi_modal_projector.linear_1.weight", (hidden, config["vision_config"]["vision_output_dim"])


def _vision_shapes(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    base = "vision_model."
    yield f"{base}class_embedding", (hidden,)
    yield f"{base}positional_embedding_vlm", ((vision["image_size"] // patch) ** 2 + 1, hidden)
    yield f"{base}patch_embedding.linear.weight", (hidden, vision["num_channels"] * patch * patch)
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
    norms = ["layernorm_pre", "layernorm_post"]
    for layer in range(vision["num_hidden_layers"]):
        norms += [f"model.layers.{layer}.input_layernorm", f"model.layers.{layer}.post_attention_layernorm"]
        for name, shape in linears.items():
            yield f"{base}model.layers.{layer}.{name}.weight", shape
            yield f"{base}model.layers.{layer}.{name}.bias", shape[:1]
    for name in norms:
        yield f"{base}{name}.weight", (hidden,)
        yield f"{base}{name}.bias", (hidden,)
    yield f"{base}vision_adapter.mlp.fc1.weight", (vision["projector_input_dim"], width)
    yield f"{base}vision_adapter.mlp.fc2.weight", (vision["projector_output_dim"], vision["projector_output_dim"])


def tiny_tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights: norms near 1, all else Gaussian, scaled so that activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tiny_shapes(config):
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif len(shape) > 1 and "embed" not in name:
            inputs = shape[1]  # of a linear [out, in] as of fused experts [experts, in, out]
            values *= inputs**-0.5
        tensors[name] = values.to(dtype)
    return tensors


def write_tiny_model(
    directory: str | Path,
    kind: str = "scout",
    seed: int = 0,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype = torch.bfloat16,
    **overrides: Any,
) -> None:
    """Write a random tiny checkpoint; the same arguments give the same bytes.

    kind: ``scout`` (2 layers, 4 experts in each), ``maverick`` (4 layers, 8 experts in every second one) or ``text`` (like scout, a
    Llama4ForCausalLM without vision).  shard_bytes: most bytes of a shard; a large value gives a single file without index.
    overrides: fields of the text section of the config, such as ``num_local_experts=128`` or ``attention_bias=True``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(kind, **overrides)
    write_files(directory, tiny_tensors(config, seed, dtype), shard_bytes)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_companions(directory)


def write_files(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as shards with an index, or as one file when they fit."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_companions(directory: Path) -> None:
    """The small files beside the weights.  The tokenizer knows one token per byte."""
    vocabulary = {f"<{number}>": number for number in range(256)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}}
    files = {
        "tokenizer.json": json.dumps(tokenizer, indent=2),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<1>"}, indent=2),
        "special_tokens_map.json": json.dumps({"bos_token": "<1>", "eos_token": "<2>"}, indent=2),
        "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True}, indent=2),
        "preprocessor_config.json": json.dumps({"image_processor_type": "Llama4ImageProcessorFast"}, indent=2),
        "chat_template.jinja": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "LICENSE": "A licence text that must travel with the weights.\n",
        "USE_POLICY.md": "A use policy that must travel with the weights.\n",
        "README.md": "The card of the source, which says nothing of the artifact.\n",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
