"""Products with FP8 and BF16 weights in Triton's interpreter, against float64, and what clients' rounding makes of rows.

Kernels run in a process of their own: this file, run as a program.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_products import worst_deviation
from instructions_by_hand import halves, run
from triton_programs import interpreted_by, machine_code_of, machine_codes, main, needs_triton, run_program

from quantkit import grid
from quantkit.kernels.weights import Weight
from quantkit.scheme import parse_scheme

HIDDEN, WIDTH = 256, 128  # multiples of 128, as blocks ask for it
ODD_HIDDEN, ODD_WIDTH = 208, 72  # multiples of nothing
LOADS = {  # rows of each of four experts, rows of a tile
    "empty experts": ((0, 5, 0, 3), 16),
    "one row": ((0, 0, 1, 0), 16),
    "all rows to one": ((0, 37, 0, 0), 32),
    "many rows": ((70, 1, 0, 65), 64),
}
CASES = {  # scheme or None for BF16, whether rows are rounded, sizes, splits, loads
    "channel": ("fp8-channel-dynamic", True, (ODD_HIDDEN, ODD_WIDTH), 1, tuple(LOADS)),
    "channel, rows as they are": ("fp8-channel-dynamic", False, (ODD_HIDDEN, ODD_WIDTH), 2, ("empty experts", "many rows")),
    "block": ("fp8-block-dynamic", True, (HIDDEN, WIDTH), 2, ("empty experts", "all rows to one", "many rows")),
    "block, rows as they are": ("fp8-block-dynamic", False, (HIDDEN, WIDTH), 1, ("one row", "many rows")),
    "tensor": ("fp8-tensor-static", True, (ODD_HIDDEN, ODD_WIDTH), 1, ("empty experts", "many rows")),
    "tensor, rows as they are": ("fp8-tensor-static", False, (ODD_HIDDEN, ODD_WIDTH), 1, ("one row",)),
    "BF16": (None, True, (ODD_HIDDEN, ODD_WIDTH), 2, tuple(LOADS)),
}
VARIANTS = {  # scheme, rows of a tile, whether rows are rounded
    "FP8, few rows": ("fp8-channel-dynamic", 16, True),
    "FP8, many rows": ("fp8-channel-dynamic", 128, True),
    "FP8 times BF16": ("fp8-channel-dynamic", 16, False),
}
MOST_SHARED = 227 * 1024  # bytes that a program may have


# ------------------------------------------------------------------------------------------------- in the other process


def matrix(scheme_name: str | None, rows: int, columns: int) -> Weight:
    """A random weight as it is stored; some of its FP8 codes are numbers without a leading bit."""
    weight = (torch.randn(rows, columns) ** 3 * 0.02).to(torch.bfloat16)
    if scheme_name is None:
        return weight
    scheme = parse_scheme(scheme_name)
    assert scheme is not None
    scale, _ = grid.fit(weight, scheme)
    quantized = grid.snap(weight, scheme, scale)
    return replace(quantized, input_scale=torch.tensor([0.0078125 * 1.5])) if scheme.static_activations else quantized


def unrounded(rows: torch.Tensor, weight: Weight) -> torch.Tensor:
    return rows


def padded_rows(rows: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1])).contiguous()


def multiply() -> dict[str, Any]:
    """By case and load: errors of gate_up and matmul in units of what rounding explains; the same twice; what lies beyond."""
    from quantkit.kernels import device_weights, moe_tiles, moe_triton_float
    from quantkit.kernels.activations import rounded_inputs

    device = torch.device("cpu")
    found: dict[str, Any] = {}
    for name, (scheme_name, round_activations, (hidden, width), splits, loads) in CASES.items():
        torch.manual_seed(len(name))
        gates, ups, downs = (
            [matrix(scheme_name, *size) for _ in range(4)] for size in ((width, hidden), (width, hidden), (hidden, width))
        )
        pair = device_weights.stack([device_weights.build(gate, device, up) for gate, up in zip(gates, ups, strict=True)])
        last = device_weights.stack([device_weights.build(down, device) for down in downs])
        for load in loads:
            counts, tokens = LOADS[load]
            ends = torch.tensor(counts).cumsum(0)
            first = ends - torch.tensor(counts)
            expert_of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
            total = int(ends[-1])
            tiles = moe_tiles.cut(first, ends, tokens, total // tokens + 4)
            outcome: dict[str, Any] = {}
            for part, weight, matrices in (("gate_up", pair, gates), ("matmul", last, downs)):
                rows = (torch.randn(total, weight.inputs) * torch.rand(total, 1)).to(torch.bfloat16)
                rows[0, : weight.inputs // 2] = 0.0
                given = padded_rows(rows, weight.padded_inputs)
                ready = moe_tiles.Rows(given)
                if round_activations and scheme_name is not None:
                    ready = moe_triton_float.round_rows(given, weight, expert_of_row)
                if part == "gate_up":
                    out = torch.full((total, weight.padded_inputs), 7.0, dtype=torch.bfloat16)
                    moe_triton_float.gate_up(ready, weight, tiles, out)
                    outcome["beyond"] = bool((out[:, weight.outputs :] == 7.0).all())
                    result = out[:, : weight.outputs].to(torch.float64)
                else:
                    parts = torch.full((splits, total, weight.outputs), float("nan"))
                    moe_triton_float.matmul(ready, weight, tiles, parts)
                    result = parts.sum(0, dtype=torch.float64)
                others = ups if part == "gate_up" else None
                clients = rounded_inputs if round_activations else unrounded
                worst = worst_deviation(result, rows[:, : weight.inputs], counts, matrices, others, clients)
                outcome[part] = worst
            found[f"{name}: {load}"] = outcome
    return found


def round_rows() -> dict[str, Any]:
    """By scheme: how many rounded numbers differ from what the library's rounding gives, and how many there are."""
    from quantkit.kernels import device_weights, moe_triton_float
    from quantkit.kernels.activations import rounded_inputs

    found: dict[str, Any] = {}
    for name in ("fp8-channel-dynamic", "fp8-block-dynamic", "fp8-tensor-static"):
        torch.manual_seed(3)
        weight = matrix(name, 128, 384)
        rows = (torch.randn(12, 384) * torch.logspace(-6, 4, 12)[:, None]).to(torch.bfloat16)
        rows[3], rows[4, :128] = 0.0, 0.0
        there = device_weights.build(weight, torch.device("cpu"))
        ready = moe_triton_float.round_rows(rows, there, torch.zeros(12, dtype=torch.int64))
        assert ready.scales is not None
        scales = ready.scales.t().repeat_interleave(128, 1) if ready.scales.ndim == 2 else ready.scales[:, None]
        values = ready.values.to(torch.float32) * scales
        found[name] = [int((values != rounded_inputs(rows.to(torch.float32), weight)).sum()), values.numel()]
    return found


def widen() -> list[int]:
    """FP8 codes whose BF16 form by the kernel's instructions is another number."""
    from quantkit.kernels import moe_triton_float

    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 127) != 127].repeat(2)[:508]  # no weight is NaN; 127 words
    codes[::2] = codes[::-2]  # so that neighbours differ
    pairs = run(moe_triton_float._WIDENED.value, 2, [codes.view(np.uint32)])
    found = torch.stack([halves(words, torch.bfloat16) for words in pairs], 1).flatten()
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float64)
    return torch.from_numpy(codes)[found != expected].tolist()


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {"products": multiply(), "rounding": round_rows(), "widened": widen()}


def compile_kernels() -> dict[str, Any]:
    """By variant: what the machine code for an H200 does in tensor cores, and where sums of products begin."""
    tools = machine_codes()
    found: dict[str, Any] = {}
    for name, (scheme, tokens, rounded) in VARIANTS.items():
        code = machine_code_of(tools.compiled_launch(tools.launch_of(tools.Variant(scheme, "down", tokens, rounded))))
        products = re.findall(r"\b([HQ]GMMA|HMMA)\.\S+ ([^;]*);", code.listing)
        found[name] = {
            "kinds": sorted({kind for kind, _ in products}),
            "products": len(products),
            "begun": sum(", RZ" in operands for _, operands in products),
            "waits": code.listing.count("WARPGROUP.DEPBAR"),
            "spilled": code.spills,
            "shared": code.shared,
        }
    return found


# ----------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_float64(interpreted: dict[str, Any], name: str) -> None:
    for load in CASES[name][4]:
        found = interpreted["products"][f"{name}: {load}"]
        assert found["gate_up"] <= 1 and found["matmul"] <= 1, load
        assert found["beyond"], f"{load}: columns beyond the outputs are left alone"


@needs_triton
def test_rows_are_rounded_as_clients_do(interpreted: dict[str, Any]) -> None:
    for name, (different, count) in interpreted["rounding"].items():
        assert different == 0 and count == 12 * 384, name


@needs_triton
def test_instructions_widen_every_number_exactly(interpreted: dict[str, Any]) -> None:
    assert interpreted["widened"] == []


@needs_triton
def test_machine_code_sums_fp8_in_short_runs(tmp_path: Path) -> None:
    for name, found in run_program(__file__, "compile_kernels", TRITON_CACHE_DIR=str(tmp_path)).items():
        eight_bits = "BF16" not in name
        assert found["kinds"] == ["QGMMA" if eight_bits else "HGMMA"], name
        assert found["products"] == (4 if eight_bits else 8), f"{name}: one step of 128 inputs"
        assert found["begun"] == 1 and found["waits"] == 1, f"{name}: a step begins at zero, and is waited for once"
        assert found["spilled"] == 0 and found["shared"] <= MOST_SHARED, name


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
