"""A tiny checkpoint of four shards, and ways to look at it and to damage it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
EXPERTS = "language_model.model.layers.1.feed_forward.experts."


def write_four_shards(directory: Path) -> Path:
    """Write it; returns the directory."""
    tiny_models.write_tiny_model(directory, "scout", shard_bytes=800_000)
    assert sorted(path.name for path in directory.glob("*.safetensors")) == SHARDS
    return directory


def contents(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the library reads them."""
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def shard_of(directory: Path, name: str) -> Path:
    return directory / str(json.loads((directory / INDEX).read_text())["weight_map"][name])


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)
