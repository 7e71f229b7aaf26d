"""Sources, their artifacts and small evaluations of them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.convert import convert
from quantkit.evaluate import evaluate
from quantkit.evaluation import Evaluation
from tests.gguf_models import DEMO, write_source

WINDOW, COUNT = 96, 8


@dataclass(frozen=True)
class Made:
    """A source and its artifacts, one directory for each target."""

    source: Path
    output: Path

    def artifact(self, name: str) -> Path:
        return self.output / name


def make_scout(output: Path, targets: Sequence[str]) -> Made:
    convert(DEMO, targets, output)
    return Made(DEMO, output)


def make_maverick(output: Path, targets: Sequence[str], experts: int = 8) -> Made:
    """Random weights; llama.cpp tells by 128 experts that queries and keys are not normalized."""
    source = write_source(output / "source", "maverick", 3, num_local_experts=experts, use_qk_norm=False)
    convert(source, targets, output)
    return Made(source, output)


def small(made: Made, artifacts: Sequence[str | Path], cache: Path, **options: Any) -> Evaluation:
    """Evaluate artifacts, by name or path, on a few windows of the held-out text."""
    settings = {"window": WINDOW, "windows": COUNT, "workers": 1, "resamples": 20}
    paths = [made.artifact(one) if isinstance(one, str) else one for one in artifacts]
    return evaluate(paths, made.source, cache=cache, **(settings | options))
