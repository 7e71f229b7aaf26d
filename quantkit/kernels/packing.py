"""Bit packing: several small codes per byte, at memory speed.

Every packed tensor of the compressed-tensors format is, on a little-endian machine, a plain sequence of bytes: eight int4 codes in
a 32-bit word are four bytes with the lower of two neighbouring codes in the low nibble, exactly as two fp4 codes share a byte, and
four int8 codes in a word are four bytes.  So one kernel packs nibbles, and int8 is a flipped sign bit.  Signed codes are stored
with an offset of half their range (q + 8, q + 128), which in two's complement is the same as flipping the top bit of each code.

The kernel takes eight codes at a time as one 64-bit word and folds it into 32 bits; it needs no buffer but its output and does not
hold the interpreter lock.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.kernels.jit import kernel

Bytes = npt.NDArray[np.uint8]

_SIGN_OF_NIBBLES = 0x0808080808080808  # bit 3 of each of eight codes


@kernel
def _fold(codes: Any, flip: Any, out: Any) -> None:
    """codes uint64 [n], one code per byte -> out uint32 [n], one code per nibble, the first in the lowest."""
    for index in range(out.size):
        word = (codes[index] & np.uint64(0x0F0F0F0F0F0F0F0F)) ^ flip
        word = (word | (word >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
        word = (word | (word >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        out[index] = np.uint32((word | (word >> np.uint64(16))) & np.uint64(0xFFFFFFFF))


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
    codes = np.empty((packed.size, 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, 0])
    np.right_shift(packed, 4, out=codes[:, 1])
    if signed:
        np.subtract(codes, 8, out=codes)  # wraps to two's complement
    return codes.reshape(-1)


def flip_sign(codes: Bytes, out: Bytes) -> None:
    """int8 codes in two's complement to q + 128, or back; any shape, ``out`` may be ``codes``."""
    np.bitwise_xor(codes, 0x80, out=out)


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("packing is written for little-endian machines only")
