"""A stored model at work on a device: the same steps as on a GPU, kernels included, in Triton's interpreter.

Triton decides at its import whether it interprets, so this file also runs as a program, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TARGETS = {  # and how far the largest logit may be off: inputs of every product are BF16, which has 8 bits
    "w4a16-rtn": 0.02,
    "fp8-dynamic": 0.06,  # where that tips the rounding of an input to FP8, it moves by a sixteenth
    "nvfp4a16": 0.02,  # has no kernel: it is brought to the device as BF16
}


def compare(directory: Path) -> dict[str, list[float]]:
    """By artifact: the largest difference of logits, their size, and the share of tokens that went to another expert."""
    import triton_arithmetic

    from quantkit.inference import Inference
    from quantkit.layer_pass import Samples
    from quantkit.stored_model import open_model
    from quantkit.team import Team

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    tokens = torch.randint(4, 200, (1, 12), generator=torch.Generator().manual_seed(2))
    samples = Samples.of(torch.tensor([12]), 12)
    found = {}
    for target in TARGETS:
        results, routes = [], []
        for device in (None, torch.device("cpu")):
            with open_model(directory / target) as model, Team(1) as team:
                inference = Inference(model, team, device=device)
                hidden = inference.embed(tokens.reshape(-1))
                for number in range(inference.config.num_layers):
                    routing = inference.layer(number, hidden, samples)
                    if routing is not None:
                        routes.append(routing.experts)
                results.append(inference.logits(hidden, torch.empty(12, inference.config.vocab_size)))
        half = len(routes) // 2
        moved = float((torch.stack(routes[:half]) != torch.stack(routes[half:])).double().mean())
        found[target] = [float((results[0] - results[1]).abs().max()), float(results[0].abs().max()), moved]
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_device_gives_the_logits_of_the_cpu(tmp_path: Path) -> None:
    from quantkit import convert
    from tests.tiny_models import write_tiny_model

    write_tiny_model(tmp_path / "tiny", "maverick")  # dense layers, and layers with experts
    convert(tmp_path / "tiny", list(TARGETS), tmp_path / "out")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for target, bound in TARGETS.items():
        difference, size, moved = found[target]
        assert moved == 0, target
        assert 0 < difference < bound * size, target


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
