"""Products with Q8_0, Q4_K and Q6_K in Triton's interpreter, against float64 on what the blocks stand for.

Kernels run in a process of their own: this file, run as a program.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from expert_products import worst_deviation
from instructions_by_hand import halves, run
from triton_programs import interpreted_by, main, needs_triton

from quantkit.ggml import TYPES
from quantkit.grid import QuantizedTensor
from quantkit.kernels import device_blocks, device_weights
from quantkit.scheme import GGML

NAMES = ("Q8_0", "Q4_K", "Q6_K")
HIDDEN, WIDTH = 512, 256  # multiples of a block
OUTPUTS = 72  # of a matrix that is not multiplied further: a multiple of no tile
LOADS = {  # rows of each of three experts, rows of a tile
    "empty experts": ((0, 5, 0), 16),
    "one row": ((1, 0, 0), 16),
    "all rows to one": ((0, 0, 37), 32),
    "many rows": ((70, 1, 3), 64),
}


def matrix(name: str, rows: int, columns: int) -> QuantizedTensor:
    """Random numbers in all fields, the outermost ones among them: searched weights would not reach every code and scale."""
    kind = TYPES[name]

    def whole(low: int, high: int, width: int) -> torch.Tensor:
        found = torch.randint(low, high + 1, (rows, width), dtype=torch.int8)
        found[0, :2], found[-1, -2:] = low, high
        return found

    blocks, groups = columns // kind.block, columns // kind.group if kind.group else 0
    scale = (torch.randn(rows, blocks) * 0.002).to(torch.float16)
    scale[1 % rows] = 6e-8  # without a leading bit
    scale[2 % rows] = 0.0
    two_levels = kind.group > 0
    return QuantizedTensor(
        GGML[name],
        whole(*kind.codes, columns),
        scale,
        group_scale=whole(*kind.group_scales, groups) if two_levels else None,
        minimum=(torch.rand(rows, blocks) * 0.02).to(torch.float16) if kind.minimum else None,
        group_minimum=whole(*kind.group_scales, groups) if kind.minimum else None,
    )


# ------------------------------------------------------------------------------------------------- in the other process


def multiply() -> dict[str, Any]:
    """By type and load: errors of gate_up and matmul in units of what rounding explains; what lies beyond the outputs."""
    from quantkit.kernels import moe_tiles, moe_triton_blocks

    device = torch.device("cpu")
    found: dict[str, Any] = {}
    for name in NAMES:
        torch.manual_seed(len(found))
        gates, ups, downs = (
            [matrix(name, *size) for _ in range(3)] for size in ((OUTPUTS, HIDDEN), (OUTPUTS, HIDDEN), (OUTPUTS, WIDTH))
        )
        pair = device_weights.stack([device_weights.build(gate, device, up) for gate, up in zip(gates, ups, strict=True)])
        last = device_weights.stack([device_weights.build(down, device) for down in downs])
        for load, (counts, tokens) in LOADS.items():
            ends = torch.tensor(counts).cumsum(0)
            first = ends - torch.tensor(counts)
            total = int(ends[-1])
            tiles = moe_tiles.cut(first, ends, tokens, total // tokens + 3)
            outcome: dict[str, Any] = {}
            for part, weight, matrices in (("gate_up", pair, gates), ("matmul", last, downs)):
                rows = torch.randn(total, weight.inputs) * torch.logspace(-3, 0, total)[:, None] + 0.1 * torch.rand(total, 1)
                rows = rows.to(torch.bfloat16)
                rows[-1, :100] = 0.0
                rows[0, 1] = 1e-20  # too small for FP16, too small to matter
                if part == "gate_up":
                    out = torch.full((total, 128), 7.0, dtype=torch.bfloat16)
                    moe_triton_blocks.gate_up(moe_tiles.Rows(rows), weight, tiles, out)
                    outcome["beyond"] = bool((out[:, OUTPUTS:] == 7.0).all())
                    result = out[:, :OUTPUTS].to(torch.float64)
                else:
                    parts = torch.full((2 if load == "one row" else 1, total, OUTPUTS), float("nan"))
                    moe_triton_blocks.matmul(moe_tiles.Rows(rows), weight, tiles, parts)
                    result = parts.sum(0, dtype=torch.float64)
                worst = worst_deviation(result, rows, counts, matrices, ups if part == "gate_up" else None)
                outcome[part] = worst
            found[f"{name}: {load}"] = outcome
    return found


def prepare() -> dict[str, Any]:
    """What preparation loses of rows of many magnitudes, relative to their largest; the largest FP16 number; what sums lose."""
    from quantkit.kernels import moe_triton_blocks

    torch.manual_seed(5)
    rows = torch.randn(10, 512) * torch.logspace(-37, 37, 10)[:, None]
    rows[4] = torch.randn(512) * torch.logspace(-12, 0, 512)
    rows[5] = 0.0
    rows = rows.to(torch.bfloat16)
    ready = moe_triton_blocks.prepared(rows)
    exact = rows.to(torch.float64)
    back = ready.values.to(torch.float64) * ready.factors[:, None]
    peak = exact.abs().amax(1, keepdim=True).clamp(min=1e-45)
    sums = ready.sums.to(torch.float64).view(10, 2, 2, 8).sum(2).view(10, 16) * ready.factors[:, None]
    return {
        "lost": float(((back - exact).abs() / peak).max()),
        "changed": int((back != exact)[exact.abs() >= peak * 2.0**-26].sum()),
        "largest": float(ready.values.abs().max()),
        "sums": float(((sums - exact.view(10, 16, 32).sum(2)).abs() / (32 * peak)).max()),
    }


def unpack_by_hand() -> dict[str, int]:
    """Differences between what instructions and arithmetic make of random words, by piece of instructions."""
    from quantkit.kernels import moe_triton_blocks as kernels

    generator = np.random.default_rng(8)
    lanes = 1 << 14

    def words() -> Any:
        return generator.integers(0, 1 << 32, lanes, dtype=np.uint64).astype(np.uint32)

    def field(word: Any, place: int, bits: int) -> Any:
        return torch.from_numpy((word >> (bits * place) & ((1 << bits) - 1)).astype(np.int64))

    found = {}
    low, other, top, other_top, scales = words(), words(), words(), words(), words()
    whole = scales & 0x3F3F3F3F  # group scales of Q4_K have 6 bits
    steps = run(kernels._UNSIGNED_PAIRS.value, 4, [whole])
    turned = [run(kernels._LESS_1024.value, 1, [step])[0] for step in steps]
    given = [low, other] + [step for step in steps for _ in range(2)] + [step for step in turned for _ in range(2)]
    pairs = run(kernels._FOUR_BITS.value, 8, given)
    wrong = 0
    for place, pair in enumerate(pairs):
        scale = field(whole, place // 2, 8)
        for half, word in enumerate((low, other)):
            wrong += int((halves(pair, torch.float16)[:, half] != field(word, place, 4) * scale).sum())
    found["four bits"] = wrong
    steps = run(kernels._SIGNED_PAIRS.value, 4, [scales])
    for quarter in range(4):
        given = [low, other, top, other_top] + [step for step in steps for _ in range(2)]
        pairs = run(kernels._SIX_BITS.value[quarter], 8, given)
        wrong = 0
        for place in range(4):
            scale = (field(scales, place, 8) ^ 128) - 128
            for half, (word, upper) in enumerate(((low, top), (other, other_top))):
                code = field(word, 4 * (quarter % 2) + place, 4) + (field(upper, 4 * quarter + place, 2) << 4)
                exact = ((code - 32) * scale).to(torch.float64)
                product, rest = (halves(pairs[place + shift], torch.float16)[:, half] for shift in (0, 4))
                wrong += int((product + rest != exact).sum()) + int((product != exact.to(torch.float16)).sum())
        found[f"six bits, quarter {quarter}"] = wrong
    return found


def interpret() -> dict[str, Any]:
    """Everything that runs in the interpreter, in one process."""
    import triton_arithmetic

    torch.set_num_threads(1)
    triton_arithmetic.make_exact()
    return {"products": multiply(), "prepared": prepare(), "instructions": unpack_by_hand()}


# ----------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return interpreted_by(__file__)  # type: ignore[no-any-return]


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_float64(interpreted: dict[str, Any], name: str) -> None:
    for load in LOADS:
        found = interpreted["products"][f"{name}: {load}"]
        assert found["gate_up"] <= 1 and found["matmul"] <= 1, load
        assert found["beyond"], f"{load}: columns beyond the outputs are left alone"


@needs_triton
def test_rows_in_fp16_are_the_rows(interpreted: dict[str, Any]) -> None:
    found = interpreted["prepared"]
    assert found["changed"] == 0 and found["lost"] <= 2.0**-34
    assert 512 <= found["largest"] <= 1024
    assert found["sums"] <= 2.0**-20


@needs_triton
def test_instructions_unpack_what_arithmetic_says(interpreted: dict[str, Any]) -> None:
    assert interpreted["instructions"] == dict.fromkeys(["four bits", *(f"six bits, quarter {quarter}" for quarter in range(4))], 0)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_on_a_device_hold_every_number(name: str) -> None:
    """Taken out of the words again, by hand."""
    torch.manual_seed(2)
    weight = matrix(name, 24, 512)
    parts = device_blocks.parts(weight, torch.device("cpu"))
    words = parts.codes.to(torch.int64) & 0xFFFFFFFF
    if name == "Q8_0":
        assert torch.equal(parts.tables["scales"], weight.scale)
        codes = (words.view(24, 4, 1, 32) >> (8 * torch.arange(4)).view(1, 1, 4, 1)) & 255
        assert torch.equal(codes.reshape(24, 512) - 128, weight.codes.to(torch.int64))
        return
    each = device_blocks.CODE_WORDS[name]
    low = (words.view(24, 2, each)[:, :, :32].reshape(24, 4, 1, 16) >> (4 * torch.arange(8)).view(1, 1, 8, 1)) & 15
    codes = low.reshape(24, 512)
    if name == "Q6_K":
        top = (words.view(24, 2, 1, each)[..., 32:] >> (2 * torch.arange(16)).view(1, 1, 16, 1)) & 3
        codes = codes + (top.reshape(24, 512) << 4)
    assert torch.equal(codes, weight.codes.to(torch.int64))
    numbers = parts.tables["numbers"].contiguous().view(torch.uint8).view(24, 2, 20)
    assert torch.equal(numbers[..., :2].contiguous().view(torch.float16).view(24, 2), weight.scale)
    assert weight.group_scale is not None
    groups = weight.group_scale.shape[1] // 2
    assert torch.equal(numbers[..., 4 : 4 + groups].contiguous().view(torch.int8).view(24, -1), weight.group_scale)
    if name == "Q4_K":
        assert weight.minimum is not None and weight.group_minimum is not None
        assert torch.equal(numbers[..., 2:4].contiguous().view(torch.float16).view(24, 2), weight.minimum)
        assert torch.equal(numbers[..., 12:].contiguous().view(torch.int8).view(24, -1), weight.group_minimum)


if __name__ == "__main__":
    main({"interpret": interpret})
