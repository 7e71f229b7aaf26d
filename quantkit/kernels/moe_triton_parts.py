"""What all products of a mixture of experts share: inside their kernels which tile is next and what is done with a finished one,
outside what a launch is made of.

Weights lie on the rows of a tensor core and tokens on its columns, so a tile of results is ``[outputs, tokens]``: columns come in
eights where rows come in sixty-fours, and a decoder has few tokens.  This module imports triton, so nothing imports it before there
is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import Shape, Tiles


@dataclass(frozen=True)
class Launch:
    """A kernel and all that it is launched with.  shape: the entry of the table that it was made for.  options: the compiler's."""

    kernel: Any
    shape: Shape
    programs: tuple[int, ...]
    arguments: tuple[object, ...]
    constants: Mapping[str, object]
    options: Mapping[str, object]

    def run(self) -> None:
        """Launch it."""
        self.kernel[self.programs](*self.arguments, **self.constants, **self.options)


def launch_of_tiles(
    kernel: Any,
    shape: Shape,
    operands: tuple[object, ...],
    weight: DeviceWeight,
    tiles: Tiles,
    out: torch.Tensor,
    inputs: int,
    constants: Mapping[str, object],
) -> Launch:
    """A program for each tile of rows, block of outputs and split, which takes steps of so many ``inputs``.

    operands: what the kernel is given before what all such kernels are given.  out: ``[splits, rows, width]``, contiguous.
    """
    assert out.is_contiguous() and not (weight.paired and len(out) > 1)
    splits, rows, width = out.shape
    steps = weight.padded_inputs // inputs
    tile = (tiles.expert, tiles.first, tiles.last, tiles.count)
    arguments = (*operands, *tile, rows, weight.rows, weight.outputs, steps, triton.cdiv(steps, splits), width)
    return Launch(
        kernel,
        shape,
        (tiles.most * triton.cdiv(weight.rows, shape.outputs), splits),
        arguments,
        {**constants, "PAIRED": weight.paired, "ROWS": tiles.tokens, "OUTPUTS": shape.outputs, "GROUP": shape.group},
        {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True},
    )


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
def tile_of(number, tiles, blocks, experts, firsts, lasts, GROUP: tl.constexpr):
    """Expert, first row, row behind the last one, and block of outputs, of what has this number."""
    tile, block = place_of(number, tiles, blocks, GROUP)
    return tl.load(experts + tile), tl.load(firsts + tile), tl.load(lasts + tile), block


@triton.jit
def joined(one, other):
    """Two tiles side by side."""
    return tl.reshape(tl.permute(tl.join(one, other), (0, 2, 1)), (one.shape[0], 2 * one.shape[1]))


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


@triton.jit
def store_tile(
    total,
    out,
    split,
    rows,
    first_row,
    last_row,
    block,
    outputs,
    width,
    PAIRED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A finished tile of this split to ``out [splits, rows, width]``, gated where rows of ``total`` are gate and up."""
    if PAIRED:
        store_gated(total, out, first_row, last_row, block * OUTPUTS, outputs, width, OUTPUTS, TOKENS)
    else:
        target = out + split.to(tl.int64) * rows * width
        store_outputs(total, target, first_row, last_row, block * OUTPUTS, outputs, width, OUTPUTS, TOKENS)
