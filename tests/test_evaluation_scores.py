"""Scores do not depend on how many positions are held in memory at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantkit import convert, evaluate

DEMO = Path(__file__).resolve().parent.parent / "demo/tiny-scout"


def test_figures_do_not_depend_on_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(DEMO, "w4a16-rtn", tmp_path / "out")
    found = []
    for memory in (1 << 20, 1 << 40):
        monkeypatch.setattr("quantkit.evaluation_scores.available_memory", lambda memory=memory: memory)
        cache = tmp_path / f"cache {memory}"
        evaluation = evaluate([tmp_path / "out/w4a16-rtn"], DEMO, window=256, windows=5, cache=cache, resamples=50)
        found.append(dataclasses.asdict(evaluation.artifacts[0].scores))
    assert found[0] == found[1]
    assert found[0]["positions"] == 5 * 255  # more than two portions of the least size
