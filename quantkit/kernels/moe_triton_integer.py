"""Products with integer codes of 2 to 8 bits, straight from their planes (:mod:`quantkit.kernels.planes`), in Triton.

A code less its zero point is a whole number of at most 8 bits, which BF16 holds exactly; so that is what the tensor cores multiply,
and the scale of a group acts on the float32 sums of its 128, 64 or 32 inputs.  No weight is ever rounded, and a scale costs one
operation for each result of a group instead of one for each weight.  Scales of rows act on the finished sums.

Numbers appear by putting the bits of a field into the mantissa of a BF16 number whose last bit is worth 1 (0x4300 is 128): one
operation for two weights, and one more to take 128 and the zero point away.  A field of neighbouring words is a run of neighbouring
inputs, so what a thread unpacks is what the tensor core wants from it.  ``ASM`` says so in machine instructions for 4 and 8 bits; the
other way is plain arithmetic, gives the same bits, and is what widths without instructions, and Triton's interpreter, take.  Widths
of several planes are one product for each plane, added in the tensor core.

A fixed number of programs takes tile after tile.  This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803, RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit.grid import HALF_RANGE, INT_RANGE
from quantkit.kernels import moe_tiles
from quantkit.kernels.activations import EPSILON
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import INPUTS, Rows, Shape, Tiles
from quantkit.kernels.moe_triton_parts import place_of, store_gated, store_outputs
from quantkit.kernels.planes import PLANES

# Two neighbouring words w0, w1 to pairs of BF16 numbers, one pair for each field: 128 + field.  %s: what is done with each pair.
_NIBBLES = """
{
.reg .b32 a, b, t, m;
mov.b32 m, 0xC308C308;
prmt.b32 a, $8, $9, 0x5410;
prmt.b32 b, $8, $9, 0x7632;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, a, 4;
lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, a, 8;
lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, a, 12;
lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $4, b, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, b, 4;
lop3.b32 $5, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, b, 8;
lop3.b32 $6, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, b, 12;
lop3.b32 $7, t, 0x000f000f, 0x43004300, 0xea;
"""
_LESS_136 = "".join(f"add.rn.bf16x2 ${field}, ${field}, m;\n" for field in range(8))
_RAW_NIBBLES = tl.constexpr(_NIBBLES + "}")
_SIGNED_NIBBLES = tl.constexpr(_NIBBLES + _LESS_136 + "}")
_NIBBLE_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))
# The same for bytes: 128 + the low 7 bits, less 128 where the top bit is set and less 256 where it is not.
_SIGNED_BYTES = tl.constexpr(
    "{\n.reg .b32 t, s;\n"
    + "".join(
        f"prmt.b32 t, $4, $5, 0x{4 + byte}{4 + byte}{byte}{byte};\n"
        f"lop3.b32 s, t, 0x00800080, 0x43804380, 0x6a;\n"
        f"lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea;\n"
        f"sub.rn.bf16x2 ${byte}, t, s;\n"
        for byte in range(4)
    )
    + "}"
)
_B = tl.bfloat16
_BYTE_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 2))


@triton.jit
def _joined(one, other):
    """Two tiles side by side."""
    return tl.reshape(tl.permute(tl.join(one, other), (0, 2, 1)), (one.shape[0], 2 * one.shape[1]))


@triton.jit
def _side_by_side(parts):
    """Tiles side by side, a power of two of them."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return _joined(parts[0], parts[1])
    elif len(parts) == 4:
        return _joined(_joined(parts[0], parts[1]), _joined(parts[2], parts[3]))
    else:
        return _joined(
            _joined(_joined(parts[0], parts[1]), _joined(parts[2], parts[3])),
            _joined(_joined(parts[4], parts[5]), _joined(parts[6], parts[7])),
        )


@triton.jit
def _less(tile, subtrahend, ASM: tl.constexpr):
    """BF16 ``tile [outputs, inputs]`` less whole BF16 numbers ``[outputs]``, exactly."""
    other = tl.broadcast_to(subtrahend[:, None], tile.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [tile, other], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tile - other


@triton.jit
def _nibbles(words, SIGNED: tl.constexpr):
    """The eight fields of ``words [outputs, 16]`` as BF16 numbers: less 8, or with 128 to be taken away."""
    asm: tl.constexpr = _SIGNED_NIBBLES if SIGNED else _RAW_NIBBLES
    return tl.inline_asm_elementwise(
        asm,
        _NIBBLE_OPERANDS,
        [words],
        dtype=(_B, _B, _B, _B, _B, _B, _B, _B),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _bytes(words):
    """The four fields of ``words [outputs, 32]`` as BF16 numbers, less 128."""
    return tl.inline_asm_elementwise(_SIGNED_BYTES, _BYTE_OPERANDS, [words], dtype=(_B, _B, _B, _B), is_pure=True, pack=2)


@triton.jit
def _fields(words, PLANE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """The fields of one of ``PARTS`` of a step, one behind the other, ``[outputs, 128 / PARTS]`` int32, in plain arithmetic."""
    COUNT: tl.constexpr = 32 // PLANE // PARTS
    shifts = (tl.arange(0, COUNT) + PART * COUNT) * PLANE
    fields = (words[:, None, :] >> shifts[None, :, None]) & ((1 << PLANE) - 1)
    return tl.reshape(fields, (words.shape[0], COUNT * words.shape[1]))


@triton.jit
def _plain(words, PLANE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """(field - ``OFFSET``) * ``STEP`` as BF16 numbers, exactly; ``PLANE`` of at most 7 bits."""
    fields = (_fields(words, PLANE, PART, PARTS) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return (fields - (128.0 + OFFSET)) * STEP


@triton.jit
def multiply(
    rows,
    low,
    middle,
    top,
    scales,
    zero_points,
    row_scales,
    out,
    experts,
    firsts,
    lasts,
    count,
    all_rows,
    weight_rows,
    outputs,
    steps,
    groups,
    width,
    LOW: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPED: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Descriptors of rows, planes, scales and zero points; pointers to the rest; see ``_launch``."""
    tiles = tl.load(count)
    blocks = tl.cdiv(weight_rows, OUTPUTS)
    WIDTH: tl.constexpr = 128 // PARTS  # inputs of a part
    WORDS: tl.constexpr = 4 * (LOW + MIDDLE + TOP)  # of a step
    for number in range(tl.program_id(0), tiles * blocks * SPLITS, tl.num_programs(0)):
        tile, block = place_of(number // SPLITS, tiles, blocks, GROUP)
        expert = tl.load(experts + tile)
        first_row = tl.load(firsts + tile)
        last_row = tl.load(lasts + tile)
        weight_row = expert * weight_rows + block * OUTPUTS
        share = tl.cdiv(steps, SPLITS)
        split = number % SPLITS
        total = tl.zeros((OUTPUTS, TOKENS), dtype=tl.float32)
        if ZERO_POINTS and not GROUPED:
            zero_point = tl.reshape(zero_points.load([expert, block * OUTPUTS]), (OUTPUTS,))
        # told here, the number of stages holds for scales too, which do not go into the product itself
        for step in tl.range(split * share, tl.minimum(split * share + share, steps), num_stages=STAGES):
            words = low.load([weight_row, step * WORDS])
            if MIDDLE:
                middle_words = middle.load([weight_row, step * WORDS + 4 * LOW])
            if TOP:
                top_words = top.load([weight_row, step * WORDS + 4 * (LOW + MIDDLE)])
            if ASM and LOW == 8:
                fields = _bytes(words)
            elif ASM and LOW == 4:
                fields = _nibbles(words, not ZERO_POINTS and not MIDDLE)
            for part in tl.static_range(PARTS):
                x = tl.trans(rows.load([first_row, step * 128 + part * WIDTH]))
                if GROUPED:
                    scale = tl.reshape(scales.load([expert * groups + step * PARTS + part, block * OUTPUTS]), (OUTPUTS,))
                    if ZERO_POINTS:
                        zero_point = tl.reshape(
                            zero_points.load([expert * groups + step * PARTS + part, block * OUTPUTS]), (OUTPUTS,)
                        )
                # the codes of the lowest plane, signed where it is the only one; what they are too large is in ``excess``
                if LOW == 8:
                    if ASM:
                        weights = _side_by_side(fields[part * (4 // PARTS) : (part + 1) * (4 // PARTS)])
                    else:
                        weights = (_fields(words, 8, part, PARTS) - 128).to(tl.float32).to(tl.bfloat16)
                    if ZERO_POINTS:
                        weights = _less(weights, zero_point.to(tl.float32).to(tl.bfloat16), ASM)
                elif ASM and LOW == 4:
                    weights = _side_by_side(fields[part * (8 // PARTS) : (part + 1) * (8 // PARTS)])
                    if MIDDLE:
                        weights = _less(weights, tl.full((OUTPUTS,), 128.0, tl.bfloat16), ASM)
                    elif ZERO_POINTS:
                        weights = _less(weights, (zero_point.to(tl.float32) + 136.0).to(tl.bfloat16), ASM)
                else:
                    weights = _plain(words, LOW, part, PARTS, 0.0 if MIDDLE else 1 << (LOW - 1), 1.0)
                    if ZERO_POINTS and not MIDDLE:
                        weights = _less(weights, zero_point.to(tl.float32).to(tl.bfloat16), ASM)
                if GROUPED:
                    found = tl.dot(weights, x)
                else:
                    found = tl.dot(weights, x, total)
                if MIDDLE:  # the highest plane is signed
                    weights = _plain(
                        middle_words, MIDDLE, part, PARTS, 0.0 if TOP else 1 << (MIDDLE - 1), 1 << LOW
                    )
                    if ZERO_POINTS and not TOP:
                        weights = _less(weights, zero_point.to(tl.float32).to(tl.bfloat16), ASM)
                    found = tl.dot(weights, x, found)
                if TOP:
                    weights = _plain(top_words, TOP, part, PARTS, 1 << (TOP - 1), 1 << (LOW + MIDDLE))
                    if ZERO_POINTS:
                        weights = _less(weights, zero_point.to(tl.float32).to(tl.bfloat16), ASM)
                    found = tl.dot(weights, x, found)
                if GROUPED:
                    total += found * scale.to(tl.float32)[:, None]
                else:
                    total = found
        if not GROUPED:
            scale = tl.reshape(scales.load([expert, block * OUTPUTS]), (OUTPUTS,))
            total *= scale.to(tl.float32)[:, None]
        if ROW_SCALES:
            row = first_row + tl.arange(0, TOKENS)
            total *= tl.load(row_scales + row, mask=row < last_row, other=0.0)[None, :]
        if GATED:
            store_gated(total, out, first_row, last_row, block * OUTPUTS, outputs, width, OUTPUTS, TOKENS)
        else:
            target = out + split.to(tl.int64) * all_rows * width
            store_outputs(total, target, first_row, last_row, block * OUTPUTS, outputs, width, OUTPUTS, TOKENS)


def gate_up(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """silu(gate) * up; see :mod:`quantkit.kernels.moe_triton`."""
    _launch(rows, weight, tiles, out[None])


def matmul(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """Products, one of each run of inputs; see :mod:`quantkit.kernels.moe_triton`."""
    _launch(rows, weight, tiles, out)


def round_rows(values: torch.Tensor, weight: DeviceWeight, expert_of_row: torch.Tensor) -> Rows:
    """Rows as clients round them to int8: whole numbers, which BF16 holds, and what a step of each row is worth."""
    wide = values.to(torch.float32)
    scale = wide.abs().amax(1, keepdim=True) / HALF_RANGE["int8"]
    scale = torch.where(scale == 0, EPSILON, scale)
    steps = wide.div_(scale).clamp_(*INT_RANGE["int8"]).round_()
    return Rows(steps.to(torch.bfloat16), scale[:, 0].contiguous())


def shape_of_tile(weight: DeviceWeight, tokens: int) -> Shape:
    """The entry of the table."""
    return moe_tiles.shape_of("integer", tokens)


def settings(weight: DeviceWeight, shape: Shape, tokens: int, *, scaled_rows: bool, splits: int, asm: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    assert weight.scheme is not None
    low, middle, top = (*PLANES[weight.scheme.bits], 0, 0)[:3]
    grouped = weight.scheme.granularity == "group"
    return {
        "LOW": low,
        "MIDDLE": middle,
        "TOP": top,
        "PARTS": INPUTS // weight.scheme.group_size if grouped else 1,
        "GROUPED": grouped,
        "ZERO_POINTS": "zero_points" in weight.tables,
        "ROW_SCALES": scaled_rows,
        "GATED": weight.paired,
        "SPLITS": splits,
        "OUTPUTS": shape.outputs,
        "TOKENS": tokens,
        "GROUP": shape.group,
        "STAGES": shape.stages,
        "ASM": asm,
    }


def _launch(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor, asm: bool | None = None) -> None:
    """out: ``[splits, rows, width]``, contiguous; one split where gate and up are multiplied."""
    assert weight.scheme is not None and out.is_contiguous() and rows.values.is_contiguous()
    assert rows.values.shape[1] == weight.padded_inputs and (not weight.paired or len(out) == 1)
    shape = shape_of_tile(weight, tiles.tokens)
    asm = weight.codes.is_cuda if asm is None else asm
    chosen = settings(weight, shape, tiles.tokens, scaled_rows=rows.scales is not None, splits=len(out), asm=asm)
    planes = [plane for plane in (chosen["LOW"], chosen["MIDDLE"], chosen["TOP"]) if plane]
    words = [_rectangles(weight.codes, shape.outputs, 4 * plane) for plane in planes]
    blocks = triton.cdiv(weight.rows, shape.outputs)
    programs = min(tiles.most * blocks * len(out), moe_tiles.multiprocessors(out.device) * shape.residents)
    scales = _rectangles(weight.tables["scales"], 1, shape.outputs)
    multiply[(programs,)](
        _rectangles(rows.values, tiles.tokens, INPUTS // chosen["PARTS"]),
        *(words[min(place, len(words) - 1)] for place in range(3)),
        scales,
        _rectangles(weight.tables["zero_points"], 1, shape.outputs) if chosen["ZERO_POINTS"] else scales,
        out if rows.scales is None else rows.scales,
        out,
        tiles.expert,
        tiles.first,
        tiles.last,
        tiles.count,
        out.shape[1],
        weight.rows,
        weight.outputs,
        weight.padded_inputs // INPUTS,
        len(weight.tables["scales"]) // weight.matrices,
        out.shape[2],
        **chosen,
        num_warps=shape.warps,
        enable_fp_fusion=True,
    )


def _rectangles(tensor: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """The tensor as something that is read in rectangles; zeros beyond its edges."""
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], [height, width])
