"""Ask llama.cpp which type it gives to every tensor, for every file type and many shapes; the answers are a test's oracle.

    python benchmarks/llama_quantize_oracle.py --directory DIR --cyllama-python PATH/TO/ENV/bin/python

The program asked is llama.cpp's ``llama_model_quantize``, as the wheel ``cyllama`` holds it.  Each case is a GGUF file with the
tensors of a Llama 4 config and nothing in them: a header, then a hole, so that Scout and Maverick in their full shapes take a few
kilobytes of disk.  Types come from a dry run's log, one line a tensor; so do sizes, in MiB with two digits.  The smallest cases
are also quantized for real, and types and exact sizes read from the files written.

Importance and overrides of types: the binding's parameters show these fields of llama.cpp's structure, but do not let them be set.
They are set in the memory that holds the structure, whose layout is checked first by the defaults that it must show.

Writes ``tests/data/llama_quantize_types.json``, with equal answers stored once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import common
import gguf
from generate_checkpoint import release_config
from plain_gguf import write_hollow

OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "llama_quantize_types.json"

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21,
    "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30,
    "IQ1_M": 31, "BF16": 32, "MXFP4_MOE": 38,
}  # fmt: skip

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "intermediate_size_mlp": 768, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "num_local_experts": 16, "num_hidden_layers": 17, "vocab_size": 128,
}  # fmt: skip
# What a case changes in a release's config.  Layers are chosen so that no two rules of llama.cpp pick the same ones.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scout": ("scout", {"num_hidden_layers": 48}),
    "maverick": ("maverick", {"num_hidden_layers": 48}),
    "tiny-scout": (
        "scout",
        {**SMALL, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 4, "vocab_size": 2048},
    ),
    "small": ("scout", SMALL),
    "small-interleaved": ("maverick", {**SMALL, "num_local_experts": 128, "num_hidden_layers": 34}),
    "few-key-heads": ("scout", {**SMALL, "num_key_value_heads": 4}),
    "few-experts": ("scout", {**SMALL, "num_local_experts": 2, "num_key_value_heads": 4}),
    "eight-experts": ("scout", {**SMALL, "num_local_experts": 8}),
    "one-expert": ("maverick", {**SMALL, "num_local_experts": 1, "num_hidden_layers": 18}),
    "tied": ("scout", {**SMALL, "tie_word_embeddings": True}),
    "tied-rows-of-96": ("scout", {**SMALL, "tie_word_embeddings": True, "hidden_size": 96}),
    "rows-of-96": (
        "scout",
        {**SMALL, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "experts-of-80": ("scout", {**SMALL, "intermediate_size": 80}),
    "rows-of-80": ("scout", {**SMALL, "hidden_size": 80, "num_hidden_layers": 4}),
}
WRITTEN = ("tiny-scout", "rows-of-96")  # quantized for real
OVERRIDES: dict[str, list[tuple[str, str]]] = {
    "values-of-early-layers": [(r"blk\.[0-4]\.attn_v", "Q8_0")],
    "first-shared-expert": [(r"blk\.0\.ffn_(gate|up|down)_shexp", "F16")],
    "experts-and-head": [("ffn_(gate|up)_exps", "IQ4_XS"), ("^output", "Q8_0"), (r"blk\.1.*_down", "Q6_K"), ("ffn_down", "Q3_K")],
}

CHILD = r"""
import ctypes, json, struct, sys
from cyllama.llama import llama_cpp

class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]

class Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]

START, IMPORTANCE, OVERRIDES = 24, 24, 40  # of the structure in the Python object, of two pointers in the structure

def set_pointer(params, field, array):
    blank = llama_cpp.LlamaModelQuantizeParams()
    seen = struct.unpack("<4i8B4Q", ctypes.string_at(id(blank) + START, 56))
    assert seen == (0, 7, blank.output_tensor_type, blank.token_embedding_type, 0, 1, *[0] * 10), seen
    assert type(params).__basicsize__ == START + 56
    ctypes.c_void_p.from_address(id(params) + START + field).value = ctypes.addressof(array)

for line in sys.stdin:
    job = json.loads(line)
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread, params.dry_run = job["number"], 1, job["output"] is None
    kept = []
    if job["importance"]:
        ones = (ctypes.c_float * job["widest"])(*[1.0] * job["widest"])
        array = (Importance * (len(job["importance"]) + 1))()
        for place, (name, size) in enumerate(job["importance"]):
            array[place] = Importance(name.encode(), ctypes.addressof(ones), size)
        set_pointer(params, IMPORTANCE, array)
        kept += [ones, array]
    if job["overrides"]:
        array = (Override * (len(job["overrides"]) + 1))()
        for place, (pattern, number) in enumerate(job["overrides"]):
            array[place] = Override(pattern.encode(), number)
        set_pointer(params, OVERRIDES, array)
        kept.append(array)
    print("BEGIN", file=sys.stderr, flush=True)
    try:
        llama_cpp.model_quantize(job["input"], job["output"] or job["input"] + ".none", params)
        print("\nEND done", file=sys.stderr, flush=True)
    except RuntimeError as error:
        print("\nEND failed", error, file=sys.stderr, flush=True)
"""

_TENSOR = re.compile(
    r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+?),? +size = +([\d.]+) MiB(?: -> +([\d.]+) MiB \((\S+)\))?", re.M
)
_SIZE = re.compile(r"quant size += +([\d.]+) MiB")


def case_config(release: str, changes: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a case."""
    config = release_config(release, changes["num_hidden_layers"], changes.get("vocab_size", 202048), None, 0)
    config.update(changes)
    config.pop("moe_layers")  # derived from the step
    return config


def numbers(layers: list[int]) -> str:
    """Ascending numbers as ranges: ``0-5,8``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in runs)


def brief_types(types: dict[str, str]) -> dict[str, str]:
    """Types of tensors as text for each type: ``attn_v:0-5,8 output`` stands for ``blk.0.attn_v.weight`` and so on."""
    layers: dict[str, dict[str, list[int]]] = {}
    for name, kind in types.items():
        block, _, part = name.removesuffix(".weight").rpartition(".")
        found = layers.setdefault(kind, {}).setdefault(part, [])
        if block:
            found.append(int(block.removeprefix("blk.")))
    return {
        kind: " ".join(f"{part}:{numbers(sorted(found))}" if found else part for part, found in sorted(parts.items()))
        for kind, parts in sorted(layers.items())
    }


def ask(python: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """Run jobs in a process that has the binding; the log of each."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    command = [str(python), "-c", CHILD]
    done = subprocess.run(command, input=lines, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False)
    logs = done.stderr.split("BEGIN\n")[1:]
    if done.returncode or len(logs) != len(jobs):
        raise SystemExit(f"the process that quantizes failed:\n{done.stderr[-2000:]}")
    return logs


def answer(log: str, tensors: int) -> dict[str, Any]:
    """What the log of one dry run says."""
    if "END done" not in log:
        reason = re.search(r"failed to quantize: (.*)", log)
        if reason is None:
            raise SystemExit(f"not understood:\n{log[-2000:]}")
        return {"refused": reason.group(1).strip()}
    types = {name: (after or before).rstrip(",").upper() for name, before, _, _, after in _TENSOR.findall(log)}
    if len(types) != tensors:
        raise SystemExit(f"{len(types)} of {tensors} tensors found in the log:\n{log[-2000:]}")
    [mebibytes] = _SIZE.findall(log)
    return {"types": brief_types(types), "MiB": mebibytes, "demands importance": "will require an imatrix" in log}


def written_answer(path: Path) -> dict[str, Any]:
    """What a quantized file holds."""
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return {"types": brief_types(types), "bytes": sum(int(tensor.n_bytes) for tensor in reader.tensors)}


def collect(case: str, directory: Path, python: Path) -> dict[str, Any]:
    """Every answer of a case: for each file type with and without importance, then overrides, then what was written."""
    path = directory / f"{case}.gguf"
    raw = case_config(*CASES[case])
    shapes = write_hollow(path, raw)
    widest = max(shape[-1] * (shape[0] if len(shape) == 3 else 1) for shape in shapes.values())
    sizes = [(name, shape[-1] * (shape[0] if len(shape) == 3 else 1)) for name, shape in shapes.items()]

    def job(kind: str, importance: bool, overrides: list[tuple[str, str]], output: Path | None) -> dict[str, Any]:
        return {
            "input": str(path),
            "output": None if output is None else str(output),
            "number": FILE_TYPES[kind],
            "importance": sizes if importance else [],
            "widest": widest,
            "overrides": [(pattern, gguf.GGMLQuantizationType[wanted].value) for pattern, wanted in overrides],
        }

    keys = [(kind, importance, "") for kind in FILE_TYPES for importance in (False, True)]
    if case == "small":
        keys += [(kind, False, name) for kind in ("Q4_K_M", "Q3_K_M", "Q4_K_S", "IQ2_M", "MXFP4_MOE", "BF16") for name in OVERRIDES]
    logs = ask(python, [job(kind, importance, OVERRIDES.get(name, []), None) for kind, importance, name in keys])
    answers: list[dict[str, Any]] = []
    for (kind, importance, name), log in zip(keys, logs, strict=True):
        found = answer(log, len(shapes))
        entry = {"file type": kind, "importance": [importance], **({"overrides": OVERRIDES[name]} if name else {}), **found}
        if answers and _facts(answers[-1]) == _facts(entry):  # importance changed nothing
            answers[-1]["importance"].append(importance)
        else:
            answers.append(entry)
    if case in WRITTEN:
        output = directory / f"{case}.out.gguf"
        for entry in answers:
            if "types" not in entry:
                continue
            importance = entry["importance"][-1]
            if entry["demands importance"] and not importance:
                continue
            ask(python, [job(entry["file type"], importance, [], output)])
            written = written_answer(output)
            output.unlink()
            if written["types"] != entry["types"]:
                raise SystemExit(f"{case}, {entry['file type']}: the dry run named other types than were written")
            entry["bytes"] = written["bytes"]
    path.unlink()
    return {"config": raw, "answers": answers}


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("importance", "demands importance")}


def versions(python: Path) -> dict[str, str]:
    """Of the binding and of the llama.cpp within."""
    code = (
        "import json, pathlib, importlib.metadata, cyllama; "
        "built = json.loads((pathlib.Path(cyllama.__file__).parent / 'build_config.json').read_text())['versions']; "
        "print(json.dumps({'cyllama': importlib.metadata.version('cyllama'), 'llama.cpp': built['llama_cpp_version']}))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for hollow files, removed again; a few MB are used")
    parser.add_argument("--cyllama-python", type=Path, required=True, help="a Python that can import cyllama")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    found = {}
    for case in arguments.cases:
        found[case] = collect(case, arguments.directory, arguments.cyllama_python)
        refused = sum("refused" in entry for entry in found[case]["answers"])
        print(f"{case}: {len(found[case]['answers'])} answers, {refused} refusals", flush=True)
    lines = [
        f'  {json.dumps(case)}: {{\n    "config": {json.dumps(content["config"])},\n    "answers": [\n'
        + ",\n".join(f"      {json.dumps(entry)}" for entry in content["answers"])
        + "\n    ]\n  }"
        for case, content in found.items()
    ]
    arguments.output.parent.mkdir(exist_ok=True)
    head = json.dumps({"versions": versions(arguments.cyllama_python), "command": common.command_line()})
    arguments.output.write_text('{\n  "about": ' + head + ",\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{arguments.output.name}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
