"""End to end: BF16 safetensors to a quantized GGUF, quantkit against llama.cpp, on a layer of Scout in its true shapes.

    python benchmarks/gguf_speed.py --directory DIR --cyllama-python PATH/TO/ENV/bin/python
    python benchmarks/gguf_speed.py --directory DIR --cyllama-python PATH/TO/ENV/bin/python --experts 2 --repetitions 1   # a trial

quantkit reads the safetensors files of ``generate_checkpoint.py`` and writes the artifact: reading, quantizing, writing, fsync, and
reading back for its checksums.  llama.cpp needs two programs for that: a converter that writes a BF16 GGUF file, and
``llama-quantize``.  Only the second is timed here, by its library function ``llama_model_quantize`` as the wheel ``cyllama``
holds it, reading a BF16 GGUF file of the same weights that this script wrote: the time of the converter, which reads and writes all
weights once more, is left out in llama.cpp's favour.

Fairness.  Each run is a fresh process bound to as many cores as it may use threads; imports do not count, and kernels were
compiled before.  Inputs are in the page cache, which is checked.  Contestants take turns, the best of all repetitions counts, and
medians are shown.  Both outputs are synced to disk within the clock.  Neither side is given importance.  That both did the same
work is checked: tensors, shapes and types must be equal, and the errors against the BF16 weights stand in the table, computed by
the ``gguf`` package from both files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import gguf
import numpy as np
from gguf.quants import dequantize
from llama_quantize_oracle import FILE_TYPES, versions
from plain_gguf import fill, write_hollow

TARGET = 5.0
SAMPLED_ROWS = 128  # of each tensor, for its error
TOKENIZER = Path(__file__).parent.parent / "demo" / "tiny-scout"
PROGRAMS = ("llama_model_quantize", "quantkit.convert")

LLAMA_CPP = """
import json, os, sys, time
job = json.loads(sys.argv[1])
os.sched_setaffinity(0, job["cores"])
from cyllama.llama import llama_cpp
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype, params.nthread = job["number"], len(job["cores"])
started = time.perf_counter(), time.process_time()
llama_cpp.model_quantize(job["input"], job["output"], params)
descriptor = os.open(job["output"], os.O_RDONLY)
os.fsync(descriptor)
print(json.dumps([time.perf_counter() - started[0], time.process_time() - started[1]]))
"""
QUANTKIT = """
import json, os, sys, time
job = json.loads(sys.argv[1])
os.sched_setaffinity(0, job["cores"])
import quantkit
started = time.perf_counter(), time.process_time()
quantkit.convert(job["input"], job["target"], job["output"], workers=len(job["cores"]))
print(json.dumps([time.perf_counter() - started[0], time.process_time() - started[1]]))
"""


def run(program: str, directory: Path, target: str, cores: list[int], cyllama_python: str) -> tuple[float, float]:
    """One run in a fresh process: wall and processor seconds.  Leaves its output in the directory."""
    ours = program == "quantkit.convert"
    remove(output_of(program, directory))
    job = {
        "cores": cores,
        "target": target,
        "number": FILE_TYPES.get(target),
        "input": str(directory / "scout" if ours else directory / "scout-bf16.gguf"),
        "output": str(output_of(program, directory)),
    }
    command = [sys.executable if ours else cyllama_python, "-c", QUANTKIT if ours else LLAMA_CPP, json.dumps(job)]
    threads = {"OMP_NUM_THREADS": str(len(cores)), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr[-3000:]}")
    wall, processor = json.loads(done.stdout.splitlines()[-1])
    return wall, processor


def output_of(program: str, directory: Path) -> Path:
    """What a program writes: a directory or a file."""
    return directory / ("quantkit" if program == "quantkit.convert" else "llama.cpp.gguf")


def remove(path: Path) -> None:
    """Remove a file or a directory, and settle the disk."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def model_file(output: Path) -> Path:
    """The GGUF file of the text model in an output."""
    if output.is_file():
        return output
    [found] = [path for path in output.rglob("*.gguf") if not path.name.startswith("mmproj")]
    return found


def compare(directory: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """How many tensors both outputs hold, alike in shape and type, and the relative error of each type for each program.

    Errors are of the first rows of every tensor, against the BF16 file.  Ends the program when the outputs differ.
    """
    readers = {program: gguf.GGUFReader(model_file(output_of(program, directory))) for program in PROGRAMS}
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(directory / "scout-bf16.gguf").tensors}
    laid_out = {
        program: {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
        for program, reader in readers.items()
    }
    theirs, ours = (laid_out[program] for program in PROGRAMS)
    ours = {name: place for name, place in ours.items() if name != "rope_freqs.weight"}  # the plain file has none
    if theirs != ours:
        different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise SystemExit(f"the outputs differ: {[(name, theirs.get(name), ours.get(name)) for name in different[:5]]}")
    errors: dict[str, dict[str, float]] = {}
    for program, reader in readers.items():
        sums: dict[str, list[float]] = {}
        for tensor in reader.tensors:
            if tensor.name not in reference or len(tensor.shape) < 2:
                continue
            weights = sample(reference[tensor.name])
            stored = sample(tensor)
            total = sums.setdefault(tensor.tensor_type.name, [0.0, 0.0])
            total[0] += float(np.square(stored - weights, dtype=np.float64).sum())
            total[1] += float(np.square(weights, dtype=np.float64).sum())
        errors[program] = {kind: (error / power) ** 0.5 for kind, (error, power) in sums.items() if power}
    return len(theirs), errors


def sample(tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first rows of a tensor, of the first expert."""
    data = tensor.data if len(tensor.shape) < 3 else tensor.data[0]
    return dequantize(np.ascontiguousarray(data[:SAMPLED_ROWS]), tensor.tensor_type).astype(np.float32)


def prepare(directory: Path, experts: int) -> int:
    """The safetensors checkpoint and the BF16 GGUF file of the same weights; returns how many weights matrices hold."""
    source = directory / "scout"
    common.run_script("generate_checkpoint.py", "scout", str(source), "--layers", "1", "--experts", str(experts), "--force")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, source / name)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    path = directory / "scout-bf16.gguf"
    path.unlink(missing_ok=True)
    shapes = write_hollow(path, raw, gguf.GGMLQuantizationType.BF16)
    fill(path, raw, source)
    os.sync()
    return sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, required=True, help="where files are written and removed again, 10 GB for 16 experts"
    )
    parser.add_argument("--cyllama-python", required=True, help="a Python that can import cyllama")
    parser.add_argument("--target", default="Q4_K_M", choices=list(FILE_TYPES))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))], help="how many to use, in turn")
    arguments = parser.parse_args()
    directory, target = arguments.directory / "gguf-speed", arguments.target
    directory.mkdir(parents=True)
    load = common.load_average()
    try:
        weights = prepare(directory, arguments.experts)
        text, ratios = measure(directory, target, weights, arguments)
        title = f"BF16 to a GGUF file of type {target}, one layer of Scout with {arguments.experts} experts"
        common.write_results(f"gguf_speed_{target}.md", common.header(title, directory, load) + text)
    finally:
        shutil.rmtree(directory)
    if min(ratios) < TARGET:
        raise SystemExit(f"less than {TARGET} times as fast")


def measure(directory: Path, target: str, weights: int, arguments: argparse.Namespace) -> tuple[str, list[float]]:
    """The text of the results after their header, and how many times as fast quantkit is for each number of cores."""
    available = sorted(os.sched_getaffinity(0))
    inputs = {
        "llama_model_quantize": [directory / "scout-bf16.gguf"],
        "quantkit.convert": common.files_of(directory / "scout"),
    }
    run("quantkit.convert", directory, target, available, arguments.cyllama_python)  # compiles kernels
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.repetitions):
        for count in arguments.cores:
            for program in PROGRAMS:
                common.bring_into_cache(inputs[program])
                if common.cached_share(inputs[program]) < 0.999:
                    raise SystemExit("the input does not fit into the page cache; use fewer experts")
                seconds = run(program, directory, target, available[:count], arguments.cyllama_python)
                times.setdefault((program, count), []).append(seconds)
                print(f"{program:22} {count} cores {seconds[0]:8.2f} s, processor {seconds[1]:8.2f} s", flush=True)
    tensors, errors = compare(directory)
    rows, ratios = [], []
    for count in arguments.cores:
        best = {program: min(times[program, count]) for program in PROGRAMS}
        ratios.append(best[PROGRAMS[0]][0] / best[PROGRAMS[1]][0])
        for program in PROGRAMS:
            wall, processor = best[program]
            median = statistics.median(seconds for seconds, _ in times[program, count])
            speed = f"{weights / processor / 1e6:.1f}"
            ratio = f"{best[PROGRAMS[0]][0] / wall:.2f}"
            rows.append((program, count, f"{wall:.2f}", f"{median:.2f}", f"{processor:.2f}", speed, ratio))
    columns = ("program", "cores", "best, s", "median, s", "processor, s", "million weights per processor second", "times as fast")
    text = (
        f"- llama.cpp: {', '.join(f'{name} {version}' for name, version in versions(Path(arguments.cyllama_python)).items())}\n\n"
    )
    text += common.table(columns, rows)
    kinds = sorted(errors[PROGRAMS[0]])
    text += (
        f"\nRelative error by type, of the first {SAMPLED_ROWS} rows of every tensor ({tensors} tensors, alike in both files):\n\n"
    )
    text += common.table(("program", *kinds), [(name, *(f"{errors[name][kind]:.5f}" for kind in kinds)) for name in PROGRAMS])
    text += (
        f"\n{weights / 1e9:.2f} billion weights.  `llama_model_quantize` starts from a BF16 GGUF file; the time of the converter\n"
        "that writes one is left out, in llama.cpp's favour.  quantkit starts from safetensors files, and reads back and checks\n"
        "what it wrote.  Both fsync.  Inputs are in the page cache.  Weights are Gaussian.  No importance on either side.\n"
    )
    return text, ratios


if __name__ == "__main__":
    main()
