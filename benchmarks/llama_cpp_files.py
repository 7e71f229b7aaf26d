"""Files of llama.cpp's own quantizer for a small model, to compare with: ``gguf_quality.py --others DIRECTORY``.

    python benchmarks/llama_cpp_files.py --calibration TEXT --output DIRECTORY --cyllama-python PYTHON [--types Q4_K_M ...]

A BF16 GGUF of the model is quantized by ``llama_model_quantize`` itself (in the wheel ``cyllama``, which wants an environment of
its own), without and with importance.  The importance is quantkit's, of the same samples that quantkit's files learn from, in
place of what llama-imatrix would collect from the text: sums of squares for each column of each expert, without lending.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from llama_quantize_oracle import FILE_TYPES

from quantkit import CalibrationOptions, calibrate, convert
from quantkit.checkpoint import Checkpoint
from quantkit.imatrix import imatrix_from_statistics

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")

CHILD = r"""
import ctypes, json, struct, sys
import numpy as np
from cyllama.llama import llama_cpp

class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]

START, IMPORTANCE = 24, 24  # of the structure in the Python object, of the pointer in the structure
source, values, jobs = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
for path, number, weighted in jobs:
    params = llama_cpp.LlamaModelQuantizeParams()
    assert type(params).__basicsize__ == START + 56
    params.ftype, params.nthread = number, 1
    if weighted:
        array = (Importance * (len(values.files) + 1))()
        kept = [values[name] for name in values.files]
        for place, (name, data) in enumerate(zip(values.files, kept)):
            array[place] = Importance(name.encode(), data.ctypes.data, data.size)
        ctypes.c_void_p.from_address(id(params) + START + IMPORTANCE).value = ctypes.addressof(array)
    llama_cpp.model_quantize(source, path, params)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/tiny-scout"))
    parser.add_argument("--calibration", type=Path, required=True, help="a plain text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--cyllama-python", required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        options = CalibrationOptions(arguments.calibration, samples=arguments.samples, sequence_length=256)
        [made] = convert(arguments.model, "BF16", work).artifacts
        [source] = (path for path in made.directory.glob("*.gguf") if not path.name.startswith("mmproj"))
        statistics = calibrate(arguments.model, work / "statistics", calibration=options).statistics
        with Checkpoint.open(arguments.model) as checkpoint:
            importance = imatrix_from_statistics(statistics, checkpoint.config)
        values = {name: found.mean_square.numpy().ravel() for name, found in importance.entries.items()}
        np.savez(work / "values.npz", **values)
        jobs = [
            (str(arguments.output / f"{kind}{'-imatrix' if weighted else ''}.gguf"), FILE_TYPES[kind], weighted)
            for kind in arguments.types
            for weighted in (False, True)
        ]
        command = [arguments.cyllama_python, "-c", CHILD, str(source), str(work / "values.npz"), json.dumps(jobs)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
