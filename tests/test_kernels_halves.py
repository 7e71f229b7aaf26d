"""FP16 by integer arithmetic, against numpy's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.halves import LARGEST_HALF, from_half, to_half
from quantkit.kernels.jit import kernel
from quantkit.kernels.memory import load_float32, load_int32, store


@kernel
def to_halves(values: Any, halves: Any) -> None:
    for place in range(0, values.size, 16):
        store(halves, place, to_half(load_float32(values, place)))


@kernel
def from_halves(halves: Any, values: Any) -> None:
    for place in range(0, values.size, 16):
        store(values, place, from_half(load_int32(halves, place)))


def halves_of(values: np.ndarray) -> np.ndarray:
    halves = np.empty(values.size, np.int32)
    to_halves(values, halves)
    return halves


def expected(values: np.ndarray) -> np.ndarray:
    limited = np.clip(np.nan_to_num(values, nan=np.inf), -LARGEST_HALF, LARGEST_HALF)
    halves: np.ndarray = limited.astype(np.float16).view(np.uint16).astype(np.int32)
    return halves


def test_every_half_becomes_the_float_that_numpy_gives() -> None:
    halves = np.arange(1 << 16, dtype=np.int32)
    values = np.empty(halves.size, np.float32)
    from_halves(halves, values)
    wanted = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values.view(np.uint32), wanted.view(np.uint32))


def test_every_finite_half_comes_back() -> None:
    halves = np.arange(1 << 16, dtype=np.int32)
    values = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(halves_of(values)[finite], halves[finite])


def test_midpoints_between_neighbours_and_the_floats_beside_them() -> None:
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    values = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(np.inf))])
    values = np.concatenate([values, -values, np.zeros(-2 * values.size % 16, np.float32)])
    np.testing.assert_array_equal(halves_of(values), expected(values))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
def test_any_float_becomes_the_nearest_half_within_the_range(patterns: list[int]) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    values = np.where(np.isnan(values), np.float32(np.inf), values)
    np.testing.assert_array_equal(halves_of(values), expected(values))


def test_nan_is_clamped_too() -> None:
    assert set(halves_of(np.full(16, np.nan, np.float32)) & 0x7FFF) == {0x7BFF}
