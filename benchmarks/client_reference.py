"""The model that a client should see in an artifact: unquantized, in the source's layout, with the dequantized weights in float32.

Clients load it without any quantization code, so it is what ``client_check`` compares with.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.formats import compressed_tensors
from quantkit.grid import dequantize
from quantkit.llama4 import Llama4Config, WeightMatrix, parse_config, units


def write_reference(artifact: Path, source: Path, directory: Path) -> None:
    """Write the reference of ``artifact``, made from ``source``, to ``directory``: ``config.json`` and one tensor file."""
    text = (source / "config.json").read_text(encoding="utf-8")
    config = parse_config(json.loads(text))
    quantization = json.loads((artifact / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    stored = {name: tensor for path in sorted(artifact.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    tensors: dict[str, torch.Tensor] = {}
    for unit in units(config):
        tensors |= {copy.name: stored[copy.name] for copy in unit.copies}
        for matrix in unit.matrices:
            scheme = compressed_tensors.scheme_of(quantization, matrix.name)
            if scheme is None:
                weight = stored[f"{matrix.name}.weight"].float()
            else:
                weight = dequantize(compressed_tensors.decode(matrix.name, stored, scheme))
            _insert(tensors, config, matrix, weight)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(text, encoding="utf-8")


def _insert(tensors: dict[str, torch.Tensor], config: Llama4Config, matrix: WeightMatrix, weight: torch.Tensor) -> None:
    """Put ``weight`` [out, in] where the source has it; experts are fused, input-major, gate before up."""
    if matrix.expert is None:
        tensors[matrix.tensor] = weight
        return
    if matrix.tensor not in tensors:
        shapes = {True: (config.hidden_size, 2 * config.expert_width), False: (config.expert_width, config.hidden_size)}
        tensors[matrix.tensor] = torch.full((config.num_experts, *shapes[matrix.columns is not None]), torch.nan)
    start, stop = matrix.columns or (0, config.hidden_size)
    tensors[matrix.tensor][matrix.expert, :, start:stop] = weight.t()
