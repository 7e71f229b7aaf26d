"""The other way to multiply with INT4: write the weights out in BF16 first.  What ``moe_gpu.py`` compares with; imports triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 64  # of a program
_ROWS = tl.constexpr(ROWS)


@triton.jit
def dequantize(words, scales, out, rows, inputs):
    """``ROWS`` rows of 128 inputs: words int32 ``[rows, inputs / 8]``, scales ``[inputs / 128, rows]``, out ``[rows, inputs]``."""
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    group = tl.program_id(1)
    known = row < rows
    place = row.to(tl.int64)[:, None]
    stored = tl.load(words + place * (inputs // 8) + group * 16 + tl.arange(0, 16)[None, :], mask=known[:, None], other=0)
    fields = (stored[:, None, :] >> (4 * tl.arange(0, 8))[None, :, None]) & 15
    scale = tl.load(scales + group.to(tl.int64) * rows + row, mask=known, other=0.0).to(tl.float32)
    values = (tl.reshape(fields, (_ROWS, 128)).to(tl.float32) - 8.0) * scale[:, None]
    tl.store(out + place * inputs + group * 128 + tl.arange(0, 128)[None, :], values.to(tl.bfloat16), mask=known[:, None])
