"""Blocks of ggml's codebook types: codes and scales to bytes, and back, without loss and without search.

A block of 256 weights holds an FP16 scale, for each run of weights the index of its point, the signs, and the groups' scales.
Every type packs them differently, so a block is first turned into plain numbers (indices, a byte of signs for 8 weights) and
these are then put where the type has them; the layouts are those of ggml's ``ggml-common.h``.  What cannot be packed, because
codes are no point of the grid, is reported as a place and not written.

Seven bits hold eight signs by leaving out the last one, which makes the number of negative weights even.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from quantkit.codebooks import CODEBOOKS, grid_digits
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_word, store_word

BLOCK = 256
IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M = range(7)
_KINDS = {"IQ2_XXS": IQ2_XXS, "IQ2_XS": IQ2_XS, "IQ2_S": IQ2_S, "IQ3_XXS": IQ3_XXS, "IQ3_S": IQ3_S, "IQ1_S": IQ1_S, "IQ1_M": IQ1_M}
_NONE = 255

_ONES, _SEVENS = np.uint64(0x0101010101010101), np.uint64(0x7F7F7F7F7F7F7F7F)
_TOPS, _LADDER = np.uint64(0x8080808080808080), np.uint64(0x8040201008040201)
_LOWER = np.uint64(0xFFFFFFFF)


class Tables(NamedTuple):
    """A type for the kernels below.

    kind: one of the constants above.  length: weights of a point.  digit_bits: bits of a digit.  group: weights of a scale.
    highest: largest group scale.  even: whether signs come in sevens.  digits: uint8 ``[256]``, the digit of a code (as unsigned
    byte), 255 for none.  indices: int16, the index of a point by its digits side by side, -1 for none.  levels: int8 ``[points *
    length]``, and eight more, so that eight can be read anywhere.
    """

    kind: int
    length: int
    digit_bits: int
    group: int
    highest: int
    even: int
    digits: Any
    indices: Any
    levels: Any


@functools.cache
def packing_tables(name: str) -> Tables:
    """The tables of one type."""
    book, points = CODEBOOKS[name], grid_digits(name).astype(np.int64)
    digits = np.full(256, _NONE, np.uint8)
    for digit, level in enumerate(book.levels):
        for code in (level + 1, level - 1) if book.shifted else (level, -level):
            digits[code % 256] = digit
    indices = np.full(1 << (book.digit_bits * book.length), -1, np.int16)
    indices[(points << (book.digit_bits * np.arange(book.length))).sum(1)] = np.arange(len(points))
    return Tables(
        kind=_KINDS[name],
        length=book.length,
        digit_bits=book.digit_bits,
        group=book.group,
        highest=book.highest,
        even=int(book.signs == "even"),
        digits=digits,
        indices=indices,
        levels=np.append(np.array(book.levels, np.int8)[points].reshape(-1), np.zeros(8, np.int8)),
    )


@compiled
def _read_codes(tables: Tables, codes: Any, start: int, indices: Any, signs: Any) -> bool:
    """Indices of the runs, and for every 8 weights a byte of signs (all or none where levels are moved down or up)."""
    shifted = tables.kind >= IQ1_S
    for run in range(BLOCK // tables.length):
        key = np.int64(0)
        for k in range(tables.length):
            digit = tables.digits[codes[start + run * tables.length + k] & 255]
            if digit == _NONE:
                return False
            key |= np.int64(digit) << (k * tables.digit_bits)
        indices[run] = tables.indices[key]
        if indices[run] < 0:
            return False
    for eight in range(BLOCK // 8):
        byte, count = 0, 0
        for k in range(8):
            code = codes[start + eight * 8 + k]
            negative = (code & 7) == 7 if shifted else code < 0
            byte |= int(negative) << k
            count += int(negative)
        signs[eight] = byte
        if (shifted and 0 < count < 8) or (tables.even and count & 1):
            return False
    return True


@compiled
def _write_block(kind: int, indices: Any, signs: Any, scale: Any, groups: Any, first: int, out: Any, at: int) -> bool:
    """Put the numbers of one block where the type has them; False where a group's shifts differ."""
    if kind == IQ1_M:
        for quarter in range(4):
            word = ((np.int64(scale) >> (4 * quarter)) & 15) << 12
            for k in range(4):
                word |= np.int64(groups[first + quarter * 4 + k]) << (3 * k)
            out[at + 48 + quarter * 2], out[at + 49 + quarter * 2] = word & 255, word >> 8
        for run in range(0, 32, 2):
            low, high = indices[run], indices[run + 1]
            out[at + run], out[at + run + 1] = low & 255, high & 255
            byte = low >> 8 | (signs[run] & 8) | (high >> 8) << 4 | (signs[run + 1] & 128)
            out[at + 32 + run // 2] = byte
        return True
    out[at], out[at + 1] = scale & 255, scale >> 8
    at += 2
    for part in range(8):  # of 32 weights
        s0, s1, s2, s3 = signs[part * 4], signs[part * 4 + 1], signs[part * 4 + 2], signs[part * 4 + 3]
        if kind in (IQ2_XXS, IQ3_XXS):
            bytes_here = 4 if kind == IQ2_XXS else 8
            for k in range(bytes_here):
                out[at + part * 8 + k] = indices[part * bytes_here + k]
            word = s0 & 127 | (s1 & 127) << 7 | (s2 & 127) << 14 | (s3 & 127) << 21 | np.int64(groups[first + part]) << 28
            place = at + part * 8 + 4 if kind == IQ2_XXS else at + 64 + part * 4
            for k in range(4):
                out[place + k] = (word >> (8 * k)) & 255
        elif kind == IQ2_XS:
            for k in range(4):
                word = indices[part * 4 + k] | (signs[part * 4 + k] & 127) << 9
                out[at + part * 8 + 2 * k], out[at + part * 8 + 2 * k + 1] = word & 255, word >> 8
            out[at + 64 + part] = groups[first + part * 2] | groups[first + part * 2 + 1] << 4
        elif kind == IQ2_S:
            high = 0
            for k in range(4):
                index = indices[part * 4 + k]
                out[at + part * 4 + k] = index & 255
                out[at + 32 + part * 4 + k] = signs[part * 4 + k]
                high |= (index >> 8) << (2 * k)
            out[at + 64 + part] = high
            out[at + 72 + part] = groups[first + part * 2] | groups[first + part * 2 + 1] << 4
        elif kind == IQ3_S:
            high = 0
            for k in range(8):
                index = indices[part * 8 + k]
                out[at + part * 8 + k] = index & 255
                high |= (index >> 8) << k
            out[at + 64 + part] = high
            for k in range(4):
                out[at + 72 + part * 4 + k] = signs[part * 4 + k]
            if part % 2 == 0:
                out[at + 104 + part // 2] = groups[first + part] | groups[first + part + 1] << 4
        else:  # IQ1_S
            if s0 != s1 or s0 != s2 or s0 != s3:
                return False
            word = np.int64(groups[first + part]) << 12 | (s0 & 128) << 8
            for k in range(4):
                index = indices[part * 4 + k]
                out[at + part * 4 + k] = index & 255
                word |= (index >> 8) << (3 * k)
            out[at + 32 + part * 2], out[at + 33 + part * 2] = word & 255, word >> 8
    return True


@kernel
def pack_blocks(tables: Tables, codes: Any, scales: Any, groups: Any, nbytes: int, out: Any, first: int, last: int) -> int:
    """Pack the blocks ``first .. last`` of flat arrays; the first block that cannot be packed, -1 when there is none.

    codes: int8 ``[blocks * 256]``.  scales: uint16 ``[blocks]``.  groups: int8 ``[blocks * groups]``.  out: uint8
    ``[blocks * nbytes]``.
    """
    indices, signs = np.empty(64, np.int64), np.empty(32, np.int64)
    per_block = BLOCK // tables.group
    for block in range(first, last):
        for group in range(block * per_block, (block + 1) * per_block):
            if not 0 <= groups[group] <= tables.highest:
                return block
        if not _read_codes(tables, codes, block * BLOCK, indices, signs):
            return block
        if not _write_block(tables.kind, indices, signs, scales[block], groups, block * per_block, out, block * nbytes):
            return block
    return -1


@compiled
def _eighth_sign(seven: Any) -> Any:
    """All eight signs from seven."""
    parity = seven ^ (seven >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return seven | (parity & 1) << 7


@compiled
def _read_block(kind: int, data: Any, at: int, indices: Any, signs: Any, groups: Any, first: int) -> Any:
    """The plain numbers of one block; its scale."""
    if kind == IQ1_M:
        scale = np.int64(0)
        for quarter in range(4):
            word = np.int64(data[at + 48 + quarter * 2]) | np.int64(data[at + 49 + quarter * 2]) << 8
            scale |= (word >> 12) << (4 * quarter)
            for k in range(4):
                groups[first + quarter * 4 + k] = (word >> (3 * k)) & 7
        for run in range(32):
            nibble = np.int64(data[at + 32 + run // 2]) >> (4 * (run & 1))
            indices[run] = np.int64(data[at + run]) | (nibble & 7) << 8
            signs[run] = 255 if nibble & 8 else 0
        return scale
    scale = np.int64(data[at]) | np.int64(data[at + 1]) << 8
    at += 2
    for part in range(8):  # of 32 weights
        if kind in (IQ2_XXS, IQ3_XXS):
            bytes_here = 4 if kind == IQ2_XXS else 8
            for k in range(bytes_here):
                indices[part * bytes_here + k] = data[at + part * 8 + k]
            place = at + part * 8 + 4 if kind == IQ2_XXS else at + 64 + part * 4
            word = np.int64(0)
            for k in range(4):
                word |= np.int64(data[place + k]) << (8 * k)
            for k in range(4):
                signs[part * 4 + k] = _eighth_sign((word >> (7 * k)) & 127)
            groups[first + part] = word >> 28
        elif kind == IQ2_XS:
            for k in range(4):
                word = np.int64(data[at + part * 8 + 2 * k]) | np.int64(data[at + part * 8 + 2 * k + 1]) << 8
                indices[part * 4 + k], signs[part * 4 + k] = word & 511, _eighth_sign(word >> 9)
            groups[first + part * 2], groups[first + part * 2 + 1] = data[at + 64 + part] & 15, data[at + 64 + part] >> 4
        elif kind == IQ2_S:
            high = np.int64(data[at + 64 + part])
            for k in range(4):
                indices[part * 4 + k] = np.int64(data[at + part * 4 + k]) | ((high >> (2 * k)) & 3) << 8
                signs[part * 4 + k] = data[at + 32 + part * 4 + k]
            groups[first + part * 2], groups[first + part * 2 + 1] = data[at + 72 + part] & 15, data[at + 72 + part] >> 4
        elif kind == IQ3_S:
            high = np.int64(data[at + 64 + part])
            for k in range(8):
                indices[part * 8 + k] = np.int64(data[at + part * 8 + k]) | ((high >> k) & 1) << 8
            for k in range(4):
                signs[part * 4 + k] = data[at + 72 + part * 4 + k]
            groups[first + part] = (data[at + 104 + part // 2] >> (4 * (part & 1))) & 15
        else:  # IQ1_S
            word = np.int64(data[at + 32 + part * 2]) | np.int64(data[at + 33 + part * 2]) << 8
            for k in range(4):
                indices[part * 4 + k] = np.int64(data[at + part * 4 + k]) | ((word >> (3 * k)) & 7) << 8
                signs[part * 4 + k] = 255 if word & 0x8000 else 0
            groups[first + part] = (word >> 12) & 7
    return scale


@kernel
def unpack_blocks(tables: Tables, data: Any, nbytes: int, codes: Any, scales: Any, groups: Any, first: int, last: int) -> None:
    """The reverse of :func:`pack_blocks`; any bytes are valid."""
    indices, signs = np.empty(64, np.int64), np.empty(32, np.int64)
    shifted = tables.kind >= IQ1_S
    for block in range(first, last):
        at = block * (BLOCK // tables.group)
        scales[block] = _read_block(tables.kind, data, block * nbytes, indices, signs, groups, at)
        for run in range(BLOCK // 8):
            if tables.length == 8:
                word = load_word(tables.levels, indices[run] * 8)
            else:
                word = load_word(tables.levels, indices[2 * run] * 4) & _LOWER
                word |= load_word(tables.levels, indices[2 * run + 1] * 4) << np.uint64(32)
            single = (np.uint64(signs[run]) * _ONES) & _LADDER  # in byte i only bit i
            negative = ((single + _SEVENS) >> np.uint64(7)) & _ONES  # 1 where it is set
            if shifted:  # one more or one less; with the top bits turned nothing is borrowed between bytes
                word = ((word ^ _TOPS) + _ONES - negative - negative) ^ _TOPS
            else:  # no level is 0, so nothing is carried between bytes
                word = (word ^ (negative * np.uint64(255))) + negative
            store_word(codes, block * BLOCK + 8 * run, word)
