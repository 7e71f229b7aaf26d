"""How long does it take to compare five artifacts with the BF16 model, on the CPU, with quantkit and with transformers?

    python benchmarks/evaluation_speed.py --directory DIR [--model demo/tiny-scout] [--window 256] [--repetitions 3]

One command each, from nothing to all figures, start of Python and imports included: ``quantkit compare`` with an empty cache, and
``transformers_evaluation.py``, a loop over transformers in float32.  Both take all windows of the bundled held-out text, of which
transformers is given the full ones.  The two take turns.  Next to the times stand the figures that both arrive at, which must
agree; quantkit's report has intervals, percentiles, kinds, languages and routes besides.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch

from quantkit import CalibrationOptions, convert
from quantkit.corpus import load_corpus

TARGETS = ("w8a16", "nvfp4a16", "w4a16-rtn-g32", "w4a16-rtn", "w4a16-gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where artifacts, cache and reports go")
    parser.add_argument("--model", type=Path, default=Path("demo/tiny-scout"))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for a quiet machine")
    arguments = parser.parse_args()
    artifacts = _artifacts(arguments.model, arguments.directory / "artifacts")
    corpus = load_corpus(None, arguments.model, held_out=True, sequence_length=arguments.window)
    full = corpus.lengths == arguments.window
    windows = arguments.directory / "windows.pt"
    torch.save(corpus.tokens[full].to(torch.int64), windows)
    load = common.wait_until_quiet(0.3, arguments.patience)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(arguments.repetitions):
        report, cache = arguments.directory / "report", arguments.directory / "cache"
        for directory in (report, cache):
            shutil.rmtree(directory, ignore_errors=True)
        command = ["quantkit", "compare", *artifacts, "--reference", arguments.model, "--window", arguments.window]
        ours.append(_timed([Path(sys.executable).parent / command[0], *command[1:], "-o", report, "--cache", cache, "--quiet"])[0])
        script = Path(__file__).with_name("transformers_evaluation.py")
        seconds, output = _timed([sys.executable, script, arguments.model, windows, *artifacts])
        theirs.append(seconds)
    found = json.loads((report / "report.json").read_text())
    _write(arguments, corpus.description, int(full.sum()), (ours, theirs), found, json.loads(output), load)


def _artifacts(model: Path, output: Path) -> list[Path]:
    """Make those artifacts that are not there."""
    missing = [name for name in TARGETS if not (output / name).is_dir()]
    if missing:
        convert(model, missing, output, calibration=CalibrationOptions(samples=64, sequence_length=256))
    return [output / name for name in TARGETS]


def _timed(command: list[Any]) -> tuple[float, str]:
    began = time.monotonic()
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{command} failed:\n{result.stderr}")
    return time.monotonic() - began, result.stdout


def _write(
    arguments: argparse.Namespace,
    text: dict[str, Any],
    windows: int,
    times: tuple[list[float], list[float]],
    found: dict[str, Any],
    peer: dict[str, Any],
    load: float,
) -> None:
    ours, theirs = (statistics.median(seconds) for seconds in times)
    rows = []
    for artifact in found["artifacts"]:
        scores, other = artifact["scores"], peer["results"][artifact["name"]]
        rows.append(
            (
                artifact["name"],
                f"{scores['perplexity']['value']:.4f}",
                f"{other['perplexity']:.4f}",
                f"{scores['perplexity']['value'] / other['perplexity'] - 1:+.1e}",
                f"{scores['divergence']['value']:.6f}",
                f"{other['divergence']:.6f}",
                f"{scores['agreement']['value']:.4f}",
                f"{other['agreement']:.4f}",
            )
        )
    columns = ("artifact", "perplexity", "transformers", "difference", "divergence", "transformers", "agreement", "transformers")
    seconds = [("quantkit compare", *times[0], ours), ("transformers", *times[1], theirs)]
    repetitions = [f"run {number}" for number in range(1, len(times[0]) + 1)]
    loading = sum(value for name, value in peer["seconds"].items() if name.endswith("loading"))
    common.write_results(
        "evaluation_speed.md",
        common.header("Five artifacts compared with BF16, seconds from start to finish", arguments.directory, load)
        + f"\n{text['tokens']:,} tokens of the bundled held-out text, {windows} full windows of {arguments.window}, model "
        + f"{arguments.model.name}; the reference is computed anew each time.\n\n"
        + common.table(("", *repetitions, "median"), [(name, *(f"{value:.1f}" for value in row)) for name, *row in seconds])
        + f"\nquantkit is **{theirs / ours:.1f} times** as fast.  Of transformers' time {loading:.1f} s are spent on loading "
        + "artifacts.\n\nThe figures of both, over the windows that each took.  transformers rounds dequantized weights to BF16\n"
        + "when it loads them, which is the difference:\n\n"
        + common.table(columns, rows),
    )


if __name__ == "__main__":
    main()
