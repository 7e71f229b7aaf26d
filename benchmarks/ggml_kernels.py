"""Every type of llama.cpp: error and speed of our kernels against ggml's own quantizer, on the same weights in one run.

    python benchmarks/ggml_kernels.py                              # all types; writes results/ggml_kernels.md
    python benchmarks/ggml_kernels.py --types Q4_K,Q2_K --print    # a look

The oracle is ``ggml_quantize_chunk`` of the wheel ``xllamacpp``, given float32 as llama-quantize gives it; ours reads BF16.  Both
run on one core, in turns, and processor time counts, the best of several repetitions.  Ours is the whole method, statistics for the
ledger included, which packs no bits; that is timed by ``gguf_speed.py``.  Errors are squared errors of what a reader of the blocks
computes, each weighted by the importance of its input, divided by the same sum over the weights themselves.  Importance is
log-normal, as mean squares of activations are, roughly.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from safetensors import safe_open

from quantkit import ggml, grid
from quantkit.evidence import Evidence
from quantkit.methods import blocks
from quantkit.scheme import parse_scheme
from quantkit.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.llama_cpp import ggml_dequantize, ggml_quantize, ggml_requires_importance  # noqa: E402

COLUMNS = 5120
KINDS = ("Gaussian", "Laplace", "Student t, 4", "tiny-scout")


@dataclass(frozen=True)
class Comparison:
    """One type on one matrix: relative weighted squared errors, and million weights per second of processor time."""

    our_error: float
    their_error: float
    our_speed: float
    their_speed: float


def matrix(kind: str, rows: int) -> torch.Tensor:
    """Weights, BF16 ``[rows, in]``."""
    if kind == "tiny-scout":
        return tiny_scout()
    generator = np.random.default_rng(1)
    shape = (rows, COLUMNS)
    if kind == "Gaussian":
        draws = generator.standard_normal(shape)
    else:
        draws = generator.laplace(size=shape) if kind == "Laplace" else generator.standard_t(4, shape)
    return torch.from_numpy(0.02 * draws).to(torch.bfloat16)


def tiny_scout() -> torch.Tensor:
    """Every seventh row of the demo model's attention and expert matrices with 256 inputs."""
    found = []
    for path in sorted((ROOT / "demo" / "tiny-scout").glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dictionary
                weight = shard.get_tensor(name)
                if "layers" in name and weight.ndim > 1:
                    rows = weight.transpose(-1, -2) if "experts." in name and "shared" not in name else weight
                    found += [rows.reshape(-1, 256)] if rows.shape[-1] == 256 else []
    rows = torch.cat(found)[::7]
    return rows[: len(rows) // 16 * 16].contiguous()


def importance_of(columns: int) -> torch.Tensor:
    """Mean squares of inputs, float32 ``[in]``."""
    return torch.from_numpy(np.random.default_rng(2).lognormal(0, 1, columns).astype(np.float32))


def relative_error(weights: np.ndarray, values: np.ndarray, importance: np.ndarray) -> float:
    """Weighted squared error over weighted squares."""
    exact = weights.astype(np.float64)
    return float((np.square(exact - values) * importance).sum() / (np.square(exact) * importance).sum())


def seconds(action: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    action()
    return time.process_time() - started


def compare(name: str, weight: torch.Tensor, importance: torch.Tensor | None, repetitions: int) -> Comparison:
    """Quantize a matrix to a type, with both quantizers."""
    weights = weight.float().numpy()
    columns, scheme, workspace = weight.shape[1], parse_scheme(name), Workspace()
    assert scheme is not None, name
    weighting = None if importance is None else importance.numpy()
    evidence = None if importance is None else Evidence(1, importance, importance)

    def ours() -> grid.QuantizedTensor:
        [(quantized, _)] = blocks.quantize([weight], scheme, clip_search=True, workspace=workspace, evidence=evidence)
        return quantized

    def theirs() -> Any:
        return ggml_quantize(name, weights, weighting)

    quantized = ours()  # compiled
    times = [(seconds(ours), seconds(theirs)) for _ in range(repetitions)]
    counts = np.ones(columns) if weighting is None else weighting.astype(np.float64)
    return Comparison(
        relative_error(weights, grid.dequantize(quantized).float().numpy(), counts),
        relative_error(weights, ggml_dequantize(name, theirs(), columns), counts),
        *(weights.size / 1e6 / min(each[side] for each in times) for side in range(2)),
    )


def tables(names: list[str], rows: int, repetitions: int) -> str:
    """Speed on Gaussian weights, then errors on all of them, without and with importance."""
    matrices = {kind: matrix(kind, rows) for kind in KINDS}
    speed_rows: list[list[str]] = []
    error_rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for name in names:
        speeds = [name]
        for weighted in (False, True):
            if not weighted and ggml_requires_importance(name):
                speeds += ["-"] * 3
                continue
            found = {
                kind: compare(name, weight, importance_of(weight.shape[1]) if weighted else None, repetitions)
                for kind, weight in matrices.items()
            }
            speed = found["Gaussian"]
            speeds += [f"{speed.their_speed:.1f}", f"{speed.our_speed:.1f}", f"{speed.our_speed / speed.their_speed:.1f}"]
            cells = [
                f"{each.their_error:.4g} {each.our_error:.4g} ({each.our_error / each.their_error:.3f})" for each in found.values()
            ]
            error_rows[weighted].append((name, f"{ggml.TYPES[name].bits_per_weight:.4g}", *cells))
        speed_rows.append(speeds)
        print(*speeds, flush=True, file=sys.stderr)
    heads = [f"{kind}: ggml, ours" for kind in KINDS]
    return (
        f"Million weights per second on one core, {rows} x {COLUMNS} Gaussian weights.\n\n"
        + common.table(("type", "ggml", "ours", "times", "with importance: ggml", "ours", "times"), speed_rows)
        + "\nRelative squared error without importance; in brackets ours divided by ggml's.\n\n"
        + common.table(("type", "bits", *heads), error_rows[False])
        + "\nThe same, with importance.\n\n"
        + common.table(("type", "bits", *heads), error_rows[True])
    )


def main() -> None:
    """Measure, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(blocks.KERNELS), help="separated by commas; default all")
    parser.add_argument("--rows", type=int, default=128, help="of the random matrices, a multiple of 16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="write no results file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = common.header("ggml's types: our kernels against ggml", Path(tempfile.gettempdir()), common.load_average())
    names = [name for name in ggml.TYPES if name in arguments.types.split(",")]
    text += "\n" + tables(names, arguments.rows, arguments.repetitions)
    if arguments.print:
        print(text)
    else:
        common.write_results("ggml_kernels.md", text)


if __name__ == "__main__":
    main()
