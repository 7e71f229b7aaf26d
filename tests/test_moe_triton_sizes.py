"""The mixture of experts where tensors have more than 2^31 numbers, as Maverick's have.

Offsets in a kernel have 32 bits unless it says otherwise; one that overflows points outside of its tensor.  The interpreter
computes them as a GPU does.  What nobody writes takes no memory, so tensors here are as large as real ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from expert_products import OUTPUT_ROUNDING, exact
from test_moe_triton import CPU, matrix
from triton_programs import interpreted_by, main, needs_triton

from quantkit.kernels import device_weights, moe_tiles
from quantkit.kernels.moe_tiles import INPUTS

SCHEMES = {"INT4": "int4-g128", "BF16": None, "Q4_K": "Q4_K"}  # one for each module of kernels
WIDTH = 8192  # numbers of a row
SHAPES = {"many splits": (8, 40_000), "many rows": (1, 300_000)}  # splits and rows of results
OUTPUTS, TILE = 32, 16
HIDDEN, INNER, EXPERTS = 5120, 8192, 129  # Maverick's, the shared expert included
SORTED = 2 * 16384  # rows of a portion of tokens
LARGEST = 2**31 - 1


def last_rows() -> dict[str, Any]:
    """By kind and shape: the largest error in the last rows, relative to what rounding explains; whether splits without inputs have
    zeros there; whether the row in front of them is as it was."""
    from quantkit.kernels import moe_triton, moe_triton_blocks

    found: dict[str, Any] = {}
    one = torch.ones(1, dtype=torch.int32)
    for (kind, name), (shape, (splits, count)) in itertools.product(SCHEMES.items(), SHAPES.items()):
        torch.manual_seed(len(found))
        tiles = moe_tiles.Tiles(one - 1, one * (count - 3), one * count, one, 1, TILE)
        weight = matrix(name, OUTPUTS, 256)
        there = device_weights.build(weight, CPU)
        values = torch.empty(count, 256, dtype=torch.bfloat16)
        values[-TILE:] = torch.randn(TILE, 256)
        out = torch.empty(splits, count, WIDTH, dtype=torch.bfloat16)
        out[:, -4:, :OUTPUTS] = 7.0
        if kind == "Q4_K":  # their preparation takes a program for each row
            ready = moe_triton_blocks.prepared(values[-TILE:])
            halves, sums = torch.empty(count, 256, dtype=torch.float16), torch.empty(count, 16, dtype=torch.float16)
            factors = torch.empty(count)
            halves[-TILE:], sums[-TILE:], factors[-TILE:] = ready.values, ready.sums, ready.factors
            rows = moe_triton_blocks.PreparedRows(halves, factors, sums)
            moe_triton_blocks.launch_of(rows, there, tiles, out, assembly=False).run()
        else:
            moe_triton.kernels_of(there.kind).matmul(moe_tiles.Rows(values), there, tiles, out)
        x = values[-3:].to(torch.float64)
        wanted, size = x @ exact(weight).t(), x.abs() @ exact(weight).abs().t()
        result = out[:, -3:, :OUTPUTS].to(torch.float64).sum(0)
        found[f"{kind}, {shape}"] = {
            "error": float(((result - wanted).abs() / (size * OUTPUT_ROUNDING)).max()),
            "zeros": not bool(out[4:, -3:, :OUTPUTS].any()),
            "kept": bool((out[:, -4, :OUTPUTS] == 7.0).all()),
        }
    return found


def rows_by_themselves() -> dict[str, bool]:
    """Whether rows beyond 2^31 numbers are permuted and added up as they should be."""
    from quantkit.kernels import moe_triton_rows

    (_, count), (splits, rows) = SHAPES["many rows"], SHAPES["many splits"]
    x = torch.empty(max(count, splits * rows), WIDTH, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, WIDTH)
    tokens, scores = torch.tensor([len(x) - 1, len(x) - 2]), torch.tensor([0.5, 2.0])
    permuted = torch.equal(moe_triton_rows.permute(x, tokens, scores, WIDTH), torch.stack([x[-1] * 0.5, x[-2] * 2.0]))
    parts = x[: splits * rows].view(splits, rows, WIDTH)
    parts[:, -2:] = torch.randint(-8, 9, (splits, 2, WIDTH)).to(torch.bfloat16)
    out = torch.empty(1, WIDTH, dtype=torch.bfloat16)
    moe_triton_rows.combine(parts, torch.tensor([[rows - 1], [rows - 2]]), out)
    return {
        "permute": permuted,
        "combine": torch.equal(out[0], parts[:, -2:].to(torch.float32).sum((0, 1)).to(torch.bfloat16)),
    }


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {"products": last_rows(), "rows": rows_by_themselves()}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SCHEMES)
def test_results_beyond_32_bits_are_where_they_belong(interpreted: dict[str, Any], kind: str, shape: str) -> None:
    splits, rows = SHAPES[shape]
    assert max(splits - 1, 1) * rows * WIDTH > LARGEST
    found = interpreted["products"][f"{kind}, {shape}"]
    assert found["error"] <= 1 and found["zeros"] and found["kept"]


@needs_triton
def test_rows_beyond_32_bits_are_found(interpreted: dict[str, Any]) -> None:
    assert interpreted["rows"] == {"permute": True, "combine": True}


@pytest.mark.parametrize("name", ["int4-g32-asym", "int8-channel", "fp8-block-dynamic", "Q4_K", "Q6_K", None])
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_what_kernels_count_in_32_bits_fits(name: str | None, part: str) -> None:
    """Coordinates of the rectangles that are read, and offsets into tables that are read by pointers."""
    matrices, outputs, inputs = (EXPERTS, 2 * INNER, HIDDEN) if part == "gate_up" else (EXPERTS, HIDDEN, INNER)
    small = device_weights.build(matrix(name, 256, 256), CPU)
    scale = matrices * outputs * inputs / small.codes.shape[0] / 256  # times the numbers of a table
    assert matrices * outputs < LARGEST, "rows of codes"
    for table in small.tables.values():
        assert table.numel() * scale < LARGEST, "scales"
    assert SORTED * max(HIDDEN, INNER) // INPUTS < LARGEST, "scales of rows"


if __name__ == "__main__":
    main({"interpret": interpret})
