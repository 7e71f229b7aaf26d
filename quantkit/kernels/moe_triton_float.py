"""Products with FP8 and BF16 weights on a Hopper GPU, for rows that are sorted by expert.

A program multiplies the rows of a tile with some outputs of their expert.  Weights and rows are fetched by the tensor memory
accelerator, 128 bytes of each row at a time, and multiplied where they arrive.

Which of the two stands on the long side of the tensor core, where 64 is the least, is a choice.  With few rows it is the weights,
so that rows count in eights; from ``MANY_ROWS`` on it is the rows, since a thread then meets few scales of activations.

FP8 times FP8.  Hopper adds such products up with about 14 bits.  So what the tensor core adds up is one step of 128 inputs, and
steps are added in float32; there 128 x 128 blocks have their scales anyway, while those of rows and channels come at the end.
(Triton's ``max_num_imprecise_acc`` would promise the same, but at 0 it multiplies in FP16 without a word, so it is left alone.)

FP8 weights times BF16 rows, where activations are not rounded.  An FP8 number is a BF16 number of another exponent: its bits are
moved to their places and multiplied by 2^120, which is exact, numbers without a leading bit included.  The converted weights go
from registers to the tensor core, which only its long side can do.  ``ASSEMBLY`` chooses between ten instructions for four weights
and the compiler's own conversion, which gives the same bits with instructions of a quarter of the rate.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit.grid import FP8_MAX
from quantkit.kernels import moe_tiles
from quantkit.kernels.activations import EPSILON
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import Rows, Shape, Tiles
from quantkit.kernels.moe_triton_parts import Launch, launch_of_tiles, store_tile, tile_of
from quantkit.scheme import BLOCK_SIZE

STEP_BYTES = 128  # of a weight's row in a step: one row of the accelerator's shuffled layout
MANY_ROWS = 64  # of a tile
NOWHERE, BY_OUTPUT, BY_BLOCK = 0, 1, 2  # where weights have scales
_BY_OUTPUT, _BY_BLOCK = tl.constexpr(BY_OUTPUT), tl.constexpr(BY_BLOCK)
# Four FP8 numbers of a word to four BF16 numbers; 0x7b80 is 2^120.
_WIDENED = tl.constexpr("""
{
.reg .b32 low, high, moved, factor;
mov.b32 factor, 0x7b807b80;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
shr.u32 moved, low, 4;
and.b32 moved, moved, 0x07f007f0;
lop3.b32 low, low, 0x80008000, moved, 0xea;
mul.rn.bf16x2 $0, low, factor;
shr.u32 moved, high, 4;
and.b32 moved, moved, 0x07f007f0;
lop3.b32 high, high, 0x80008000, moved, 0xea;
mul.rn.bf16x2 $1, high, factor;
}
""")
_BLOCK, _LARGEST, _EPSILON = tl.constexpr(BLOCK_SIZE), tl.constexpr(FP8_MAX), tl.constexpr(EPSILON)


# ------------------------------------------------------------------------------------------------------------- products


@triton.jit
def widened(codes, ASSEMBLY: tl.constexpr):
    """FP8 as BF16, exactly."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_WIDENED, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    return codes.to(tl.bfloat16)


@triton.jit
def _block_steps(scales, by_row, PAIRED: tl.constexpr, SWAPPED: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """What a product of this step is worth; its shape spreads over the tile.  A tile lies in one block, of gate and of up each."""
    if PAIRED and SWAPPED:
        parity = tl.load(scales + 8 * tl.arange(0, 2))  # outputs alternate in blocks of 8
        step = tl.reshape(parity, (1, 2, 1, 1)) * tl.reshape(by_row, (1, 1, 1, ROWS))
        return tl.reshape(tl.broadcast_to(step, (OUTPUTS // 16, 2, 8, ROWS)), (OUTPUTS, ROWS))
    elif PAIRED:
        parity = tl.load(scales + 8 * tl.arange(0, 2))
        step = tl.reshape(by_row, (ROWS, 1, 1, 1)) * tl.reshape(parity, (1, 1, 2, 1))
        return tl.reshape(tl.broadcast_to(step, (ROWS, OUTPUTS // 16, 2, 8)), (ROWS, OUTPUTS))
    elif SWAPPED:
        return (by_row * tl.load(scales))[None, :]
    else:
        return (by_row * tl.load(scales))[:, None]


@triton.jit(do_not_specialize=["rows", "split_steps"])
def products(
    values,
    codes,
    out,
    row_scales,
    scales,
    tile_expert,
    tile_first,
    tile_last,
    tile_count,
    rows,
    weight_rows,
    outputs,
    steps,
    split_steps,
    width,
    PAIRED: tl.constexpr,
    SWAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of rows, one block of outputs, ``split_steps`` steps of ``INPUTS`` inputs; see :func:`launch_of`."""
    tiles = tl.load(tile_count)
    blocks = tl.cdiv(weight_rows, OUTPUTS)
    program, split = tl.program_id(0), tl.program_id(1)
    if program >= tiles * blocks:
        return
    expert, first, last, block = tile_of(program, tiles, blocks, tile_expert, tile_first, tile_last, GROUP)
    row = first + tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = expert * weight_rows + block * OUTPUTS
    begin = split * split_steps
    by_row = tl.full((ROWS,), 1.0, tl.float32)
    if SCALES == _BY_OUTPUT:
        by_output = tl.load(scales + expert * weight_rows + output, mask=output < weight_rows, other=0.0)
    if SWAPPED:
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    else:
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(begin, tl.minimum(begin + split_steps, steps)):
        x = values.load([first, step * INPUTS])
        w = codes.load([weight_row, step * INPUTS])
        if WIDEN:
            w = widened(w, ASSEMBLY)
        if SCALES == _BY_BLOCK or ROUNDED or WIDEN:
            if SWAPPED:
                part = tl.dot(w, tl.trans(x))
            else:
                part = tl.dot(x, tl.trans(w))
            if SCALES == _BY_BLOCK:
                if ROUNDED:
                    by_row = tl.load(row_scales + step * rows + row, mask=row < last, other=0.0)
                at = scales + (expert * steps + step) * weight_rows + block * OUTPUTS
                part *= _block_steps(at, by_row, PAIRED, SWAPPED, OUTPUTS, ROWS)
            elif WIDEN:  # here, as the compiler would make a bare sum one with the product, and then wait for every part of it
                part *= by_output[:, None]
            total += part
        elif SWAPPED:
            total = tl.dot(w, tl.trans(x), total)
        else:
            total = tl.dot(x, tl.trans(w), total)
    if SCALES == _BY_OUTPUT and ROUNDED:
        by_row = tl.load(row_scales + row, mask=row < last, other=0.0)
        if SWAPPED:
            total *= by_output[:, None] * by_row[None, :]
        else:
            total *= by_row[:, None] * by_output[None, :]
    if SWAPPED:
        store_tile(total, out, split, rows, first, last, block, outputs, width, PAIRED, OUTPUTS, ROWS)
    else:
        place = out + split.to(tl.int64) * rows * width + row.to(tl.int64)[:, None] * width
        if PAIRED:
            gate, up = tl.split(tl.permute(tl.reshape(total, (ROWS, OUTPUTS // 16, 2, 8)), (0, 1, 3, 2)))
            total = tl.reshape(gate * tl.sigmoid(gate) * up, (ROWS, OUTPUTS // 2))
            output = block * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        inside = (row < last)[:, None] & (output < outputs)[None, :]
        tl.store(place + output[None, :], total.to(out.dtype.element_ty), mask=inside)


def shape_of_tile(weight: DeviceWeight, tokens: int) -> Shape:
    """The entry of the table for tiles of so many rows."""
    return moe_tiles.shape_of(weight.kind, tokens)


def gate_up(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """silu(gate) * up; see :mod:`quantkit.kernels.moe_triton`."""
    assert weight.paired
    launch_of(rows, weight, tiles, out[None], assembly=out.is_cuda).run()


def matmul(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """Products; see :mod:`quantkit.kernels.moe_triton`."""
    assert not weight.paired
    launch_of(rows, weight, tiles, out, assembly=out.is_cuda).run()


def launch_of(
    rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor, *, assembly: bool, shape: Shape | None = None
) -> Launch:
    """out: ``[splits, rows, width]``, as many rows as there are; one split where gate and up are multiplied."""
    shape = shape or shape_of_tile(weight, tiles.tokens)
    block = weight.scheme is not None and weight.scheme.granularity == "block"
    widen = weight.kind == "fp8" and rows.scales is None
    inputs = STEP_BYTES // weight.codes.element_size()
    assert rows.values.shape == (out.shape[1], weight.padded_inputs)
    assert not (block and shape.outputs > BLOCK_SIZE * (1 + weight.paired))
    nothing = tiles.count  # stands where there are no scales
    operands = (
        TensorDescriptor.from_tensor(rows.values, [tiles.tokens, inputs]),
        TensorDescriptor.from_tensor(weight.codes, [shape.outputs, inputs]),
        out,
        nothing if rows.scales is None else rows.scales,
        weight.tables.get("scales", nothing),
    )
    constants: dict[str, object] = {
        "SWAPPED": widen or tiles.tokens < MANY_ROWS,
        "SCALES": NOWHERE if weight.kind == "floating" else BY_BLOCK if block else BY_OUTPUT,
        "ROUNDED": rows.scales is not None,
        "WIDEN": widen,
        "ASSEMBLY": assembly,
        "INPUTS": inputs,
    }
    return launch_of_tiles(products, shape, operands, weight, tiles, out, inputs, constants)


# ------------------------------------------------------------------------------------------------------------- rounding


@triton.jit(do_not_specialize=["rows"])
def round_fp8(
    values,
    codes,
    scales,
    input_scale,
    expert_of_row,
    rows,
    columns,
    STATIC: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST: tl.constexpr,
):
    """One row of ``values [rows, columns]`` as FP8 and what a step of it is worth, for all of it or for each 128 inputs."""
    number = tl.program_id(0)
    group, within = tl.arange(0, MOST), tl.arange(0, _BLOCK)
    place = group[:, None] * _BLOCK + within[None, :]
    inside = place < columns
    x = tl.load(values + number.to(tl.int64) * columns + place, mask=inside, other=0.0).to(tl.float32)
    if GROUPS:
        peak = tl.max(tl.abs(x), 1)
        scale = tl.div_rn(peak, tl.full((MOST,), _LARGEST, tl.float32))
        scale = tl.where(scale == 0.0, _EPSILON, scale)
        tl.store(scales + group * rows + number, scale, mask=group * _BLOCK < columns)
        divisor = tl.broadcast_to(scale[:, None], (MOST, _BLOCK))
    else:
        if STATIC:
            scale = tl.load(input_scale + tl.load(expert_of_row + number))
        else:
            peak = tl.max(tl.max(tl.abs(x), 1), 0)
            scale = tl.div_rn(peak, _LARGEST)
            scale = tl.where(scale == 0.0, _EPSILON, scale)
        tl.store(scales + number, scale)
        divisor = tl.full((MOST, _BLOCK), 1.0, tl.float32) * scale
    steps = tl.minimum(tl.maximum(tl.div_rn(x, divisor), -_LARGEST), _LARGEST)
    tl.store(codes + number.to(tl.int64) * columns + place, steps.to(codes.dtype.element_ty), mask=inside)


def round_rows(values: torch.Tensor, weight: DeviceWeight, expert_of_row: torch.Tensor) -> Rows:
    """Rows as FP8, rounded as clients do; see :mod:`quantkit.kernels.activations` and :mod:`quantkit.kernels.moe_triton`."""
    assert weight.scheme is not None and values.is_contiguous()
    count, columns = values.shape
    by_group = weight.scheme.granularity == "block"
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty((columns // BLOCK_SIZE, count) if by_group else (count,), device=values.device)
    most = triton.next_power_of_2(columns // BLOCK_SIZE)
    round_fp8[(count,)](
        values,
        codes,
        scales,
        scales if weight.input_scale is None else weight.input_scale,
        expert_of_row,
        count,
        columns,
        STATIC=weight.input_scale is not None,
        GROUPS=by_group,
        MOST=most,
        num_warps=max(4, most // 16),  # a whole row in registers
        enable_fp_fusion=False,
    )
    return Rows(codes, scales)
