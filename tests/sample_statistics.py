"""Made-up statistics for tests of what is saved and shown: right in form for a config, random in content."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.evidence import Evidence
from quantkit.llama4 import Llama4Config, units
from quantkit.statistics import ExpertCounts, Statistics

PROVENANCE: dict[str, Any] = {"config": "00aa11bb", "shards": {"model.safetensors": {"size": 1234, "header": "22cc33dd"}}}
KINDS = ("code.python", "prose.de", "prose.en")


def sample_counts(layer: int, kinds: torch.Tensor, *, lent_below: int = 0, seed: int = 0) -> ExpertCounts:
    """Counts of one layer from ``kinds``, int64 ``[experts, kinds]``."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    tokens = kinds.sum(1)
    scores = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    margin = torch.rand(len(tokens), generator=generator, dtype=torch.float64) * (tokens > 0)
    return ExpertCounts(layer, tokens, scores * tokens, margin, kinds, torch.where(tokens < lent_below, 64, 0))


def sample_statistics(config: Llama4Config, *, seed: int = 0, layers: tuple[int, ...] | None = None) -> Statistics:
    """Statistics of all layers, or of some."""
    generator = torch.Generator().manual_seed(seed)
    chosen = range(config.num_layers) if layers is None else layers
    inputs = {}
    for unit in units(config):
        if unit.matrices and unit.layer in chosen:
            width = unit.matrices[0].shape[1]
            inputs[unit.key] = Evidence(50, torch.rand(width, generator=generator), torch.randn(width, generator=generator).abs())
    experts = {
        layer: sample_counts(layer, torch.randint(0, 40, (config.num_experts, len(KINDS)), generator=generator), seed=seed)
        for layer in chosen
        if config.moe_layers[layer]
    }
    peaks = {layer: (1.5 + layer / 3, 0.1 * layer) for layer in chosen}
    corpus = {"source": "bundled", "samples": 7, "tokens": 700, "packing": "packed", "seed": 0}
    description = {"corpus": corpus, "source": PROVENANCE, "settings": {"sequential": False}, "version": "1"}
    return Statistics(inputs, experts, peaks, KINDS, description)
