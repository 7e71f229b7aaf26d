"""Evaluations and golden sets on a device, in Triton's interpreter: scores do not depend on what is kept there, weights that stay
are prepared once.

Triton decides at its import whether it interprets, so this file also runs as a program, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

QUESTIONS = ({"prompt": "The history of the city", "kind": "exact", "answer": "x", "max_tokens": 3},)
PLENTY = 1 << 40


def compare(directory: Path) -> dict[str, Any]:
    """What evaluations and golden sets give under different circumstances."""
    import triton_arithmetic

    from quantkit.calibration import CalibrationOptions

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    with mock.patch.object(CalibrationOptions, "accelerator", return_value=torch.device("cpu")):
        return {"scores": scores(directory), "golden": {str(share): golden(directory, share) for share in (0.0, 0.6, 1.0)}}


def scores(directory: Path) -> dict[str, dict[str, Any]]:
    """Of an artifact: with the head kept, with the head streamed, and with logits compared by the kernel of the CPU."""
    from quantkit import evaluate
    from quantkit.kernels import divergence, divergence_device
    from quantkit.stored_model import ArtifactModel, CheckpointModel

    found, reads = {}, list[str]()

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def rows(self: Any, name: str, at_once: int) -> Any:
            reads.append(name)
            return read(self, name, at_once)

        return rows

    by_device, by_cpu = (
        {name: getattr(module, name) for name in ("reference_rows", "compare_rows")} for module in (divergence_device, divergence)
    )
    for name, memory, kernels in (("kept", PLENTY, by_device), ("streamed", 0, by_device), ("by the CPU", PLENTY, by_cpu)):
        reads.clear()
        with (
            mock.patch("quantkit.ready_weights.device_memory", return_value=memory),
            mock.patch("quantkit.evaluation_scores.LEAST_PORTION", 10),
            mock.patch("quantkit.evaluation_scores.LARGEST_PORTION", 10),
            mock.patch.multiple(divergence_device, **kernels),
            mock.patch.object(ArtifactModel, "rows", counted(ArtifactModel.rows)),
            mock.patch.object(CheckpointModel, "rows", counted(CheckpointModel.rows)),
        ):
            cache = directory / "cache"
            for old in cache.glob("*/scores-*"):
                old.unlink()  # so that scores are computed again, and hidden states of the reference are not
            artifact, source = directory / "w4a16-rtn", directory / "source"
            result = evaluate([artifact], source, window=14, windows=2, cache=cache, resamples=0)
        heads = sum("lm_head" in read for read in reads)
        found[name] = {"scores": dataclasses.asdict(result.artifacts[0].scores), "heads": heads}
    return found


def golden(directory: Path, share: float) -> dict[str, Any]:
    """Answers, when ``share`` of what there is to keep may be kept."""
    from quantkit.golden import golden_answers
    from quantkit.golden_set import read_questions
    from quantkit.kernels import moe_triton
    from quantkit.kernels.device_mixture import prepare
    from quantkit.ready_weights import DeviceWeights
    from quantkit.stored_model import open_model
    from quantkit.team import Team

    kept, prepared = list[DeviceWeights](), {"once": 0, "again": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            prepared[name] += 1
            return function(*arguments)

        return called

    def remembered(self: DeviceWeights, *arguments: Any) -> None:
        begin(self, *arguments)
        kept.append(self)

    begin, budget = DeviceWeights.__init__, None if share == 1 else int(share * whole_bytes(directory))
    with (
        open_model(directory / "w4a16-rtn") as model,
        Team(1) as team,
        mock.patch("quantkit.ready_weights.device_memory", return_value=PLENTY),
        mock.patch("quantkit.ready_weights.prepare", counted("once", prepare)),
        mock.patch.object(moe_triton, "prepare", counted("again", prepare)),
        mock.patch.object(DeviceWeights, "__init__", remembered),
    ):
        questions = read_questions(directory / "questions.jsonl")
        [found] = golden_answers(
            [model], questions, directory / "source", team=team, device=torch.device("cpu"), kept_bytes=budget, rounds=1
        )
        layers = sum(model.config.moe_layers)
    answers = [answer for _, _, answer in found.answers]
    return {"answers": answers, "kept": kept[0].kept, "budget": budget, "layers": layers, **prepared}


def whole_bytes(directory: Path) -> int:
    """About what the model takes on the device."""
    from quantkit.stored_model import open_model

    with open_model(directory / "w4a16-rtn") as model:
        return model.bytes


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_what_stays_on_a_device_never_shows(tmp_path: Path) -> None:
    from quantkit import convert
    from tests.gguf_models import write_source

    convert(write_source(tmp_path / "source", "scout", 3, num_local_experts=2), "w4a16-rtn", tmp_path)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)

    kept, streamed, by_cpu = (found["scores"][name] for name in ("kept", "streamed", "by the CPU"))
    assert kept["scores"] == streamed["scores"]
    assert kept["heads"] == 2 and streamed["heads"] == 2 * 3  # of both models, for 26 positions, 10 at a time
    assert kept["scores"]["positions"] == 26
    for name, value in kept["scores"].items():
        right = by_cpu["scores"][name]
        if isinstance(value, dict):
            assert list(value.values()) == pytest.approx(list(right.values()), rel=2e-5, nan_ok=True), name
        else:
            assert value == pytest.approx(right, rel=2e-5), name

    nothing, part, whole = (found["golden"][share] for share in ("0.0", "0.6", "1.0"))
    assert nothing["answers"] == part["answers"] == whole["answers"]
    assert (whole["once"], whole["again"]) == (whole["layers"], 0)
    assert (nothing["once"], nothing["kept"]) == (0, 0) and nothing["again"] > 2 * nothing["layers"]
    assert 0 < part["kept"] <= part["budget"] < whole["kept"]
    assert 0 < part["once"] < part["layers"] and part["again"] > 0


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
