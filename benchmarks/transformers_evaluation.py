"""Evaluate artifacts with transformers, as one would by hand: the peer that ``evaluation_speed.py`` times.

    python benchmarks/transformers_evaluation.py REFERENCE WINDOWS.pt ARTIFACT ...

Everything in float32: the reference answers once and its log probabilities are kept, then each artifact is loaded and compared
with it, windows in batches.  Prints one JSON object: for each artifact the perplexity, its ratio, the mean divergence and the
agreement, and the seconds that loading and computing took.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig, Llama4ForConditionalGeneration

BATCH = 8


def load(directory: Path) -> Any:
    """The model; quantized weights are decompressed once, which is faster than doing so in every forward pass."""
    quantized = "quantization_config" in json.loads((directory / "config.json").read_text())
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    return Llama4ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, **options).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    batches = torch.load(arguments.windows).split(BATCH)
    with torch.no_grad():
        model = load(arguments.reference)
        answers = [model(input_ids=batch).logits[:, :-1].log_softmax(-1) for batch in batches]
        results, seconds = {}, {"reference": time.monotonic() - began}
        for artifact in arguments.artifacts:
            started = time.monotonic()
            model = load(artifact)
            loaded = time.monotonic()
            total = torch.zeros(5, dtype=torch.float64)
            for batch, expected in zip(batches, answers, strict=True):
                found, targets = model(input_ids=batch).logits[:, :-1].log_softmax(-1), batch[:, 1:, None]
                total += torch.stack(
                    [
                        torch.tensor(float(targets.numel())),
                        -expected.gather(2, targets).sum(),
                        -found.gather(2, targets).sum(),
                        (expected.exp() * (expected - found)).sum(),
                        torch.eq(expected.argmax(-1), found.argmax(-1)).sum(),
                    ]
                ).double()
            count, truth, loss, divergence, same = total.tolist()
            results[artifact.name] = {
                "perplexity": math.exp(loss / count),
                "ratio": math.exp((loss - truth) / count),
                "divergence": divergence / count,
                "agreement": same / count,
            }
            seconds[artifact.name] = time.monotonic() - started
            seconds[f"{artifact.name}, of which loading"] = loaded - started
    print(json.dumps({"results": results, "seconds": seconds, "total": time.monotonic() - began}))


if __name__ == "__main__":
    main()
