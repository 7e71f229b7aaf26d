"""Planes: the layout of integer codes that the fused products read, as packed and unpacked on a CPU.

A row of weights is cut into groups of 128 inputs, the last one filled up with code 0.  A group becomes ``4 * bits`` words of 32
bits, group after group, so a row takes ``ceil(in / 128) * 4 * bits`` words.  Codes are stored with an offset of half their range,
``u = code + 2^(bits - 1)``, hence unsigned.

A *plane* holds p neighbouring bits of every code of a group, p one of 1, 2, 4 and 8, in ``B = 4 * p`` words: field j of word b,
that is its bits ``p * j`` to ``p * j + p - 1``, belongs to input ``k = B * j + b`` of the group.  Widths 2, 4 and 8 are one plane;
the others are planes one after the other, the lowest bits first:

    bits       2    3      4    5      6      7          8
    planes     2    2, 1   4    4, 1   4, 2   4, 2, 1    8

Why so: a thread that has loaded a word shifts and masks it field by field, and what lies in one field of neighbouring words is a
run of neighbouring inputs.  No shuffle between threads is needed, no word is read twice, and an odd width costs one more load.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_int32, store
from quantkit.kernels.plane_memory import (
    copy_shifts_of_one,
    copy_shifts_of_two,
    load_codes,
    load_eight,
    load_four,
    store_codes,
    store_eight,
    store_four,
)
from quantkit.kernels.simd import ints

GROUP = 128  # inputs that are packed together
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits of a code -> bits of its planes

Codes = npt.NDArray[np.int8]
Words = npt.NDArray[np.int32]


def plane_words(columns: int, bits: int) -> int:
    """Words of 32 bits in a row of ``columns`` codes."""
    return -(-columns // GROUP) * 4 * bits


@compiled
def _field(words: Any, first: Any, width: Any, chunk: Any) -> Any:
    """Of a plane that begins at word ``first``: the bits of inputs 16 * chunk to 16 * chunk + 15 of the group."""
    if width == 4:
        return (load_int32(words, first) >> ints(4 * chunk)) & ints(15)
    if width == 2:
        return (load_eight(words, first) >> (ints(4 * chunk) + copy_shifts_of_two())) & ints(3)
    if width == 1:
        return (load_four(words, first) >> (ints(4 * chunk) + copy_shifts_of_one())) & ints(1)
    return (load_int32(words, first + 16 * (chunk & 1)) >> ints(8 * (chunk >> 1))) & ints(255)


@compiled
def _unpack_group(words: Any, first: Any, codes: Any, start: Any, planes: Any, half: Any) -> None:
    """words from ``first`` on -> 128 codes from ``start`` on, in two's complement."""
    for chunk in range(8):
        value = _field(words, first, planes[0], chunk)
        position, low = first + 4 * planes[0], planes[0]
        for index in range(1, planes.size):
            value = value | (_field(words, position, planes[index], chunk) << ints(low))
            position += 4 * planes[index]
            low += planes[index]
        store_codes(codes, start + 16 * chunk, value - ints(half))


@compiled
def _bits(codes: Any, start: Any, half: Any, low: Any, mask: Any) -> Any:
    """Bits ``low`` and following of 16 codes as they are stored."""
    return (((load_codes(codes, start) + ints(half)) & ints(255)) >> ints(low)) & ints(mask)


@compiled
def _pack_group(codes: Any, start: Any, words: Any, first: Any, planes: Any, half: Any) -> None:
    """128 codes from ``start`` on -> words from ``first`` on."""
    low = 0
    for index in range(planes.size):
        width = planes[index]
        mask = (1 << width) - 1
        even, odd = ints(0), ints(0)
        if width == 8:
            for field in range(4):
                even = even | (_bits(codes, start + 32 * field, half, low, mask) << ints(8 * field))
                odd = odd | (_bits(codes, start + 32 * field + 16, half, low, mask) << ints(8 * field))
            store(words, first, even)
            store(words, first + 16, odd)
        else:
            for chunk in range(8):
                even = even | (_bits(codes, start + 16 * chunk, half, low, mask) << ints(4 * chunk))
            if width == 4:
                store(words, first, even)
            elif width == 2:
                store_eight(words, first, even << copy_shifts_of_two())
            else:
                store_four(words, first, even << copy_shifts_of_one())
        first += 4 * width
        low += width


@kernel
def _pack(codes: Any, words: Any, planes: Any, half: Any) -> None:
    """codes uint8 [out, in], words uint32 [out, groups * 4 * bits], both contiguous."""
    rows, columns = codes.shape
    whole = columns // 128
    step = words.shape[1] // max(1, -(-columns // 128))
    last = np.zeros(128, np.uint8)  # code 0 beyond the end
    for row in range(rows):
        for group in range(whole):
            _pack_group(codes, row * columns + 128 * group, words, row * words.shape[1] + step * group, planes, half)
        if columns % 128:
            last[: columns % 128] = codes[row, 128 * whole :]
            _pack_group(last, 0, words, row * words.shape[1] + step * whole, planes, half)


@kernel
def _unpack(words: Any, codes: Any, planes: Any, half: Any) -> None:
    """words uint32 [out, groups * 4 * bits], codes uint8 [out, in], both contiguous."""
    rows, columns = codes.shape
    whole = columns // 128
    step = words.shape[1] // max(1, -(-columns // 128))
    last = np.empty(128, np.uint8)
    for row in range(rows):
        for group in range(whole):
            _unpack_group(words, row * words.shape[1] + step * group, codes, row * columns + 128 * group, planes, half)
        if columns % 128:
            _unpack_group(words, row * words.shape[1] + step * whole, last, 0, planes, half)
            codes[row, 128 * whole :] = last[: columns % 128]


def pack_planes(codes: Codes, bits: int, out: Words | None = None) -> Words:
    """Pack ``codes`` [out, in], each in the range of ``bits`` bits, into words [out, ``plane_words(in, bits)``].

    out: contiguous memory of exactly that many words, of any shape; allocated when None.  Raises ValueError for sizes that
    do not fit.
    """
    planes = _planes(bits)
    rows, columns = codes.shape
    shape = rows, plane_words(columns, bits)
    target = np.empty(shape, np.int32) if out is None else out
    if codes.dtype != np.int8 or target.dtype != np.int32 or not target.flags.c_contiguous or target.size != shape[0] * shape[1]:
        raise ValueError(
            f"int8 codes {list(codes.shape)} of {bits} bits take {list(shape)} contiguous words of 32 bits; "
            f"got {codes.dtype} codes, {target.dtype} {list(target.shape)}"
        )
    target = target.reshape(shape)
    _pack(np.ascontiguousarray(codes).view(np.uint8), target.view(np.uint32), planes, 1 << (bits - 1))
    return target


def unpack_planes(words: Words, bits: int, columns: int, out: Codes | None = None) -> Codes:
    """The reverse of :func:`pack_planes`: words [out, ``plane_words(columns, bits)``] -> codes int8 [out, ``columns``].

    out: contiguous int8 [out, ``columns``] to fill; allocated when None.  Raises ValueError for sizes that do not fit.
    """
    planes = _planes(bits)
    shape = words.shape[0], columns
    target = np.empty(shape, np.int8) if out is None else out
    if words.dtype != np.int32 or words.shape[1] != plane_words(columns, bits) or target.dtype != np.int8 or target.shape != shape:
        raise ValueError(
            f"rows of {columns} codes of {bits} bits are {plane_words(columns, bits)} words of 32 bits; got {words.dtype} "
            f"{list(words.shape)} for {target.dtype} {list(target.shape)}"
        )
    if not target.flags.c_contiguous:
        raise ValueError("codes are unpacked into contiguous memory only")
    _unpack(np.ascontiguousarray(words).view(np.uint32), target.view(np.uint8), planes, 1 << (bits - 1))
    return target


def _planes(bits: int) -> npt.NDArray[np.int64]:
    if bits not in PLANES:
        raise ValueError(f"codes of {bits} bits have no planes; widths: {', '.join(map(str, PLANES))}")
    if sys.byteorder != "little":
        raise NotImplementedError("packing is written for little-endian machines only")
    return np.array(PLANES[bits], np.int64)
