"""Peak resident memory of a conversion, above what a process that has only imported quantkit holds.

    python benchmarks/memory.py --directory DIR [--cases scout,maverick] [--workers default,1]
    python benchmarks/memory.py --directory DIR --calibrated [--experts 4]
    python benchmarks/memory.py --directory DIR --gguf [--calibrated] --cases maverick --experts 2

Generates a checkpoint with one layer of Scout's true shapes, and one with a pair of layers (dense and MoE, 128 experts) of
Maverick's, converts each to fp8-dynamic and w4a16-rtn, alone and in one pass, every time in a fresh process, and reads the kernel's
own high-water mark.  Needs some 30 GB in DIR for Maverick, nearly all of it output.  Ends with an error when a case passes the
bound.

``--calibrated`` converts to w4a16-gptq with 4 samples of 2048 tokens instead; then the bound is 5 GiB.  What that needs follows
from the widest matrix and from the tokens, not from the number of experts, which are worked on one after the other; all that grows
with them is the router's logits.  ``--experts`` may leave out most of Maverick's 128, each of which takes as long as another.

``--gguf`` converts to Q4_K_M, or with ``--calibrated`` to Q4_K_M-gptq, with random weights and the demo's tokenizer.  Free of
calibration the embedding and the head have all 202,048 rows; calibrated fewer, since GPTQ rounds them portion by portion.

Counted is everything the kernel counts as resident in the process: heap, stacks, code, and pages of mapped files.  Compiled
kernels, and whatever is imported only when a conversion needs it, count too.  Not counted is the page cache, which the kernel gives
back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

BOUND = 1.5 * 2**30
CALIBRATED_BOUND = 5 * 2**30
SAMPLES, LENGTH = 4, 2048
TARGETS = (("fp8-dynamic",), ("w4a16-rtn",), ("fp8-dynamic", "w4a16-rtn"))
# One MoE layer of Scout; a dense and a MoE layer of Maverick.
CHECKPOINTS = {
    "scout": ("scout", "--layers", "1"),
    "maverick": ("maverick", "--layers", "2", "--zeros"),
}
GGUF_TARGETS = {False: "Q4_K_M", True: "Q4_K_M-gptq"}  # by whether it is calibrated
VOCABULARY = {False: 202_048, True: 32_768}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
EXPERTS_WITHOUT_NORM = 128  # llama.cpp normalizes queries and keys of all other models
COLUMNS = (
    "checkpoint",
    "workers",
    "targets",
    "GB in",
    "GB out",
    "import",
    "peak",
    "anonymous",
    "mapped",
    "above import",
    "seconds",
)
EXPLANATION = (
    "\nMemory in MiB. `import`: resident after `import quantkit` alone. `peak`: the kernel's high-water mark (VmHWM) at the\n"
    "end. "
    "`anonymous`, `mapped`: what the largest of the samples taken every 20 ms consisted of.\n"
    "Each run is a first run: nothing is compiled yet, and `seconds` and memory include compiling the kernels.\n"
)


def measure_child(source: Path, output: Path, targets: list[str], workers: int | None, calibrated: bool) -> None:
    """Runs in the fresh process: import, note, convert, note; prints JSON."""
    import quantkit  # the only import between the start of the process and the first reading

    after_import = status("self")
    started = time.perf_counter()
    calibration = quantkit.CalibrationOptions(samples=SAMPLES, sequence_length=LENGTH) if calibrated else None
    quantkit.convert(source, to=targets, output=output, workers=workers, calibration=calibration)
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "import": after_import["VmRSS"],
                "import_peak": after_import["VmHWM"],
                "peak": status("self")["VmHWM"],
                "seconds": seconds,
            }
        )
    )


def status(process: int | str) -> dict[str, int]:
    """Memory figures of a process in bytes: VmRSS, VmHWM, RssAnon, RssFile ..."""
    fields = {}
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        name, value, *unit = [*line.split()[:3], ""]
        if unit and unit[0] == "kB":
            fields[name.rstrip(":")] = int(value) * 1024
    return fields


def measure(source: Path, output: Path, targets: tuple[str, ...], workers: str, *, calibrated: bool = False) -> dict[str, float]:
    """One conversion in a fresh process.  Adds what the largest sample consisted of: anonymous memory and mapped files."""
    command = [
        sys.executable,
        __file__,
        "--directory",
        str(output),
        "--child",
        str(source),
        "--targets",
        *targets,
        "--workers",
        workers,
        *(["--calibrated"] if calibrated else []),
    ]
    return run_watched(command, f"converting {source.name} to {', '.join(targets)}")


def run_watched(command: list[str], what: str) -> dict[str, float]:
    """What a process prints as JSON, and anonymous and mapped bytes of its largest sample.

    No kernel is compiled yet, so what a first run needs is counted.
    """
    with tempfile.TemporaryDirectory() as compiled:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NUMBA_CACHE_DIR": compiled})
        anonymous, mapped = watch(process)
        text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{what} failed")
    result: dict[str, float] = json.loads(text.splitlines()[-1])
    return result | {"anonymous": anonymous, "mapped": mapped}


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Sample a process until it ends; anonymous and mapped bytes of the largest sample."""
    anonymous = mapped = 0
    while process.poll() is None:
        try:
            sampled = status(process.pid)
        except (OSError, ValueError):  # it has just ended
            break
        if sampled.get("RssAnon", 0) + sampled.get("RssFile", 0) > anonymous + mapped:
            anonymous, mapped = sampled["RssAnon"], sampled["RssFile"]
        time.sleep(0.02)
    return anonymous, mapped


def write_tokenizer(directory: Path) -> None:
    """A token for each byte: as good as another where only memory counts, and small enough for a small vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))


def measure_calibrated(directory: Path, cases: list[str], workers: list[str], experts: list[int]) -> None:
    """Calibrated conversions; random weights, since zeros have no activations."""
    load, rows, worst = common.load_average(), [], 0.0
    for case in cases:
        for count in experts:
            source, output = directory / f"memory-{case}", directory / "memory-out"
            release, *options = CHECKPOINTS[case]
            options = [*(option for option in options if option != "--zeros"), "--random"]
            common.run_script(
                "generate_checkpoint.py", release, str(source), "--force", *options, *(["--experts", str(count)] if count else [])
            )
            write_tokenizer(source)
            size = common.size_of(source)
            for number in workers:
                result = measure(source, output, ("w4a16-gptq",), number, calibrated=True)
                written = common.size_of(output / "w4a16-gptq")
                shutil.rmtree(output)
                above = result["peak"] - result["import"]
                worst = max(worst, above)
                name = case + (f", {count} experts" if count else "")
                rows.append((name, number, "w4a16-gptq", *_figures(result, size, written)))
                print(*rows[-1], flush=True)
            shutil.rmtree(source)
    verdict = "holds" if worst <= CALIBRATED_BOUND else "does NOT hold"
    text = common.header("Peak resident memory of a calibrated conversion", directory, load)
    bound, largest = (f"{size / 2**20:,.0f} MiB" for size in (CALIBRATED_BOUND, worst))
    text += f"\nBound: {bound} above the bare import; largest measured {largest}: it {verdict}.\n\n"
    text += common.table(COLUMNS, rows) + EXPLANATION
    text += (
        f"{SAMPLES} samples of {LENGTH} tokens. `scout`: one MoE layer. `maverick`: a dense and a MoE layer. Random\n"
        f"weights. The router's logits, all that grows with the experts, take {SAMPLES * LENGTH * 4 / 2**10:.0f} KiB for each.\n"
        "`mapped` holds the hidden states, files that the kernel may write back and drop; they grow with the tokens.\n"
    )
    common.write_results("memory_calibrated.md", text)
    if worst > CALIBRATED_BOUND:
        raise SystemExit(f"the bound of {CALIBRATED_BOUND / 2**20:,.0f} MiB was passed")


def write_gguf_source(case: str, source: Path, experts: int, vocabulary: int) -> None:
    """A checkpoint of random weights with the demo's tokenizer, such as llama.cpp computes.  experts: 0 for the release's."""
    release, *options = CHECKPOINTS[case]
    options = [*(option for option in options if option != "--zeros"), "--random", "--vocabulary", str(vocabulary)]
    common.run_script(
        "generate_checkpoint.py", release, str(source), "--force", *options, *(["--experts", str(experts)] if experts else [])
    )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["use_qk_norm"] = config["num_local_experts"] != EXPERTS_WITHOUT_NORM  # it has no weights
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(common.HERE.parent / "demo" / "tiny-scout" / name, source / name)


def measure_gguf(directory: Path, cases: list[str], workers: list[str], experts: list[int], calibrated: bool) -> None:
    """Conversions to GGUF."""
    load, rows, worst, target = common.load_average(), [], 0.0, GGUF_TARGETS[calibrated]
    bound = CALIBRATED_BOUND if calibrated else BOUND
    title = (
        "Peak resident memory of a calibrated conversion to GGUF" if calibrated else "Peak resident memory of a conversion to GGUF"
    )
    text = common.header(title, directory, load)
    for case in cases:
        for count in experts:
            source, output = directory / f"memory-{case}", directory / "memory-out"
            write_gguf_source(case, source, count, VOCABULARY[calibrated])
            size = common.size_of(source)
            for number in workers:
                result = measure(source, output, (target,), number, calibrated=calibrated)
                written = common.size_of(output / target)
                shutil.rmtree(output)
                worst = max(worst, result["peak"] - result["import"])
                rows.append((case + (f", {count} experts" if count else ""), number, target, *_figures(result, size, written)))
                print(*rows[-1], flush=True)
            shutil.rmtree(source)
    verdict = "holds" if worst <= bound else "does NOT hold"
    text += f"\nBound: {bound / 2**20:,.0f} MiB above the bare import; largest measured {worst / 2**20:,.0f} MiB: it {verdict}.\n\n"
    text += common.table(COLUMNS, rows) + EXPLANATION
    text += "`scout`: one MoE layer. `maverick`: a dense and a MoE layer. Random weights, "
    text += f"{VOCABULARY[calibrated]:,} rows in embedding and head.\n"
    if calibrated:
        text += f"{SAMPLES} samples of {LENGTH} tokens.\n"
    common.write_results("memory_gguf_calibrated.md" if calibrated else "memory_gguf.md", text)
    if worst > bound:
        raise SystemExit(f"the bound of {bound / 2**20:,.0f} MiB was passed")


def _figures(result: dict[str, float], size: int, written: int) -> tuple[str, ...]:
    """The figures of one row."""
    sizes = [f"{result[key] / 2**20:,.0f}" for key in ("import", "peak", "anonymous", "mapped")]
    above = result["peak"] - result["import"]
    return (f"{size / 1e9:.2f}", f"{written / 1e9:.2f}", *sizes, f"{above / 2**20:,.0f}", f"{result['seconds']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, required=True, help="where checkpoints and artifacts are written and removed again"
    )
    parser.add_argument("--cases", default="scout,maverick")
    parser.add_argument("--workers", nargs="+", default=["default", "1"], help="numbers of workers to try; default: one per core")
    parser.add_argument("--calibrated", action="store_true", help="convert to w4a16-gptq, calibrated")
    parser.add_argument("--gguf", action="store_true", help="convert to Q4_K_M, or if calibrated to Q4_K_M-gptq")
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        default=[0],
        help="calibrated or GGUF only: experts of a MoE layer, 0 for as many as in the release",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--targets", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        [workers] = arguments.workers
        count = None if workers == "default" else int(workers)
        measure_child(arguments.child, arguments.directory, arguments.targets, count, arguments.calibrated)
        return
    if arguments.gguf:
        cases = arguments.cases.split(",")
        measure_gguf(arguments.directory, cases, arguments.workers, arguments.experts, arguments.calibrated)
        return
    if arguments.calibrated:
        measure_calibrated(arguments.directory, arguments.cases.split(","), arguments.workers, arguments.experts)
        return

    load, rows, worst = common.load_average(), [], 0.0
    for case in arguments.cases.split(","):
        source, output = arguments.directory / f"memory-{case}", arguments.directory / "memory-out"
        release, *options = CHECKPOINTS[case]
        common.run_script("generate_checkpoint.py", release, str(source), "--force", *options)
        size = common.size_of(source)
        for workers in arguments.workers:
            for targets in TARGETS:
                result = measure(source, output, targets, workers)
                written = sum(common.size_of(output / target) for target in targets)
                shutil.rmtree(output)
                above = result["peak"] - result["import"]
                worst = max(worst, above)
                rows.append((case, workers, " + ".join(targets), *_figures(result, size, written)))
                print(*rows[-1], flush=True)
        shutil.rmtree(source)
    verdict = "holds" if worst <= BOUND else "does NOT hold"
    text = common.header("Peak resident memory of a conversion", arguments.directory, load)
    text += f"\nBound: {BOUND / 2**20:,.0f} MiB above the bare import; largest measured {worst / 2**20:,.0f} MiB: it {verdict}.\n\n"
    text += common.table(COLUMNS, rows) + EXPLANATION
    text += "`scout`: one MoE layer, 16 experts. `maverick`: a dense and a MoE layer, 128 experts, zero weights in a sparse file.\n"
    common.write_results("memory.md", text)
    if worst > BOUND:
        raise SystemExit(f"the bound of {BOUND / 2**20:,.0f} MiB was passed")


if __name__ == "__main__":
    main()
