"""Kernels of Q4_K, Q5_K, Q2_K, Q4_1 and Q5_1: against ggml's own quantizer, and the formula of the stored value in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from block_kernels import squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import ggml_dequantize, ggml_quantize
from numpy.typing import NDArray

from quantkit.ggml import TYPES
from quantkit.kernels.block_target import BlockTarget
from quantkit.kernels.ggml_minimum import quantize_q2_k, quantize_q4_1, quantize_q4_k, quantize_q5_1, quantize_q5_k
from quantkit.kernels.tiles import BFLOAT16, FLOAT16, FLOAT32, Source

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"
Floats = NDArray[np.float32]
KERNELS = {"Q2_K": quantize_q2_k, "Q4_1": quantize_q4_1, "Q4_K": quantize_q4_k, "Q5_1": quantize_q5_1, "Q5_K": quantize_q5_k}
every_type = pytest.mark.parametrize("name", KERNELS)


class Outcome(NamedTuple):
    target: BlockTarget
    values: Floats  # [rows, columns], what a reader computes
    sums: tuple[Any, ...]


def quantize(
    name: str, weights: Floats, importance: Floats | None = None, searched: int = 1, input_major: bool = False, parts: int = 1
) -> Outcome:
    """Run a kernel on float32 weights."""
    rows, columns = weights.shape
    kind = TYPES[name]
    data = np.ascontiguousarray(weights.T if input_major else weights)
    row_stride, input_stride = (1, rows) if input_major else (columns, 1)
    source = Source(data.view(np.uint8).reshape(-1), FLOAT32, row_stride, input_stride, rows, columns)
    groups = rows * columns // kind.group if kind.group else 0
    blocks = rows * columns // kind.block
    target = BlockTarget(
        np.full(rows * columns, -1, np.int8),
        np.full(blocks, 0xFFFF, np.uint16),
        np.full(blocks, 0xFFFF, np.uint16),
        np.full(groups, -1, np.int8),
        np.full(groups, -1, np.int8),
    )
    given = np.ones(columns, np.float32) if importance is None else importance
    portion = rows // parts
    sums = [KERNELS[name](source, target, given, searched, first, first + portion) for first in range(0, rows, portion)]
    total = [sum(each[place] for each in sums) for place in range(4)]
    return Outcome(target, decode(name, target, rows), (*total, max(each[4] for each in sums)))


def decode(name: str, target: BlockTarget, rows: int) -> Floats:
    """The stored values by the formula of quantkit.ggml, in float32."""
    kind = TYPES[name]
    codes = target.codes.reshape(rows, -1).astype(np.float32)
    scales = np.repeat(target.scales.view(np.float16).astype(np.float32).reshape(rows, -1), kind.block, axis=1)
    minimums = np.repeat(target.minimums.view(np.float16).astype(np.float32).reshape(rows, -1), kind.block, axis=1)
    if not kind.group:
        return np.asarray(scales * codes + minimums, np.float32)
    group_scales = np.repeat(target.group_scales.reshape(rows, -1).astype(np.float32), kind.group, axis=1)
    group_minimums = np.repeat(target.group_minimums.reshape(rows, -1).astype(np.float32), kind.group, axis=1)
    return np.asarray((scales * group_scales) * codes - minimums * group_minimums, np.float32)


def sample(kind: str, rows: int = 64, columns: int = 1024) -> Floats:
    """Weights as BF16 holds them."""
    generator = np.random.default_rng(7)
    if kind == "tiny-scout":
        values = tiny_scout()[:rows].astype(np.float64)
    elif kind == "gaussian":
        values = 0.02 * generator.standard_normal((rows, columns))
    elif kind == "laplace":
        values = 0.02 * generator.laplace(size=(rows, columns))
    else:
        values = 0.02 * generator.standard_t(4, size=(rows, columns))
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.ascontiguousarray(bits.view(np.float32))


def tiny_scout() -> Floats:
    """Rows of attention matrices of the demo's model, ``[out, 256]``."""
    from safetensors.torch import load_file

    found = []
    for path in sorted(DEMO.glob("*.safetensors")):
        found += [tensor.float().numpy() for name, tensor in load_file(path).items() if "self_attn" in name and tensor.ndim == 2]
    rows = np.concatenate([tensor for tensor in found if tensor.shape[1] == 256])
    return rows[:: len(rows) // 256]


def importance_of(columns: int, spread: float = 1.0) -> Floats:
    return np.exp(spread * np.random.default_rng(3).standard_normal(columns)).astype(np.float32)


def checked(name: str, weights: Floats, importance: Floats | None = None) -> Outcome:
    """Quantize, and check everything that must hold whatever the weights are."""
    outcome = quantize(name, weights, importance)
    kind, target = TYPES[name], outcome.target
    assert target.codes.min() >= kind.codes[0] and target.codes.max() <= kind.codes[1]
    for integers in (target.group_scales, target.group_minimums):
        assert integers.size == 0 or (integers.min() >= 0 and integers.max() <= kind.group_scales[1])
    for halves in (target.scales, target.minimums):
        assert np.isfinite(halves.view(np.float16)).all()
    assert (target.scales.view(np.float16) >= 0).all()
    assert np.isfinite(outcome.sums[:4]).all()
    return outcome


# ------------------------------------------------------------------------------------------------------------------ errors


@every_type
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "tiny-scout"])
def test_error_is_below_that_of_ggml(name: str, kind: str, weighted: bool) -> None:
    weights = sample(kind)
    importance = importance_of(weights.shape[1]) if weighted else None
    theirs = ggml_dequantize(name, ggml_quantize(name, weights, importance), weights.shape[1])
    ours = checked(name, weights, importance).values
    assert squared_error(weights, ours, importance) < squared_error(weights, theirs, importance)


@every_type
@pytest.mark.parametrize("searched", [0, 1])
def test_sums_are_those_of_the_stored_values(name: str, searched: int) -> None:
    weights, importance = sample("student"), importance_of(1024)
    outcome = quantize(name, weights, importance, searched)
    squares = weights.astype(np.float64) ** 2
    np.testing.assert_allclose(outcome.sums[0], squared_error(weights, outcome.values, None), rtol=1e-6)
    np.testing.assert_allclose(outcome.sums[1], squares.sum(), rtol=1e-6)
    np.testing.assert_allclose(outcome.sums[2], squared_error(weights, outcome.values, importance), rtol=1e-6)
    np.testing.assert_allclose(outcome.sums[3], (squares * importance).sum(), rtol=1e-6)
    assert outcome.sums[4] == np.abs(weights).max().view(np.int32)


@every_type
def test_every_code_is_the_best_for_the_stored_numbers(name: str) -> None:
    weights = sample("laplace", 16, 512)
    outcome = quantize(name, weights)
    kind = TYPES[name]
    error = np.abs(weights - outcome.values)
    for code in range(kind.codes[0], kind.codes[1] + 1):
        other = outcome.target._replace(codes=np.full_like(outcome.target.codes, code))
        assert (error <= np.abs(weights - decode(name, other, 16)) * (1 + 1e-5) + 1e-9).all()


@every_type
def test_search_lowers_the_weighted_error(name: str) -> None:
    weights, importance = sample("gaussian"), importance_of(1024)
    plain, searched = (quantize(name, weights, importance, search).sums[2] for search in (0, 1))
    unaware = squared_error(weights, quantize(name, weights).values, importance)
    assert searched < 0.9 * plain
    assert searched < unaware


@every_type
def test_plain_fit_is_near_that_of_ggml(name: str) -> None:
    weights = sample("gaussian")
    theirs = ggml_dequantize(name, ggml_quantize(name, weights), weights.shape[1])
    assert squared_error(weights, quantize(name, weights, searched=0).values, None) < 1.35 * squared_error(weights, theirs, None)


# ------------------------------------------------------------------------------------------------- order, strides, dtypes


@every_type
def test_results_depend_neither_on_strides_nor_on_portions(name: str) -> None:
    weights, importance = sample("student", 160, 512), importance_of(512)
    one = quantize(name, weights, importance)
    for other in (quantize(name, weights, importance, input_major=True), quantize(name, weights, importance, parts=5)):
        for left, right in zip(one.target, other.target, strict=True):
            np.testing.assert_array_equal(left, right)
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-12)


@every_type
def test_other_rows_are_left_alone(name: str) -> None:
    weights = sample("gaussian", 48, 256)
    whole, kind = quantize(name, weights), TYPES[name]
    source = Source(weights.view(np.uint8).reshape(-1), FLOAT32, 256, 1, 48, 256)
    target = BlockTarget(*(np.full_like(array, 85) for array in whole.target))
    KERNELS[name](source, target, np.ones(256, np.float32), 1, 16, 32)
    for array, expected, share in zip(target, whole.target, (1, kind.block, kind.block, kind.group, kind.group), strict=True):
        if array.size:
            found, wanted = array.reshape(48, 256 // share), expected.reshape(48, 256 // share)
            np.testing.assert_array_equal(found[16:32], wanted[16:32])
            assert (found[:16] == 85).all() and (found[32:] == 85).all()


@every_type
@pytest.mark.parametrize("stored", [BFLOAT16, FLOAT16])
def test_narrow_sources_give_what_their_float32_values_give(name: str, stored: int) -> None:
    halves = sample("gaussian", 16, 256).astype(np.float16)
    narrow: np.ndarray[Any, Any] = halves.view(np.uint16)
    weights = halves.astype(np.float32)
    if stored == BFLOAT16:
        narrow = (weights.view(np.uint32) >> 16).astype(np.uint16)
        weights = (narrow.astype(np.uint32) << 16).view(np.float32)
    expected = quantize(name, weights)
    target = BlockTarget(*(np.empty_like(array) for array in expected.target))
    source = Source(narrow.view(np.uint8).reshape(-1), stored, 256, 1, 16, 256)
    KERNELS[name](source, target, np.ones(256, np.float32), 1, 0, 16)
    for left, right in zip(target, expected.target, strict=True):
        np.testing.assert_array_equal(left, right)


# -------------------------------------------------------------------------------------------------------------- edge cases


@every_type
def test_zeros_stay_zeros(name: str) -> None:
    outcome = checked(name, np.zeros((16, 256), np.float32), importance_of(256))
    np.testing.assert_array_equal(outcome.values, 0)
    assert outcome.sums == (0, 0, 0, 0, 0)


@every_type
@pytest.mark.parametrize("constant", [0.75, -0.75, 0.1, -3e-4])
def test_constants_are_met(name: str, constant: float) -> None:
    weights = np.full((16, 256), constant, np.float32)
    np.testing.assert_allclose(checked(name, weights).values, weights, rtol=2e-3)


@every_type
def test_a_constant_with_little_noise_is_no_worse_than_in_ggml(name: str) -> None:
    noise = np.random.default_rng(5).standard_normal((32, 256))
    for middle in (-1.0, 1.0):
        weights = (middle + 0.01 * noise).astype(np.float32)
        theirs = ggml_dequantize(name, ggml_quantize(name, weights), 256)
        assert squared_error(weights, checked(name, weights).values, None) <= 1.001 * squared_error(weights, theirs, None)


@every_type
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e-9, 1e-6, 1e3, 1e6, 1e20, 1e30, 3e38])
def test_tiny_and_huge_weights_give_finite_numbers(name: str, size: float) -> None:
    weights = (size * np.clip(np.random.default_rng(2).standard_normal((16, 256)) / 3, -1, 1)).astype(np.float32)
    outcome = checked(name, weights, importance_of(256))
    assert np.isfinite(outcome.values).all()
    assert outcome.sums[2] <= outcome.sums[3] * (1 + 1e-6)  # at worst what zeros give


@every_type
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 3e-6])
def test_scales_with_few_bits_of_fp16(name: str, size: float) -> None:
    """Such weights have scales near the smallest FP16 numbers."""
    weights = (sample("gaussian") * np.float32(size / 0.02)).astype(np.float32)
    theirs = ggml_dequantize(name, ggml_quantize(name, weights), 1024)
    error = squared_error(weights, checked(name, weights).values, None)
    assert error < squared_error(weights, theirs, None)
    assert error < 0.1 * squared_error(weights, np.zeros_like(weights), None)


@every_type
def test_one_huge_outlier(name: str) -> None:
    """It is met within what FP16 scales allow, and changes nothing for other rows."""
    weights, importance = sample("gaussian", 32, 512), importance_of(512)
    expected = quantize(name, weights, importance).values
    weights[3, 17], weights[20, 300] = 1e4, -1e4
    values = checked(name, weights, importance).values
    assert squared_error(weights, values, importance) < 1e-5 * squared_error(weights, np.zeros_like(weights), importance)
    others = np.delete(np.arange(32), [3, 20])
    np.testing.assert_array_equal(values[others], expected[others])


@every_type
@pytest.mark.parametrize("size", [0.2, 1.0, 5.0])
def test_outliers_in_every_block(name: str, size: float) -> None:
    weights, importance = sample("gaussian"), importance_of(1024)
    generator = np.random.default_rng(11)
    for start in range(0, 1024, 256):
        weights[np.arange(64), start + generator.integers(0, 256, 64)] = size * generator.choice([-1, 1], 64)
    theirs = ggml_dequantize(name, ggml_quantize(name, weights, importance), 1024)
    assert squared_error(weights, checked(name, weights, importance).values, importance) <= squared_error(
        weights, theirs, importance
    )


@every_type
def test_importance_of_zeros_counts_as_none(name: str) -> None:
    weights = sample("gaussian", 16, 256)
    outcome = checked(name, weights, np.zeros(256, np.float32))
    assert outcome.sums[2:4] == (0, 0)
    np.testing.assert_array_equal(outcome.values, quantize(name, weights).values)


@every_type
def test_some_importance_of_zero(name: str) -> None:
    weights, importance = sample("laplace", 64, 512), importance_of(512)
    importance[::3] = 0
    importance[64:128] = 0
    theirs = ggml_dequantize(name, ggml_quantize(name, weights, importance), 512)
    outcome = checked(name, weights, importance)
    assert squared_error(weights, outcome.values, importance) < squared_error(weights, theirs, importance)


@every_type
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_of_importance_changes_nothing(name: str, size: float) -> None:
    weights, power_of_two = sample("gaussian", 16, 256), np.float32(2.0 ** np.round(np.log2(size)))
    one, other = checked(name, weights, importance_of(256)), checked(name, weights, importance_of(256) * power_of_two)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(other.sums[2:4], np.array(one.sums[2:4]) * float(power_of_two), rtol=1e-6)


@every_type
def test_one_input_of_overwhelming_importance(name: str) -> None:
    weights, importance = sample("gaussian", 32, 256), np.ones(256, np.float32)
    importance[100] = 1e30
    outcome = checked(name, weights, importance)
    step = np.abs(weights).max(axis=1) / TYPES[name].codes[1]
    assert (np.abs(outcome.values - weights)[:, 100] < step / 4).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_finite_weights_and_importance(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KERNELS)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    smallest, largest = sorted(data.draw(st.tuples(st.integers(-149, 127), st.integers(-149, 127))))
    exponents = generator.integers(smallest, largest, (16, 256), endpoint=True)
    weights = np.ldexp(generator.uniform(-1, 1, (16, 256)), exponents).astype(np.float32)
    if data.draw(st.booleans()):
        weights = np.abs(weights) * np.float32(data.draw(st.sampled_from([-1, 1])))
    lowest, highest = sorted(data.draw(st.tuples(st.integers(-100, 100), st.integers(-100, 100))))
    importance = np.ldexp(generator.uniform(0, 1, 256), generator.integers(lowest, highest, 256, endpoint=True)).astype(np.float32)
    outcome = checked(name, weights, importance)
    np.testing.assert_allclose(outcome.sums[0], squared_error(weights, outcome.values, None), rtol=1e-4)
