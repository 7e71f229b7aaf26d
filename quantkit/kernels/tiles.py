"""Tiles: how a matrix ``[out, in]`` passes through the first-level cache, and where its codes go.

A matrix is cut into strips of 64 rows (128 for block scales) and chunks of 128 inputs.  A chunk of a strip is loaded into a float32
tile ``[lane vectors, TILE_INPUTS, 16]``; scales, search, codes and statistics are computed there, and codes leave transposed, in
whole words.  Slices of fused expert tensors are input-major, which is the tile's own order; row-major sources are transposed while
they are loaded.

``rows`` is a multiple of 16 (of 128 for blocks) and ``columns`` of 128.  Zeros added as padding change no scale of a real row, no
code of a real weight and no sum, so odd shapes are padded by the caller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from quantkit.kernels.numbers import SCALE_BF16, Numbers, largest_magnitude
from quantkit.kernels.simd import (
    compiled,
    ints,
    kernel,
    largest_lane,
    load_bfloat16,
    load_float16,
    load_float32,
    maximum,
    scatter_bytes,
    scatter_halves,
    store,
    transpose_bfloat16,
    transpose_float16,
    transpose_float32,
    transpose_int32,
)

STRIP_ROWS = 64
BLOCK_ROWS = 128
TILE_INPUTS = 128
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # Source.stored


class Source(NamedTuple):
    """A matrix in memory.  data: its bytes, uint8 from the first weight on.  Strides count weights; one of them is 1."""

    data: Any
    stored: int
    row_stride: int
    input_stride: int
    rows: int
    columns: int


class Target(NamedTuple):
    """Where results go, as bytes.  codes: ``[rows, columns]``.  scales: scale codes of one or two bytes.  zero_points: one each."""

    codes: Any
    scales: Any
    zero_points: Any


class Scratch(NamedTuple):
    """Memory a kernel works in.

    All are float32 arrays, some hold bits of integers.  tile: ``[BLOCK_ROWS / 16, TILE_INPUTS, 16]``.  words: four codes each,
    ``[TILE_INPUTS / 4, 16]``.  For each row of a strip: scale_codes, largest, low, high; errors: ``[candidates + 1, STRIP_ROWS]``.
    """

    tile: Any
    words: Any
    scale_codes: Any
    largest: Any
    low: Any
    high: Any
    errors: Any


@compiled
def load_tile(source: Source, row: int, first_input: int, vectors: int, tile: Any) -> None:
    """Copy 16 * vectors rows x 128 inputs to the tile as float32."""
    start = row * source.row_stride + first_input * source.input_stride
    if source.row_stride == 1:
        for step in range(TILE_INPUTS):
            for vector in range(vectors):
                position, target = start + step * source.input_stride + vector * 16, (vector * TILE_INPUTS + step) * 16
                if source.stored == BFLOAT16:
                    store(tile, target, load_bfloat16(source.data, position))
                elif source.stored == FLOAT16:
                    store(tile, target, load_float16(source.data, position))
                else:
                    store(tile, target, load_float32(source.data, position))
        return
    for vector in range(vectors):
        for step in range(0, TILE_INPUTS, 16):
            position, target = start + vector * 16 * source.row_stride + step, (vector * TILE_INPUTS + step) * 16
            if source.stored == BFLOAT16:
                transpose_bfloat16(source.data, position, source.row_stride, tile, target, 16)
            elif source.stored == FLOAT16:
                transpose_float16(source.data, position, source.row_stride, tile, target, 16)
            else:
                transpose_float32(source.data, position, source.row_stride, tile, target, 16)


@compiled
def store_codes(words: Any, codes: Any, row: int, first_input: int, columns: int) -> None:
    """Transpose the words of 128 inputs x 16 rows into the row-major codes."""
    for half in range(2):
        target = (row * columns + first_input) // 4 + half * 16
        transpose_int32(words, half * 256, 16, codes, target, columns // 4)


@compiled
def store_scales(numbers: Numbers, target: Target, place: int, stride: int, code: Any, zero_point: Any) -> None:
    """Store the scale codes and zero points of 16 rows, ``stride`` scales apart."""
    if numbers.scale_kind == SCALE_BF16:
        scatter_halves(target.scales, place, stride, code)
    else:
        scatter_bytes(target.scales, place, stride, code)
    if not numbers.symmetric:
        scatter_bytes(target.zero_points, place, stride, ints(zero_point))


@kernel
def largest_bits(source: Source, scratch: Scratch) -> int:
    """Bits of the largest magnitude of a matrix, as float32; infinity and NaN are larger than every number."""
    peak = ints(0)
    for strip in range(0, source.rows, STRIP_ROWS):
        vectors = min(STRIP_ROWS, source.rows - strip) // 16
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, scratch.tile)
            peak = maximum(peak, largest_magnitude(scratch.tile, 0, vectors * TILE_INPUTS))
    return largest_lane(peak)
