"""Peak resident memory of an evaluation, above what a process that has only imported quantkit holds.

    python benchmarks/evaluation_memory.py --directory DIR [--layers 4] [--windows 4] [--window 2048] [--targets w4a16-rtn]

Generates a stack of layers with Scout's true shapes (16 experts, embedding and head with all 202,048 rows, random weights),
converts it, and evaluates each artifact against the BF16 stack in a fresh process, with an empty cache, so that the reference is
computed too.  What is counted is told in ``memory.py``.  Needs some 32 GB in DIR for four layers; what is there from an earlier run
is used again.  Ends with an error when a case passes the bound.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common
from memory import TOKENIZER_FILES, run_watched, status

BOUND = 3 * 2**30
VOCABULARY = 202_048
COLUMNS = ("artifact", "GB", "import", "peak", "anonymous", "mapped", "above import", "seconds", "tokens/s")


def measure_child(artifact: Path, reference: Path, window: int, windows: int, cache: Path) -> None:
    """Runs in the fresh process: import, note, evaluate, note; prints JSON."""
    import quantkit  # the only import between the start of the process and the first reading

    after_import = status("self")
    began = time.perf_counter()
    found = quantkit.evaluate([artifact], reference, window=window, windows=windows, cache=cache)
    seconds = time.perf_counter() - began
    scores = found.artifacts[0].scores
    figures = {"import": after_import["VmRSS"], "peak": status("self")["VmHWM"], "seconds": seconds}
    print(json.dumps(figures | {"positions": scores.positions, "divergence": scores.divergence.value}))


def measure(artifact: Path, arguments: argparse.Namespace, reference: Path) -> dict[str, float]:
    """One evaluation in a fresh process."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as cache:
        sizes = ["--window", str(arguments.window), "--windows", str(arguments.windows)]
        command = [sys.executable, __file__, "--directory", cache, "--child", str(artifact), str(reference), *sizes]
        return run_watched(command, f"evaluating {artifact.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--targets", nargs="+", default=["w4a16-rtn"])
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure_child(*arguments.child, arguments.window, arguments.windows, arguments.directory)
        return
    from quantkit import convert

    source, output = arguments.directory / f"scout-{arguments.layers}", arguments.directory / "artifacts"
    if not source.is_dir():
        options = ["--layers", str(arguments.layers), "--vocabulary", str(VOCABULARY)]
        common.run_script("generate_checkpoint.py", "scout", str(source), *options)
        for name in TOKENIZER_FILES:
            shutil.copy(common.HERE.parent / "demo" / "tiny-scout" / name, source / name)
    if missing := [target for target in arguments.targets if not (output / target).is_dir()]:
        convert(source, missing, output)
    load, rows, worst = common.load_average(), [], 0.0
    for target in arguments.targets:
        result = measure(output / target, arguments, source)
        above = result["peak"] - result["import"]
        worst = max(worst, above)
        sizes = [f"{result[key] / 2**20:,.0f}" for key in ("import", "peak", "anonymous", "mapped")]
        rate = arguments.window * arguments.windows / result["seconds"]
        size = f"{common.size_of(output / target) / 1e9:.2f}"
        rows.append((target, size, *sizes, f"{above / 2**20:,.0f}", f"{result['seconds']:.0f}", f"{rate:.0f}"))
        print(*rows[-1], f"divergence {result['divergence']:.4f} over {result['positions']:.0f} positions", flush=True)
    text = common.header("Peak resident memory of an evaluation", arguments.directory, load)
    verdict = "holds" if worst <= BOUND else "does NOT hold"
    text += f"\nBound: {BOUND / 2**20:,.0f} MiB above the bare import; largest measured {worst / 2**20:,.0f} MiB: it {verdict}.\n\n"
    text += common.table(COLUMNS, rows)
    text += (
        f"\nA stack of {arguments.layers} layers of Scout's shapes with {VOCABULARY:,} rows in embedding and head, random\n"
        f"weights; {arguments.windows} windows of {arguments.window} tokens, on all cores. Memory in MiB: `import` is resident\n"
        "after the bare import, `peak` the kernel's high-water mark at the end, `anonymous` and `mapped` what the largest of the\n"
        "samples taken every 20 ms consisted of. `seconds` and tokens/s are of the whole evaluation, BF16 reference and compiling\n"
        "of kernels included.\n"
    )
    common.write_results("evaluation_memory.md", text)
    if worst > BOUND:
        raise SystemExit(f"the bound of {BOUND / 2**20:,.0f} MiB was passed")


if __name__ == "__main__":
    main()
