"""Quantizing to the codebook types: at most ggml's error, for any weights; the search against all points of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from block_kernels import importance_of, squared_error
from safetensors import safe_open

from quantkit.codebooks import CODEBOOKS, dequantize_codebook, grid_digits
from quantkit.formats.ggml_codebooks import encode_codebook
from quantkit.grid import QuantizedTensor
from quantkit.kernels import ggml_codebook, ggml_codebook_points, memory, simd, tiles
from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_codebook_tables import grid_tables
from quantkit.kernels.jit import compiled
from quantkit.methods.sources import kernel_source
from quantkit.scheme import parse_scheme

NAMES = sorted(CODEBOOKS)
DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"

Floats = np.ndarray[Any, np.dtype[np.float32]]


def quantize(
    name: str, weight: torch.Tensor, importance: Floats | None = None, searched: int = 1, portion: int = 1 << 20
) -> tuple[QuantizedTensor, list[float]]:
    """Quantized rows, and the kernel's sums; ``portion`` rows at a time."""
    rows, columns = weight.shape
    weighting = np.ones(columns, np.float32) if importance is None else importance
    groups = weight.numel() // CODEBOOKS[name].group
    target = BlockTarget(
        np.full(weight.numel(), 99, np.int8),
        np.full(weight.numel() // 256, 99, np.uint16),
        np.zeros(0, np.uint16),
        np.full(groups, 99, np.int8),
        np.zeros(0, np.int8),
    )
    source = kernel_source(weight, 16, 256)
    parts = [
        ggml_codebook.KERNELS[name](source, target, weighting, searched, first, min(first + portion, rows))
        for first in range(0, rows, portion)
    ]
    scheme = parse_scheme(name)
    assert scheme is not None
    quantized = QuantizedTensor(
        scheme,
        torch.from_numpy(target.codes).reshape(rows, columns),
        torch.from_numpy(target.scales).view(torch.float16).reshape(rows, -1),
        group_scale=torch.from_numpy(target.group_scales).reshape(rows, -1),
    )
    return quantized, [sum(part[k] for part in parts) for k in range(4)] + [max(part[4] for part in parts)]


def values_of(quantized: QuantizedTensor) -> Floats:
    assert quantized.group_scale is not None
    return dequantize_codebook(quantized.scheme.name, quantized.codes, quantized.scale, quantized.group_scale).numpy()


def real_weights() -> Floats:
    """Rows of attention and of experts of the trained tiny model."""
    rows: list[Floats] = []
    for path in sorted(DEMO.glob("model-*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dictionary
                if name.endswith(("q_proj.weight", "experts.down_proj")):
                    tensor = shard.get_tensor(name).float()
                    tensor = tensor.transpose(1, 2).reshape(-1, tensor.shape[1]) if tensor.ndim == 3 else tensor
                    if tensor.shape[1] % 256 == 0:
                        rows.append(tensor.reshape(-1, 256)[:: max(1, tensor.numel() // 256 // 64)].numpy())
    return np.ascontiguousarray(np.concatenate(rows)[:128])


def matrix(kind: str) -> Floats:
    generator = np.random.default_rng(3)
    if kind == "real":
        return real_weights()
    draw = generator.standard_normal((16, 1024)) if kind == "gaussian" else generator.laplace(size=(16, 1024))
    return (0.02 * draw).astype(np.float32)


WITHOUT_IMPORTANCE = [name for name in NAMES if not llama_cpp.ggml_requires_importance(name)]  # where ggml does that


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "real"])
@pytest.mark.parametrize(("name", "weighted"), [(name, True) for name in NAMES] + [(name, False) for name in WITHOUT_IMPORTANCE])
def test_error_is_below_that_of_ggml(name: str, kind: str, weighted: bool) -> None:
    weight = matrix(kind)
    importance = importance_of(weight.shape[1]) if weighted else None
    theirs = llama_cpp.ggml_dequantize(name, llama_cpp.ggml_quantize(name, weight, importance), weight.shape[1])
    quantized, sums = quantize(name, torch.from_numpy(weight), importance)
    ours = values_of(quantized)
    assert squared_error(weight, ours, importance) < 0.95 * squared_error(weight, theirs, importance)
    # What the kernel says of itself, and what llama.cpp makes of the bytes.
    assert sums[0] == pytest.approx(squared_error(weight, ours, None), rel=1e-5)
    assert sums[1] == pytest.approx(squared_error(weight, np.zeros_like(weight), None), rel=1e-9)
    assert sums[2] == pytest.approx(squared_error(weight, ours, importance), rel=1e-5)
    assert sums[3] == pytest.approx(squared_error(weight, np.zeros_like(weight), importance), rel=1e-6)
    assert sums[4] == np.abs(weight).max().view(np.int32)
    assert np.array_equal(llama_cpp.ggml_dequantize(name, encode_codebook(quantized).numpy(), weight.shape[1]), ours)


@pytest.mark.parametrize("name", NAMES)
def test_search_lowers_the_error(name: str) -> None:
    weight = matrix("laplace")
    plain, searched = (values_of(quantize(name, torch.from_numpy(weight), searched=search)[0]) for search in (0, 1))
    assert squared_error(weight, searched, None) < 0.99 * squared_error(weight, plain, None)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_how_weights_lie(name: str) -> None:
    weight = torch.from_numpy(matrix("gaussian")[:, :512]).repeat(2, 1).to(torch.bfloat16)
    expected, sums = quantize(name, weight)
    for other, portion in ((weight.t().contiguous().t(), 1 << 20), (weight.float(), 1 << 20), (weight, 16)):
        quantized, other_sums = quantize(name, other, portion=portion)
        assert torch.equal(encode_codebook(quantized), encode_codebook(expected))
        assert other_sums == pytest.approx(sums)


@pytest.mark.parametrize("searched", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_weights_and_importance_give_valid_blocks(name: str, searched: int) -> None:
    generator = np.random.default_rng(9)
    weight = generator.standard_normal((32, 512)).astype(np.float32)
    factors = [0.0, 1e-45, 1e-40, 1e-30, 1e-12, 1e-6, 1e-4, 1e4, 1e6, 1e12, 1e30, 3e37]
    for row, factor in enumerate(factors):
        weight[row] = np.float32(factor) * weight[row]
    weight[12, :256] = 0
    weight[13] = 0
    weight[13, 7] = 1
    weight[14, ::2] = -0.0
    weight[15] = 1
    weight[16, :32] *= 1e-20
    weight[17, 3] = 3e38
    for importance in (np.zeros(512), np.full(512, 1e-38), np.full(512, 1e38), (np.arange(512) % 32 < 4) * 1.0, np.ones(512)):
        quantized, sums = quantize(name, torch.from_numpy(weight), importance.astype(np.float32), searched)
        assert bool(torch.isfinite(quantized.scale).all())
        assert np.isfinite(values_of(quantized)).all()
        encode_codebook(quantized)  # refuses what is no point of the grid
        assert all(np.isfinite(sums))
    assert not values_of(quantized)[0].any()
    ordinary = [5, 6, 7, *range(18, 32)]
    error = np.linalg.norm(values_of(quantized)[ordinary] - weight[ordinary], axis=1) / np.linalg.norm(weight[ordinary], axis=1)
    assert error.max() < 0.7


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S", "IQ1_S"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    weight[5, 300] = bad
    assert quantize(name, weight)[1][4] >= 0x7F800000


@compiled
def find_points(grid: Any, scratch: Any, inverse: float, shift: float, costs: Any, levels: Any) -> None:
    step, move = simd.floats(inverse), simd.floats(shift)
    if grid.shifted:
        one, other, payload, other_payload = ggml_codebook_points._assign_runs(grid, scratch, 0, step, move, move)
    else:
        one, other, payload, other_payload = ggml_codebook_points.nearest_points(grid, scratch, 0, step, move, move)
    memory.store(costs, 0, one)
    memory.store(costs, 16, other)
    for k in range(grid.length):
        memory.store(levels, k * 16, ggml_codebook_points.level_of(grid, payload, k))
        memory.store(levels, (grid.length + k) * 16, ggml_codebook_points.level_of(grid, other_payload, k))


@compiled
def fill(grid: Any, importance: Any, magnitudes: Any) -> Any:
    scratch = ggml_codebook._scratch(grid)
    scratch.magnitudes[:] = magnitudes
    ggml_codebook._prepare_levels(grid, scratch, importance, 0)
    if grid.shifted:
        ggml_codebook._prepare_tilts(grid, scratch, importance, 0)
    return scratch


@compiled
def guess_shifts(grid: Any, scratch: Any, inverse: float, importance: Any) -> None:
    ggml_codebook_points.choose_shifts(grid, scratch, 0, simd.floats(inverse), importance, 0)


@pytest.mark.parametrize(
    ("name", "shift"), [(name, shift) for name in NAMES for shift in ((1, -1) if CODEBOOKS[name].shifted else (0,))]
)
def test_nearest_points_are_those_of_the_whole_grid(name: str, shift: int) -> None:
    book, grid = CODEBOOKS[name], grid_tables(name)
    generator, count = np.random.default_rng(1), 2 * book.length
    importance = generator.lognormal(0, 1, 256).astype(np.float32)
    magnitudes = generator.standard_normal((256, 16)).astype(np.float32)
    step = 0.5 / grid.rms
    costs, levels = np.empty(32, np.float32), np.empty(count * 16, np.float32)
    find_points(grid, fill(grid, importance, magnitudes.reshape(-1)), 2 / step, shift, costs, levels)
    points = np.array(book.levels, np.float64)[grid_digits(name)] + shift
    for run in range(2):
        inputs = slice(run * book.length, (run + 1) * book.length)
        wanted = magnitudes[inputs].astype(np.float64) / step  # [length, 16]
        distances = (importance[inputs][:, None, None] * np.square(wanted[:, None] - points.T[:, :, None])).sum(0)  # [points, 16]
        found = levels.reshape(count, 16)[inputs]
        ours = (importance[inputs][:, None] * np.square(wanted - found)).sum(0)
        assert all(any((point == found[:, row]).all() for point in points) for row in range(16))
        constant = (importance[inputs][:, None] * np.square(wanted)).sum(0)
        # Costs are compared with 15 bits.
        np.testing.assert_allclose(ours, distances.min(0), atol=1e-3 * float(np.abs(distances.min(0) - constant).max()))
        np.testing.assert_allclose(costs[run * 16 : run * 16 + 16], distances.min(0) - constant, rtol=1e-3)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M"])
def test_levels_are_moved_where_that_suits_free_combinations(name: str) -> None:
    book, grid = CODEBOOKS[name], grid_tables(name)
    generator = np.random.default_rng(2)
    importance = generator.lognormal(0, 1, 256).astype(np.float32)
    magnitudes = generator.standard_normal((256, 16)).astype(np.float32)
    scratch, step = fill(grid, importance, magnitudes.reshape(-1)), 0.12
    guess_shifts(grid, scratch, 2 / step, importance)
    for start in range(0, book.group, book.shifted):
        inputs = slice(start, start + book.shifted)
        levels = np.array(book.levels)[:, None] + np.array([1, -1])  # [levels, directions]
        gaps = np.square(magnitudes[inputs, :, None, None].astype(np.float64) / step - levels).min(2)  # [inputs, 16, directions]
        expected = np.array([1, -1])[(importance[inputs, None, None] * gaps).sum(0).argmin(1)]
        for run in range(start // book.length, (start + book.shifted) // book.length):
            assert np.array_equal(scratch.shifts[run * 16 : run * 16 + 16], expected)


@compiled
def roots(values: Any) -> None:
    for place in range(0, values.size, 16):
        memory.store(values, place, simd.root(memory.load_float32(values, place)))


def test_roots() -> None:
    ordinary = np.random.default_rng(0).exponential(size=1008)
    values = np.concatenate([ordinary, [0, 1, 2, 1e-45, 1e-38, 3e38, 4, 9]] * 2).astype(np.float32)
    expected = np.sqrt(values)
    roots(values)
    assert np.array_equal(values, expected)


def test_tile_is_two_loads_of_a_block() -> None:
    assert 2 * tiles.TILE_INPUTS == ggml_codebook_points.BLOCK
