"""transformers' Llama 4 in float32, with its slowest and plainest attention: what quantkit's own forward pass is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Llama4ForCausalLM, Llama4ForConditionalGeneration


def load_reference(directory: Path) -> Any:
    """The text model (a Llama4ForCausalLM) of a checkpoint; every one of its weights comes from the files."""
    config = json.loads((directory / "config.json").read_text())
    whole = Llama4ForConditionalGeneration if config["model_type"] == "llama4" else Llama4ForCausalLM
    model, info = whole.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    return (model.language_model if config["model_type"] == "llama4" else model).eval()


@torch.no_grad()
def reference_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """float32 ``[samples, length, vocabulary]``."""
    return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def reference_cache(model: Any, tokens: torch.Tensor) -> DynamicCache:
    """All keys and values of a forward pass; chunked layers keep what is before the chunk, too."""
    cache = DynamicCache()
    model(input_ids=tokens, use_cache=True, past_key_values=cache)
    return cache


@torch.no_grad()
def make_coarse(weight: torch.Tensor) -> torch.Tensor:
    """A replacement of a weight that everything after it feels: rounded to multiples of 1/32.  Indifferent to layout."""
    return torch.round(weight.to(torch.float32) * 32) / 32


@torch.no_grad()
def make_matrices_coarse(model: Any) -> None:
    """Apply :func:`make_coarse` to every matrix of attention, MLPs and experts, and to nothing else."""
    for name, parameter in model.named_parameters():
        if "_proj" in name and not name.endswith("bias"):
            parameter.copy_(make_coarse(parameter))
