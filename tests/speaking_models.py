"""Tiny models that can be calibrated: their tokenizer knows a word for each token, and texts are random words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration import CalibrationOptions
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS, Recipe, Rule
from tests.tiny_models import write_tiny_model

LENGTH = 40
KEEP_REST = Rule("keep")
ASYMMETRIC = Recipe("asymmetric", (Rule("int4-g64-asym", FEED_FORWARD_ROLES, method="gptq"), KEEP_REST))
EVERYWHERE = Recipe("everywhere", (Rule("int8-g64", ("attention",), method="gptq"), *PRESETS["w4a16-gptq"].rules), kv_cache="fp8")


def write_speaking_model(directory: Path, kind: str = "scout", seed: int = 0, **overrides: Any) -> Path:
    """A tiny checkpoint whose tokenizer splits text at spaces: ``<17> <4>`` are the tokens 17 and 4."""
    write_tiny_model(directory, kind, seed, **overrides)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}, indent=2))
    return directory


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"<{token}>" for token in tokens)


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(8, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_texts(path: Path, texts: Sequence[tuple[str, Sequence[int]]]) -> Path:
    """JSON lines of (kind, tokens); each begins with the model's first token, 1, when it is read."""
    path.write_text("".join(json.dumps({"kind": kind, "text": words(tokens)}) + "\n" for kind, tokens in texts))
    return path


def write_random_texts(path: Path, *, documents: int = 6, seed: int = 0) -> Path:
    """Documents of two kinds, most of them shorter than ``LENGTH``."""
    lengths = [LENGTH + 5, 7, 30, 1, LENGTH - 1, 22, 39, 13]
    kinds = ("prose.en", "code.python")
    texts = [(kinds[number % 2], random_tokens(lengths[number % 8], 100 * seed + number)) for number in range(documents)]
    return write_texts(path, texts)


def options(texts: Path, **others: Any) -> CalibrationOptions:
    """Each document is a sample, cut at ``LENGTH`` tokens."""
    return CalibrationOptions(texts, **{"sequence_length": LENGTH, "packing": "documents", **others})
