"""The mixture of experts on a CUDA GPU: is it right, and how fast beside what memory and tensor cores could give?

    python benchmarks/moe_gpu.py [--seconds 540] [--parts scout,maverick,tuning,others] [--output DIR]
    python benchmarks/moe_gpu.py --interpret

One run for an H200 without network; it needs torch, Triton, NumPy and 60 GiB of the GPU.  What matters most comes first, results
are written after every step, and steps for which no time is left are named as left out.

- bandwidth of a copy of 4 GiB, reading and writing counted
- every scheme against float64 on new random inputs, for small and large tiles; instructions against plain arithmetic, bit for bit
- Scout's layer (16 experts of 3 x 5120 x 8192, one of them for every token, and the shared one) with 1 to 16 tokens, as a share of
  that bandwidth, and with 512, 4096 and 16384 tokens in TFLOP/s; Maverick's (128 experts) with few
- in the same run BF16 weights through torch's ``grouped_mm``, and INT4 weights that are written out in BF16 for it first
- other tiles than those of ``quantkit/kernels/moe_tiles.py``, and the table that would be best

"products" are the launches of gate_up and down with whatever they do to rows; "layer" is everything from the router to the output.
Every time is the median of replays of a CUDA graph, each after the second level cache was overwritten.  With ``--interpret`` the
script runs on a CPU at tiny sizes in Triton's interpreter and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import moe_gpu_cases as cases
import moe_gpu_tiles as tuning
import torch
import torch.nn.functional as functional

TESTS = Path(__file__).resolve().parent.parent / "tests"
PARTS = ("scout", "maverick", "tuning", "others")
MAIN = ("int4-g128", "fp8-channel-dynamic", "fp8-block-dynamic", cases.BF16)
OTHERS = ("Q4_K", "int8-channel", "int4-g32", "int4-g128-asym", "int8-channel-dynamic", "Q8_0", "Q6_K", "int4-channel", "int8-g128")
FLUSHED = 256 << 20  # bytes, several times the second level cache
LEAST_SECONDS = 15.0  # that a step needs
LAYER_ERROR = 0.03  # of results whose inner values are rounded to BF16, or to FP8 once more
FP8_SUMS, SUMS, OUTPUT = 2.0**-12, 2.0**-15, 2.0**-8  # what is lost in tensor cores and in the BF16 of the result


@dataclasses.dataclass(frozen=True)
class Sizes:
    """hidden, width: of an expert.  scout, maverick: routed experts.  decode, prefill: tokens.  checked: rows of tiles."""

    hidden: int = 5120
    width: int = 8192
    scout: int = 16
    maverick: int = 128
    decode: tuple[int, ...] = (1, 8, 16, 2, 4)
    prefill: tuple[int, ...] = (4096, 16384, 512)
    checked: tuple[int, ...] = (16, 128)


TINY = Sizes(256, 256, 2, 3, (1,), (20,), (16,))


CHECK_COLUMNS = (
    "scheme",
    "rows of a tile",
    "gate_up, error / allowed",
    "down",
    "bytes that differ without instructions",
    "layer, error",
)
FIGURE_COLUMNS = (
    *("layer", "scheme", "tokens", "tile", "gate_up", "down"),
    *("products", "of the copy's rate", "TFLOP/s", "whole layer", "TFLOP/s"),
)


class Run:
    """What a run knows: where, how long, and what was found, kept on disk as it grows."""

    def __init__(self, device: torch.device, sizes: Sizes, seconds: float, output: Path | None, seed: int) -> None:
        self.device, self.sizes, self.output = device, sizes, output
        self.deadline = time.monotonic() + seconds
        self.measures = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED if self.measures else 16, dtype=torch.uint8, device=device)
        self.found: dict[str, Any] = {
            "seed": seed,
            "copy": None,
            "checks": [],
            "figures": [],
            "tiles": [],
            "problems": [],
            "left out": [],
        }
        self.head = common.header("Mixture of experts on a GPU", Path.cwd(), common.load_average()) + toolchain(device)

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do it if there is time, and write down what was found.  A failure is a finding: the run goes on, and fails at its end."""
        if self.late():
            self.found["left out"].append(name)
        else:
            started = time.monotonic()
            try:
                work()
            except Exception as error:  # written down, and the exit code tells
                self.found["problems"].append(f"{name}: {type(error).__name__}: {str(error)[:2000]}")
            print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def late(self) -> bool:
        """Whether too little time is left to begin anything."""
        return self.deadline - time.monotonic() < LEAST_SECONDS

    def seconds(self, work: Callable[[], object], longest: float = 0.4) -> float | None:
        """Median of replays, each with a cold cache; None where nothing can be measured.  Compiles first."""
        work()
        if not self.measures:
            return None
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 5 or (len(times) < 50 and time.monotonic() - begin < longest):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self.flushed.zero_()
            first.record()
            graph.replay()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return statistics.median(times)

    def write(self) -> None:
        """JSON and Markdown of all that was found so far."""
        if self.output is None:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "moe_gpu.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        (self.output / "moe_gpu.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The report."""
        found, copy = self.found, self.found["copy"]
        lines = [self.head, f"- seed: {found['seed']}\n"]
        lines.append(f"- copy: {'not measured' if copy is None else f'{copy / 1e12:.2f} TB/s, read and written'}\n\n")
        lines += [f"PROBLEM: {problem}\n\n" for problem in found["problems"]]
        if found["left out"]:
            lines.append(f"No time was left for: {', '.join(found['left out'])}\n\n")
        if found["checks"]:
            keys = ("scheme", "tile", "gate_up", "down", "different", "layer")
            checked = [[check[key] for key in keys] for check in found["checks"]]
            checked = [[f"{cell:.2g}" if isinstance(cell, float) else cell for cell in cells] for cells in checked]
            lines.append(common.table(CHECK_COLUMNS, checked))
        lines.append("\n" + common.table(FIGURE_COLUMNS, [self.row(figure) for figure in found["figures"]]))
        for tuned in found["tiles"]:
            lines.append(f"\n{tuned['scheme']}, tiles of {tuned['tile']} rows, {tuned['tokens']} tokens:\n\n")
            cells = [(str(tuple(shape)), shown(time_of), note) for shape, time_of, note in tuned["tried"]]
            lines.append(common.table(("outputs, warps, stages, programs", "gate_up and down", ""), cells))
        return "".join(lines) + (tuning.table_source(found["tiles"]) if found["tiles"] else "")

    def row(self, figure: dict[str, Any]) -> list[str]:
        """A line of the table of figures."""
        copy, products, layer = self.found["copy"], figure["products"], figure["layer"]
        share = "" if not copy or not products or not figure["bytes"] else f"{figure['bytes'] / products / copy:.0%}"
        rates = [f"{figure['flop'] / value / 1e12:.0f}" if value else "" for value in (products, layer)]
        times = [shown(figure[key]) for key in ("gate_up", "down", "products", "layer")]
        return [
            figure["model"],
            figure["scheme"],
            str(figure["tokens"]),
            str(figure["tile"]),
            *times[:3],
            share,
            rates[0],
            times[3],
            rates[1],
        ]


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value * 1e6:,.0f} us"


def toolchain(device: torch.device) -> str:
    """GPU, Triton and the assembler that it brings: the same kernel is faster or slower with another."""
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    version = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout.split("release ")[-1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return f"- GPU: {name}\n- triton: {triton.__version__}, ptxas {version.split(',')[0]}\n- CUDA of torch: {torch.version.cuda}\n"


# ------------------------------------------------------------------------------------------------------------ correctness


def copy_rate(run: Run) -> None:
    """Bytes a second, of the best of some copies."""
    if run.measures:
        source = torch.empty(4 << 30, dtype=torch.uint8, device=run.device).fill_(1)
        target = torch.empty_like(source)
        taken = run.seconds(lambda: target.copy_(source))
        assert taken is not None
        run.found["copy"] = 2 * source.nbytes / taken


def check(run: Run, name: str, *, round_activations: bool = True) -> None:
    """gate_up and down of four different experts, one of them without rows, against float64; and a layer against float32."""
    for size in run.sizes.checked:
        layer = cases.layer(name, 3, run.sizes.hidden, run.sizes.width, run.device, distinct=True)
        counts = torch.tensor([0, size + 3, 1, 5], device=run.device)
        outcome: dict[str, Any] = {
            "scheme": name if round_activations else name + ", rows as they are",
            "tile": size,
            **_checked_products(run, layer, counts, size, round_activations),
            "layer": _checked_layer(run, layer, size, round_activations),
        }
        run.found["checks"].append(outcome)
        wrong = [
            part
            for part, most in (("gate_up", 1), ("down", 1), ("layer", LAYER_ERROR), ("different", 0))
            if not outcome[part] <= most
        ]
        if wrong:
            raise AssertionError(f"{' and '.join(wrong)} of {name}: {outcome}")


def _checked_products(run: Run, layer: cases.Layer, counts: torch.Tensor, size: int, round_activations: bool) -> dict[str, Any]:
    """Errors of what two launches give, relative to what is allowed, and bits in which instructions and arithmetic differ."""
    from quantkit.kernels.activations import rounded_inputs

    tiles = cases.tiles_of(counts, int(counts.sum()), size)
    [stack] = layer.mixture.stacks
    found: dict[str, Any] = {"gate_up": 0.0, "down": 0.0, "different": 0}
    for part, weight in (("gate_up", stack.gate), ("down", stack.down)):
        values = torch.randn(int(counts.sum()), weight.inputs, device=run.device).to(torch.bfloat16)
        rows = cases.rounded(values, weight, counts, round_activations)
        dtype = torch.float32 if part == "down" else torch.bfloat16
        out = torch.empty(1, len(values), weight.outputs, dtype=dtype, device=run.device)
        cases.launch(rows, weight, tiles, out)
        if run.measures:
            plain = torch.empty_like(out)
            cases.launch(rows, weight, tiles, plain, assembly=False)
            found["different"] += int((plain.view(torch.uint8) != out.view(torch.uint8)).sum())
        sums = FP8_SUMS if rows.values.dtype == torch.float8_e4m3fn else SUMS
        split = [torch.split(both, counts.tolist()) for both in (values.to(torch.float32), out[0].to(torch.float64))]
        for matrices, x, result in zip(layer.matrices, *split, strict=True):
            first = matrices.down if part == "down" else matrices.gate
            exact = (rounded_inputs(x, first) if round_activations else x).to(torch.float64)
            product, slack = _product(exact, first, sums)
            if part == "gate_up":
                other, other_slack = _product(exact, matrices.up, sums)
                inner = functional.silu(product)
                slack = 1.1 * slack * other.abs() + other_slack * inner.abs()
                product = inner * other
                slack = slack + product.abs() * OUTPUT
            error = (result - product).abs() / slack
            found[part] = max(found[part], float(error.max()) if error.numel() else 0.0)
    return found


def _checked_layer(run: Run, layer: cases.Layer, tokens: int, round_activations: bool) -> float:
    """Relative L2 error of a layer from router to output."""
    from quantkit.kernels import moe_triton, reference
    from quantkit.kernels.activations import rounded_inputs

    x = torch.randn(tokens, layer.hidden, device=run.device).to(torch.bfloat16)
    router = torch.randn(layer.experts, layer.hidden, device=run.device)
    out, routing = moe_triton.moe_forward(x, router, layer.mixture, None, round_activations=round_activations)
    rounded = rounded_inputs if round_activations else (lambda values, _: values)
    wanted = reference.moe(x.to(torch.float32), routing, layer.matrices[:-1], layer.matrices[-1], rounded)
    return float((out.to(torch.float32) - wanted).norm() / wanted.norm())


def _product(x: torch.Tensor, weight: Any, sums: float) -> tuple[torch.Tensor, torch.Tensor]:
    values = cases.values_of(weight).to(torch.float64)
    return x @ values.t(), sums * (x.abs() @ values.abs().t()) + 1e-12


# ---------------------------------------------------------------------------------------------------------------- figures


def figures(run: Run, layer: cases.Layer, model: str, counts_of_tokens: Sequence[int], *, round_activations: bool = True) -> None:
    """Times of one layer with so many tokens."""
    from quantkit.kernels import moe_triton

    [stack] = layer.mixture.stacks
    router = torch.randn(layer.experts, layer.hidden, device=run.device)
    for tokens in counts_of_tokens:
        if run.late():
            run.found["left out"].append(f"{model}, {layer.name}, {tokens} tokens")
            continue
        counts = cases.rows_per_expert(tokens, layer.experts, run.device)
        launches = cases.chosen_tiles(layer, counts, tokens)
        values = torch.randn(2 * tokens, layer.hidden, device=run.device).to(torch.bfloat16)
        inner = torch.randn(2 * tokens, layer.width, device=run.device).to(torch.bfloat16)
        splits = moe_triton.splits_of(stack.down, launches, run.device)
        parts = torch.empty(splits, 2 * tokens, layer.hidden, device=run.device)

        def gate_up() -> None:
            rows = cases.rounded(values, stack.gate, counts, round_activations)  # noqa: B023
            for tiles in launches:  # noqa: B023
                cases.launch(rows, stack.gate, tiles, inner[None])  # noqa: B023

        def down() -> None:
            rows = cases.rounded(inner, stack.down, counts, round_activations)  # noqa: B023
            for tiles in launches:  # noqa: B023
                cases.launch(rows, stack.down, tiles, parts)  # noqa: B023

        def whole() -> None:
            moe_triton.moe_forward(values[:tokens], router, layer.mixture, None, round_activations=round_activations)  # noqa: B023

        times = [run.seconds(work) for work in (gate_up, down, whole)]
        distinct = int((counts > 0).sum())
        run.found["figures"].append(
            {
                "model": model,
                "scheme": layer.name if round_activations else layer.name + ", rows as they are",
                "tokens": tokens,
                "tile": ", ".join(str(tiles.tokens) for tiles in launches),
                "splits": splits,
                "gate_up": times[0],
                "down": times[1],
                "products": None if times[0] is None or times[1] is None else times[0] + times[1],
                "layer": times[2],
                "bytes": distinct * layer.bytes_of_expert,
                "flop": 2.0 * layer.weights_of_expert * 2 * tokens,
            }
        )
        run.write()


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's product of rows that are sorted by group, under the name that this torch has for it."""
    function: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    result: torch.Tensor = function(rows, weights, offs=ends)
    return result


def baselines(run: Run, layer: cases.Layer, model: str, counts_of_tokens: Sequence[int]) -> None:
    """torch's grouped product of BF16 weights, and the same after INT4 weights were written out for it."""
    [stack] = layer.mixture.stacks
    count = layer.experts + 1
    gate_up = torch.empty(count, 2 * layer.width, layer.hidden, dtype=torch.bfloat16, device=run.device).normal_(std=0.01)
    down = torch.empty(count, layer.hidden, layer.width, dtype=torch.bfloat16, device=run.device).normal_(std=0.01)

    def write_out() -> None:
        for weight, target in ((stack.gate, gate_up), (stack.down, down)):
            words = weight.codes.view(count, target.shape[1], -1)
            scales = weight.tables["scales"].view(count, -1, target.shape[1])
            for expert in range(count):
                cases.dequantized(words[expert], scales[expert], target[expert])

    for tokens in counts_of_tokens:
        if run.late():
            run.found["left out"].append(f"{model}, {layer.name}, {tokens} tokens")
            continue
        counts = cases.rows_per_expert(tokens, layer.experts, run.device)
        ends = counts.cumsum(0).to(torch.int32)
        values = torch.randn(2 * tokens, layer.hidden, device=run.device).to(torch.bfloat16)

        def products() -> torch.Tensor:
            inner = grouped_product(values, gate_up.transpose(1, 2), ends)  # noqa: B023
            gated = functional.silu(inner[:, : layer.width]) * inner[:, layer.width :]
            return grouped_product(gated, down.transpose(1, 2), ends)  # noqa: B023

        def both() -> None:
            write_out()
            products()

        for scheme, work, share in (("BF16, grouped_mm", products, 2.0), ("int4-g128 written out, grouped_mm", both, 0.0)):
            taken = run.seconds(work)
            run.found["figures"].append(
                {
                    "model": model,
                    "scheme": scheme,
                    "tokens": tokens,
                    "tile": "",
                    "gate_up": None,
                    "down": None,
                    "products": taken,
                    "layer": None,
                    "bytes": int((counts > 0).sum()) * share * layer.weights_of_expert,
                    "flop": 2.0 * layer.weights_of_expert * 2 * tokens,
                }
            )
            run.write()


# ------------------------------------------------------------------------------------------------------------------- run


def steps(run: Run, parts: Sequence[str]) -> None:
    """All that is asked for, the most important first."""
    sizes, few = run.sizes, not run.measures

    def layer(name: str, experts: int) -> cases.Layer:
        return cases.layer(name, experts, sizes.hidden, sizes.width, run.device)

    def scout(name: str, tokens: Sequence[int], round_activations: bool = True) -> None:
        figures(run, layer(name, sizes.scout), "Scout", tokens, round_activations=round_activations)

    def maverick(name: str) -> None:
        figures(run, layer(name, sizes.maverick), "Maverick", sizes.decode if few else (*sizes.decode, sizes.prefill[0]))

    def baseline() -> None:
        baselines(run, layer(MAIN[0], sizes.scout), "Scout", (*sizes.prefill[:2], sizes.decode[0]))

    def tune(chosen: Sequence[tuple[str, int]]) -> None:
        for name, tile in chosen:
            run.step(f"tiles of {tile} rows, {name}", lambda: tuning.tune(run, layer(name, sizes.scout), tile))  # noqa: B023

    run.step("copy", partial(copy_rate, run))
    if "scout" in parts:
        for name in MAIN:
            run.step(f"check of {name}", partial(check, run, name))
            run.step(
                f"Scout, {name}", partial(scout, name, (sizes.decode[0], *sizes.prefill[:2], *sizes.decode[1:], *sizes.prefill[2:]))
            )
            if name == MAIN[0]:
                run.step("Scout, baselines", baseline)
    if "maverick" in parts:
        for name in MAIN[:1] if few else MAIN[:3:2]:
            run.step(f"Maverick, {name}", partial(maverick, name))
    if "tuning" in parts:
        tune([(MAIN[0], 16), (MAIN[1], 16)] if few else tuning.TUNED[: tuning.FIRST_TUNED])
    if "others" in parts:
        for name in OTHERS[:1] if few else OTHERS:
            run.step(f"check of {name}", partial(check, run, name))
            run.step(f"Scout, {name}", partial(scout, name, (sizes.decode[0], sizes.prefill[0], *sizes.decode[1:2])))
        for name in MAIN[1:2] if few else MAIN[1:3]:
            run.step(f"check of {name}, rows as they are", partial(check, run, name, round_activations=False))
            run.step(f"Scout, {name}, rows as they are", partial(scout, name, (sizes.decode[0], sizes.prefill[0]), False))
    if "tuning" in parts and not few:
        tune(tuning.TUNED[tuning.FIRST_TUNED :])


def main() -> None:
    """Check, measure, and write the results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="when to be done")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="directory of the results; benchmarks/results on a GPU, else none")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if not arguments.interpret and not torch.cuda.is_available():
        print("not measured: there is no CUDA GPU; --interpret runs at tiny size in Triton's interpreter")
        return
    device, output = torch.device("cpu" if arguments.interpret else "cuda"), arguments.output
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported only from here on
        torch.set_num_threads(1)
        sys.path.insert(0, str(TESTS))
        importlib.import_module("triton_arithmetic").make_exact()
    else:
        output = output or common.RESULTS
    cases.import_kernels()
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    run = Run(device, TINY if arguments.interpret else Sizes(), arguments.seconds, output, seed)
    steps(run, arguments.parts.split(","))
    print(run.text())
    if run.found["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
