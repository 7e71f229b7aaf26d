"""Blocks of llama.cpp's tensor types: codes and scales to bytes, and back, at memory speed.

Every type stores the bits of its codes in *planes*.  A plane takes 1, 2, 4 or 8 bits of each code and puts those of 8, 4, 2 or 1
codes, which stand a fixed distance apart, into one byte.  So the types differ in numbers only, and one kernel serves them all.
What remains are the FP16 numbers of a block, copied to their places, and five ways to pack the small integers of groups.

The kernels work on eight codes at a time as one 64-bit word, so they need neither tables nor vectors to outrun the quantizers, and
compile once for all types.  The layouts are those of ggml's ``ggml-common.h``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_word, store_word

Bytes = npt.NDArray[np.uint8]

# How the integers of groups are stored.
NO_GROUPS, PAIRED, SIX_BITS, SIX_BITS_TWICE, WHOLE, SIX_BITS_APART = range(6)

_ONES = np.uint64(0x0101010101010101)  # bit 0 of each of eight bytes
_GATHER = np.uint64(0x0102040810204080)  # times a word of single bits: bit of byte i lands in bit 56 + i
_LADDER = np.uint64(0x8040201008040201)  # bit i of byte i
_FIVE, _SIXTH = np.uint64(0x1F1F1F1F1F1F1F1F), np.uint64(0x2020202020202020)
_NIBBLES, _PAIRS = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x3030303030303030)
_SIX = np.uint64(0x3F3F3F3F3F3F3F3F)
_HALF = np.uint64(0xFFFFFFFF)
_SEVENS = np.uint64(0x7F7F7F7F7F7F7F7F)
_STRETCH = 16384  # codes that are packed plane by plane while they are in the cache
_TWO, _FOUR, _SEVEN, _EIGHT = np.uint64(2), np.uint64(4), np.uint64(7), np.uint64(8)
_THIRTY_TWO, _FIFTY_SIX, _BYTE = np.uint64(32), np.uint64(56), np.uint64(0xFF)


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block.

    at: first byte of the plane in the block.  low, bits: which bits of the codes.  distance: how far apart the codes that share a
    byte stand; 1 or a multiple of 8.
    """

    at: int
    low: int
    bits: int
    distance: int


@dataclass(frozen=True)
class Layout:
    """Where in a block everything is stored.

    block, nbytes: weights and bytes.  scale, scale_bytes: place and size of the scale.  minimum: place of the minimum, -1 for none.
    groups: how many groups.  group_kind, group_at: how and where their integers are stored.
    """

    block: int
    nbytes: int
    planes: tuple[Plane, ...]
    scale: int = 0
    scale_bytes: int = 2
    minimum: int = -1
    groups: int = 0
    group_kind: int = NO_GROUPS
    group_at: int = 0

    def numbers(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Everything but the planes, as the kernels take it."""
        return (
            self.block,
            self.nbytes,
            self.scale,
            self.scale_bytes,
            self.minimum,
            self.groups,
            self.group_kind,
            self.group_at,
        )

    def plane_table(self) -> npt.NDArray[np.int64]:
        """The planes, one a row, as the kernels take them."""
        return np.array([(plane.at, plane.low, plane.bits, plane.distance) for plane in self.planes], np.int64)


LAYOUTS: dict[str, Layout] = {
    "Q8_0": Layout(32, 34, (Plane(2, 0, 8, 32),)),
    "Q4_0": Layout(32, 18, (Plane(2, 0, 4, 16),)),
    "Q4_1": Layout(32, 20, (Plane(4, 0, 4, 16),), minimum=2),
    "Q5_0": Layout(32, 22, (Plane(2, 4, 1, 1), Plane(6, 0, 4, 16))),
    "Q5_1": Layout(32, 24, (Plane(4, 4, 1, 1), Plane(8, 0, 4, 16)), minimum=2),
    "IQ4_NL": Layout(32, 18, (Plane(2, 0, 4, 16),)),
    "MXFP4": Layout(32, 17, (Plane(1, 0, 4, 16),), scale_bytes=1),
    "Q2_K": Layout(256, 84, (Plane(16, 0, 2, 32),), 80, minimum=82, groups=16, group_kind=PAIRED, group_at=0),
    "Q3_K": Layout(256, 110, (Plane(0, 2, 1, 32), Plane(32, 0, 2, 32)), 108, groups=16, group_kind=SIX_BITS, group_at=96),
    "Q4_K": Layout(256, 144, (Plane(16, 0, 4, 32),), minimum=2, groups=8, group_kind=SIX_BITS_TWICE, group_at=4),
    "Q5_K": Layout(
        256, 176, (Plane(16, 4, 1, 32), Plane(48, 0, 4, 32)), minimum=2, groups=8, group_kind=SIX_BITS_TWICE, group_at=4
    ),
    "Q6_K": Layout(256, 210, (Plane(0, 0, 4, 64), Plane(128, 4, 2, 32)), 208, groups=16, group_kind=WHOLE, group_at=192),
    "IQ4_XS": Layout(256, 136, (Plane(8, 0, 4, 16),), groups=8, group_kind=SIX_BITS_APART, group_at=2),
}


class Fields(NamedTuple):
    """Codes and scales of whole blocks, as bytes."""

    codes: Bytes
    scales: Bytes
    minimums: Bytes
    group_scales: Bytes
    group_minimums: Bytes


def pack(layout: Layout, fields: Fields, out: Bytes) -> None:
    """Write whole blocks to ``out``.

    fields: the five of :class:`Fields`, flat, contiguous and seen as bytes; those that the type lacks are empty.  Raises ValueError
    when sizes do not fit each other.
    """
    _check_sizes(layout, fields, out)
    _pack(layout.numbers(), layout.plane_table(), *fields, out)


def unpack(layout: Layout, data: Bytes, fields: Fields) -> None:
    """The reverse of :func:`pack`: fill all ``fields`` from the blocks ``data``."""
    _check_sizes(layout, fields, data)
    _unpack(layout.numbers(), layout.plane_table()[::-1].copy(), data, *fields)  # the last one has no single bits side by side


def _check_sizes(layout: Layout, fields: Fields, data: Bytes) -> None:
    """The kernels trust these sizes."""
    if sys.byteorder != "little":
        raise NotImplementedError("packing is written for little-endian machines only")
    blocks = fields.codes.size // layout.block
    expected = (
        blocks * layout.block,
        blocks * layout.scale_bytes,
        blocks * 2 if layout.minimum >= 0 else 0,
        blocks * layout.groups,
        blocks * layout.groups if layout.group_kind in (PAIRED, SIX_BITS_TWICE) else 0,
        blocks * layout.nbytes,
    )
    actual = tuple(array.size for array in (*fields, data))
    if actual != expected:
        raise ValueError(f"arrays of {actual} bytes for blocks of {layout.block}; expected {expected}")


# ----------------------------------------------------------------------------------------------------------------- planes


@compiled
def _repeated(value: int) -> Any:
    """A byte in all eight bytes of a word."""
    return np.uint64(value) * _ONES


@compiled
def _pack_plane(codes: Any, first: int, count: int, low: int, bits: int, distance: int, out: Any, at: int) -> None:
    """Bits ``low`` and up of ``count`` codes to the plane at ``at``."""
    shift = np.uint64(low)
    mask = _repeated((1 << bits) - 1)
    if distance == 1:
        for group in range(count // 8):
            word = (load_word(codes, first + 8 * group) >> shift) & _ONES
            out[at + group] = np.uint8((word * _GATHER) >> _FIFTY_SIX)
        return
    parts = 8 // bits
    for run in range(count // (parts * distance)):
        for place in range(0, distance, 8):
            source = first + run * parts * distance + place
            packed = (load_word(codes, source) >> shift) & mask
            for part in range(1, parts):
                word = (load_word(codes, source + part * distance) >> shift) & mask
                packed |= word << np.uint64(part * bits)
            store_word(out, at + run * distance + place, packed)


@compiled
def _first_plane(data: Any, at: int, runs: int, parts: int, low: int, bits: int, distance: int, codes: Any, first: int) -> None:
    """The reverse: codes of these bits and no others.  distance: not 1.  runs: of ``parts`` times ``distance`` codes."""
    shift, mask = np.uint64(low), _repeated((1 << bits) - 1)
    if runs == 1 and distance == 16 and parts == 2:  # blocks of 32, for which loops of unknown length take longer than the work
        for place in (0, 8):
            packed = load_word(data, at + place)
            store_word(codes, first + place, (packed & mask) << shift)
            store_word(codes, first + 16 + place, ((packed >> _FOUR) & mask) << shift)
        return
    if runs == 1 and distance == 32 and parts == 1:
        store_word(codes, first, load_word(data, at))
        store_word(codes, first + 8, load_word(data, at + 8))
        store_word(codes, first + 16, load_word(data, at + 16))
        store_word(codes, first + 24, load_word(data, at + 24))
        return
    for run in range(runs):
        for place in range(0, distance, 8):
            packed = load_word(data, at + run * distance + place)
            for part in range(parts):
                word = (packed >> np.uint64(part * bits)) & mask
                store_word(codes, first + (run * parts + part) * distance + place, word << shift)


@compiled
def _unpack_plane(data: Any, at: int, runs: int, parts: int, low: int, bits: int, distance: int, codes: Any, first: int) -> None:
    """Set these bits of codes that do not have them yet."""
    shift = np.uint64(low)
    mask = _repeated((1 << bits) - 1)
    if distance == 1:
        for group in range(runs):
            single = (np.uint64(data[at + group]) * _ONES) & _LADDER  # in byte i only bit i
            word = ((single + _SEVENS) >> _SEVEN) & _ONES  # whether it is set
            store_word(codes, first + 8 * group, load_word(codes, first + 8 * group) | (word << shift))
        return
    for run in range(runs):
        for place in range(0, distance, 8):
            packed = load_word(data, at + run * distance + place)
            for part in range(parts):
                target = first + (run * parts + part) * distance + place
                word = (packed >> np.uint64(part * bits)) & mask
                store_word(codes, target, load_word(codes, target) | (word << shift))


# ----------------------------------------------------------------------------------------------------------------- groups


@compiled
def _lifted(word: Any) -> Any:
    """Bytes -32..31 to 0..63."""
    return (word & _FIVE) | (~word & _SIXTH)


@compiled
def _lowered(word: Any) -> Any:
    """Bytes 0..63 to -32..31."""
    return (word & _FIVE) | ((~word & _SIXTH) * _SEVEN)


@compiled
def _store_half_word(out: Any, at: int, word: Any) -> None:
    """The four lower bytes of a word."""
    for byte in range(4):
        out[at + byte] = np.uint8((word >> np.uint64(8 * byte)) & _BYTE)


@compiled
def _load_half_word(data: Any, at: int) -> Any:
    """Four bytes as the lower half of a word."""
    word = np.uint64(0)
    for byte in range(4):
        word |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
    return word


@compiled
def _pack_groups(kind: int, scales: Any, minimums: Any, first: int, out: Any, at: int) -> None:
    """The integers of one block's groups, from ``first`` on, to ``at``."""
    word = load_word(scales, first)
    if kind == PAIRED:  # a byte for each group: scale, minimum << 4
        for half in (0, 8):
            low = load_word(scales, first + half) & _NIBBLES
            store_word(out, at + half, low | ((load_word(minimums, first + half) & _NIBBLES) << _FOUR))
    elif (
        kind == SIX_BITS
    ):  # eight bytes with the low nibbles of 0..7 and 8..15, four with the upper bits of 0..3, 4..7, 8..11, 12..15
        low, high = _lifted(word), _lifted(load_word(scales, first + 8))
        store_word(out, at, (low & _NIBBLES) | ((high & _NIBBLES) << _FOUR))
        tops = ((low & _PAIRS) >> _FOUR) | ((low >> _THIRTY_TWO) & _PAIRS) >> _TWO
        tops |= (high & _PAIRS) | ((high >> _THIRTY_TWO) & _PAIRS) << _TWO
        _store_half_word(out, at + 8, tops)
    elif kind == SIX_BITS_TWICE:  # scales 0..3, minimums 0..3, with the upper bits of 4..7 in theirs; the nibbles of 4..7 in pairs
        minimum = load_word(minimums, first)
        later, later_minimum = word >> _THIRTY_TWO, minimum >> _THIRTY_TWO
        front = ((word & _SIX) | ((later & _PAIRS) << _TWO)) & _HALF
        middle = ((minimum & _SIX) | ((later_minimum & _PAIRS) << _TWO)) & _HALF
        store_word(out, at, front | (middle << _THIRTY_TWO))
        _store_half_word(out, at + 8, (later & _NIBBLES) | ((later_minimum & _NIBBLES) << _FOUR))
    elif kind == WHOLE:  # a byte for each
        store_word(out, at, word)
        store_word(out, at + 8, load_word(scales, first + 8))
    elif kind == SIX_BITS_APART:  # two bytes with the upper bits, four with the nibbles, neighbours in one byte
        lifted = _lifted(word)
        for pair in range(4):
            even, odd = (lifted >> np.uint64(16 * pair)) & _BYTE, (lifted >> np.uint64(16 * pair + 8)) & _BYTE
            out[at + 2 + pair] = np.uint8((even & np.uint64(15)) | ((odd & np.uint64(15)) << _FOUR))
        tops = (lifted & _PAIRS) >> _FOUR
        tops = (tops | (tops >> np.uint64(6))) & np.uint64(0x000F000F000F000F)
        tops = (tops | (tops >> np.uint64(12))) & np.uint64(0x000000FF000000FF)
        out[at] = np.uint8(tops & _BYTE)
        out[at + 1] = np.uint8((tops >> _THIRTY_TWO) & _BYTE)


@compiled
def _unpack_groups(kind: int, data: Any, at: int, scales: Any, minimums: Any, first: int) -> None:
    """The reverse of :func:`_pack_groups`."""
    if kind == PAIRED:
        for half in (0, 8):
            word = load_word(data, at + half)
            store_word(scales, first + half, word & _NIBBLES)
            store_word(minimums, first + half, (word >> _FOUR) & _NIBBLES)
    elif kind == SIX_BITS:
        word, tops = load_word(data, at), _load_half_word(data, at + 8)
        low = ((tops << _FOUR) & _PAIRS) & _HALF | (((tops << _TWO) & _PAIRS) << _THIRTY_TWO)
        high = (tops & _PAIRS) | (((tops >> _TWO) & _PAIRS) << _THIRTY_TWO)
        store_word(scales, first, _lowered((word & _NIBBLES) | low))
        store_word(scales, first + 8, _lowered(((word >> _FOUR) & _NIBBLES) | high))
    elif kind == SIX_BITS_TWICE:
        word, nibbles = load_word(data, at), _load_half_word(data, at + 8)
        front, middle = word & _HALF, word >> _THIRTY_TWO
        later = (nibbles & _NIBBLES) | ((front >> _TWO) & _PAIRS)
        later_minimum = ((nibbles >> _FOUR) & _NIBBLES) | ((middle >> _TWO) & _PAIRS)
        store_word(scales, first, (front & _SIX) | (later << _THIRTY_TWO))
        store_word(minimums, first, (middle & _SIX) | (later_minimum << _THIRTY_TWO))
    elif kind == WHOLE:
        store_word(scales, first, load_word(data, at))
        store_word(scales, first + 8, load_word(data, at + 8))
    elif kind == SIX_BITS_APART:
        tops = np.uint64(data[at]) | (np.uint64(data[at + 1]) << _EIGHT)
        for group in range(8):
            nibble = (np.uint64(data[at + 2 + group // 2]) >> np.uint64(4 * (group % 2))) & np.uint64(15)
            top = (tops >> np.uint64(2 * group)) & np.uint64(3)
            scales[first + group] = np.uint8((nibble | (top << _FOUR)) - np.uint64(32) & _BYTE)


# ---------------------------------------------------------------------------------------------------------------- kernels


@kernel
def _pack(
    numbers: Any, planes: Any, codes: Any, scales: Any, minimums: Any, group_scales: Any, group_minimums: Any, out: Any
) -> None:
    block, nbytes, scale, scale_bytes, minimum, groups, kind, group_at = numbers
    blocks = codes.size // block
    for first in range(0, blocks, _STRETCH // block):
        last = min(first + _STRETCH // block, blocks)
        for plane in range(planes.shape[0]):
            at, low, bits, distance = planes[plane, 0], planes[plane, 1], planes[plane, 2], planes[plane, 3]
            for index in range(first, last):
                _pack_plane(codes, index * block, block, low, bits, distance, out, index * nbytes + at)
        _copy(scales, first * scale_bytes, scale_bytes, out, first * nbytes + scale, nbytes, scale_bytes, last - first)
        if minimum >= 0:
            _copy(minimums, 2 * first, 2, out, first * nbytes + minimum, nbytes, 2, last - first)
        if groups:
            for index in range(first, last):
                _pack_groups(kind, group_scales, group_minimums, index * groups, out, index * nbytes + group_at)


@kernel
def _unpack(
    numbers: Any, planes: Any, data: Any, codes: Any, scales: Any, minimums: Any, group_scales: Any, group_minimums: Any
) -> None:
    block, nbytes, scale, scale_bytes, minimum, groups, kind, group_at = numbers
    blocks = codes.size // block
    for first in range(0, blocks, _STRETCH // block):
        last = min(first + _STRETCH // block, blocks)
        for plane in range(planes.shape[0]):
            at, low, bits, distance = planes[plane, 0], planes[plane, 1], planes[plane, 2], planes[plane, 3]
            parts = 8 // bits
            runs = block // (parts * distance)
            for index in range(first, last):
                if plane == 0:
                    _first_plane(data, index * nbytes + at, runs, parts, low, bits, distance, codes, index * block)
                else:
                    _unpack_plane(data, index * nbytes + at, runs, parts, low, bits, distance, codes, index * block)
        _copy(data, first * nbytes + scale, nbytes, scales, first * scale_bytes, scale_bytes, scale_bytes, last - first)
        if minimum >= 0:
            _copy(data, first * nbytes + minimum, nbytes, minimums, 2 * first, 2, 2, last - first)
        if groups:
            for index in range(first, last):
                _unpack_groups(kind, data, index * nbytes + group_at, group_scales, group_minimums, index * groups)


@compiled
def _copy(
    source: Any, source_at: int, source_step: int, target: Any, target_at: int, target_step: int, size: int, count: int
) -> None:
    """``count`` fields of one or two bytes, one in each block."""
    if size == 2:
        for index in range(count):
            target[target_at + index * target_step] = source[source_at + index * source_step]
            target[target_at + index * target_step + 1] = source[source_at + index * source_step + 1]
        return
    for index in range(count):
        target[target_at + index * target_step] = source[source_at + index * source_step]
