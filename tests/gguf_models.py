"""Sources for tests of GGUF files, with the demo's tokenizer, and what such a file holds, read by the ``gguf`` package.

The weights of :mod:`tests.tiny_models` are random, rows are multiples of 256 so that every type fits, and every fourth layer has no
rotary embedding.  llama.cpp fixes the rest: it normalizes queries and keys unless there are 128 experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader

from quantkit.formats import ggml_blocks
from quantkit.gguf_header import MetadataEntry, build_header, parse_header
from quantkit.grid import dequantize
from quantkit.llama4 import Role
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import parse_scheme
from tests.tiny_models import write_tiny_model

DEMO = Path(__file__).parent.parent / "demo" / "tiny-scout"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
QUANTIZABLE: tuple[Role, ...] = ("embedding", "lm_head", "attention", "routed_expert", "shared_expert", "dense_mlp")
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 512,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "bos_token_id": 2032,
    "eos_token_id": 2037,
    "pad_token_id": 2045,
}
SMOOTHED = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "llama3",
}
MAVERICK: dict[str, Any] = {"num_local_experts": 128, "use_qk_norm": False, "intermediate_size": 256}


def write_source(directory: Path, kind: str = "scout", seed: int = 0, **overrides: Any) -> Path:
    """A random checkpoint with the demo's tokenizer.  overrides: fields of the text section of its config."""
    write_tiny_model(directory, kind, seed, **(SIZES | overrides))
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, directory / name)
    if kind != "text":  # the projector ends in what the text model has
        path = directory / "config.json"
        config = json.loads(path.read_text())
        assert config["text_config"]["hidden_size"] == SIZES["hidden_size"]
    return directory


def pure(kind: str, method: str = "rtn") -> Recipe:
    """A recipe that gives one type to everything that takes it."""
    rule = Rule(kind, roles=QUANTIZABLE)
    return Recipe(f"pure-{kind}", (rule, Rule("keep")), format="gguf", method=method)


def text_file(directory: Path) -> Path:
    """The text model's file of an artifact, of a split one the first."""
    return min(path for path in directory.glob("*.gguf") if not path.name.startswith("mmproj-"))


def vision_file(directory: Path) -> Path:
    """The vision tower's file of an artifact."""
    [path] = directory.glob("mmproj-*.gguf")
    return path


def change_metadata(path: Path, change: Callable[[dict[str, MetadataEntry]], object]) -> None:
    """Write the same file with other metadata."""
    header = parse_header(path)
    metadata = dict(header.metadata)
    change(metadata)
    listed = [(tensor.name, tensor.type, tensor.shape) for tensor in header.tensors.values()]
    path.write_bytes(build_header(list(metadata.values()), listed)[0] + path.read_bytes()[header.data_start :])


def stored_tensors(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any], tuple[int, ...]]]:
    """By name: type, bytes ``[rows, row bytes]``, and shape in torch's order, of every tensor of a file."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        data = np.array(tensor.data).reshape(-1).view(np.uint8).reshape(rows, -1)
        found[tensor.name] = tensor.tensor_type.name, data, shape
    return found


def stored_values(path: Path) -> dict[str, torch.Tensor]:
    """By name: what the bytes of a file mean by our own decoder, float32 in torch's shapes."""
    values = {}
    for name, (kind, data, shape) in stored_tensors(path).items():
        scheme = parse_scheme(kind)
        assert scheme is not None
        values[name] = dequantize(ggml_blocks.decode(torch.from_numpy(data), scheme, shape[-1])).reshape(shape)
    return values


_PLAIN = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}


@torch.no_grad()
def load_values(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Put the values of a file into transformers' text model.  Every parameter is replaced, and every value is used."""
    left = {name: value for name, value in values.items() if name != "rope_freqs.weight"}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        if module in top:
            value = left.pop(f"{top[module]}.weight")
        else:
            _, _, layer, inner = name.split(".", 3)
            base = f"blk.{layer}."
            if inner.endswith("experts.gate_up_proj"):
                gate, up = (left.pop(f"{base}ffn_{part}_exps.weight") for part in ("gate", "up"))
                value = torch.cat([gate, up], 1).transpose(1, 2)
            elif inner.endswith("experts.down_proj"):
                value = left.pop(f"{base}ffn_down_exps.weight").transpose(1, 2)
            else:
                value = left.pop(f"{base}{_PLAIN[inner.rpartition('.')[0]]}.{suffix}")
        assert parameter.shape == value.shape, name
        parameter.copy_(value)
    assert not left, list(left)
