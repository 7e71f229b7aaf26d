"""Llama 4: configuration, the full inventory of expected tensors, and the units of work that follow from it.

Everything here is derived from ``config.json`` alone, so a plan needs no weights.  Three levels:

* ``SourceTensor``  a tensor as the checkpoint stores it.  The routed experts of a layer are two fused tensors,
  ``gate_up_proj [experts, hidden, 2 * expert_width]`` and ``down_proj [experts, expert_width, hidden]``, input-major, with gate in
  the first half of the columns and up in the second.
* ``WeightMatrix``  one linear weight in the usual ``[out, in]`` sense, with the place in the source it comes from: a whole tensor,
  or one expert's slice of a fused tensor, some of its columns, transposed.  This is what a scheme is given to.
* ``Unit``  the smallest piece of work that is read, quantized, written and journalled at once: matrices that clients fuse and that
  may have to share a scale (gate and up; q, k and v), or a single matrix or tensor.  One expert's slice is contiguous on disk.

Facts the code rests on: expert MLPs have width ``intermediate_size``, dense MLPs ``intermediate_size_mlp``; layer i has experts
when it is listed in ``moe_layers`` or, if that is absent, when (i + 1) is a multiple of ``interleave_moe_layer_step``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import AlreadyQuantizedError, UnsupportedModelError

Role = Literal[
    "routed_expert", "shared_expert", "dense_mlp", "attention", "router", "norm", "embedding", "lm_head", "vision", "projector"
]
ROLES: tuple[Role, ...] = (
    "routed_expert",
    "shared_expert",
    "dense_mlp",
    "attention",
    "router",
    "norm",
    "embedding",
    "lm_head",
    "vision",
    "projector",
)
FLOAT_DTYPES = ("BF16", "F16", "F32")  # what a source weight may be stored as, in safetensors' spelling


@dataclass(frozen=True)
class RopeScaling:
    """``llama3`` rotary scaling: frequencies of long wavelengths are divided by ``factor``, with a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; see ``vision_config`` of the releases."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    num_channels: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int


@dataclass(frozen=True)
class Llama4Config:
    """The parts of ``config.json`` that shapes, planning and the forward pass need.

    vision is None for a text-only ``Llama4ForCausalLM``; ``prefix`` is what text tensor names begin with.
    rope_layers and moe_layers are resolved: one flag per layer.
    """

    hidden_size: int
    expert_width: int
    dense_width: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[bool, ...]
    rope_layers: tuple[bool, ...]
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_chunk_size: int
    use_qk_norm: bool
    attention_bias: bool
    temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    dtype: str
    prefix: str
    vision: VisionConfig | None


@dataclass(frozen=True)
class SourceTensor:
    """One tensor the checkpoint must contain."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightMatrix:
    """One linear weight ``[out, in]`` and where it lies in the source.

    name: module path as quantized checkpoints spell it, without ``.weight`` (experts are spelled one by one).
    tensor: name of the source tensor.  expert: index on dim 0 of a fused tensor, else None.
    columns: (start, stop) on the last dim of the fused tensor, else None.  A fused slice is ``[in, out]`` and is transposed.
    """

    name: str
    shape: tuple[int, int]
    role: Role
    layer: int | None
    projection: str
    tensor: str
    expert: int | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Unit:
    """Work done at once.  Exactly one of ``matrices`` (may be quantized) and ``copies`` (never quantized) is filled."""

    key: str
    role: Role
    layer: int | None
    expert: int | None = None
    matrices: tuple[WeightMatrix, ...] = ()
    copies: tuple[SourceTensor, ...] = ()


# ---------------------------------------------------------------------------------------------------------------- config


def parse_config(config: Mapping[str, Any]) -> Llama4Config:
    """Read a parsed ``config.json``.

    Raises UnsupportedModelError when it is not a Llama 4 or lacks a needed value, AlreadyQuantizedError when it carries a
    quantization section.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedModelError("config.json does not hold a JSON object")
    _refuse_quantized(config)
    model_type = config.get("model_type")
    if model_type == "llama4":
        text, vision = config.get("text_config"), config.get("vision_config")
        prefix = "language_model."
        if not isinstance(text, Mapping):
            raise UnsupportedModelError("config.json has model_type llama4 but no text_config section")
    elif model_type == "llama4_text":
        text, vision, prefix = config, None, ""
    else:
        raise UnsupportedModelError(
            f"config.json has model_type {model_type!r}; quantkit handles Llama 4 only (model_type 'llama4' or 'llama4_text')"
        )
    return _parse_text(text, config, prefix, _parse_vision(vision) if vision is not None else None)


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    sections = [config, text] if isinstance(text, Mapping) else [config]
    for section in sections:
        quantization = section.get("quantization_config") or section.get("compression_config")
        if quantization:
            detail = quantization if isinstance(quantization, Mapping) else {}
            method = detail.get("quant_method") or "unknown method"
            kind = detail.get("format") or detail.get("quant_algo") or detail.get("fmt")
            raise AlreadyQuantizedError(
                f"the source is already quantized: {method}{f' ({kind})' if kind else ''}. "
                "Use the BF16 release that this checkpoint was made from."
            )


_REQUIRED = object()


class _Section:
    """Typed access to one JSON section, so that each wrong value is named with where it stands."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**48:
            raise UnsupportedModelError(f"{self.where}: {key} is {value!r}; expected an integer of at least {minimum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UnsupportedModelError(f"{self.where}: {key} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, (bool, int)):  # early releases hold the integer 4 for attn_temperature_tuning
            raise UnsupportedModelError(f"{self.where}: {key} is {value!r}; expected true or false")
        return bool(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UnsupportedModelError(f"{self.where} has no {key}")
            return default
        return value


def _parse_text(text: Mapping[str, Any], top: Mapping[str, Any], prefix: str, vision: VisionConfig | None) -> Llama4Config:
    section = _Section(text, "text_config" if prefix else "config.json")
    layers = section.integer("num_hidden_layers")
    if layers > 10_000:
        raise UnsupportedModelError(f"{section.where}: num_hidden_layers is {layers}; no Llama 4 has that many")
    heads = section.integer("num_attention_heads")
    hidden = section.integer("hidden_size")
    if not text.get("head_dim") and hidden % heads:
        raise UnsupportedModelError(f"{section.where}: hidden_size {hidden} is not a multiple of {heads} heads and head_dim is absent")
    experts = section.integer("num_local_experts")
    if experts > 65_536:
        raise UnsupportedModelError(f"{section.where}: num_local_experts is {experts}; no Llama 4 has that many")
    rope_theta, rope_scaling = _parse_rope(text, section)
    dtype = text.get("dtype") or text.get("torch_dtype") or top.get("dtype") or top.get("torch_dtype") or "bfloat16"
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if dtype not in names:
        raise UnsupportedModelError(f"config.json: dtype {dtype!r} is not one of {', '.join(names)}")
    tied = top.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return Llama4Config(
        hidden_size=hidden,
        expert_width=section.integer("intermediate_size"),
        dense_width=section.integer("intermediate_size_mlp"),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=section.integer("num_key_value_heads", heads),
        head_dim=section.integer("head_dim", hidden // heads),
        vocab_size=section.integer("vocab_size"),
        num_experts=experts,
        experts_per_token=section.integer("num_experts_per_tok", 1),
        moe_layers=_moe_layers(text, section, layers),
        rope_layers=_rope_layers(text, section, layers),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_chunk_size=section.integer("attention_chunk_size", 8192),
        use_qk_norm=section.flag("use_qk_norm", True),
        attention_bias=section.flag("attention_bias", False),
        temperature_tuning=section.flag("attn_temperature_tuning", True),
        floor_scale=section.number("floor_scale", 8192.0),
        attn_scale=section.number("attn_scale", 0.1),
        rms_norm_eps=section.number("rms_norm_eps", 1e-5),
        max_positions=section.integer("max_position_embeddings", 131_072),
        tie_word_embeddings=bool(tied),
        dtype=names[dtype],
        prefix=prefix,
        vision=vision,
    )


def _parse_rope(text: Mapping[str, Any], section: _Section) -> tuple[float, RopeScaling | None]:
    """Both spellings: ``rope_theta`` + ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5)."""
    parameters = text.get("rope_parameters")
    scaling = parameters if parameters is not None else text.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise UnsupportedModelError(f"{section.where}: the rope section is {scaling!r}; expected an object or null")
    theta_holder = _Section({**(scaling or {}), **{k: v for k, v in text.items() if k == "rope_theta" and v is not None}}, section.where)
    theta = theta_holder.number("rope_theta", 500_000.0)
    if scaling is None:
        return theta, None
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(f"{section.where}: rope_type {kind!r} is not supported; expected 'llama3' or 'default'")
    rope = _Section(scaling, f"{section.where}, rope section")
    return theta, RopeScaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings"),
    )


def _moe_layers(text: Mapping[str, Any], section: _Section, layers: int) -> tuple[bool, ...]:
    listed = text.get("moe_layers")
    if listed is None:
        step = section.integer("interleave_moe_layer_step", 1)
        return tuple((layer + 1) % step == 0 for layer in range(layers))
    if not isinstance(listed, list) or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers for i in listed):
        raise UnsupportedModelError(f"{section.where}: moe_layers must list layer numbers below {layers}; it is {listed!r}")
    chosen = set(listed)
    return tuple(layer in chosen for layer in range(layers))


def _rope_layers(text: Mapping[str, Any], section: _Section, layers: int) -> tuple[bool, ...]:
    flags = text.get("no_rope_layers")  # despite its name, 1 means that the layer does use rope
    if not flags:  # absent, null or the empty list of base checkpoints
        interval = section.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(flags, list) or len(flags) != layers or not all(flag in (0, 1) for flag in flags):
        raise UnsupportedModelError(f"{section.where}: no_rope_layers must hold {layers} flags (0 or 1); it is {flags!r}")
    return tuple(bool(flag) for flag in flags)


def _parse_vision(vision: Any) -> VisionConfig:
    if not isinstance(vision, Mapping):
        raise UnsupportedModelError(f"config.json: vision_config is {vision!r}; expected an object")
    section = _Section(vision, "vision_config")
    return VisionConfig(
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_hidden_layers=section.integer("num_hidden_layers"),
        image_size=section.integer("image_size"),
        patch_size=section.integer("patch_size"),
        num_channels=section.integer("num_channels", 3),
        pixel_shuffle_ratio=section.number("pixel_shuffle_ratio", 0.5),
        projector_input_dim=section.integer("projector_input_dim"),
        projector_output_dim=section.integer("projector_output_dim"),
        vision_output_dim=section.integer("vision_output_dim"),
    )


# ------------------------------------------------------------------------------------------------------------- inventory


def inventory(config: Llama4Config) -> list[SourceTensor]:
    """Every tensor that a checkpoint of this config must contain, in natural order, each with its role."""
    tensors: list[SourceTensor] = []
    for unit in units(config):
        if unit.copies:
            tensors.extend(unit.copies)
        else:
            seen: set[str] = {tensor.name for tensor in tensors[-4:]}
            for matrix in unit.matrices:
                if matrix.tensor not in seen and not matrix.expert:
                    seen.add(matrix.tensor)
                    tensors.append(SourceTensor(matrix.tensor, _source_shape(config, matrix), matrix.role, matrix.layer))
    return tensors


def _source_shape(config: Llama4Config, matrix: WeightMatrix) -> tuple[int, ...]:
    if matrix.expert is None:
        return matrix.shape
    if matrix.columns is not None:
        return (config.num_experts, config.hidden_size, 2 * config.expert_width)
    return (config.num_experts, config.expert_width, config.hidden_size)


def units(config: Llama4Config) -> list[Unit]:
    """All work in natural order: embedding, layers, final norm, head, vision tower, projector."""
    base = f"{config.prefix}model."
    result = [_copy("embedding", f"{base}embed_tokens.weight", (config.vocab_size, config.hidden_size))]
    for layer in range(config.num_layers):
        result.extend(_layer_units(config, layer, f"{base}layers.{layer}."))
    result.append(_copy("norm", f"{base}norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        result.append(_copy("lm_head", f"{config.prefix}lm_head.weight", (config.vocab_size, config.hidden_size)))
    if config.vision is not None:
        result.extend(_vision_units(config.vision))
        shape = (config.hidden_size, config.vision.vision_output_dim)
        result.append(_copy("projector", "multi_modal_projector.linear_1.weight", shape))
    return result


def _copy(role: Role, name: str, shape: tuple[int, ...], layer: int | None = None) -> Unit:
    return Unit(name, role, layer, copies=(SourceTensor(name, shape, role, layer),))


def _layer_units(config: Llama4Config, layer: int, base: str) -> Iterator[Unit]:
    hidden, query, key_value = config.hidden_size, config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield _copy("norm", f"{base}input_layernorm.weight", (hidden,), layer)
    attention = f"{base}self_attn."
    shapes = {"q_proj": (query, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
    yield _linear_unit(f"{attention}qkv", "attention", layer, attention, shapes)
    yield _linear_unit(f"{attention}o_proj", "attention", layer, attention, {"o_proj": (hidden, query)})
    if config.attention_bias:
        for projection, (size, _) in {**shapes, "o_proj": (hidden, query)}.items():
            yield _copy("attention", f"{attention}{projection}.bias", (size,), layer)
    yield _copy("norm", f"{base}post_attention_layernorm.weight", (hidden,), layer)
    feed_forward = f"{base}feed_forward."
    if not config.moe_layers[layer]:
        yield from _mlp_units("dense_mlp", layer, feed_forward, hidden, config.dense_width)
        return
    yield _copy("router", f"{feed_forward}router.weight", (config.num_experts, hidden), layer)
    yield from _mlp_units("shared_expert", layer, f"{feed_forward}shared_expert.", hidden, config.expert_width)
    experts, width = f"{feed_forward}experts.", config.expert_width
    for expert in range(config.num_experts):
        module = f"{experts}{expert}."
        gate_up = tuple(
            WeightMatrix(
                f"{module}{projection}", (width, hidden), "routed_expert", layer, projection, f"{experts}gate_up_proj", expert, columns
            )
            for projection, columns in (("gate_proj", (0, width)), ("up_proj", (width, 2 * width)))
        )
        yield Unit(f"{module}gate_up_proj", "routed_expert", layer, expert, gate_up)
        down = WeightMatrix(
            f"{module}down_proj", (hidden, width), "routed_expert", layer, "down_proj", f"{experts}down_proj", expert
        )
        yield Unit(f"{module}down_proj", "routed_expert", layer, expert, (down,))


def _mlp_units(role: Role, layer: int, base: str, hidden: int, width: int) -> Iterator[Unit]:
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden)}
    yield _linear_unit(f"{base}gate_up_proj", role, layer, base, shapes)
    yield _linear_unit(f"{base}down_proj", role, layer, base, {"down_proj": (hidden, width)})


def _linear_unit(key: str, role: Role, layer: int, base: str, shapes: Mapping[str, tuple[int, int]]) -> Unit:
    matrices = tuple(
        WeightMatrix(f"{base}{projection}", shape, role, layer, projection, f"{base}{projection}.weight")
        for projection, shape in shapes.items()
    )
    return Unit(key, role, layer, matrices=matrices)


def _vision_units(vision: VisionConfig) -> Iterator[Unit]:
    hidden, width, prefix = vision.hidden_size, vision.intermediate_size, "vision_model."
    patches = (vision.image_size // vision.patch_size) ** 2
    shuffled = round(hidden / vision.pixel_shuffle_ratio**2)
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (hidden,),
        "positional_embedding_vlm": (patches + 1, hidden),
        "patch_embedding.linear.weight": (hidden, vision.num_channels * vision.patch_size**2),
        "layernorm_pre.weight": (hidden,),
        "layernorm_pre.bias": (hidden,),
        "layernorm_post.weight": (hidden,),
        "layernorm_post.bias": (hidden,),
    }
    for layer in range(vision.num_hidden_layers):
        base = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{base}{norm}.weight": (hidden,), f"{base}{norm}.bias": (hidden,)}
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= {f"{base}self_attn.{projection}.weight": (hidden, hidden), f"{base}self_attn.{projection}.bias": (hidden,)}
        shapes |= {f"{base}mlp.fc1.weight": (width, hidden), f"{base}mlp.fc1.bias": (width,)}
        shapes |= {f"{base}mlp.fc2.weight": (hidden, width), f"{base}mlp.fc2.bias": (hidden,)}
    shapes["vision_adapter.mlp.fc1.weight"] = (vision.projector_input_dim, shuffled)
    shapes["vision_adapter.mlp.fc2.weight"] = (vision.projector_output_dim, vision.projector_input_dim)
    for name, shape in shapes.items():
        yield _copy("vision", prefix + name, shape)
