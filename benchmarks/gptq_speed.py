"""GPTQ against llm-compressor: one expert of Scout's true shapes, and a whole small model.

    python benchmarks/gptq_speed.py --directory DIR --llmcompressor-python ENV/bin/python
    python benchmarks/gptq_speed.py --directory DIR --llmcompressor-python ENV/bin/python \\
        --parts model --checkpoint MODEL [--text CALIBRATION.txt] [--peer-samples 4] [--peer-limit 2700]

``expert``: gate and up ``[8192, 5120]`` and down ``[5120, 8192]`` with 4096 tokens, from tensors in memory to codes and scales in
memory: Hessians, scales, factorization, rounding.  Weights and tokens are made once and read by both sides from the same file.
``model``: the corpus through the model and every expert quantized; ours from shards to a published artifact, theirs from a loaded
model to a quantized model in memory.

Fairness: the same number of threads, contestants take turns, imports and loading are outside the clock, and the error of the
outputs is computed for both by the same code, for tokens that both learned from and for others.  llm-compressor takes its scales
from the extremes of each group; the fair pair is therefore quantkit without clip search.  Its preset has one, so both are shown.
Processor seconds count all threads of the process; where other work takes part of the machine they compare better than seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.corpus import load_corpus
from quantkit.evidence import Evidence
from quantkit.grid import dequantize
from quantkit.methods import gptq, rtn
from quantkit.scheme import parse_scheme
from quantkit.team import Team, add_gram
from quantkit.workspace import Workspace

THREADS = 2
TARGET = 2.5
HIDDEN, WIDTH, TOKENS, OTHERS = 5120, 8192, 4096, 512
SAMPLES, LENGTH = 128, 256  # of the whole model
PARTS = ("hessian", "scales", "factorization", "rounding", "rest")
PEER = "gptq_speed_llmcompressor.py"


# ------------------------------------------------------------------------------------------------------------------ expert


def make_expert(path: Path, shrink: int) -> None:
    """Weights as an expert's slice lies in a fused tensor, ``[in, out]``, and inputs with channels that differ and depend on each
    other; those of the down projection are what gate and up make of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, width, tokens, others = (number // shrink for number in (HIDDEN, WIDTH, TOKENS, OTHERS))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    gate_up, down = ((0.02 * shrink**0.5 * normal(*shape)).to(torch.bfloat16) for shape in ((hidden, 2 * width), (width, hidden)))
    few = hidden // 8
    rows = normal(tokens + others, few) @ normal(few, hidden) / few**0.5 + 0.5 * normal(tokens + others, hidden)
    rows *= torch.exp(0.5 * normal(hidden))
    gate, up = (rows @ gate_up.to(torch.float32)).chunk(2, dim=1)
    inner = torch.nn.functional.silu(gate) * up
    tensors = {"gate_up": gate_up, "down": down}
    tensors |= {"tokens": rows[:tokens], "inner": inner[:tokens], "other tokens": rows[tokens:], "other inner": inner[tokens:]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def quantize_expert(
    given: dict[str, torch.Tensor], clip_search: bool, team: Team, workspace: Workspace
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One expert by quantkit: seconds per step, and the values stored for gate, up and down."""
    scheme, seconds = parse_scheme("int4-g128"), dict.fromkeys(PARTS, 0.0)
    stored: dict[str, torch.Tensor] = {}
    assert scheme is not None
    gate, up = (half.t() for half in given["gate_up"].chunk(2, dim=1))
    steps = {"scales": (rtn, "quantize"), "factorization": (gptq, "_factor"), "rounding": (gptq, "_round_all")}
    originals = {step: getattr(*place) for step, place in steps.items()}
    for step, (module, name) in steps.items():
        setattr(module, name, common.timed(seconds, step, originals[step]))
    total = processor = 0.0
    try:
        for names, weights, inputs in (
            (("gate", "up"), (gate, up), given["tokens"]),
            (("down",), (given["down"].t(),), given["inner"]),
        ):
            started, before = time.perf_counter(), time.process_time()
            hessian = workspace.tensor(f"hessian {names[0]}", torch.float32, inputs.shape[1], inputs.shape[1]).zero_()
            add_gram(team, inputs, hessian)
            hessian.div_(len(inputs))
            seconds["hessian"] += time.perf_counter() - started
            nothing = torch.empty(0)
            evidence = Evidence(len(inputs), nothing, nothing, hessian, rows=float(len(inputs)))
            results = gptq.quantize(weights, scheme, clip_search=clip_search, workspace=workspace, evidence=evidence, team=team)
            total, processor = total + time.perf_counter() - started, processor + time.process_time() - before
            stored |= {name: dequantize(quantized) for name, (quantized, _) in zip(names, results, strict=True)}
    finally:
        for step, (module, name) in steps.items():
            setattr(module, name, originals[step])
    seconds["rest"] = total - sum(seconds[part] for part in PARTS[:-1])
    return seconds | {"total": total, "processor": processor}, stored


def output_errors(given: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> list[str]:
    """Relative L2 error of the outputs of gate, up and down: for tokens learned from, then for others."""
    gate, up = given["gate_up"].to(torch.float32).chunk(2, dim=1)
    weights = {"gate": (gate, "tokens"), "up": (up, "tokens"), "down": (given["down"].to(torch.float32), "inner")}
    errors = []
    for prefix in ("", "other "):
        for name, (weight, inputs) in weights.items():
            rows = given[prefix + inputs][:OTHERS]
            wanted = rows @ weight
            errors.append(f"{float((rows @ stored[name].t() - wanted).norm() / wanted.norm()):.4f}")
    return errors


def measure_expert(directory: Path, python: str, repetitions: int, shrink: int) -> str:
    """The section on one expert."""
    make_expert(directory / "expert.safetensors", shrink)
    given, workspace = load_file(directory / "expert.safetensors"), Workspace()
    best: dict[str, dict[str, float]] = {}
    errors: dict[str, list[str]] = {}
    loads: dict[str, str] = {}
    versions: dict[str, str] = {}

    def note(name: str, seconds: dict[str, float], load: float) -> None:
        print(f"{name}: {seconds}, load {load:.2f}", flush=True)
        if name not in best or seconds["total"] < best[name]["total"]:
            best[name], loads[name] = seconds, f"{load:.1f}"

    for repetition in range(repetitions):
        with Team(THREADS) as team:
            for name, search in (("quantkit, no clip search", False), ("quantkit, clip search", True)):
                seconds, stored = quantize_expert(given, search, team, workspace)
                note(name, seconds, common.load_average())
                errors[name] = output_errors(given, stored)
        if not repetition:
            environment = {variable: str(THREADS) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            output = common.run_script(
                PEER, "expert", str(directory), "--threads", str(THREADS), python=python, environment=environment
            )
            report = json.loads(output.splitlines()[-1])
            note("llm-compressor", report["seconds"], report["load"])
            errors["llm-compressor"] = output_errors(given, load_file(directory / "theirs.safetensors"))
            versions = report["versions"]
    shutil.rmtree(directory)
    peer = best["llm-compressor"]
    rows = [
        (name, *(f"{seconds[part]:.2f}" for part in (*PARTS, "total", "processor")), loads[name]) for name, seconds in best.items()
    ]
    shapes = "Scout's shapes" + (f" / {shrink}" if shrink > 1 else "")
    text = f"\n## One expert of {shapes}, {TOKENS // shrink} tokens, INT4 groups of 128\n\n"
    text += common.table(("seconds", *PARTS, "total", "processor", "load"), rows)
    for name in best:
        if name != "llm-compressor":
            ratio = peer["total"] / best[name]["total"]
            verdict = "met" if ratio >= TARGET else "NOT met"
            work = peer["processor"] / best[name]["processor"]
            text += f"\n- {name}: {ratio:.1f} times faster (target {TARGET}: {verdict}); {work:.1f} times fewer processor seconds"
    text += "\n\nRelative L2 error of the outputs:\n\n"
    columns = ("", *(f"{name}, {which}" for which in ("learned from", "others") for name in ("gate", "up", "down")))
    text += common.table(columns, [(name, *values) for name, values in errors.items()])
    described = ", ".join(f"{package} {version}" for package, version in versions.items())
    return text + f"\nBest of {repetitions} runs of quantkit, one of llm-compressor ({described}); {THREADS} threads.\n"


# ------------------------------------------------------------------------------------------------------------------- model


def run_peer(python: str, checkpoint: Path, directory: Path, samples: int, limit: float) -> dict[str, Any]:
    """llm-compressor on a whole model.  Returns its report, or after ``limit`` seconds how far it had come."""
    command = [python, str(common.HERE / PEER), "model", str(checkpoint), str(directory), "--samples", str(samples)]
    process = subprocess.Popen([*command, "--threads", str(THREADS)], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    progress, report = "nothing quantized", {}
    assert process.stdout is not None
    for line in process.stdout:
        if " modules quantized after " in line:
            progress = line.strip()
        elif line.startswith('{"seconds"'):
            report = json.loads(line)
    timed_out = process.wait() and not timer.is_alive()
    timer.cancel()
    if process.returncode and not timed_out:
        raise SystemExit(f"llm-compressor failed, exit status {process.returncode}")
    return {"progress": progress, "samples": samples, "limit": limit} | report


def measure_model(
    directory: Path, python: str, checkpoint: Path, source: Path | None, peer_samples: list[int], limit: float
) -> str:
    """The section on a whole model."""
    corpus = load_corpus(source, checkpoint, samples=SAMPLES, sequence_length=LENGTH)
    save_file({"tokens": corpus.tokens.to(torch.int64).contiguous()}, directory / "tokens.safetensors")
    options = quantkit.CalibrationOptions(corpus=source, samples=SAMPLES, sequence_length=LENGTH)
    runs = []
    for _ in range(2):
        started, processor = time.perf_counter(), time.process_time()
        result = quantkit.convert(checkpoint, to=["w4a16-gptq"], output=directory / "ours", workers=THREADS, calibration=options)
        runs.append((time.perf_counter() - started, time.process_time() - processor))
        print(f"quantkit: {runs[-1]}, load {common.load_average():.2f}", flush=True)
        quantized = sum('"method": "gptq"' in line for line in _ledger_lines(result.artifacts[0].directory))
        shutil.rmtree(directory / "ours")
    own = min(runs)
    rows = [(f"quantkit, {len(corpus.tokens)} samples", f"{own[0]:.1f}", f"{own[1]:.1f}", "1.0")]
    notes = []
    for samples in peer_samples:
        report = run_peer(python, checkpoint, directory, samples, limit)
        print(report, flush=True)
        if "seconds" in report:
            total, processor = report["seconds"]["total"], report["seconds"]["processor"]
            rows.append((f"llm-compressor, {samples} samples", f"{total:.1f}", f"{processor:.1f}", f"{total / own[0]:.1f}"))
        else:
            rows.append((f"llm-compressor, {samples} samples", f"> {limit:.0f}", "-", f"> {limit / own[0]:.0f}"))
            notes.append(f"- llm-compressor on {samples} samples was stopped after {limit:.0f} s: {report['progress']}.\n")
    shutil.rmtree(directory)
    text = f"\n## A whole model ({checkpoint.name}), samples of {LENGTH} tokens\n\n"
    text += common.table(("", "seconds", "processor seconds", "times quantkit"), rows) + "\n" + "".join(notes)
    text += f"\nquantkit: from shards to a published artifact of {quantized} quantized matrices, best of 2.  llm-compressor:\n"
    return (
        text + "`oneshot` on the same token ids, from a loaded model to a quantized one; every token goes through every expert.\n"
    )


def _ledger_lines(artifact: Path) -> list[str]:
    return [line for path in artifact.glob("*ledger*") for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="a new directory inside it is used and removed again")
    parser.add_argument("--llmcompressor-python", required=True, help="python of an environment that has llm-compressor")
    parser.add_argument("--parts", default="expert")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divide all shapes, to try the script; nothing is stored")
    parser.add_argument("--checkpoint", type=Path, help="of the model part")
    parser.add_argument("--text", type=Path, help="what the model is calibrated on (default: the bundled corpus)")
    parser.add_argument("--peer-samples", type=int, nargs="*", default=[SAMPLES], help="how many samples llm-compressor is given")
    parser.add_argument("--peer-limit", type=float, default=7200, help="seconds after which it is stopped")
    parser.add_argument("--quiet-load", type=float, default=0.5, help="wait until the load average is below this")
    parser.add_argument("--patience", type=float, default=600, help="but not longer than these seconds")
    parser.add_argument("--results", default="gptq_speed.md", help="name of the file of results")
    arguments = parser.parse_args()
    load = common.wait_until_quiet(arguments.quiet_load, arguments.patience)
    text = common.header("Speed of GPTQ", arguments.directory, load)
    directory = arguments.directory / "gptq-speed"
    for part in arguments.parts.split(","):
        directory.mkdir(parents=True)
        if part == "expert":
            text += measure_expert(directory, arguments.llmcompressor_python, arguments.repetitions, arguments.shrink)
        elif part == "model" and arguments.checkpoint is not None:
            text += measure_model(
                directory,
                arguments.llmcompressor_python,
                arguments.checkpoint,
                arguments.text,
                arguments.peer_samples,
                arguments.peer_limit,
            )
        else:
            parser.error("a part is expert, or model with --checkpoint")
    if arguments.shrink > 1:
        sys.stdout.write(text)
    else:
        common.write_results(arguments.results, text)


if __name__ == "__main__":
    main()
