"""GGUF files of a Llama 4 as llama.cpp's own converter lays them out, unquantized, for measuring what llama.cpp makes of them.

Written with the ``gguf`` package alone, so that they are independent of quantkit's writer: first a hollow file, a header and then a
hole of the right size, which is enough for a dry run; then, where weights are wanted, the tensors are put at their places.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantkit.llama4 import Llama4Config, SourceTensor, inventory, parse_config

Kind = gguf.GGMLQuantizationType
Shape = tuple[int, ...]


def write_hollow(path: Path, raw: dict[str, Any], kind: Kind = Kind.F32) -> dict[str, Shape]:
    """A file of zeros for ``config.json``, most of it a hole; returns its tensors with their shapes, rows last.

    kind: of matrices.  Norms and the router are F32.
    """
    config = parse_config(raw)
    writer = gguf.GGUFWriter(path, "llama4")
    _add_keys(writer, config, raw["interleave_moe_layer_step"])
    shapes = {name: shape for tensor in inventory(config) for name, shape in places(config, tensor)}
    size = 0
    for name, shape in shapes.items():
        stored = Kind.F32 if len(shape) == 1 or "ffn_gate_inp" in name else kind
        nbytes = int(np.prod(shape)) * (4 if stored == Kind.F32 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32 if stored == Kind.F32 else np.float16), nbytes, stored)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(-(-header // 32) * 32 + size)
    return shapes


def _add_keys(writer: gguf.GGUFWriter, config: Llama4Config, step: int) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.dense_width)
    writer.add_expert_feed_forward_length(config.expert_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_interleave_moe_layer_step(step)
    writer.add_vocab_size(config.vocab_size)


def places(config: Llama4Config, tensor: SourceTensor) -> list[tuple[str, Shape]]:
    """Names and shapes of the file's tensors that hold a source tensor: two for gate and up of the experts, else one."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, config.num_layers)
    name = tensor.name.removeprefix("language_model.")

    def translated(module: str) -> str:
        return f"{names.get_name(module)}.weight"

    if name.endswith("experts.gate_up_proj"):
        experts, hidden, width = tensor.shape
        modules = [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
        return [(translated(module), (experts, width // 2, hidden)) for module in modules]
    if name.endswith("experts.down_proj"):
        experts, width, hidden = tensor.shape
        return [(translated(name), (experts, hidden, width))]
    return [(translated(name.removesuffix(".weight")), tensor.shape)]


def fill(path: Path, raw: dict[str, Any], source: Path) -> None:
    """Put the weights of BF16 safetensors files at their places in a hollow file of BF16 matrices, an expert at a time."""
    config = parse_config(raw)
    offsets = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors}
    wanted = {tensor.name: tensor for tensor in inventory(config)}
    with path.open("r+b") as output:
        for shard in sorted(source.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                stored_names = opened.keys()
                for name in stored_names:
                    tensor = wanted[name]
                    stored = opened.get_slice(name)
                    targets = places(config, tensor)
                    if len(tensor.shape) < 3:
                        [(target, _)] = targets
                        output.seek(offsets[target])
                        wide = tensor.role in ("norm", "router")
                        output.write(stored[:].float().numpy().tobytes() if wide else _bytes(stored[:]))
                        continue
                    for expert in range(tensor.shape[0]):
                        halves = stored[expert : expert + 1][0].t().contiguous().chunk(len(targets))  # [out, in] each
                        for (target, shape), half in zip(targets, halves, strict=True):
                            output.seek(offsets[target] + expert * 2 * shape[1] * shape[2])
                            output.write(_bytes(half))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16).numpy().tobytes()
