"""How far from BF16 is a small model after each method, each refinement and each treatment of cold experts?

    python benchmarks/quality.py --model MODEL --calibration TEXT --evaluation TEXT TEXT ... [--samples 50 128 500]

Every artifact is made by ``quantkit.convert`` and read back from its own bytes.  It is compared with the BF16 model on windows of
256 tokens (without BOS, 24 from each text, every position but the first): mean KL divergence and share of tokens with the same
most likely next token.  Both models run in float32 through quantkit's own arithmetic, which equals transformers' to 1e-5 in the
logits; activation quantization is left out.  Calibration takes windows of 256 tokens spread evenly over the text; ``--repeats``
draws others, one window further each time, and the table gives mean and range, because one draw moves the divergence by two to
three per cent.

The refinements are switched off one at a time through the constants that rule them.  Shrinking an expert's Hessian toward that of
its layer is no part of quantkit, since it needs every expert twice; ``cold_experts.py`` measures it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import common
import torch
from small_model import Reference, SmallModel, divergence, reference, windows

from quantkit import CalibrationOptions, Recipe, Rule, convert
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS

LENGTH = 256
NOTES = (
    "Against the BF16 model in float32; weights only. Of several draws of the calibration windows: mean (least to largest). "
    "Samples of 256 tokens."
)


def recipe(name: str, scheme: str = "int4-g128", method: str = "rtn", search: bool = True) -> Recipe:
    """Feed-forward weights in that scheme, by that method."""
    return Recipe(name, (Rule(scheme, roles=FEED_FORWARD_ROLES, method=method, clip_search=search), Rule("keep")))


@dataclass(frozen=True)
class Variant:
    """One row of the table.  constants: what is patched, module attribute -> value."""

    label: str
    recipe: Recipe
    constants: tuple[tuple[str, object], ...] = ()
    sequential: bool = False


GPTQ = PRESETS["w4a16-gptq"]
VARIANTS = [
    Variant("rtn, no clip search", recipe("rtn-plain", search=False)),
    Variant("rtn (preset w4a16-rtn)", PRESETS["w4a16-rtn"]),
    *([Variant("awq (preset w4a16-awq)", PRESETS["w4a16-awq"])] if "w4a16-awq" in PRESETS else []),
    Variant("gptq (preset w4a16-gptq)", GPTQ),
    Variant("gptq, no clip search", recipe("gptq-plain", method="gptq", search=False)),
    Variant("gptq, shared expert not made up for", GPTQ, (("quantkit.calibration.LEAST_TO_LEARN", math.inf),)),
    Variant("gptq, nothing lent to cold experts", GPTQ, (("quantkit.calibration.ENOUGH_ROWS", 0.0),)),
    Variant("gptq, lent tokens count in full", GPTQ, (("quantkit.calibration.BORROWED_WEIGHT", 1.0),)),
    Variant("gptq, later layers see quantized inputs", GPTQ, sequential=True),
    Variant("w8a16", PRESETS["w8a16"]),
    Variant("fp8-dynamic", PRESETS["fp8-dynamic"]),
    Variant("fp8-dynamic, clip search", recipe("fp8-search", "fp8-channel-dynamic")),
]


@contextlib.contextmanager
def patched(constants: tuple[tuple[str, object], ...]) -> Iterator[None]:
    """Set constants of the library for a while."""
    with contextlib.ExitStack() as stack:
        for name, value in constants:
            stack.enter_context(mock.patch(name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/tiny-scout"))
    parser.add_argument("--calibration", type=Path, required=True, help="a plain text")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, help="plain texts")
    parser.add_argument("--samples", type=int, nargs="+", default=[50, 128, 500])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--results", default="quality.md")
    arguments = parser.parse_args()
    with torch.no_grad():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure every variant and write the table."""
    model = SmallModel.read(arguments.model)
    truth = reference(model, windows(arguments.model, arguments.evaluation, LENGTH, most=24))
    text, load = common.header("Quality of calibrated quantization", Path.cwd(), common.load_average()), time.monotonic()
    rows: list[list[str]] = []
    for variant in VARIANTS:
        if arguments.only not in variant.label:
            continue
        cells = [variant.label]
        for count in arguments.samples:
            if not variant.recipe.needs_calibration and count != arguments.samples[0]:
                cells.append("the same")
                continue
            draws = arguments.repeats if variant.recipe.needs_calibration else 1
            found = [measure(variant, arguments, count, draw, model, truth) for draw in range(draws)]
            divergences = [pair[0] for pair in found]
            spread = f" ({min(divergences):.6f} to {max(divergences):.6f})" if draws > 1 else ""
            agreement = sum(pair[1] for pair in found) / draws
            cells.append(f"{sum(divergences) / draws:.6f}{spread}, {agreement:.4f}")
        print(" | ".join(cells), f"[{time.monotonic() - load:.0f} s]", flush=True)
        rows.append(cells)
    text += f"\n{NOTES}\n" + common.table(
        ["mean KL divergence, top-1 agreement", *(f"{n} samples" for n in arguments.samples)], rows
    )
    common.write_results(arguments.results, text)


def measure(
    variant: Variant, arguments: argparse.Namespace, count: int, draw: int, model: SmallModel, truth: Reference
) -> tuple[float, float]:
    """Make the artifact and compare it."""
    options = CalibrationOptions(
        arguments.calibration, samples=count, sequence_length=LENGTH, seed=draw, sequential=variant.sequential
    )
    with tempfile.TemporaryDirectory() as output, patched(variant.constants):
        made = convert(arguments.model, variant.recipe, output, calibration=options)
        return divergence(model, model.artifact(made.artifacts[0].directory), truth)


if __name__ == "__main__":
    main()
