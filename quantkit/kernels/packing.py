"""Bit packing: several small codes per byte, at memory speed.

Every packed tensor of the compressed-tensors format is, on a little-endian machine, a plain sequence of bytes: eight int4 codes in
a 32-bit word are four bytes with the lower of two neighbouring codes in the low nibble, exactly as two fp4 codes share a byte, and
four int8 codes in a word are four bytes.  So one kernel packs nibbles, and int8 is a flipped sign bit.  Signed codes are stored
with an offset of half their range (q + 8, q + 128), which in two's complement is the same as flipping the top bit of each code.

The kernels take eight codes at a time as one 64-bit word and fold it into 32 bits, or spread 32 bits to 64; they need no buffer but
their output and do not hold the interpreter lock.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.kernels.jit import kernel

Bytes = npt.NDArray[np.uint8]

_SIGN_OF_NIBBLES = 0x0808080808080808  # bit 3 of each of eight codes
_SIGN_OF_BYTES, _LESS_EIGHT = 0x8080808080808080, 0x7878787878787878


@kernel
def _fold(codes: Any, flip: Any, out: Any) -> None:
    """codes uint64 [n], one code per byte -> out uint32 [n], one code per nibble, the first in the lowest."""
    for index in range(out.size):
        word = (codes[index] & np.uint64(0x0F0F0F0F0F0F0F0F)) ^ flip
        word = (word | (word >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
        word = (word | (word >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        out[index] = np.uint32((word | (word >> np.uint64(16))) & np.uint64(0xFFFFFFFF))


@kernel
def _spread(packed: Any, offset: Any, flip: Any, out: Any) -> None:
    """The reverse: packed uint32 [n] -> out uint64 [n], each code plus a byte of ``offset``, less a bit of ``flip``."""
    for index in range(packed.size):
        word = np.uint64(packed[index])
        word = (word | (word << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
        word = (word | (word << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        word = (word | (word << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        out[index] = (word + offset) ^ flip


def pack_nibbles(codes: Bytes, out: Bytes, *, signed: bool) -> None:
    """Pack one code per byte, ``codes`` [n], into two codes per byte, ``out`` [n / 2]; the even code goes to the low nibble.

    signed: codes are int4 in two's complement and are stored as q + 8; otherwise they are stored as they are (0..15).
    n is a multiple of 8; both arrays are contiguous and flat.
    """
    _little_endian()
    _fold(codes.view(np.uint64), np.uint64(_SIGN_OF_NIBBLES if signed else 0), out.view(np.uint32))


def unpack_nibbles(packed: Bytes, *, signed: bool) -> Bytes:
    """The reverse of :func:`pack_nibbles`: ``packed`` [n] -> codes [2 n]; signed codes come back in two's complement."""
    _little_endian()
    codes = np.empty(2 * packed.size, np.uint8)
    whole = packed.size // 4 * 4
    # u + 0x78 is 0x80 + (u - 8), and no byte overflows into its neighbour.
    offset, flip = np.uint64(_LESS_EIGHT if signed else 0), np.uint64(_SIGN_OF_BYTES if signed else 0)
    _spread(packed[:whole].view(np.uint32), offset, flip, codes[: 2 * whole].view(np.uint64))
    for index in range(whole, packed.size):
        codes[2 * index], codes[2 * index + 1] = packed[index] & 0x0F, packed[index] >> 4
    if signed:
        codes[2 * whole :] -= 8  # wraps to two's complement
    return codes


def flip_sign(codes: Bytes, out: Bytes) -> None:
    """int8 codes in two's complement to q + 128, or back; any shape, ``out`` may be ``codes``."""
    np.bitwise_xor(codes, 0x80, out=out)


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("packing is written for little-endian machines only")
