"""The other side of the W4A16 comparison: llm-compressor's data-free W4A16 of one checkpoint, timed step by step.

Runs inside an environment that has llm-compressor (``pip install llmcompressor``), started by ``speed.py``; it imports nothing
of quantkit.  It follows llm-compressor's own examples: load with ``load_quantizable_moe``, one ``QuantizationModifier`` with the
ignore list of the public Llama 4 releases, ``oneshot`` without a dataset (so it takes its data-free pipeline), ``save_pretrained``.

    python llmcompressor_baseline.py CHECKPOINT OUTPUT --observer memoryless_minmax|mse [--threads 2]

The last line of the output is JSON: seconds per step.  ``calibrate`` is where scales are found (one call per pass over all
modules), ``compress`` is where codes are computed and packed; their sum is the quantization alone, with the weights already in
memory.  Imports are not counted.  ``fsync`` is what it takes to bring the saved files to the disk, which the library leaves to the
kernel.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import common
import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import Llama4ForConditionalGeneration

IGNORE = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]

seconds: dict[str, float] = {}
timed = functools.partial(common.timed, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--observer", choices=("memoryless_minmax", "mse"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    # Steps are timed where the library itself draws the line: finding the scales of all modules, and turning weights into codes.
    QuantizationModifier.on_sequential_epoch_end = timed("calibrate", QuantizationModifier.on_sequential_epoch_end)
    ModelCompressor.compress_model = timed("compress", ModelCompressor.compress_model)

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, observer=arguments.observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=IGNORE)

    def load() -> Any:
        with load_quantizable_moe(Llama4ForConditionalGeneration):
            return Llama4ForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype="auto")

    def fsync() -> None:
        for path in arguments.output.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    started = time.perf_counter()
    model = timed("load", load)()
    timed("oneshot", oneshot)(model=model, recipe=recipe)
    timed("save", model.save_pretrained)(arguments.output, save_compressed=True)
    timed("fsync", fsync)()
    total = time.perf_counter() - started
    report = {
        "seconds": seconds | {"total": total},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {module.__name__: module.__version__ for module in (llmcompressor, compressed_tensors, transformers, torch)},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
