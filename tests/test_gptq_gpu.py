"""GPTQ on a GPU, without one: kernels in Triton's interpreter and as machine code that is looked at; the rest of it on CPU tensors.

Both happen in processes of their own: this file, run as a program.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_programs import interpreted_by, machine_code, main, needs_triton, run_program

from quantkit.errors import CalibrationError
from quantkit.evidence import Evidence
from quantkit.ggml import FP4_LEVELS, IQ4_LEVELS
from quantkit.methods import gptq_gpu
from quantkit.scheme import parse_scheme

BLOCK = 32  # inputs of a launch: the interpreter's time grows with the square of it
CASES = {  # scheme, inputs, rows of the matrices, how much is missing
    "int4-g32": ("int4-g32", 64, (40, 24), 0.0),
    "int4-g32-asym": ("int4-g32-asym", 96, (40, 24), 0.0),
    "int4-channel, little missing": ("int4-channel", 64, (48,), 0.02),
    "int8-channel, too much missing": ("int8-channel", 100, (40,), 5.0),  # 100 inputs are padded
    "int8-g32": ("int8-g32", 64, (40, 24), 0.0),
    "int2-g32-asym": ("int2-g32-asym", 64, (40, 24), 0.0),
    "Q4_K": ("Q4_K", 256, (40, 24), 0.0),
    "Q5_0, little missing": ("Q5_0", 64, (48,), 0.02),
    "Q5_1": ("Q5_1", 64, (40, 24), 0.0),
    "IQ4_NL": ("IQ4_NL", 64, (48,), 0.0),
    "MXFP4": ("MXFP4", 64, (40, 24), 0.0),
}
LATTICES = {  # range of codes, and what else a launch is told: zero points, minimums, the offset, levels
    "int4": ((-8, 7), False, False, 0.0, None),
    "int4 asymmetric": ((-8, 7), True, False, 0.0, None),
    "int8": ((-128, 127), False, False, 0.0, None),
    "int3 asymmetric": ((-4, 3), True, False, 0.0, None),
    "Q4_K": ((0, 15), False, True, 0.0, None),
    "Q6_K": ((0, 63), False, False, 32.0, None),
    "IQ4_XS": ((0, 15), False, False, 0.0, IQ4_LEVELS),
    "MXFP4": ((0, 15), False, False, 0.0, FP4_LEVELS),
}
VARIANTS = {  # ZERO_POINTS, MINIMUMS, LEVELS
    "symmetric": (False, False, 0),
    "asymmetric": (True, False, 0),
    "with minimums": (False, True, 0),
    "of levels": (False, False, 16),
}
MOST_DIFFERENT = 0.005  # share of codes: nearly ties, and what they change further on in their rows
MOST_REGISTERS = 128  # of a thread, for 16 programs on a multiprocessor
TYPES = {
    **dict.fromkeys(("errors", "corrections", "factor", "variances", "scales", "zero_points", "minimums"), "*fp32"),
    **dict.fromkeys(("midpoints", "levels"), "*fp32"),
    "level_codes": "*i32",
    **dict.fromkeys(("groups", "places"), "*i64"),
    **dict.fromkeys(("offset", "lowest", "highest"), "fp32"),
    "codes": "*i8",
    "sums": "*fp64",
    **dict.fromkeys(("first", "panel_first", "panel_inputs", "inputs", "rows", "scale_groups"), "i32"),
}


# -------------------------------------------------------------------------------------------------- in the other processes


def fuse_in_old_interpreters() -> None:
    """Before Triton 3.9 the interpreter rounded a fused product twice: let it round once."""
    import numpy as np
    import triton
    from triton.runtime import interpreter

    def fma(_self: object, left: Any, right: Any, addend: Any) -> Any:
        one, other, last = (value.data.astype(np.float64) for value in (left, right, addend))
        product = one * other  # exact
        total = np.asarray(product + last)
        virtual = total - product
        lost = (product - (total - virtual)) + (last - virtual)
        even = (total.view(np.int64) & 1) == 0
        odd = np.where((lost != 0) & even, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
        return interpreter.TensorHandle(odd.astype(np.float32), addend.dtype.scalar)

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):
        interpreter.InterpreterBuilder.create_fma = fma


def compare_kernels() -> dict[str, Any]:
    """One block through both kernels: differing codes and errors, and the sums of both."""
    import numpy as np

    from quantkit.kernels import gptq, gptq_triton
    from quantkit.methods.gptq import level_table

    found: dict[str, Any] = {}
    for name, ((lowest, highest), asymmetric, lowered, offset, table) in LATTICES.items():
        torch.manual_seed(1)
        experts, inputs, rows, groups_of_row = (1, 80, 64, 5) if name == "int4" else (2, 48, 64, 3)
        weights, corrections = torch.randn(experts, inputs, rows), torch.randn(experts, inputs, rows) * 0.1
        factor = torch.randn(experts, inputs, inputs) * 0.1
        variances = torch.rand(experts, inputs) + 0.1
        scales = (torch.rand(experts, groups_of_row, rows) + 0.2) * (4.0 / max(map(abs, table or (highest - offset,))))
        zero_points = torch.full_like(scales, offset)
        if asymmetric:
            zero_points = torch.randint(lowest, highest + 1, scales.shape).to(torch.float32)
        minimums = torch.rand(scales.shape) * 2 if lowered else None
        if offset or lowered or table:
            scales[:, :, ::7] = 0.0  # a scale of llama.cpp's types may be zero
            weights[:, :, ::14] = 0.0
        weights[:, :4] = scales[:, :1] * torch.tensor([0.5, 1.5, -0.5, -2.5])[:, None]  # ties
        corrections[:, :4], factor[:, :4] = 0.0, 0.0
        places = torch.stack([torch.cat([torch.arange(4), 4 + torch.randperm(inputs - 4)]) for _ in range(experts)])
        groups = places // (inputs // groups_of_row)
        errors, codes = weights.clone(), torch.zeros(weights.shape, dtype=torch.int8)
        sums = torch.zeros(experts, 3, rows, dtype=torch.float64)
        levels = level_table(table)
        gptq_triton.launch(
            errors,
            corrections,
            factor,
            variances,
            scales,
            zero_points if asymmetric else None,
            groups,
            places,
            codes,
            sums,
            block=slice(0, inputs),
            panel_first=0,
            lowest=lowest,
            highest=highest,
            offset=offset,
            minimums=minimums,
            table=gptq.Table(*map(torch.from_numpy, levels)) if table else None,
            rows_of_program=64 if name == "int4" else 32,
        )
        different = [0, 0]
        expected = []
        for expert in range(experts):
            own, out = weights[expert].clone(), np.zeros(inputs * rows, np.int8)
            arrays = [values[expert].numpy() for values in (corrections, factor)]
            totals = gptq.quantize_block(
                own.numpy().reshape(-1),
                *(array.reshape(-1) for array in arrays),
                variances[expert].numpy().astype(np.float64),
                scales[expert].numpy().reshape(-1),
                zero_points[expert].numpy().reshape(-1),
                np.empty(0, np.float32) if minimums is None else minimums[expert].numpy().reshape(-1),
                groups[expert].numpy(),
                places[expert].numpy(),
                float(lowest),
                float(highest),
                levels,
                out,
                rows,
                0,
                rows,
            )
            different[0] += int((out != codes[expert].numpy().reshape(-1)).sum())
            different[1] += int((own != errors[expert]).sum())
            expected.append([float(total) for total in totals])
        found[name] = {"different": different, "expected": expected, "sums": sums.sum(2).tolist(), "tied": codes[0, :4, 0].tolist()}
    return found


def round_once() -> list[int]:
    """The codes of two inputs, the second of which is a hair above a half if a product is added with one rounding, else a half."""
    from quantkit.kernels import gptq_triton

    hair = 2.0**-12
    errors, factor = torch.zeros(1, 8, 32), torch.zeros(1, 8, 8)
    errors[0, 0], errors[0, 1] = 8 + hair, -(0.5 + 2 * hair)  # the first is clipped at 7, its error is 1 + hair
    factor[0, 0, 1] = 1 + hair  # (1 + hair)^2 - 0.5 - 2 hair = 0.5 + hair^2
    codes, sums = torch.zeros(1, 8, 32, dtype=torch.int8), torch.zeros(1, 3, 32, dtype=torch.float64)
    gptq_triton.launch(
        errors,
        torch.zeros(1, 8, 32),
        factor,
        torch.ones(1, 8),
        torch.ones(1, 1, 32),
        None,
        torch.zeros(1, 8, dtype=torch.int64),
        torch.arange(8)[None],
        codes,
        sums,
        block=slice(0, 8),
        panel_first=0,
        lowest=-8,
        highest=7,
        rows_of_program=32,
    )
    return codes[0, :2, 5].tolist()  # type: ignore[no-any-return]


def sample(scheme: str, inputs: int, heights: Sequence[int], missing: float, experts: int) -> tuple[list[Any], list[Evidence]]:
    """Heavy-tailed weights, and evidence of inputs that hang together."""
    torch.manual_seed(len(scheme) + inputs)
    weights = [[(torch.randn(height, inputs) ** 3 * 0.02).to(torch.bfloat16) for height in heights] for _ in range(experts)]
    evidence = []
    for _ in range(experts):
        rows = torch.randn(inputs // 2 if scheme == "int8-g32" else 2 * inputs, inputs) @ (
            torch.randn(inputs, inputs) / inputs**0.5 + torch.eye(inputs)
        )
        hessian = rows.t() @ rows / rows.shape[0]
        wanted = torch.randn(rows.shape[0], heights[0]).t() @ rows * (missing / rows.shape[0]) if missing else None
        evidence.append(Evidence(len(rows), hessian.diagonal(), rows.abs().amax(0), hessian, wanted, float(len(rows))))
    return weights, evidence


def compare_methods() -> dict[str, Any]:
    """Both methods on the cases: share of differing codes, statistics of both."""
    from quantkit.methods import gptq
    from quantkit.team import Team
    from quantkit.workspace import Workspace

    workspace, found = Workspace(), {}
    for name, (scheme_name, inputs, heights, missing) in CASES.items():
        scheme = parse_scheme(scheme_name)
        assert scheme is not None
        weights, evidence = sample(scheme_name, inputs, heights, missing, 2)
        device = torch.device("cpu")
        ours = list(gptq_gpu.quantize_batch(weights, scheme, evidence, device, clip_search=True, workspace=workspace, block=BLOCK))
        different = total = scales = moved = 0
        statistics = []
        for expert, seen, got in zip(weights, evidence, ours, strict=True):
            with Team(1) as team:
                plain = replace(seen, missing=None)
                [(first, _), *_] = gptq.quantize(expert, scheme, clip_search=True, workspace=workspace, evidence=plain, team=team)
                moved += int((first.codes != got[0][0].codes).sum())
                expected = gptq.quantize(expert, scheme, clip_search=True, workspace=workspace, evidence=seen, team=team)
            for (one, mine), (other, theirs) in zip(got, expected, strict=True):
                different += int((one.codes != other.codes).sum())
                total += other.codes.numel()
                for field in ("scale", "zero_point", "group_scale", "minimum", "group_minimum"):
                    ours_of, theirs_of = getattr(one, field), getattr(other, field)
                    assert (ours_of is None) == (theirs_of is None)
                    scales += 0 if ours_of is None else int((ours_of != theirs_of).sum())
                statistics.append((vars(mine), vars(theirs)))
        found[name] = {"different": different / total, "scales": scales, "moved": moved / total, "statistics": statistics}
    return found


def compare_devices() -> dict[str, Any]:
    """Four experts on two devices, against all in one batch and against chunks that a budget allows: differing codes."""
    from quantkit.workspace import Workspace

    scheme = parse_scheme("int4-channel")
    assert scheme is not None
    weights, evidence = sample("devices", 16, (24,), 0.0, 4)
    alone = threading.Lock()  # the interpreter has one place in the grid, not one per thread
    found: dict[int, torch.Tensor] = {}
    used = set()

    def batch(device: torch.device, items: Sequence[int], budget: int | None = None) -> list[torch.Tensor]:
        chosen = ([weights[item] for item in items], scheme, [evidence[item] for item in items], device)
        results = gptq_gpu.quantize_batch(*chosen, clip_search=False, workspace=Workspace(), budget=budget, block=8)
        return [codes for [(quantized, _)] in results for codes in [quantized.codes]]

    def work(device: torch.device, items: Sequence[int]) -> None:
        with alone:
            used.add(str(device))
            found.update(zip(items, batch(device, items), strict=True))

    together = batch(torch.device("cpu"), range(4))
    need = gptq_gpu.bytes_per_expert(16, 24, scheme, makes_up=False)
    pieces = batch(torch.device("cpu"), range(4), 3 * need)
    gptq_gpu.run_on_devices([torch.device("cpu", 0), torch.device("cpu", 1)], [1.0] * 4, work)
    return {
        "devices": sorted(used),
        "chunks": sum(int((one != other).sum()) for one, other in zip(together, pieces, strict=True)),
        "shared": sum(int((together[item] != found[item]).sum()) for item in range(4)),
    }


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    torch.set_num_threads(1)
    fuse_in_old_interpreters()
    return {"kernels": compare_kernels(), "once": round_once(), "methods": compare_methods(), "devices": compare_devices()}


def compile_kernels() -> dict[str, Any]:
    """The block kernel as machine code for sm_90a: resources and instructions of each variant."""
    from quantkit.kernels import gptq_triton

    found: dict[str, Any] = {}
    for variant, values in VARIANTS.items():
        constants = dict(zip(("ZERO_POINTS", "MINIMUMS", "LEVELS"), values, strict=True))
        constants |= {"COUNT": 128, "STEP": gptq_triton.STEP, "ROWS": gptq_triton.ROWS}
        code = machine_code(gptq_triton.quantize_block, TYPES, constants, gptq_triton.OPTIONS)
        found[variant] = {
            "registers": code.registers,
            "stack": code.stack,
            "shared": code.shared,
            "operations": dict(code.operations),
            "fusible": re.findall(r"\b(?:mul|add|sub|fma)\.(?:ftz\.)?f32", code.ptx),
            "divisions": sorted(set(re.findall(r"\bdiv\.[a-z.]*f32", code.ptx))),
            "target": re.findall(r"\.target (\w+)", code.ptx),
        }
    return found


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
def test_the_kernel_gives_the_cpu_kernels_bits(interpreted: dict[str, Any]) -> None:
    for name, found in interpreted["kernels"].items():
        assert found["different"] == [0, 0], f"{name}: codes, errors"
        for expected, sums in zip(found["expected"], found["sums"], strict=True):
            assert sums == pytest.approx(expected, rel=1e-5), name
            assert sums[2] == expected[2] and (expected[2] > 0 or LATTICES[name][4]), name
    assert interpreted["kernels"]["int4"]["tied"] == [0, 2, 0, -2], "ties go to even"
    assert interpreted["once"] == [7, 1], "a product is added with one rounding"


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_the_cpu_gives(interpreted: dict[str, Any], name: str) -> None:
    found = interpreted["methods"][name]
    assert found["different"] <= MOST_DIFFERENT
    assert found["scales"] == 0
    for ours, expected in found["statistics"]:
        assert expected["output_error"] > 0 and expected["damping"] > 0
        assert ours.pop("clipped") == pytest.approx(expected.pop("clipped"), abs=2)
        assert ours == pytest.approx(expected, rel=2e-3, abs=0.0)
    assert (found["moved"] > 0.05) == ("missing" in name), "what is missing makes the outputs move"


@needs_triton
def test_neither_batches_nor_devices_change_codes(interpreted: dict[str, Any]) -> None:
    assert interpreted["devices"] == {"devices": ["cpu:0", "cpu:1"], "chunks": 0, "shared": 0}


@needs_triton
def test_machine_code_keeps_everything_in_registers(tmp_path: Path) -> None:
    for name, found in run_program(__file__, "compile_kernels", TRITON_CACHE_DIR=str(tmp_path)).items():
        operations = found["operations"]
        assert found["target"] == ["sm_90a"], name
        assert found["stack"] == 0 and not {"LDL", "STL"} & set(operations), f"{name}: registers are spilled"
        assert found["registers"] <= MOST_REGISTERS, name
        assert operations["FFMA"] > 8 * 7 / 2 * 2, name
        assert found["fusible"] == [] and found["divisions"] == ["div.rn.f32"], f"{name}: would round unlike the CPU"


def test_the_library_does_without_triton() -> None:
    """It neither imports it on a machine without GPU nor fails without it until it is needed; the error says what to install."""
    code = (
        "import sys, quantkit, quantkit.methods.gptq_gpu as gpu; assert 'triton' not in sys.modules; sys.modules['triton'] = None\n"
        "try: gpu._kernels()\nexcept quantkit.RecipeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantkit[cuda]" in result.stdout


def test_the_largest_go_first() -> None:
    assert gptq_gpu.share_out([1, 5, 4, 3, 3], 2) == [[1, 4], [2, 3, 0]]
    assert gptq_gpu.share_out([2.0], 3) == [[0], [], []]


def test_devices_work_at_the_same_time_and_failures_come_out() -> None:
    both = threading.Barrier(2, timeout=20)

    def work(device: torch.device, items: Sequence[int]) -> None:
        both.wait()
        assert torch.get_float32_matmul_precision() == "highest"
        if device.index == 1:
            raise CalibrationError(f"items {items}")

    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(CalibrationError, match=r"items \[1\]"):
            gptq_gpu.run_on_devices([torch.device("cpu", 0), torch.device("cpu", 1)], [2.0, 1.0], work)
        assert torch.get_float32_matmul_precision() == "high", "the caller's setting is back"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_budget_says_how_many_experts_go_together() -> None:
    scheme = parse_scheme("int4-g128")
    assert scheme is not None
    need = gptq_gpu.bytes_per_expert(5120, 16384, scheme, makes_up=False)
    weights = 5120 * 16384
    assert 4 * (5120**2 + weights) + 2 * weights < need < 8 * (5120**2 + weights)
    assert gptq_gpu.bytes_per_expert(8192, 256, scheme, makes_up=False) == 3 * 4 * 8192**2, "a flat matrix: its Hessian decides"
    assert gptq_gpu.bytes_per_expert(5120, 16384, scheme, makes_up=True) == need + 12 * weights
    assert gptq_gpu.experts_at_once(need, 16, None) == 16
    assert gptq_gpu.experts_at_once(need, 16, 17 * need) == 16
    assert gptq_gpu.experts_at_once(need, 16, 6 * need - 1) == 4
    with pytest.raises(CalibrationError, match="GiB are free"):
        gptq_gpu.experts_at_once(need, 16, 2 * need - 1)


def test_hessians_that_resist_are_damped_more() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 24)
    good = rows.t() @ rows / 200
    bad = good - 0.06 * torch.linalg.eigvalsh(good).max() * torch.eye(24)
    lowest = float(torch.linalg.eigvalsh(bad).min())
    bad -= (lowest + 0.05) * torch.eye(24)  # now its lowest eigenvalue is -0.05: it takes the fourth step, 0.1 after 0.03
    matrices = torch.stack([good, bad])
    sources = matrices.clone()
    dampings = gptq_gpu._factor_upper(matrices, 24, [0.01, 0.01])
    assert dampings == pytest.approx([0.01, 0.1])
    for matrix, source, damping in zip(matrices, sources, dampings, strict=True):
        assert torch.equal(matrix, matrix.triu())
        assert torch.allclose(matrix @ matrix.t(), source + damping * torch.eye(24), atol=1e-5)
    with pytest.raises(CalibrationError, match="expert 1 of 2"):
        gptq_gpu._factor_upper(torch.stack([good, good - 50 * torch.eye(24)]), 24, [0.01, 0.01])


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
