"""A small Llama 4 wholly in memory, its feed-forward weights exchangeable, and how far its answers are from the original's.

In float32 through quantkit's own arithmetic, which tests compare with transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantkit import forward, grid
from quantkit.checkpoint import Checkpoint
from quantkit.config import Llama4Config
from quantkit.corpus import load_corpus
from quantkit.formats import compressed_tensors
from quantkit.llama4 import units

PORTION = 8  # windows computed at once
Weights = dict[str, torch.Tensor]  # by module name, [out, in]


@dataclass(frozen=True)
class Reference:
    """Windows, and the log probabilities that the original gives, portion by portion."""

    windows: torch.Tensor
    answers: list[torch.Tensor]


class SmallModel:
    """tensors: everything that is not a matrix of a unit.  matrices: by module name."""

    def __init__(self, config: Llama4Config, tensors: dict[str, torch.Tensor], matrices: Weights) -> None:
        self.config, self.tensors, self.matrices = config, tensors, matrices

    @classmethod
    def read(cls, directory: Path) -> SmallModel:
        """A checkpoint in float32."""
        with Checkpoint.open(directory) as checkpoint:
            config, prefix = checkpoint.config, checkpoint.config.prefix
            work = units(config)
            copies = [copy.name for unit in work for copy in unit.copies if copy.name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): checkpoint.read_slice(name).to(torch.float32) for name in copies}
            matrices = {
                matrix.name.removeprefix(prefix): checkpoint.read_matrix(matrix).to(torch.float32)
                for unit in work
                for matrix in unit.matrices
            }
        return cls(config, tensors, matrices)

    def artifact(self, directory: Path) -> Weights:
        """The matrices of a quantized artifact of this model."""
        config = json.loads((directory / "config.json").read_text())
        stored: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            stored |= load_file(path)
        weights = {}
        for name in self.matrices:
            full = f"{self.config.prefix}{name}"
            scheme = compressed_tensors.scheme_of(config["quantization_config"], full)
            if scheme is None:
                weights[name] = stored[f"{full}.weight"].to(torch.float32)
            else:
                weights[name] = grid.dequantize(compressed_tensors.decode(full, stored, scheme))
        return weights

    def attended(self, layer: int, hidden: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Hidden states ``[windows, length, hidden]`` after attention."""
        base = f"model.layers.{layer}."
        rows = forward.rms_norm(hidden, self.config.rms_norm_eps, self.tensors[f"{base}input_layernorm.weight"])
        query, key, value = (rows @ weights[f"{base}self_attn.{name}_proj"].t() for name in "qkv")
        found = [forward.attend(self.config, layer, *each) for each in zip(query, key, value, strict=True)]
        return hidden + torch.stack(found) @ weights[f"{base}self_attn.o_proj"].t()

    def feed_forward_rows(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What router and experts see, ``[tokens, hidden]``."""
        weight = self.tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
        return forward.rms_norm(hidden, self.config.rms_norm_eps, weight).flatten(0, 1)

    def route(self, layer: int, rows: torch.Tensor) -> forward.Routing:
        """Where the rows go."""
        router = self.tensors[f"model.layers.{layer}.feed_forward.router.weight"]
        return forward.route(rows, router, self.config.experts_per_token)

    def answers(self, windows: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
        """Log probabilities ``[windows, length, vocabulary]``."""
        weights = self.matrices if weights is None else weights
        hidden = self.tensors["model.embed_tokens.weight"][windows]
        for layer in range(self.config.num_layers):
            hidden = self.attended(layer, hidden, weights)
            rows = self.feed_forward_rows(layer, hidden)
            base = f"model.layers.{layer}.feed_forward"
            if not self.config.moe_layers[layer]:
                hidden = hidden + mlp(weights, base, rows).view(hidden.shape)
                continue
            added = mlp(weights, f"{base}.shared_expert", rows)
            routing = self.route(layer, rows)
            for slot in range(routing.experts.shape[1]):
                for expert in range(self.config.num_experts):
                    places = (routing.experts[:, slot] == expert).nonzero()[:, 0]
                    scaled = rows[places] * routing.scores[places, slot, None]
                    added[places] += mlp(weights, f"{base}.experts.{expert}", scaled)
            hidden = hidden + added.view(hidden.shape)
        rows = forward.rms_norm(hidden, self.config.rms_norm_eps, self.tensors["model.norm.weight"])
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return (rows @ head.t()).log_softmax(-1)


def mlp(weights: Weights, base: str, rows: torch.Tensor) -> torch.Tensor:
    """A gated MLP."""
    gate, up, down = (weights[f"{base}.{name}_proj"] for name in ("gate", "up", "down"))
    return forward.gated(rows @ gate.t(), rows @ up.t()) @ down.t()


def windows(model: Path, texts: Sequence[Path], length: int, most: int | None = None, seed: int = 0) -> torch.Tensor:
    """Windows of ``length`` tokens of plain texts without BOS: the first ``most`` of each text, or all."""
    parts = [load_corpus(text, model, sequence_length=length, seed=seed).tokens[:most] for text in texts]
    return torch.cat(parts).to(torch.int64)


def reference(model: SmallModel, chosen: torch.Tensor) -> Reference:
    """The original's answers."""
    return Reference(chosen, [model.answers(part)[:, :-1] for part in chosen.split(PORTION)])


def divergence(model: SmallModel, weights: Weights, truth: Reference) -> tuple[float, float]:
    """Mean KL divergence from the original, and share of positions with the same most likely token."""
    total = same = count = 0.0
    for part, answer in zip(truth.windows.split(PORTION), truth.answers, strict=True):
        other = model.answers(part, weights)[:, :-1]
        total += float((answer.exp() * (answer - other)).sum(dtype=torch.float64))
        same += float((answer.argmax(-1) == other.argmax(-1)).sum())
        count += answer.shape[0] * answer.shape[1]
    return total / count, same / count
