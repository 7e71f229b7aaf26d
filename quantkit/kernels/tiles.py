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

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import (
    load_bfloat16,
    load_float16,
    load_float32,
    load_int32,
    scatter_bytes,
    scatter_halves,
    store,
    transpose_bfloat16,
    transpose_float16,
    transpose_float32,
    transpose_int32,
)
from quantkit.kernels.numbers import SCALE_BF16, Numbers, largest_magnitude
from quantkit.kernels.simd import (
    bits,
    ints,
    largest_lane,
    maximum,
)

STRIP_VECTORS = 8
STRIP_ROWS = STRIP_VECTORS * 16
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


class Search(NamedTuple):
    """Candidates for a scale code and a zero point, in rounds: each round starts from the best pair of the round before.

    offsets: int64, from that scale code, of all rounds.  shifts: int64, as many, from that zero point; those of schemes without one
    are 0.  ends: int64, where each round ends among them; no rounds, no search.
    """

    offsets: Any
    shifts: Any
    ends: Any


class Scratch(NamedTuple):
    """Memory a kernel works in.

    All are float32 arrays, some hold bits of integers.  tile: ``[STRIP_ROWS / 16, TILE_INPUTS, 16]``.  words: four codes each,
    ``[TILE_INPUTS / 4, 16]``.  For each row of a strip: scale_codes, largest, low, high, and the errors of a round's candidates and
    of the scale it starts from, ``[candidates + 1, STRIP_ROWS]``.
    """

    tile: Any
    words: Any
    scale_codes: Any
    largest: Any
    low: Any
    high: Any
    errors: Any


@compiled
def load_weights(source: Source, position: int) -> Any:
    """16 neighbouring weights as float32."""
    if source.stored == BFLOAT16:
        return load_bfloat16(source.data, position)
    if source.stored == FLOAT16:
        return load_float16(source.data, position)
    return load_float32(source.data, position)


@compiled
def strip_rows(source: Source) -> Any:
    """Rows worked on at once: many where neighbouring rows lie side by side in memory, else few long streams."""
    return STRIP_ROWS if source.row_stride == 1 else 16


@compiled
def load_tile(source: Source, row: int, first_input: int, vectors: int, tile: Any) -> None:
    """Copy 16 * vectors rows x 128 inputs to the tile as float32."""
    start = row * source.row_stride + first_input * source.input_stride
    if source.row_stride == 1:
        for step in range(TILE_INPUTS):
            position, target = start + step * source.input_stride, step * 16
            if vectors == STRIP_VECTORS:  # a constant count, which the compiler unrolls
                for vector in range(STRIP_VECTORS):
                    store(tile, target + vector * TILE_INPUTS * 16, load_weights(source, position + vector * 16))
            else:
                for vector in range(vectors):
                    store(tile, target + vector * TILE_INPUTS * 16, load_weights(source, position + vector * 16))
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


@compiled
def largest_of_strip(source: Source, strip: int, vectors: int, scratch: Scratch) -> Any:
    """Leave the bits of the largest magnitude of each row in ``scratch.largest``; return the largest of each lane."""
    mask = ints(0x7FFFFFFF)
    for lane in range(0, STRIP_ROWS, 16):
        store(scratch.largest, lane, ints(0))
    if vectors == STRIP_VECTORS and source.row_stride == 1:
        for step in range(source.columns):  # in memory order; needs no tile
            start = strip + step * source.input_stride
            for lane in range(0, STRIP_ROWS, 16):
                magnitude = bits(load_weights(source, start + lane)) & mask
                store(scratch.largest, lane, maximum(load_int32(scratch.largest, lane), magnitude))
    else:
        for chunk in range(0, source.columns, TILE_INPUTS):
            load_tile(source, strip, chunk, vectors, scratch.tile)
            for lane in range(0, vectors * 16, 16):
                magnitude = largest_magnitude(scratch.tile, lane * TILE_INPUTS, TILE_INPUTS)
                store(scratch.largest, lane, maximum(load_int32(scratch.largest, lane), magnitude))
    peak = ints(0)
    for lane in range(0, vectors * 16, 16):
        peak = maximum(peak, load_int32(scratch.largest, lane))
    return peak


@kernel
def largest_bits(source: Source, scratch: Scratch) -> Any:
    """Bits of the largest magnitude of a matrix, as float32; infinity and NaN are larger than every number."""
    peak = ints(0)
    height = strip_rows(source)
    for strip in range(0, source.rows, height):
        vectors = min(height, source.rows - strip) // 16
        peak = maximum(peak, largest_of_strip(source, strip, vectors, scratch))
    return largest_lane(peak)
