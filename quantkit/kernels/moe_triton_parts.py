"""What all products of a mixture of experts share inside their kernels: which tile is next, and what is done with a finished one.

Weights lie on the rows of a tensor core and tokens on its columns, so a tile of results is ``[outputs, tokens]``: columns come in
eights where rows come in sixty-fours, and a decoder has few tokens.  This module imports triton, so nothing imports it before there
is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(number, tiles, blocks, GROUP: tl.constexpr):
    """Which tile of rows and which block of outputs has this number, of ``tiles * blocks``.

    ``GROUP`` tiles of rows share a block of weights before the next block is taken.
    """
    first = number // (GROUP * blocks) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = number % (GROUP * blocks)
    return first + within % size, within // size


@triton.jit
def store_outputs(total, out, first_row, last_row, first_output, outputs, width, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr):
    """``total [OUTPUTS, TOKENS]`` to ``out [rows, width]``, whatever lies before ``last_row`` and ``outputs``."""
    row = first_row + tl.arange(0, TOKENS)
    output = first_output + tl.arange(0, OUTPUTS)
    inside = (row < last_row)[None, :] & (output < outputs)[:, None]
    tl.store(out + row.to(tl.int64)[None, :] * width + output[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_gated(total, out, first_row, last_row, first_output, outputs, width, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr):
    """silu(gate) * up of ``total [OUTPUTS, TOKENS]``, whose rows are gate and up in blocks of 8 from row ``first_output`` on."""
    pairs = tl.permute(tl.reshape(total, (OUTPUTS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    inner = tl.reshape(gate * tl.sigmoid(gate) * up, (OUTPUTS // 2, TOKENS))
    store_outputs(inner, out, first_row, last_row, first_output // 2, outputs, width, OUTPUTS // 2, TOKENS)
