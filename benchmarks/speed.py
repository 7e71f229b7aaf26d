"""Speed as ratios measured in one run: FP8 against a plain copy of the same bytes, W4A16 against llm-compressor.

    python benchmarks/speed.py --directory DIR --parts fp8
    python benchmarks/speed.py --directory DIR --parts fp8,w4a16 --llmcompressor-python PATH/TO/ENV/bin/python

fp8     One layer of Scout's true shapes to ``fp8-dynamic``.  The yardstick is what a plain program needs to read the input in
        large pieces, then write as many bytes as the artifact has and fsync; or, where the cores are slower than the disk, to cast
        as many weights from BF16 to FP8 with torch on all cores.  Cold means that the input was dropped from the page cache before,
        warm that it was in it; the state is probed, not assumed.
w4a16   A Scout layer with fewer experts (llm-compressor's time is the limit) to INT4 in groups of 128, symmetric, with and without
        clip search, against llm-compressor's data-free path with its ``mse`` and its default observer on the same files: from
        shards on disk to a saved artifact, and the quantization alone with all weights in memory.  Both sides write the same
        tensors, which is checked, and the error of both is computed from the files by the same code.

Contestants take turns within each repetition, and the best of all repetitions counts; medians are shown beside it.  One repetition
more runs first and is thrown away, since it compiles kernels.  Before each run memory is filled with page cache, as it is in the
middle of a long run; see ``common.Ballast``.  Imports do not count, except where a row says that the whole command was timed.
Everybody fsyncs what was written, and outputs are removed and synced outside the clock.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import torch

import quantkit

PIECE = 16 << 20
TARGET = 1.3
COPY, COPY_THREADED, CAST = "plain copy, 1 thread", "plain copy, 2 threads", "torch cast, 2 threads"
LIBRARY, COMMAND = "quantkit.convert", "quantkit convert (whole command)"
THREADS = 2

Times = dict[tuple[str, str], list[float]]


def best(times: Times, *key: str) -> float:
    """The shortest of the times of a contestant in a state."""
    return min(times[key[0], key[1]])


# ------------------------------------------------------------------------------------------------------------- contestants


def plain_copy(files: list[Path], output: Path, nbytes: int, threads: int) -> None:
    """Read all files in large pieces into a reused buffer, then write ``nbytes`` in large pieces, then fsync."""
    pieces = [(path, offset) for path in files for offset in range(0, path.stat().st_size, PIECE)]
    targets = range(0, nbytes, PIECE)
    descriptors = {path: os.open(path, os.O_RDONLY) for path in files}
    output.mkdir()
    target = os.open(output / "copy", os.O_WRONLY | os.O_CREAT)

    def copy(part: int) -> None:
        buffer = memoryview(bytearray(PIECE))
        for path, offset in pieces[part::threads]:
            os.preadv(descriptors[path], [buffer], offset)
        for offset in targets[part::threads]:
            os.pwrite(target, buffer[: nbytes - offset], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(threads)))
    os.fsync(target)
    for descriptor in (target, *descriptors.values()):
        os.close(descriptor)


def cast(elements: int) -> None:
    """Cast that many BF16 weights to FP8, matrix by matrix, a thread per core, into reused memory: no reading, no scales."""
    matrix = 1024 * 1024
    sources = [torch.randn(32 * matrix).to(torch.bfloat16) for _ in range(THREADS)]
    targets = [torch.empty(32 * matrix, dtype=torch.float8_e4m3fn) for _ in range(THREADS)]

    def work(thread: int) -> None:
        for _ in range(elements // THREADS // sources[thread].numel()):
            targets[thread].copy_(sources[thread])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def cast_seconds(elements: int) -> float:
    """Wall time of :func:`cast`, memory made ready before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cast(THREADS * 32 * 1024 * 1024)
    started = time.perf_counter()
    cast(elements)
    seconds = time.perf_counter() - started
    torch.set_num_threads(before)
    return seconds


def run_command(source: Path, output: Path, target: str) -> None:
    """The command line in a fresh process, start-up and all."""
    command = [sys.executable, "-m", "quantkit_cli", "convert", str(source), "--to", target, "-o", str(output), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def timed(contestant: Callable[[], object], output: Path) -> float:
    """Wall time; what was written is removed, and the disk settled, outside the clock."""
    started = time.perf_counter()
    contestant()
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    os.sync()
    return seconds


def alternate(
    contestants: dict[str, Callable[[], object]],
    source: Path,
    output: Path,
    ballast: common.Ballast,
    states: list[str],
    repetitions: int,
) -> tuple[Times, dict[str, float]]:
    """Run all contestants in turn, ``repetitions`` times and one time more that does not count.

    Returns the times of each (contestant, state), and the share of the input that was in the page cache in each state (the largest
    share found before a cold run, the smallest before a warm one).
    """
    files = common.files_of(source)
    times: Times = {(name, state): [] for name in contestants for state in states}
    shares: dict[str, list[float]] = {state: [] for state in states}
    for repetition in range(repetitions + 1):
        for state in states:
            for name, contestant in contestants.items():
                if state == "cold":
                    common.drop_from_cache(files)
                ballast.fill_cache()
                if state == "warm":
                    common.bring_into_cache(files)
                shares[state].append(common.cached_share(files))
                seconds = timed(contestant, output)
                if repetition:
                    times[name, state].append(seconds)
                print(f"{repetition or 'warm-up':>8} {state:5} {name:34} {seconds:7.2f} s", flush=True)
    return times, {state: (max if state == "cold" else min)(found) for state, found in shares.items()}


# -------------------------------------------------------------------------------------------------------------------- fp8


def measure_fp8(directory: Path, repetitions: int) -> str:
    """The FP8 section of the results."""
    source, output = directory / "speed-scout", directory / "speed-out"
    common.run_script("generate_checkpoint.py", "scout", str(source), "--layers", "1", "--force")
    quantkit.convert(source, ["fp8-dynamic"], output)
    files, read, written = common.files_of(source), common.size_of(source), common.size_of(output / "fp8-dynamic")
    elements = quantized_elements(output / "fp8-dynamic")
    shutil.rmtree(output)
    finished_units: list[float] = []

    def library() -> None:
        started = time.perf_counter()
        marks: dict[str, float] = {}
        note = lambda progress: marks.update({progress.phase: time.perf_counter() - started})  # noqa: E731
        quantkit.convert(source, ["fp8-dynamic"], output, progress=note)
        finished_units.append(marks["convert"])

    contestants: dict[str, Callable[[], object]] = {
        COPY: lambda: plain_copy(files, output, written, 1),
        COPY_THREADED: lambda: plain_copy(files, output, written, THREADS),
        LIBRARY: library,
        COMMAND: lambda: run_command(source, output, "fp8-dynamic"),
    }
    states, ballast = ["cold", "warm"], common.Ballast(directory / "speed-ballast")
    times, shares = alternate(contestants, source, output, ballast, states, repetitions)
    casts = [cast_seconds(elements) for _ in range(repetitions + 1)][1:]
    shutil.rmtree(source)
    ballast.path.unlink()

    rows = []
    for name in contestants:
        cells = [
            f"{figure:.2f}" for state in states for figure in (best(times, name, state), statistics.median(times[name, state]))
        ]
        ratios = [f"{best(times, name, state) / best(times, COPY, state):.2f}" for state in states]
        rows.append((name, *cells, *ratios))
    ratios = [f"{min(casts) / best(times, COPY, state):.2f}" for state in states]
    rows.append((CAST, *[f"{min(casts):.2f}", f"{statistics.median(casts):.2f}"] * 2, *ratios))
    text = f"\n## FP8: one layer of Scout's true shapes, {read / 1e9:.2f} GB in, {written / 1e9:.2f} GB out\n\n"
    text += common.table(
        ("seconds", "cold, best", "cold, median", "warm, best", "warm, median", "cold / copy", "warm / copy"), rows
    )
    for state in states:
        limit = max(best(times, COPY, state), min(casts))
        what = "plain copy" if limit > min(casts) else "cast"
        ratio = best(times, LIBRARY, state) / limit
        paired = [own / other for own, other in zip(times[LIBRARY, state], times[COPY, state], strict=True)]
        text += f"\n- {state}: {ratio:.2f} times the {what}, which is the limit here (target at most {TARGET:.2f}: "
        text += f"{'met' if ratio <= TARGET else 'not met'}); median of the ratios to the plain copy of the same repetition "
        text += f"{statistics.median(paired):.2f}"
    rate = elements / min(casts) / 1e9
    text += (
        f"\n\nBest of {repetitions} alternating repetitions. {elements / 1e9:.2f} billion weights become FP8; the cast alone runs\n"
        f"at {rate:.2f} billion weights/s on {THREADS} threads. Of the input, {shares['cold']:.0%} was in the page cache before\n"
        f"cold runs (worst case) and {shares['warm']:.0%} before warm ones. `quantkit.convert` had quantized and written every\n"
        f"unit after {min(finished_units):.2f} s at best; the rest is reading back, hashing, syncing and publishing.\n"
    )
    return text


def quantized_elements(artifact: Path) -> int:
    """How many weights of an artifact are stored as FP8."""
    from quantkit.safetensors_header import read_header

    entries = [entry for path in artifact.glob("*.safetensors") for entry in read_header(path).tensors.values()]
    return sum(entry.nbytes for entry in entries if entry.dtype == "F8_E4M3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, required=True, help="where checkpoints and artifacts are written and removed again"
    )
    parser.add_argument("--parts", default="fp8,w4a16")
    parser.add_argument("--repetitions", type=int, default=5, help="of the FP8 part")
    parser.add_argument("--peer-repetitions", type=int, default=2, help="of the W4A16 part, where llm-compressor takes minutes")
    parser.add_argument("--experts", type=int, default=2, help="of the W4A16 part")
    parser.add_argument(
        "--llmcompressor-python", help="interpreter of an environment with llm-compressor; needed for the W4A16 part"
    )
    parser.add_argument("--quiet-load", type=float, default=0.5, help="wait (at most an hour) until the load average is below this")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    load = common.wait_until_quiet(arguments.quiet_load, 3600)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    text = common.header("Speed", arguments.directory, load)
    if "fp8" in parts:
        text += measure_fp8(arguments.directory, arguments.repetitions)
    if "w4a16" in parts:
        import speed_w4a16

        if arguments.llmcompressor_python is None:
            parser.error("the w4a16 part needs --llmcompressor-python")
        text += speed_w4a16.measure(
            arguments.directory, arguments.experts, arguments.peer_repetitions, arguments.llmcompressor_python
        )
    common.write_results("speed.md", text)


if __name__ == "__main__":
    main()
