"""The pieces of the fused kernels, each against torch or plain arithmetic, over every value where that is possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from quantkit import grid
from quantkit.kernels import jit, memory, numbers, simd, tiles
from quantkit.methods import rtn
from quantkit.methods.sources import kernel_source
from quantkit.scheme import parse_scheme
from quantkit.workspace import Workspace

compiled = njit(error_model="numpy")

# Each float32 up to 448 by its upper half, with the lower halves that rounding can tell apart: zero, least, near the middle, most.
LOWER_HALVES = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.int32)


def floats_up_to(largest: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    upper = np.arange(np.float32(largest).view(np.int32) >> 16, dtype=np.int32) << 16
    values = (upper[:, None] | LOWER_HALVES).reshape(-1).view(np.float32)
    return np.append(values, np.full(16 - values.size % 16, largest, np.float32))


@compiled
def round_all(magnitudes: Any, mantissa_bits: int, smallest_normal: float, codes: Any, values: Any) -> None:
    for place in range(0, magnitudes.size, 16):
        code, value = numbers.round_small(memory.load_float32(magnitudes, place), mantissa_bits, smallest_normal)
        memory.store(codes, place, code)
        memory.store(values, place, value)


def test_every_float_rounds_to_fp8_as_torch_does() -> None:
    magnitudes = floats_up_to(448.0)
    codes, values = np.empty(magnitudes.size, np.int32), np.empty_like(magnitudes)
    round_all(magnitudes, 3, 2.0**-6, codes, values)
    expected = torch.from_numpy(magnitudes).to(torch.float8_e4m3fn)
    assert np.array_equal(codes, expected.view(torch.uint8).numpy())
    assert np.array_equal(values, expected.float().numpy())


def test_every_float_rounds_to_the_nearest_fp4() -> None:
    magnitudes = floats_up_to(6.0)
    codes, values = np.empty(magnitudes.size, np.int32), np.empty_like(magnitudes)
    round_all(magnitudes, 1, 1.0, codes, values)
    assert np.array_equal(values, np.array(grid.FP4_VALUES, np.float32)[codes])
    distances = np.abs(magnitudes[:, None].astype(np.float64) - np.array(grid.FP4_VALUES))
    assert np.array_equal(np.abs(magnitudes.astype(np.float64) - values), distances.min(1))
    tied = (distances == distances.min(1, keepdims=True)).sum(1) > 1
    assert tied.sum() == len(grid.FP4_MIDPOINTS)
    assert not (codes[tied] % 2).any()


@compiled
def scales_of(numbers_: Any, largest: Any, global_scale: float, codes: Any, scales: Any) -> None:
    for place in range(0, largest.size, 16):
        code = numbers.fit_scale(numbers_, memory.load_float32(largest, place), global_scale)
        memory.store(codes, place, code)
        memory.store(scales, place, numbers.decode_scale(numbers_, code, global_scale))


@pytest.mark.parametrize(
    ("name", "global_scale"),
    [
        *((f"int{bits}-g32", 1.0) for bits in (2, 3, 4, 5, 6, 8)),
        ("fp8-channel-dynamic", 1.0),
        ("mxfp4", 1.0),
        ("nvfp4", 1.0),
        ("nvfp4", 2688 / 0.37),
    ],
)
def test_every_bf16_magnitude_gets_the_oracles_scale(name: str, global_scale: float) -> None:
    scheme = parse_scheme(name)
    assert scheme is not None
    largest = (np.arange(0x7F80, dtype=np.int32) << 16).view(np.float32)  # every non-negative finite BF16
    codes, scales = np.empty(largest.size, np.int32), np.empty_like(largest)
    divisor = torch.tensor([global_scale]) if scheme.global_scale else None
    scales_of(rtn.numbers_of(scheme), largest, float(np.float32(global_scale)), codes, scales)
    group = scheme.group_size or 1
    expected, _ = grid.fit(torch.from_numpy(largest).reshape(-1, 1).repeat(1, group), scheme, divisor)
    raw = expected.view(torch.int16 if scheme.scale_number == "bf16" else torch.uint8)
    assert np.array_equal(codes, raw.numpy().reshape(-1))
    assert np.array_equal(scales, grid.effective_scale(scheme, expected, divisor).numpy().reshape(-1))


@compiled
def load_once(source: Any, row: int, first_input: int, vectors: int, tile: Any) -> None:
    tiles.load_tile(source, row, first_input, vectors, tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [16, 48, 128])
@pytest.mark.parametrize("order", ["row-major", "input-major"])
def test_a_tile_holds_the_weights(dtype: torch.dtype, rows: int, order: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(dtype)
    if order == "input-major":
        weight = weight.t().contiguous().t()
    source = kernel_source(weight, 16, tiles.TILE_INPUTS)
    tile = np.full(tiles.STRIP_ROWS * tiles.TILE_INPUTS, np.nan, np.float32)
    load_once(source, 128, 256, rows // 16, tile)
    expected = weight[128 : 128 + rows, 256:].float().reshape(rows // 16, 16, 128).transpose(1, 2)
    loaded = tile.reshape(8, 128, 16)
    assert np.array_equal(loaded[: rows // 16], expected.numpy())
    assert np.isnan(loaded[rows // 16 :]).all()


def test_every_finite_half_is_loaded_exactly() -> None:
    for dtype, exponent in ((torch.float16, 0x7C00), (torch.bfloat16, 0x7F80)):
        codes = torch.arange(65536, dtype=torch.int32)
        codes = torch.where((codes & exponent) == exponent, 0, codes).to(torch.int16)
        weight = codes.view(dtype).reshape(128, 512)
        source, tile = kernel_source(weight, 16, tiles.TILE_INPUTS), np.empty(128 * 128, np.float32)
        for first in range(0, 512, 128):
            load_once(source, 0, first, 8, tile)
            expected = weight[:, first : first + 128].float().reshape(8, 16, 128).transpose(1, 2).numpy()
            assert np.array_equal(tile.reshape(8, 128, 16).view(np.int32), np.ascontiguousarray(expected).view(np.int32))


@compiled
def vector_operations(numbers_: Any, out: Any) -> tuple[int, int, float]:
    value, other = memory.load_float32(numbers_, 0), memory.load_float32(numbers_, 16)
    memory.store(out, 0, simd.minimum(value, other))
    memory.store(out, 16, simd.maximum(value, other))
    memory.store(out, 32, simd.nearest(value))
    memory.store(out, 48, simd.fused(value, other, value))
    memory.store(out, 64, simd.select(value < other, value, simd.floats(7.0)))
    memory.store(out, 80, simd.floats(simd.ints(value > other) + simd.ints(value != other)))
    memory.store(out, 96, simd.from_bits(simd.bits(value) & simd.ints(0x7FFFFFFF)))
    whole = simd.ints(simd.nearest(value))
    return simd.largest_lane(whole), simd.lane_sum(whole), simd.lane_sum(simd.doubles(value))


def test_vector_operations() -> None:
    torch.manual_seed(1)
    value = np.concatenate([[0.5, 1.5, 2.5, -0.5, -1.5, -0.0], np.random.default_rng(0).normal(size=10) * 9]).astype(np.float32)
    other = np.random.default_rng(1).normal(size=16).astype(np.float32)
    out = np.empty(112, np.float32)
    largest, total, exact = vector_operations(np.concatenate([value, other]), out)
    fused = (value.astype(np.float64) * other + value).astype(np.float32)  # exact products, so this rounds at most twice
    expected = [
        np.minimum(value, other),
        np.maximum(value, other),
        np.rint(value),
        fused,
        np.where(value < other, value, np.float32(7)),
        (value > other).astype(np.float32) + (value != other),
        np.abs(value),
    ]
    for got, want in zip(out.reshape(7, 16), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=0)
    assert largest == np.rint(value).max()
    assert total == np.rint(value).sum()
    assert exact == sum(value.astype(np.float64).tolist())


def test_scattered_and_transposed_stores() -> None:
    @compiled
    def write(words: Any, halves: Any, single: Any, out: Any) -> None:
        memory.transpose_int32(words, 0, 16, out, 3, 20)
        memory.scatter_halves(halves, 1, 3, memory.load_int32(words, 16))
        memory.scatter_bytes(single, 2, 2, memory.load_int32(words, 16))

    words = np.random.default_rng(2).integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
    halves, single, out = np.zeros(60, np.uint16), np.zeros(40, np.uint8), np.zeros((17, 20), np.int32)
    write(words.reshape(-1), halves.view(np.uint8), single, out.reshape(-1))
    assert np.array_equal(out.reshape(-1)[3:].tolist()[: 16 * 20], np.pad(words.T, ((0, 0), (0, 4))).reshape(-1).tolist())
    assert np.array_equal(halves[1:49:3], words[1].astype(np.uint16))
    assert np.array_equal(single[2:34:2], words[1].astype(np.uint8))
    assert np.count_nonzero(halves) <= 16
    assert np.count_nonzero(single) <= 16


def test_machine_code_is_looked_up_by_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = jit._Cache(vector_operations.py_func)

    class Codegen:
        def magic_tuple(self) -> tuple[str, ...]:
            return ("cpu",)

    before = cache._index_key((), Codegen())
    assert cache._index_key((), Codegen()) == before
    monkeypatch.setattr(jit, "_SOURCES", "other sources")
    assert cache._index_key((), Codegen()) != before


def test_a_kernel_runs_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place(function: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit, "_Cache", no_place)
    assert jit.kernel(lambda value: value + 1)(1) == 2
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.FunctionCache, "save_overload", full)
    assert jit.kernel(lambda value: value + 2)(1) == 3


def test_workspace_reuses_and_grows() -> None:
    workspace = Workspace()
    first = workspace.take("codes", 100)
    assert first.size == 100
    assert first.ctypes.data % 64 == 0
    assert np.shares_memory(workspace.take("codes", 50), first)
    assert not np.shares_memory(workspace.take("scales", 50), first)
    assert workspace.take("codes", 200).size == 200
    assert workspace.nbytes == 250
