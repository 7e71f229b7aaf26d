"""llama.cpp's types on a GPU, without one: kernels in Triton's interpreter, and as machine code that is looked at.

Both happen in processes of their own: this file, run as a program.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_programs import interpreted_by, machine_code, main, needs_triton, run_program

from quantkit.ggml import TYPES
from quantkit.methods import blocks_gpu
from quantkit.scheme import parse_scheme

NAMES = (*blocks_gpu.SYMMETRIC, *blocks_gpu.MINIMUM)
COLUMNS = 256  # the interpreter takes its time
MATRICES = (("gaussian", False), ("laplace", True), ("real", True))  # and whether inputs differ in importance
BELOW = {  # at most so much of ggml's weighted error
    "Q8_0": 0.83,
    "Q4_0": 0.97,
    "Q5_0": 0.96,
    "Q3_K": 0.98,
    "Q6_K": 0.9,
    "IQ4_NL": 0.94,
    "IQ4_XS": 0.94,
    "Q2_K": 0.92,
    "Q4_K": 0.97,
    "Q5_K": 0.92,
}
MOST_REGISTERS = 96  # of a thread, for 5 programs on a multiprocessor
ARGUMENTS = {
    **dict.fromkeys(("shares", "exact"), "*fp32"),
    **dict.fromkeys(("scales", "minimums"), "*fp16"),
    **dict.fromkeys(("codes", "group_scales", "group_minimums"), "*i8"),
    **dict.fromkeys(("rows", "columns"), "i32"),
    "weights": "*bf16",
    "sums": "*fp64",
}


# -------------------------------------------------------------------------------------------------- in the other processes


def search(name: str, weight: torch.Tensor, importance: Any = None) -> tuple[Any, Any]:
    """What the method stores with a team that has a device, and its statistics."""
    from quantkit.evidence import Evidence
    from quantkit.methods import blocks
    from quantkit.team import Team
    from quantkit.workspace import Workspace

    scheme = parse_scheme(name)
    assert scheme is not None
    mean_square = None if importance is None else torch.as_tensor(importance)
    evidence = None if mean_square is None else Evidence(1, mean_square, mean_square)
    with Team(1, torch.device("cpu")) as team:
        [found] = blocks.quantize([weight], scheme, clip_search=True, workspace=Workspace(), evidence=evidence, team=team)
    return found


def compare_errors() -> dict[str, Any]:
    """By type and matrix: our error beside ggml's; ours as the kernel adds it up beside a count from what it stores."""
    import block_kernels
    import llama_cpp

    from quantkit import grid

    found: dict[str, Any] = {}
    for name in NAMES:
        for kind, weighted in MATRICES:
            weight = block_kernels.matrix(kind, 16, COLUMNS)
            importance = block_kernels.importance_of(COLUMNS) if weighted else None
            quantized, statistics = search(name, torch.from_numpy(weight), importance)
            stored = grid.dequantize(quantized).numpy()
            theirs = llama_cpp.ggml_dequantize(name, llama_cpp.ggml_quantize(name, weight, importance), COLUMNS)
            ours = block_kernels.squared_error(weight, stored, importance)
            power = block_kernels.squared_error(weight, 0 * weight, importance)
            kind_of, codes = TYPES[name], quantized.codes
            found[f"{name} {kind}"] = {
                "below": ours / block_kernels.squared_error(weight, theirs, importance),
                "squared": statistics.squared_error / block_kernels.squared_error(weight, stored),
                "power": statistics.squared_weight / block_kernels.squared_error(weight, 0 * weight),
                "output": statistics.output_error / (ours / power) ** 0.5 if weighted else 1.0,
                "codes": kind_of.codes[0] <= int(codes.min()) and int(codes.max()) <= kind_of.codes[1],
            }
    return found


def run_on_extremes() -> dict[str, Any]:
    """By type: whether what is stored for extreme weights and importance is finite, and zeros for zeros; whether the stride order
    changes anything; what is said of a weight that is not finite; the error where everything is the same."""
    import numpy as np

    from quantkit import grid
    from quantkit.errors import WeightError

    found: dict[str, Any] = {}
    for name in ("Q4_0", "Q3_K", "IQ4_XS", "Q4_K"):
        columns = 288 if name == "Q4_0" else 256  # 32 beyond a tile
        generator = np.random.default_rng(9)
        weight = torch.from_numpy(generator.standard_normal((15, columns)).astype(np.float32))  # a row less than a tile
        plain = search(name, weight.to(torch.bfloat16))[0]
        turned = search(name, weight.to(torch.bfloat16).t().contiguous().t())[0]
        same = all(torch.equal(getattr(plain, field), getattr(turned, field)) for field in ("codes", "scale"))
        for row, factor in enumerate([0.0, 1e-45, 1e-40, 1e-30, 1e-12, 1e-7, 1e-4, 1e4, 1e12, 3e37]):
            weight[row] *= factor
        weight[10, 3], weight[11, :128], weight[12] = 1e3, 0.0, -0.0
        finite = []
        for importance in (np.zeros(columns), np.full(columns, 1e-38), (np.arange(columns) % 32 < 4) * 1.0):
            quantized, statistics = search(name, weight, importance.astype(np.float32))
            stored = grid.dequantize(quantized)
            finite.append(bool(stored.isfinite().all()) and not bool(stored[0].any()) and np.isfinite(statistics.squared_error))
            error = float((stored[13:] - weight[13:]).norm() / weight[13:].norm())
        weight[5, 200] = float("nan")
        try:
            search(name, weight)
            message = ""
        except WeightError as problem:
            message = str(problem)
        _, constant = search(name, torch.full((4, columns), -0.02, dtype=torch.bfloat16))
        found[name] = {
            "same": same,
            "finite": bool(all(finite)),
            "error": error,
            "message": message,
            "constant": constant.squared_error / constant.squared_weight,
        }
    return found


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    torch.set_num_threads(1)
    blocks_gpu.ROWS = 16  # its time grows with the number of programs
    return {"errors": compare_errors(), "extremes": run_on_extremes()}


def compile_kernels() -> dict[str, Any]:
    """Kernels as machine code for sm_90a: resources and instructions."""
    from quantkit.kernels import ggml_triton, ggml_triton_minimum

    found: dict[str, Any] = {}
    for name in NAMES:
        kernel = ggml_triton_minimum.quantize_minimum if name in blocks_gpu.MINIMUM else ggml_triton.quantize_symmetric
        settings = blocks_gpu.constants(TYPES[name]) | {"ROWS": blocks_gpu.ROWS}
        code = machine_code(kernel, ARGUMENTS, settings, blocks_gpu.OPTIONS)
        found[name] = {
            "registers": code.registers,
            "stack": code.stack,
            "spills": code.spills,
            "target": re.findall(r"\.target (\w+)", code.ptx),
        }
    return found


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_error_is_below_that_of_ggml(interpreted: dict[str, Any], name: str) -> None:
    for kind, _ in MATRICES:
        found = interpreted["errors"][f"{name} {kind}"]
        assert found["below"] < BELOW[name], kind
        assert found["codes"], kind
        for sums in ("squared", "power", "output"):
            assert found[sums] == pytest.approx(1, rel=1e-4), f"{kind}: {sums}"


@needs_triton
def test_extreme_weights_and_importance_give_valid_blocks(interpreted: dict[str, Any]) -> None:
    for name, found in interpreted["extremes"].items():
        assert found["finite"] and found["same"], name
        assert found["error"] < 0.3, name
        assert "row 5, column 200" in found["message"], name
        assert found["constant"] < 1e-5, name


@needs_triton
def test_machine_code_keeps_everything_in_registers(tmp_path: Path) -> None:
    for name, found in run_program(__file__, "compile_kernels", TRITON_CACHE_DIR=str(tmp_path)).items():
        assert found["target"] == ["sm_90a"], name
        assert found["stack"] == 0 and found["spills"] == 0, f"{name}: registers are spilled"
        assert found["registers"] <= MOST_REGISTERS, name


def test_types_without_a_kernel_stay_on_the_cpu() -> None:
    assert {name for name, kind in TYPES.items() if not blocks_gpu.searched_on_gpu(kind) and not kind.codebook} == {
        "F32",
        "F16",
        "BF16",
        "Q4_1",
        "Q5_1",
        "MXFP4",
    }


def test_the_library_does_without_triton() -> None:
    code = (
        "import sys, quantkit.methods.blocks_gpu as gpu; assert 'triton' not in sys.modules; sys.modules['triton'] = None\n"
        "try: gpu._kernels()\nexcept gpu.RecipeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantkit[cuda]" in result.stdout


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
