"""Planes against an oracle that places every bit by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.planes import PLANES, pack_planes, plane_words, unpack_planes

WIDTHS = {
    2: [(2, 0)],
    3: [(2, 0), (1, 2)],
    4: [(4, 0)],
    5: [(4, 0), (1, 4)],
    6: [(4, 0), (2, 4)],
    7: [(4, 0), (2, 4), (1, 6)],
    8: [(8, 0)],
}


def bit_by_bit(codes: np.ndarray, bits: int) -> np.ndarray:
    """The layout in plain Python integers: one bit at a time."""
    rows, columns = codes.shape
    groups = -(-columns // 128)
    words = [[0] * (groups * 4 * bits) for _ in range(rows)]
    for row in range(rows):
        for column in range(groups * 128):
            stored = (int(codes[row, column]) if column < columns else 0) + 2 ** (bits - 1)
            group, k = divmod(column, 128)
            first = group * 4 * bits
            for width, low in WIDTHS[bits]:
                field, word = divmod(k, 4 * width)
                for bit in range(width):
                    words[row][first + word] |= (stored >> (low + bit) & 1) << (width * field + bit)
                first += 4 * width
    return np.array(words, np.uint32).reshape(rows, -1).view(np.int32)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, (rows, columns)).astype(np.int8)


def test_widths_are_all_there() -> None:
    assert {bits: sum(planes) for bits, planes in PLANES.items()} == {bits: bits for bits in range(2, 9)}


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from(sorted(PLANES)), rows=st.integers(0, 4), columns=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_layout_and_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack_planes(codes, bits)
    assert words.dtype == np.int32 and words.shape == (rows, plane_words(columns, bits))
    if rows:
        np.testing.assert_array_equal(words, bit_by_bit(codes, bits))
    np.testing.assert_array_equal(unpack_planes(words, bits, columns), codes)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_extremes(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = np.array([[-half] * 128, [half - 1] * 128, [0] * 128], np.int8)
    words = pack_planes(codes, bits)
    assert not words[0].any() and (words[1] == -1).all()
    np.testing.assert_array_equal(words, bit_by_bit(codes, bits))
    np.testing.assert_array_equal(unpack_planes(words, bits, 128), codes)


def test_four_bits_word_by_word() -> None:
    """One plane of 16 words: word b holds inputs b, 16 + b, ..., 112 + b, from the lowest nibble on."""
    codes = random_codes(1, 256, 4, 5)
    words = pack_planes(codes, 4).view(np.uint32)
    for group in range(2):
        for word in range(16):
            expected = sum((int(codes[0, 128 * group + 16 * j + word]) + 8) << (4 * j) for j in range(8))
            assert int(words[0, 16 * group + word]) == expected


def test_strided_codes_and_given_memory() -> None:
    codes = random_codes(200, 6, 3, 1).T  # [6, 200], input-major in memory
    out = np.full(6 * plane_words(200, 3), 77, np.int32)
    words = pack_planes(codes, 3, out)
    assert np.shares_memory(words, out)
    np.testing.assert_array_equal(words, bit_by_bit(codes, 3))
    target = np.full((6, 200), 99, np.int8)
    assert unpack_planes(words, 3, 200, target) is target
    np.testing.assert_array_equal(target, codes)
    np.testing.assert_array_equal(unpack_planes(words[1:5:2], 3, 200), codes[1:5:2])


def test_wrong_sizes() -> None:
    codes = random_codes(2, 128, 4, 0)
    with pytest.raises(ValueError, match="widths: 2, 3, 4, 5, 6, 7, 8"):
        pack_planes(codes, 9)
    with pytest.raises(ValueError, match="contiguous words"):
        pack_planes(codes, 4, np.empty(31, np.int32))
    with pytest.raises(ValueError, match="int16 codes"):
        pack_planes(codes.astype(np.int16), 4)
    words = pack_planes(codes, 4)
    with pytest.raises(ValueError, match="rows of 129 codes"):
        unpack_planes(words, 4, 129)
    with pytest.raises(ValueError, match="contiguous memory"):
        unpack_planes(words, 4, 128, np.empty((128, 2), np.int8).T)
