"""``config.json`` of a Llama 4, as quantkit needs it: typed, with everything resolved that the file may leave open.

Fields mean what transformers takes them to mean, in both spellings: ``rope_theta`` and ``rope_scaling`` (version 4) or
``rope_parameters`` (version 5).  Traps that this reader knows: ``no_rope_layers`` holds 1 where rope IS used, and is empty in base
checkpoints; ``moe_layers`` may be absent; ``attn_temperature_tuning`` was once the integer 4; the text section says whether
embeddings are tied, not the top level.  A value that is missing, mistyped or contradicts another one is an error with its place,
never a guess.  Nothing is ever written back from here: artifacts carry the source's own text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import AlreadyQuantizedError, UnsupportedModelError
from quantkit.strict_json import brief

# Beyond these a config is damaged, and planning it would only fill the memory.
MAX_SIZE = 2**32
MAX_LAYERS = 10_000
MAX_EXPERTS = 1_000_000  # over all layers

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class RopeScaling:
    """``llama3`` rotary scaling: frequencies of long wavelengths are divided by ``factor``, with a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class VisionConfig:
    """What the shapes of vision tower and projector follow from, and the numbers its arithmetic needs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    num_channels: int
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int
    num_attention_heads: int
    norm_eps: float
    rope_theta: float
    hidden_act: str
    pixel_shuffle_ratio: float


@dataclass(frozen=True)
class Llama4Config:
    """The parts of ``config.json`` that shapes, planning and the forward pass need.

    prefix: what text tensor names begin with.  vision: None for a text-only ``Llama4ForCausalLM``.  moe_layers, rope_layers: one
    flag per layer.  dtype: of the weights, in safetensors' spelling.
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


def parse_config(config: Mapping[str, Any]) -> Llama4Config:
    """Read a parsed ``config.json``.

    Raises UnsupportedModelError when it is not a Llama 4, lacks a needed value or contradicts itself, AlreadyQuantizedError when it
    carries a quantization section.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(f"config.json holds {brief(config)}; expected a JSON object")
    _refuse_quantized(config)
    top = _Section(config, "config.json")
    model_type = config.get("model_type")
    if model_type == "llama4":
        text = top.section("text_config")
        if text is None:
            raise UnsupportedModelError("config.json has model_type llama4 but no text_config section")
        return _parse_text(text, top, "language_model.", _parse_vision(top.section("vision_config")))
    if model_type == "llama4_text":
        return _parse_text(top, top, "", None)
    raise UnsupportedModelError(
        f"config.json has model_type {brief(model_type)}; quantkit handles Llama 4 only (model_type 'llama4' or 'llama4_text')"
    )


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        quantization = section.get("quantization_config") or section.get("compression_config")
        if quantization:
            detail = quantization if isinstance(quantization, Mapping) else {}
            kinds = [detail.get(key) for key in ("quant_method", "format", "quant_algo", "fmt", "bits")]
            named = ", ".join(str(kind) if isinstance(kind, int) else kind for kind in kinds if isinstance(kind, (str, int)))
            raise AlreadyQuantizedError(
                f"the source is already quantized: config.json has a quantization section ({named[:200] or 'of unknown method'}). "
                "Use the BF16 release that this checkpoint was made from."
            )


class _Section:
    """Typed access to one JSON object, so that each wrong value is named with where it stands.  Null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def wrong(self, key: str, expected: str) -> UnsupportedModelError:
        value = self.values.get(key)
        if value is None:
            return UnsupportedModelError(f"{self.where} has no {key}; expected {expected}")
        return UnsupportedModelError(f"{self.where}: {key} is {brief(value)}; expected {expected}")

    def integer(self, key: str, default: int | None = None, maximum: int = MAX_SIZE) -> int:
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.wrong(key, f"an integer from 1 to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int):  # a bool is one; early releases hold 4 for attn_temperature_tuning
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a name")
        return value

    def section(self, key: str) -> _Section | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return _Section(value, key if self.where == "config.json" else f"{self.where}.{key}")

    def integers(self, key: str) -> list[int] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.wrong(key, "a list of integers")
        return value


def _parse_text(text: _Section, top: _Section, prefix: str, vision: VisionConfig | None) -> Llama4Config:
    layers = text.integer("num_hidden_layers", maximum=MAX_LAYERS)
    moe_layers = _moe_layers(text, layers)
    experts = text.integer("num_local_experts", maximum=MAX_EXPERTS // max(1, sum(moe_layers)))
    hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    if text.get("head_dim") is None and hidden % heads:
        raise UnsupportedModelError(
            f"{text.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    rope_theta, rope_scaling = _parse_rope(text)
    return Llama4Config(
        hidden_size=hidden,
        expert_width=text.integer("intermediate_size"),
        dense_width=text.integer("intermediate_size_mlp"),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=text.integer("num_key_value_heads", heads),
        head_dim=text.integer("head_dim", hidden // heads),
        vocab_size=text.integer("vocab_size"),
        num_experts=experts,
        experts_per_token=text.integer("num_experts_per_tok", 1),
        moe_layers=moe_layers,
        rope_layers=_rope_layers(text, layers),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_chunk_size=text.integer("attention_chunk_size", 8192),
        use_qk_norm=text.flag("use_qk_norm", True),
        attention_bias=text.flag("attention_bias", False),
        temperature_tuning=text.flag("attn_temperature_tuning", True),
        floor_scale=text.number("floor_scale", 8192.0),
        attn_scale=text.number("attn_scale", 0.1),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_positions=text.integer("max_position_embeddings", 131_072),
        tie_word_embeddings=text.flag("tie_word_embeddings", False),
        dtype=_dtype(text, top),
        prefix=prefix,
        vision=vision,
    )


def _dtype(text: _Section, top: _Section) -> str:
    for section in (text, top):
        for key in ("dtype", "torch_dtype"):
            name = section.get(key)
            if name is not None:
                if not isinstance(name, str) or name not in _DTYPES:
                    raise section.wrong(key, f"one of {', '.join(_DTYPES)}")
                return _DTYPES[name]
    return "BF16"


def _moe_layers(text: _Section, layers: int) -> tuple[bool, ...]:
    listed = text.integers("moe_layers")
    if listed is None:
        step = text.integer("interleave_moe_layer_step", 1)
        return tuple((layer + 1) % step == 0 for layer in range(layers))
    if any(layer >= layers for layer in listed):
        raise text.wrong("moe_layers", f"numbers of the {layers} layers, from 0 to {layers - 1}")
    chosen = set(listed)
    return tuple(layer in chosen for layer in range(layers))


def _rope_layers(text: _Section, layers: int) -> tuple[bool, ...]:
    flags = text.integers("no_rope_layers")  # despite its name, 1 means that the layer does use rope
    if not flags:
        interval = text.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(flags) < layers or any(flag > 1 for flag in flags):
        raise text.wrong("no_rope_layers", f"one flag, 0 or 1, for each of the {layers} layers")
    return tuple(bool(flag) for flag in flags[:layers])


def _parse_rope(text: _Section) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either spelling; where both are given they must agree."""
    thetas = {text.number("rope_theta")} if text.get("rope_theta") is not None else set()
    scalings: set[RopeScaling | None] = set()
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.section(key)
        if rope is not None:
            scalings.add(_parse_scaling(rope))
            if rope.get("rope_theta") is not None:
                thetas.add(rope.number("rope_theta"))
    if len(thetas) > 1 or len(scalings) > 1:
        raise UnsupportedModelError(f"{text.where}: rope_theta, rope_scaling and rope_parameters contradict each other")
    return thetas.pop() if thetas else 500_000.0, scalings.pop() if scalings else None


def _parse_scaling(rope: _Section) -> RopeScaling | None:
    key = "type" if rope.get("rope_type") is None else "rope_type"
    kind = rope.get(key)
    if kind == "llama3":
        return RopeScaling(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
    if kind == "default" or (kind is None and set(rope.values) <= {"rope_theta", "rope_type", "type"}):
        return None
    raise rope.wrong(key, "'llama3' or 'default'")


def _parse_vision(vision: _Section | None) -> VisionConfig | None:
    if vision is None:
        return None
    return VisionConfig(
        hidden_size=vision.integer("hidden_size"),
        intermediate_size=vision.integer("intermediate_size"),
        num_hidden_layers=vision.integer("num_hidden_layers", maximum=MAX_LAYERS),
        image_size=vision.integer("image_size"),
        patch_size=vision.integer("patch_size"),
        num_channels=vision.integer("num_channels", 3),
        projector_input_dim=vision.integer("projector_input_dim"),
        projector_output_dim=vision.integer("projector_output_dim"),
        vision_output_dim=vision.integer("vision_output_dim"),
        num_attention_heads=vision.integer("num_attention_heads", 16),
        norm_eps=vision.number("norm_eps", 1e-5),
        rope_theta=vision.number("rope_theta", 10_000.0),
        hidden_act=vision.text("hidden_act", "gelu"),
        pixel_shuffle_ratio=vision.number("pixel_shuffle_ratio", 0.5),
    )
