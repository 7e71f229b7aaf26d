"""Llama 4: the full inventory of expected tensors, and the units of work that follow from it.

Everything here is derived from the config alone, so a plan needs no weights.  Three levels:

* ``SourceTensor``  a tensor as the checkpoint stores it.  The routed experts of a layer are two fused tensors,
  ``gate_up_proj [experts, hidden, 2 * expert_width]`` and ``down_proj [experts, expert_width, hidden]``, input-major, with gate in
  the first half of the columns and up in the second.
* ``WeightMatrix``  one linear weight in the usual ``[out, in]`` sense, with the place in the source it comes from: a whole tensor,
  or one expert's slice of a fused tensor, some of its columns, transposed.  This is what a scheme is given to.
* ``Unit``  the smallest piece of work that is read, quantized, written and journalled at once: matrices that clients fuse and that
  may have to share a scale (gate and up; q, k and v), or a single matrix or tensor.  One expert's slice is contiguous on disk.

Expert MLPs have width ``intermediate_size``, dense MLPs ``intermediate_size_mlp``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.config import Llama4Config, VisionConfig, parse_config

__all__ = [
    "FLOAT_DTYPES",
    "ROLES",
    "Llama4Config",
    "Role",
    "SourceTensor",
    "Unit",
    "WeightMatrix",
    "inventory",
    "parse_config",
    "units",
]

Role = Literal[
    "routed_expert", "shared_expert", "dense_mlp", "attention", "router", "norm", "embedding", "lm_head", "vision", "projector"
]
ROLES: tuple[Role, ...] = get_args(Role)
FLOAT_DTYPES = ("BF16", "F16", "F32")  # what a source weight may be stored as, in safetensors' spelling


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Unit:
    """Work done at once.  Exactly one of ``matrices`` (may be quantized) and ``copies`` (never quantized) is filled."""

    key: str
    role: Role
    layer: int | None
    expert: int | None = None
    matrices: tuple[WeightMatrix, ...] = ()
    copies: tuple[SourceTensor, ...] = ()

    @property
    def items(self) -> tuple[WeightMatrix | SourceTensor, ...]:
        """Everything that a recipe gives a scheme to."""
        return (*self.matrices, *self.copies)


def inventory(config: Llama4Config) -> list[SourceTensor]:
    """Every tensor that a checkpoint of this config must contain, in natural order, each with its role."""
    tensors: dict[str, SourceTensor] = {}
    for unit in _units(config, experts=1):  # each fused tensor shows in its first expert
        for tensor in unit.copies:
            tensors[tensor.name] = tensor
        for matrix in unit.matrices:
            tensors[matrix.tensor] = SourceTensor(matrix.tensor, _source_shape(config, matrix), matrix.role, matrix.layer)
    return list(tensors.values())


def _source_shape(config: Llama4Config, matrix: WeightMatrix) -> tuple[int, ...]:
    if matrix.expert is None:
        return matrix.shape
    if matrix.columns is not None:
        return (config.num_experts, config.hidden_size, 2 * config.expert_width)
    return (config.num_experts, config.expert_width, config.hidden_size)


def units(config: Llama4Config) -> list[Unit]:
    """All work in natural order: embedding, layers, final norm, head, vision tower, projector."""
    return list(_units(config, config.num_experts))


def units_by_layer(given: Iterable[Unit], layers: int) -> dict[int, list[Unit]]:
    """The units of every layer, those of the tables, the final norm and the vision tower left out."""
    found: dict[int, list[Unit]] = {layer: [] for layer in range(layers)}
    for unit in given:
        if unit.layer is not None:
            found[unit.layer].append(unit)
    return found


def _units(config: Llama4Config, experts: int) -> Iterator[Unit]:
    """The units of the model, of each layer's routed experts only the first ``experts``."""
    base = f"{config.prefix}model."
    yield _copy("embedding", f"{base}embed_tokens.weight", (config.vocab_size, config.hidden_size))
    for layer in range(config.num_layers):
        yield from _layer_units(config, layer, f"{base}layers.{layer}.", experts)
    yield _copy("norm", f"{base}norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield _copy("lm_head", f"{config.prefix}lm_head.weight", (config.vocab_size, config.hidden_size))
    if config.vision is not None:
        yield from _vision_units(config.vision)
        yield _copy("projector", "multi_modal_projector.linear_1.weight", (config.hidden_size, config.vision.vision_output_dim))


def _copy(role: Role, name: str, shape: tuple[int, ...], layer: int | None = None) -> Unit:
    return Unit(name, role, layer, copies=(SourceTensor(name, shape, role, layer),))


def _layer_units(config: Llama4Config, layer: int, base: str, experts: int) -> Iterator[Unit]:
    hidden = config.hidden_size
    yield _copy("norm", f"{base}input_layernorm.weight", (hidden,), layer)
    yield from _attention_units(config, layer, f"{base}self_attn.")
    yield _copy("norm", f"{base}post_attention_layernorm.weight", (hidden,), layer)
    feed_forward = f"{base}feed_forward."
    if not config.moe_layers[layer]:
        yield from _mlp_units("dense_mlp", layer, feed_forward, hidden, config.dense_width)
        return
    yield _copy("router", f"{feed_forward}router.weight", (config.num_experts, hidden), layer)
    yield from _mlp_units("shared_expert", layer, f"{feed_forward}shared_expert.", hidden, config.expert_width)
    for expert in range(experts):
        yield from _expert_units(config, layer, f"{feed_forward}experts.", expert)


def _attention_units(config: Llama4Config, layer: int, base: str) -> Iterator[Unit]:
    hidden, query, key_value = config.hidden_size, config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    joined = {"q_proj": (query, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
    output = {"o_proj": (hidden, query)}
    yield _linear_unit(f"{base}qkv", "attention", layer, base, joined)
    yield _linear_unit(f"{base}o_proj", "attention", layer, base, output)
    if config.attention_bias:
        for projection, (rows, _) in (joined | output).items():
            yield _copy("attention", f"{base}{projection}.bias", (rows,), layer)


def _mlp_units(role: Role, layer: int, base: str, hidden: int, width: int) -> Iterator[Unit]:
    yield _linear_unit(f"{base}gate_up_proj", role, layer, base, {"gate_proj": (width, hidden), "up_proj": (width, hidden)})
    yield _linear_unit(f"{base}down_proj", role, layer, base, {"down_proj": (hidden, width)})


def _linear_unit(key: str, role: Role, layer: int, base: str, shapes: Mapping[str, tuple[int, int]]) -> Unit:
    matrices = tuple(
        WeightMatrix(f"{base}{projection}", shape, role, layer, projection, f"{base}{projection}.weight")
        for projection, shape in shapes.items()
    )
    return Unit(key, role, layer, matrices=matrices)


def _expert_units(config: Llama4Config, layer: int, base: str, expert: int) -> Iterator[Unit]:
    hidden, width = config.hidden_size, config.expert_width

    def matrix(projection: str, shape: tuple[int, int], fused: str, columns: tuple[int, int] | None) -> WeightMatrix:
        name = f"{base}{expert}.{projection}"
        return WeightMatrix(name, shape, "routed_expert", layer, projection, f"{base}{fused}", expert, columns)

    gate = matrix("gate_proj", (width, hidden), "gate_up_proj", (0, width))
    up = matrix("up_proj", (width, hidden), "gate_up_proj", (width, 2 * width))
    down = matrix("down_proj", (hidden, width), "down_proj", None)
    yield Unit(f"{base}{expert}.gate_up_proj", "routed_expert", layer, expert, (gate, up))
    yield Unit(f"{base}{expert}.down_proj", "routed_expert", layer, expert, (down,))


def _vision_units(vision: VisionConfig) -> Iterator[Unit]:
    hidden, width = vision.hidden_size, vision.intermediate_size
    norm, square = (hidden,), (hidden, hidden)
    with_bias: dict[str, tuple[int, ...]] = {"layernorm_pre": norm}
    for layer in range(vision.num_hidden_layers):
        base = f"model.layers.{layer}."
        with_bias[f"{base}input_layernorm"] = norm
        with_bias |= {f"{base}self_attn.{projection}_proj": square for projection in "qkvo"}
        with_bias[f"{base}post_attention_layernorm"] = norm
        with_bias |= {f"{base}mlp.fc1": (width, hidden), f"{base}mlp.fc2": (hidden, width)}
    with_bias["layernorm_post"] = norm
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": norm,
        "positional_embedding_vlm": ((vision.image_size // vision.patch_size) ** 2 + 1, hidden),  # patches and one class token
        "patch_embedding.linear.weight": (hidden, vision.num_channels * vision.patch_size**2),
    }
    for name, shape in with_bias.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    # The adapter's input is what pixel shuffle makes of ``hidden``; clients take it to be as wide as the tower's MLP.
    shapes["vision_adapter.mlp.fc1.weight"] = (vision.projector_input_dim, width)
    shapes["vision_adapter.mlp.fc2.weight"] = (vision.projector_output_dim, vision.projector_output_dim)
    for name, shape in shapes.items():
        yield _copy("vision", f"vision_model.{name}", shape)
