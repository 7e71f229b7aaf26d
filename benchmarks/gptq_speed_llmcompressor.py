"""The other side of the GPTQ comparison: one expert, or a whole model, quantized by llm-compressor and timed step by step.

Runs inside an environment that has llm-compressor (``pip install llmcompressor``), started by ``gptq_speed.py``; it imports nothing
of quantkit.

    python gptq_speed_llmcompressor.py expert DIR [--threads 2]
    python gptq_speed_llmcompressor.py model CHECKPOINT DIR --samples 128 [--threads 2]

``expert``: gate, up and down as linear layers, which a ``GPTQModifier`` with its defaults (INT4, groups of 128, min-max scales,
static activation order, blocks of 128, damping 0.01) is given as in a run: its own hook accumulates the Hessians from the tokens,
``on_sequential_epoch_end`` finds the scales and quantizes.  Reads ``DIR/expert.safetensors``; leaves what the weights became in
``DIR/theirs.safetensors``, float32, so that their error is measured by the same code as ours.

``model``: ``oneshot`` as in llm-compressor's examples, on the token ids in ``DIR/tokens.safetensors``.  A line of progress is
printed for every module that was quantized, so that a run that is stopped still says how far it came.

The last line of the output is JSON: seconds per step.  Imports and loading are not counted.
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
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier, base, gptq_quantize
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: F401  (registers what GPTQModifier needs)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

IGNORE = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]

seconds: dict[str, float] = {}
timed = functools.partial(common.timed, seconds)


def modifier(ignore: list[str]) -> GPTQModifier:
    """GPTQ with the library's defaults for 4-bit weights in groups of 128."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    return GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=ignore)


@torch.no_grad()
def quantize_expert(directory: Path) -> None:
    """One expert through the modifier's own hooks."""
    given = load_file(directory / "expert.safetensors")
    gate, up = (half.t().contiguous() for half in given["gate_up"].chunk(2, dim=1))
    parts = {"gate": gate, "up": up, "down": given["down"].t().contiguous()}
    model = torch.nn.Module()
    for name, weight in parts.items():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        model.add_module(name, linear)
    found: dict[str, torch.Tensor] = {}
    quantize_weight = base.quantize_weight

    def kept(**options: Any) -> Any:
        result = quantize_weight(**options)
        found[names.pop(0)] = result[0][0]
        return result

    names = list(parts)
    base.quantize_weight = timed("quantize_weight", kept)
    state, method = State(model=model), modifier([])
    method.on_initialize(state)
    method.on_calibration_start(state, None)
    method.remove_hooks()  # called below without a forward pass

    started, processor = time.perf_counter(), time.process_time()
    for name, inputs in (("gate", "tokens"), ("up", "tokens"), ("down", "inner")):
        method.calibrate_module(getattr(model, name), (given[inputs][None],), None)
    method.on_sequential_epoch_end(state, None, list(model.children()))
    seconds["total"] = time.perf_counter() - started
    seconds["processor"] = time.process_time() - processor
    if method._rtn_fallback_module_names:
        raise SystemExit(f"rounded to nearest, since the Hessian could not be factored: {method._rtn_fallback_module_names}")
    save_file({name: value.contiguous() for name, value in found.items()}, directory / "theirs.safetensors")


def quantize_model(checkpoint: Path, directory: Path, samples: int) -> None:
    """A whole model by ``oneshot``; loading it is not counted."""
    import datasets

    tokens = load_file(directory / "tokens.safetensors")["tokens"][:samples]
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    with load_quantizable_moe(Llama4ForConditionalGeneration):
        model = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
    started, processor = time.perf_counter(), time.process_time()
    compress = GPTQModifier.compress_module_list

    def told(self: GPTQModifier, modules: list[torch.nn.Module]) -> None:
        compress(self, modules)
        print(f"{self._num_compressed_modules} modules quantized after {time.perf_counter() - started:.0f} s", flush=True)

    GPTQModifier.compress_module_list = told
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(checkpoint),
        dataset=data,
        recipe=modifier(IGNORE),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=samples,
        shuffle_calibration_samples=False,
    )
    seconds["total"] = time.perf_counter() - started
    seconds["processor"] = time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("expert", "model"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    base.accumulate_hessian = timed("hessian", base.accumulate_hessian)
    base.observe = timed("scales", base.observe)
    gptq_quantize.factorize_hessian = timed("factorization", gptq_quantize.factorize_hessian)
    if arguments.what == "expert":
        quantize_expert(arguments.paths[0])
        seconds["rounding"] = seconds.pop("quantize_weight") - seconds["factorization"]
    else:
        quantize_model(arguments.paths[0], arguments.paths[1], arguments.samples)
    parts = ("hessian", "scales", "factorization", "rounding")
    seconds["rest"] = seconds["total"] - sum(seconds.get(part, 0.0) for part in parts)
    report = {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load": os.getloadavg()[0],
        "versions": {module.__name__: module.__version__ for module in (llmcompressor, compressed_tensors, transformers, torch)},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
