"""The W4A16 part of ``speed.py``: against llm-compressor's data-free W4A16, end to end and the quantization alone.

Fairness.  Same files, warm in the page cache for both; same number of threads; imports outside the clock on both sides; each side's
usual way of running (llm-compressor's follows its examples, see ``llmcompressor_baseline.py``).  quantkit reads back and hashes
all it wrote and llm-compressor does not; that stays in quantkit's time.  The fsync of llm-compressor's files is counted, and shown
alone.  The quantization alone: weights in memory on both sides, codes and scales packed as they are stored, nothing written.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import common
from safetensors import safe_open

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.convert import plan_checkpoint
from quantkit.engine import run_units
from quantkit.formats import FORMATS
from quantkit.grid import dequantize
from quantkit.llama4 import Unit, WeightMatrix
from quantkit.methods import METHODS
from quantkit.plan import Plan
from quantkit.recipe import FEED_FORWARD_ROLES, Recipe, Rule
from quantkit.scheme import Scheme
from quantkit.workspace import Workspace

THREADS = 2
# llm-compressor's observer and the recipe it is compared with, and how many times faster quantkit is to be.
PAIRS = (
    ("mse", Recipe("w4a16-search", (Rule("int4-g128", FEED_FORWARD_ROLES, clip_search=True), Rule("keep"))), 5.0),
    ("memoryless_minmax", Recipe("w4a16-plain", (Rule("int4-g128", FEED_FORWARD_ROLES, clip_search=False), Rule("keep"))), 2.0),
)


def run_peer(python: str, source: Path, output: Path, observer: str) -> dict[str, float]:
    """llm-compressor in its own environment, a fresh process; seconds per step.  Leaves its artifact in ``output``."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    arguments = (str(source), str(output), "--observer", observer, "--threads", str(THREADS))
    output_text = common.run_script("llmcompressor_baseline.py", *arguments, python=python, environment=threads)
    report = json.loads(output_text.splitlines()[-1])
    seconds: dict[str, float] = report["seconds"]
    alone = seconds["calibrate"] + seconds["compress"]
    return seconds | {"alone": alone, "peak": report["peak_bytes"], "versions": report["versions"]}


def quantize_alone(source: Path, recipe: Recipe) -> float:
    """Seconds to quantize and pack all matrices, which were read into memory before."""
    with Checkpoint.open(source) as checkpoint:
        plan = plan_checkpoint(checkpoint, [recipe])
        [artifact] = plan.artifacts
        work = [unit for unit in plan.units if unit.matrices and artifact.assignments[unit.matrices[0].name].scheme is not None]
        weights = {unit.key: checkpoint.read_unit(unit, Workspace())[0] for unit in work}
    form = FORMATS[recipe.format]

    def quantize(unit: Unit, workspace: Workspace) -> None:
        assignment = artifact.assignments[unit.matrices[0].name]
        assert assignment.scheme is not None
        quantized = METHODS[assignment.method](
            weights[unit.key], assignment.scheme, clip_search=assignment.clip_search, workspace=workspace
        )
        for matrix, (result, _) in zip(unit.matrices, quantized, strict=True):
            form.encode(matrix.name, result)

    started = time.perf_counter()
    run_units(work, quantize, workers=THREADS)
    return time.perf_counter() - started


def relative_errors(source: Path, recipe: Recipe, artifact: Path) -> list[float]:
    """Relative L2 error of every quantized matrix of an artifact, whoever wrote it.  A matrix that is missing is a KeyError."""
    errors = []
    stored = _tensor_places(artifact)
    with Checkpoint.open(source) as checkpoint:
        for matrix, scheme in _quantized(plan_checkpoint(checkpoint, [recipe])):
            wanted = FORMATS[recipe.format].output_tensors(matrix, scheme, "BF16")
            tensors = {}
            for tensor in wanted:
                with safe_open(stored[tensor.name], "pt") as file:
                    tensors[tensor.name] = file.get_tensor(tensor.name)
            weight = checkpoint.read_matrix(matrix, None).float()
            difference = dequantize(FORMATS[recipe.format].decode(matrix.name, tensors, scheme)) - weight
            errors.append(float(difference.norm() / weight.norm()))
    return errors


def _quantized(plan: Plan) -> list[tuple[WeightMatrix, Scheme]]:
    assignments = plan.artifacts[0].assignments
    pairs = [(matrix, assignments[matrix.name].scheme) for unit in plan.units for matrix in unit.matrices]
    return [(matrix, scheme) for matrix, scheme in pairs if scheme is not None]


def _tensor_places(artifact: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def measure(directory: Path, experts: int, repetitions: int, python: str) -> str:
    """The W4A16 section of the results."""
    source, ours, theirs = directory / "speed-w4a16", directory / "speed-ours", directory / "speed-peer"
    options = ("--layers", "1", "--experts", str(experts), "--vision-layers", "1")  # llm-compressor wants the multimodal class
    common.run_script("generate_checkpoint.py", "scout", str(source), "--force", *options)
    files, read = common.files_of(source), common.size_of(source)
    text = f"\n## W4A16: a layer of Scout's true shapes with {experts} experts, {read / 1e9:.2f} GB in\n\n"
    rows, steps, verdicts, notes = [], [], [], []
    for observer, recipe, target in PAIRS:
        peers: list[dict[str, float]] = []
        totals: list[float] = []
        alone: list[float] = []
        quantkit.convert(source, [recipe], ours, force=True)  # compiles kernels; does not count
        for _ in range(repetitions):
            shutil.rmtree(theirs, ignore_errors=True)
            os.sync()
            common.bring_into_cache(files)
            peers.append(run_peer(python, source, theirs, observer))
            for _ in range(3):
                shutil.rmtree(ours)
                os.sync()
                common.bring_into_cache(files)
                started = time.perf_counter()
                quantkit.convert(source, [recipe], ours, workers=THREADS)
                totals.append(time.perf_counter() - started)
                alone.append(quantize_alone(source, recipe))
            print(f"{observer}: llm-compressor {peers[-1]}; quantkit {totals[-3:]}, alone {alone[-3:]}", flush=True)
        name = f"{observer} / {'with' if recipe.rules[0].clip_search else 'without'} clip search"
        for what, key, own in (("shards to artifact", "total", totals), ("quantization alone", "alone", alone)):
            other = [peer[key] for peer in peers]
            ratio = min(other) / min(own)
            figures = (
                f"{min(other):.1f}",
                f"{statistics.median(other):.1f}",
                f"{min(own):.2f}",
                f"{statistics.median(own):.2f}",
                f"{ratio:.1f}",
            )
            rows.append((f"{name}, {what}", *figures, f"{target:.0f}", "yes" if ratio >= target else "NO"))
        fastest = min(peers, key=lambda peer: peer["total"])
        steps.append(
            (
                observer,
                *(f"{fastest[key]:.2f}" for key in ("load", "calibrate", "compress", "save", "fsync", "total")),
                f"{fastest['peak'] / 1e9:.1f}",
            )
        )
        verdicts.append(_compare(observer, source, recipe, ours / recipe.name, theirs))
        notes = [f"{package} {version}" for package, version in peers[0]["versions"].items()]  # type: ignore[attr-defined]
    for path in (source, ours, theirs):
        shutil.rmtree(path)
    text += common.table(
        ("observer / quantkit", "llm-compressor, best s", "median", "quantkit, best s", "median", "ratio", "target", "met"), rows
    )
    text += f"\nllm-compressor's steps in its best run ({', '.join(notes)}), in seconds, and its peak memory in GB:\n\n"
    text += common.table(("observer", "load", "calibrate", "compress", "save (compress included)", "fsync", "total", "peak"), steps)
    return text + "\n" + "".join(f"- {verdict}\n" for verdict in verdicts)


def _compare(observer: str, source: Path, recipe: Recipe, ours: Path, theirs: Path) -> str:
    """That both sides wrote the same tensors, what else each wrote, and the error of both."""
    own, other = set(_tensor_places(ours)), set(_tensor_places(theirs))
    if own != other:
        raise SystemExit(
            f"the two sides wrote different tensors, so their times do not compare: {_some(own - other)} / {_some(other - own)}"
        )
    packed = sum(name.endswith("weight_packed") for name in own)
    errors = [sum(found) / len(found) for found in (relative_errors(source, recipe, theirs), relative_errors(source, recipe, ours))]
    return (
        f"`{observer}`: both wrote the same {len(own)} tensors, {packed} of them packed INT4 (llm-compressor "
        f"{common.size_of(theirs) / 1e9:.3f} GB in {len(common.files_of(theirs))} files, quantkit "
        f"{common.size_of(ours) / 1e9:.3f} GB in {len(common.files_of(ours))}). "
        f"Mean relative L2 error of a matrix: llm-compressor {errors[0]:.4f}, quantkit {errors[1]:.4f}."
    )


def _some(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "nothing"
