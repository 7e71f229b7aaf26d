"""How far from BF16 is a small model in GGUF files of every type and method, as llama.cpp computes it, and at which size?

    python benchmarks/gguf_quality.py --model MODEL --calibration TEXT --evaluation TEXT TEXT ... [--others DIR]

Files are made by ``quantkit.convert`` and run by llama.cpp (through the PyPI wheel ``xllamacpp``, see ``tests/llama_cpp.py``) on
windows of 256 tokens, without BOS, 24 from each text, every position but the first.  The reference is the BF16 model in float32
through quantkit's own arithmetic, which equals transformers' to 1e-5 in the logits.  llama.cpp rounds activations to 8 bits, which
alone costs some 0.0016 of divergence on this model; it is part of every figure.  ``--others`` names a directory with files of
llama.cpp's own (``<type>.gguf``, with or without ``-imatrix``), which are measured in the same way.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from small_model import Reference, SmallModel, reference, windows

from quantkit import CalibrationOptions, convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.llama_cpp import Llama

LENGTH = 256
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "QK5_MOE", "Q4_K_M", "QK4_MOE", "IQ4_XS", "QK3_MOE_L", "Q3_K_M", "QK3_MOE", "Q2_K", "QK2_MOE")
METHODS = ("", "-importance", "-gptq")


@dataclass(frozen=True)
class Row:
    """One file.  ratio: of perplexities."""

    name: str
    size: int
    ratio: float
    divergence: float
    agreement: float


def compare(path: Path, truth: Reference) -> tuple[float, float, float]:
    """Perplexity ratio, mean divergence and agreement of a GGUF file."""
    model = Llama(path, context=LENGTH, threads=1)
    count, loss, divergence, agreement, position = 0, 0.0, 0.0, 0.0, 0
    for answers in truth.answers:
        for row in answers:
            ids = truth.windows[position]
            position += 1
            expected, found = row, model.logits(ids.tolist())[:-1].log_softmax(-1)
            targets = ids[1:, None]
            count += len(targets)
            loss += float((expected.gather(1, targets) - found.gather(1, targets)).sum(dtype=torch.float64))
            divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            agreement += int((expected.argmax(-1) == found.argmax(-1)).sum())
    model.close()
    return math.exp(loss / count), divergence / count, agreement / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/tiny-scout"))
    parser.add_argument("--calibration", type=Path, required=True, help="a plain text")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, help="plain texts")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--others", type=Path, help="directory with llama.cpp's own files")
    parser.add_argument("--results", default="gguf_quality.md")
    with torch.no_grad():
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure every file and write the table."""
    model = SmallModel.read(arguments.model)
    truth = reference(model, windows(arguments.model, arguments.evaluation, LENGTH, most=arguments.windows))
    del model
    text, start = common.header("Quality of GGUF files", Path.cwd(), common.load_average()), time.monotonic()
    rows: list[Row] = []
    for path in sorted(arguments.others.glob("*.gguf")) if arguments.others else ():
        add(rows, f"llama.cpp {path.stem}", path, truth, start)
    options = CalibrationOptions(arguments.calibration, samples=arguments.samples, sequence_length=LENGTH)
    for name in [f"{kind}{method}" for kind in arguments.types for method in arguments.methods]:
        with tempfile.TemporaryDirectory() as output:
            [made] = convert(arguments.model, name, output, calibration=options).artifacts
            [path] = (found for found in made.directory.glob("*.gguf") if not found.name.startswith("mmproj"))
            add(rows, f"quantkit {name}", path, truth, start)
    cells = [
        [row.name, f"{row.size:,}", f"{row.ratio:.5f}", f"{row.divergence:.6f}", f"{row.agreement:.4f}"]
        for row in sorted(rows, key=lambda row: row.size)
    ]
    text += f"\n{arguments.samples} samples of {LENGTH} tokens. Of equal size, who is nearer?\n\n" + common.table(
        ["file", "bytes", "perplexity ratio", "mean KL divergence", "top-1 agreement"], cells
    )
    common.write_results(arguments.results, text)


def add(rows: list[Row], name: str, path: Path, truth: Reference, start: float) -> None:
    """Measure one file."""
    row = Row(name, path.stat().st_size, *compare(path, truth))
    print(f"{row.name}: {row.size:,} {row.ratio:.5f} {row.divergence:.6f} {row.agreement:.4f}", end=" ")
    print(f"[{time.monotonic() - start:.0f} s]", flush=True)
    rows.append(row)


if __name__ == "__main__":
    main()
