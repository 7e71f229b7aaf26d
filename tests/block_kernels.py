"""Running a kernel of one of ggml's types by itself, and reading what it stores by the formulas of ``quantkit.ggml``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from quantkit.ggml import TYPES
from quantkit.kernels.block_target import BlockTarget
from quantkit.methods.sources import kernel_source

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"

Floats = np.ndarray[Any, np.dtype[np.float32]]
Kernel = Callable[..., tuple[float, float, float, float, int]]


def run(
    kernel: Kernel, name: str, weight: torch.Tensor, importance: Floats | None = None, searched: int = 1, portion: int = 1 << 20
) -> tuple[BlockTarget, list[float]]:
    """What the kernel stores, and its sums; ``portion`` rows at a time."""
    kind, (rows, columns) = TYPES[name], weight.shape
    weighting = np.ones(columns, np.float32) if importance is None else importance
    target = BlockTarget(
        np.full(weight.numel(), 99, np.int8),
        np.full(weight.numel() // kind.block, 99, np.uint8 if name == "MXFP4" else np.uint16),
        np.zeros(0, np.uint16),
        np.full(weight.numel() // kind.group if kind.group else 0, 99, np.int8),
        np.zeros(0, np.int8),
    )
    source = kernel_source(weight, 16, max(128, kind.block))
    parts = [kernel(source, target, weighting, searched, first, min(first + portion, rows)) for first in range(0, rows, portion)]
    return target, [sum(part[k] for part in parts) for k in range(4)] + [max(part[4] for part in parts)]


def values(name: str, target: BlockTarget, rows: int) -> Floats:
    """Stored values, float32 ``[rows, columns]``."""
    kind, codes = TYPES[name], target.codes.reshape(rows, -1).astype(np.int64)
    if name == "MXFP4":
        scale = np.ldexp(np.float32(1), target.scales.astype(np.int32) - 128)
    else:
        scale = target.scales.view(np.float16).astype(np.float32)
    assert np.isfinite(scale).all()
    scale = scale.reshape(rows, -1)
    if kind.group:
        multiples = target.group_scales.reshape(rows, -1)
        assert kind.group_scales[0] <= multiples.min() and multiples.max() <= kind.group_scales[1]
        scale = np.repeat(scale, kind.block // kind.group, 1) * multiples.astype(np.float32)
    assert kind.codes[0] <= codes.min() and codes.max() <= kind.codes[1]
    levels = (codes - kind.offset if kind.levels is None else np.array(kind.levels)[codes]).astype(np.float32)
    return np.asarray(np.repeat(scale, kind.group or kind.block, 1) * levels, np.float32)


def squared_error(weight: Floats, stored: Floats, importance: Floats | None = None) -> float:
    error = np.square(weight.astype(np.float64) - stored)
    return float((error if importance is None else error * importance).sum())


def matrix(kind: str, rows: int = 32, columns: int = 1024) -> Floats:
    generator = np.random.default_rng(3)
    if kind == "real":
        return real_weights(rows, columns)
    draws = {
        "gaussian": lambda: generator.standard_normal((rows, columns)),
        "laplace": lambda: generator.laplace(size=(rows, columns)),
        "student": lambda: generator.standard_t(4, (rows, columns)),
    }
    return (0.02 * draws[kind]()).astype(np.float32)


def real_weights(rows: int, columns: int) -> Floats:
    """Weights of attention and of experts of the trained tiny model."""
    parts = []
    for path in sorted(DEMO.glob("model-*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, not a dictionary
                if name.endswith(("q_proj.weight", "o_proj.weight", "experts.down_proj")):
                    parts.append(shard.get_tensor(name).float().reshape(-1)[: 4 * columns])
    everything = torch.cat(parts)
    return np.ascontiguousarray(everything[: rows * columns].reshape(rows, columns).numpy())


def importance_of(columns: int) -> Floats:
    return np.random.default_rng(5).lognormal(0, 1, columns).astype(np.float32)


def check_error_against_ggml(kernel: Kernel, name: str, kind: str, weighted: bool, below: float) -> None:
    """Error at most ``below`` times ggml's, and the kernel's own sums against a count from what it stored."""
    weight = matrix(kind)
    importance = importance_of(weight.shape[1]) if weighted else None
    theirs = llama_cpp.ggml_dequantize(name, llama_cpp.ggml_quantize(name, weight, importance), weight.shape[1])
    target, sums = run(kernel, name, torch.from_numpy(weight), importance)
    ours = values(name, target, len(weight))
    assert squared_error(weight, ours, importance) < below * squared_error(weight, theirs, importance)
    assert sums[0] == pytest.approx(squared_error(weight, ours), rel=1e-5)
    assert sums[1] == pytest.approx(squared_error(weight, np.zeros_like(weight)), rel=1e-6)
    assert sums[2] == pytest.approx(squared_error(weight, ours, importance), rel=1e-5)
    assert sums[3] == pytest.approx(squared_error(weight, np.zeros_like(weight), importance), rel=1e-6)
    assert sums[4] == np.abs(weight).max().view(np.int32)


def check_search_helps(kernel: Kernel, name: str) -> None:
    """Without a search the error is larger, but that of a type that just spans the range."""
    weight = matrix("laplace")
    plain, searched = (values(name, run(kernel, name, torch.from_numpy(weight), searched=search)[0], 32) for search in (0, 1))
    assert squared_error(weight, searched) < 0.99 * squared_error(weight, plain)
    theirs = llama_cpp.ggml_dequantize(name, llama_cpp.ggml_quantize(name, weight), weight.shape[1])
    assert squared_error(weight, plain) < 1.25 * squared_error(weight, theirs)


def check_layouts(kernel: Kernel, name: str) -> None:
    """The same result whatever the dtype and the stride order, and however rows are cut into portions."""
    weight = torch.from_numpy(matrix("gaussian", 160, 512)).to(torch.bfloat16)
    expected, sums = run(kernel, name, weight)
    for other, portion in ((weight.t().contiguous().t(), 1 << 20), (weight.t().contiguous().t(), 48), (weight.float(), 16)):
        found, other_sums = run(kernel, name, other, portion=portion)
        assert all(np.array_equal(one, another) for one, another in zip(expected, found, strict=True))
        assert other_sums == pytest.approx(sums)


def check_extremes(kernel: Kernel, name: str, searched: int, worst: float) -> None:
    """Valid and finite results for any weights and any importance; ordinary rows among them stay within ``worst``."""
    generator = np.random.default_rng(9)
    weight = generator.standard_normal((32, 512)).astype(np.float32)
    factors = [0.0, 1e-45, 1e-40, 1e-30, 1e-12, 1e-7, 1e-4, 1e4, 1e6, 1e12, 1e30, 3e37]
    for row, factor in enumerate(factors):
        weight[row] = np.float32(factor) * weight[row]
    weight[12, :256], weight[13], weight[15] = 0, 0, 1
    weight[13, 7] = 1
    weight[14, ::2] = -0.0
    weight[16, :32] *= 1e-20
    weight[17, 3], weight[18, 3] = 3e38, -3e38
    weight[19, 5] = 1e3  # one outlier
    ordinary = [6, 7, 14, *range(20, 32)]
    few = (np.arange(512) % 32 < 4) * 1.0
    for importance in (np.zeros(512), np.full(512, 1e-38), np.full(512, 1e38), np.full(512, 1e30), few, np.ones(512)):
        target, sums = run(kernel, name, torch.from_numpy(weight), importance.astype(np.float32), searched)
        stored = values(name, target, 32)
        assert np.isfinite(stored).all() and np.isfinite(sums).all()
        assert not stored[0].any()
        assert sums[0] == pytest.approx(squared_error(weight, stored), rel=1e-4)
        assert sums[2] == pytest.approx(squared_error(weight, stored, importance.astype(np.float32)), rel=1e-4)
        if importance[5]:
            error = np.linalg.norm((stored - weight)[ordinary], axis=1) / np.linalg.norm(weight[ordinary], axis=1)
            assert error.max() < worst
            assert abs(stored[13, 7] - 1) < 0.01 and abs(stored[15] - 1).max() < 0.01 + worst / 4
            assert abs(stored[19, 5] / 1e3 - 1) < 2 * worst


def check_what_is_not_finite_shows(kernel: Kernel, name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        weight = torch.from_numpy(matrix("gaussian", 16, 512))
        weight[5, 300] = float(bad)
        assert run(kernel, name, weight)[1][4] >= 0x7F800000


def check_small_weights(kernel: Kernel, name: str, worst: float) -> None:
    """Where scales come near the smallest FP16 numbers, weights are not clipped or lost."""
    draw, importance = matrix("gaussian", 32, 512) * 50, importance_of(512)
    for factor in (1e-3, 1e-4, 1e-5):
        weight = (np.float32(factor) * draw).astype(np.float32)
        theirs = llama_cpp.ggml_dequantize(name, llama_cpp.ggml_quantize(name, weight, importance), 512)
        _, sums = run(kernel, name, torch.from_numpy(weight), importance)
        assert sums[2] < squared_error(weight, theirs, importance)
        assert sums[2] < worst**2 * sums[3]
