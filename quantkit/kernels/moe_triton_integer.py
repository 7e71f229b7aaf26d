"""Products with integer codes of 2 to 8 bits, straight from their planes (:mod:`quantkit.kernels.planes`), in Triton.

A code less its zero point is a whole number of at most 8 bits, which BF16 holds exactly; so that is what the tensor cores multiply,
and the scale of a group acts on the float32 sums of its 128, 64 or 32 inputs.  No weight is ever rounded, and a scale costs one
operation for each result of a group instead of one for each weight.

Numbers appear by putting the bits of a field into the mantissa of a BF16 number whose last bit is worth 1 (0x4300 is 128): one
operation for two weights, and one more to take 128 and the zero point away.  A field of neighbouring words is a run of neighbouring
inputs, so what a thread unpacks is what the tensor core wants from it.  ``instructions`` says so for planes of 2, 4 and 8 bits; the
other way is plain arithmetic, gives the same bits, and is what planes of 1 bit, and Triton's interpreter, take.  Widths of several
planes are one product for each plane, added in the tensor core.

A fixed number of programs takes tile after tile.  This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803, N806

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit.grid import HALF_RANGE, INT_RANGE
from quantkit.kernels import moe_tiles
from quantkit.kernels.activations import EPSILON
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import INPUTS, Rows, Shape, Tiles
from quantkit.kernels.moe_triton_parts import Launch, joined, store_tile, tile_of
from quantkit.kernels.planes import PLANES

MOST_TOKENS_OF_PARTS = 64  # of a tile where a step has several groups; larger ones are multiplied in pieces
_B = tl.bfloat16


@functools.cache  # making the text takes as long as a whole launch
def instructions(plane: int, offset: int | None, step: int) -> str:
    """What makes ``(field - offset) * step`` of the fields of two neighbouring words: a pair of BF16 numbers for each field.

    Without an offset it is ``field + 128``.  plane: bits of a field, 2, 4 or 8; of 8 there is nothing but ``field - 128``.
    """
    count = 32 // plane
    one, other = f"${count}", f"${count + 1}"
    if plane == 8:  # 128 + the low 7 bits, less 128 where the top bit is set and less 256 where it is not
        lines = [".reg .b32 t, s;"]
        for field in range(count):
            lines += [
                f"prmt.b32 t, {one}, {other}, 0x{4 + field}{4 + field}{field}{field};",
                "lop3.b32 s, t, 0x00800080, 0x43804380, 0x6a;",
                "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea;",
                f"sub.rn.bf16x2 ${field}, t, s;",
            ]
        return "{\n" + "\n".join(lines) + "\n}"
    mask = (1 << plane) - 1
    lines = [".reg .b32 a, b, t, m, f;", f"prmt.b32 a, {one}, {other}, 0x5410;", f"prmt.b32 b, {one}, {other}, 0x7632;"]
    for field in range(count):
        half, shift = "ab"[field * plane // 16], field * plane % 16
        if shift:
            lines.append(f"shr.u32 t, {half}, {shift};")
        lines.append(f"lop3.b32 ${field}, {'t' if shift else half}, 0x{mask:04x}{mask:04x}, 0x43004300, 0xea;")
    if offset is not None:
        lines += [f"mov.b32 m, {_pair(-(128 + offset) * step)};", f"mov.b32 f, {_pair(step)};"]
        how = "add.rn.bf16x2 ${0}, ${0}, m;" if step == 1 else "fma.rn.bf16x2 ${0}, ${0}, f, m;"
        lines += [how.format(field) for field in range(count)]
    return "{\n" + "\n".join(lines) + "\n}"


def _pair(value: int) -> str:
    """A whole number twice in BF16."""
    code = int(torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
    assert float(torch.tensor(float(value), dtype=torch.bfloat16)) == value
    return f"0x{code:04x}{code:04x}"


@triton.jit
def _side_by_side(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` tiles side by side, a power of two, from ``FIRST`` on."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        HALF: tl.constexpr = COUNT // 2
        return joined(_side_by_side(parts, FIRST, HALF), _side_by_side(parts, FIRST + HALF, HALF))


@triton.jit
def _unpacked(words, PLANE: tl.constexpr, ASM: tl.constexpr):
    """All fields of ``words [outputs, 4 * PLANE]`` as BF16 numbers by instructions; two neighbouring words at a time."""
    if PLANE == 8:
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,r,r", [words], dtype=(_B, _B, _B, _B), is_pure=True, pack=2)
    elif PLANE == 4:
        return tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(_B, _B, _B, _B, _B, _B, _B, _B),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(_B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B, _B),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _plain(words, PLANE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr):
    """(field - ``OFFSET``) * ``STEP`` for the fields of one of ``PARTS`` of a step, side by side, in plain arithmetic."""
    COUNT: tl.constexpr = 32 // PLANE // PARTS
    shifts = (tl.arange(0, COUNT) + PART * COUNT) * PLANE
    fields = (words[:, None, :] >> shifts[None, :, None]) & ((1 << PLANE) - 1)
    fields = tl.reshape(fields, (words.shape[0], COUNT * words.shape[1]))
    if PLANE == 8:
        return (fields - OFFSET).to(tl.float32).to(tl.bfloat16)
    else:
        return ((fields | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128.0 + OFFSET)) * STEP


@triton.jit
def _less(tile, subtrahend, ASSEMBLY: tl.constexpr):
    """BF16 ``tile [outputs, inputs]`` less whole numbers ``[outputs]``, exactly."""
    other = tl.broadcast_to(subtrahend.to(tl.bfloat16)[:, None], tile.shape)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [tile, other], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tile - other


@triton.jit(do_not_specialize=["rows_of_split"])
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
    rows_of_split,
    weight_rows,
    outputs,
    steps,
    groups,
    width,
    splits,
    LOW: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOP: tl.constexpr,
    LOW_ASM: tl.constexpr,
    MIDDLE_ASM: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPED: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PAIRED: tl.constexpr,
    PIECES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Descriptors of rows, planes, scales and zero points; pointers to the rest; see :func:`launch_of`."""
    tiles = tl.load(count)
    blocks = tl.cdiv(weight_rows, OUTPUTS)
    WIDTH: tl.constexpr = 128 // PARTS  # inputs of a part
    WORDS: tl.constexpr = 4 * (LOW + MIDDLE + TOP)  # of a step
    share = tl.cdiv(steps, splits)
    for number in range(tl.program_id(0), tiles * blocks * splits * PIECES, tl.num_programs(0)):
        expert, first_row, last_row, block = tile_of(number // (splits * PIECES), tiles, blocks, experts, firsts, lasts, GROUP)
        split = number % splits
        first_row += number // splits % PIECES * TOKENS
        weight_row = expert * weight_rows + block * OUTPUTS
        last_step = tl.minimum(split * share + share, steps)
        if PIECES > 1:
            last_step = tl.where(first_row < last_row, last_step, 0)
        total = tl.zeros((OUTPUTS, TOKENS), dtype=tl.float32)
        if not GROUPED:
            scale = tl.reshape(scales.load([expert, block * OUTPUTS]), (OUTPUTS,))
            if ZERO_POINTS:
                zero_point = tl.reshape(zero_points.load([expert, block * OUTPUTS]), (OUTPUTS,)).to(tl.float32)
        # told here, the number of stages holds for scales too, which do not go into the product itself
        for step in tl.range(split * share, last_step, num_stages=STAGES):
            words = low.load([weight_row, step * WORDS])
            if LOW_ASM != "":
                fields = _unpacked(words, LOW, LOW_ASM)
            if MIDDLE:
                middle_words = middle.load([weight_row, step * WORDS + 4 * LOW])
                if MIDDLE_ASM != "":
                    middle_fields = _unpacked(middle_words, MIDDLE, MIDDLE_ASM)
            if TOP:
                top_words = top.load([weight_row, step * WORDS + 4 * (LOW + MIDDLE)])
            for part in tl.static_range(PARTS):
                x = tl.trans(rows.load([first_row, step * 128 + part * WIDTH]))
                if GROUPED:
                    group = expert * groups + step * PARTS + part
                    scale = tl.reshape(scales.load([group, block * OUTPUTS]), (OUTPUTS,))
                    if ZERO_POINTS:
                        zero_point = tl.reshape(zero_points.load([group, block * OUTPUTS]), (OUTPUTS,)).to(tl.float32)
                # the highest plane has the sign and the zero point
                if LOW_ASM != "":
                    weights = _side_by_side(fields, part * (32 // LOW // PARTS), 32 // LOW // PARTS)
                else:
                    weights = _plain(words, LOW, part, PARTS, 0 if MIDDLE else 1 << (LOW - 1), 1.0)
                if ZERO_POINTS and not MIDDLE:
                    if LOW_ASM != "" and LOW < 8:  # instructions left 128 and the offset in
                        weights = _less(weights, zero_point + (128 + (1 << (LOW - 1))), ASSEMBLY)
                    else:
                        weights = _less(weights, zero_point, ASSEMBLY)
                found = tl.dot(weights, x)
                if MIDDLE:
                    if MIDDLE_ASM != "":
                        weights = _side_by_side(middle_fields, part * (32 // MIDDLE // PARTS), 32 // MIDDLE // PARTS)
                    else:
                        weights = _plain(middle_words, MIDDLE, part, PARTS, 0 if TOP else 1 << (MIDDLE - 1), 1 << LOW)
                    if ZERO_POINTS and not TOP:
                        weights = _less(weights, zero_point, ASSEMBLY)
                    found = tl.dot(weights, x, found)
                if TOP:
                    weights = _plain(top_words, TOP, part, PARTS, 1 << (TOP - 1), 1 << (LOW + MIDDLE))
                    if ZERO_POINTS:
                        weights = _less(weights, zero_point, ASSEMBLY)
                    found = tl.dot(weights, x, found)
                # scales of rows too: a bare sum would become one with the product, whose parts would then wait for each other
                total += found * scale.to(tl.float32)[:, None]
        if ROW_SCALES:
            row = first_row + tl.arange(0, TOKENS)
            total *= tl.load(row_scales + row, mask=row < last_row, other=0.0)[None, :]
        store_tile(total, out, split, rows_of_split, first_row, last_row, block, outputs, width, PAIRED, OUTPUTS, TOKENS)


def gate_up(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """silu(gate) * up; see :mod:`quantkit.kernels.moe_triton`."""
    launch_of(rows, weight, tiles, out[None], assembly=out.is_cuda).run()


def matmul(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """Products, one of each run of inputs; see :mod:`quantkit.kernels.moe_triton`."""
    launch_of(rows, weight, tiles, out, assembly=out.is_cuda).run()


def round_rows(values: torch.Tensor, weight: DeviceWeight, expert_of_row: torch.Tensor) -> Rows:
    """Rows as clients round them to int8: whole numbers, which BF16 holds, and what a step of each row is worth."""
    wide = values.to(torch.float32)
    scale = wide.abs().amax(1, keepdim=True) / HALF_RANGE["int8"]
    scale = torch.where(scale == 0, EPSILON, scale)
    steps = wide.div_(scale).clamp_(*INT_RANGE["int8"]).round_()
    return Rows(steps.to(torch.bfloat16), scale[:, 0].contiguous())


def shape_of_tile(weight: DeviceWeight, tokens: int) -> Shape:
    """The entry of the table: several planes, and several groups in a step, need registers of their own."""
    assert weight.scheme is not None
    planes, parts = PLANES[weight.scheme.bits], _parts(weight)
    if 1 in planes:
        return moe_tiles.shape_of("integer-odd", tokens)
    if len(planes) > 1:
        return moe_tiles.shape_of("integer-planes", tokens)
    if parts > 1:
        return moe_tiles.shape_of("integer-halves" if parts == 2 else "integer-parts", tokens)
    return moe_tiles.shape_of("integer-wide" if planes == (8,) else "integer", tokens)


def _parts(weight: DeviceWeight) -> int:
    """Groups in a step of 128 inputs."""
    assert weight.scheme is not None
    return INPUTS // weight.scheme.group_size if weight.scheme.granularity == "group" else 1


def launch_of(
    rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor, *, assembly: bool, shape: Shape | None = None
) -> Launch:
    """out: ``[splits, rows, width]``, contiguous; one split where gate and up are multiplied."""
    assert weight.scheme is not None and out.is_contiguous() and rows.values.is_contiguous()
    assert rows.values.shape[1] == weight.padded_inputs and (not weight.paired or len(out) == 1)
    shape = shape or shape_of_tile(weight, tiles.tokens)
    bits, parts = weight.scheme.bits, _parts(weight)
    planes, zero_points = PLANES[bits], "zero_points" in weight.tables
    tokens = min(tiles.tokens, MOST_TOKENS_OF_PARTS) if parts > 1 else tiles.tokens
    low, middle, top = (*planes, 0, 0)[:3]
    raw = zero_points and not middle  # what is taken away comes with the zero point
    words = [_rectangles(weight.codes, shape.outputs, 4 * plane) for plane in planes]
    scales = _rectangles(weight.tables["scales"], 1, shape.outputs)
    arguments = (
        _rectangles(rows.values, tokens, INPUTS // parts),
        *(words[min(place, len(words) - 1)] for place in range(3)),
        scales,
        _rectangles(weight.tables["zero_points"], 1, shape.outputs) if zero_points else scales,
        tiles.count if rows.scales is None else rows.scales,
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
        len(out),
    )
    constants: dict[str, object] = {
        "LOW": low,
        "MIDDLE": middle,
        "TOP": top,
        "LOW_ASM": instructions(low, None if raw else 0 if middle else 1 << (low - 1), 1) if assembly else "",
        "MIDDLE_ASM": instructions(2, 0 if top else 2, 1 << low) if assembly and middle == 2 else "",
        "PARTS": parts,
        "GROUPED": weight.scheme.granularity == "group",
        "ZERO_POINTS": zero_points,
        "ROW_SCALES": rows.scales is not None,
        "PAIRED": weight.paired,
        "PIECES": tiles.tokens // tokens,
        "OUTPUTS": shape.outputs,
        "TOKENS": tokens,
        "GROUP": shape.group,
        "STAGES": shape.stages,
        "ASSEMBLY": assembly,
    }
    programs = tiles.most * triton.cdiv(weight.rows, shape.outputs) * len(out) * (tiles.tokens // tokens)
    programs = min(programs, moe_tiles.multiprocessors(out.device) * shape.residents)
    options = {"num_warps": shape.warps, "maxnreg": shape.most_registers, "enable_fp_fusion": True}
    return Launch(multiply, shape, (programs,), arguments, constants, options)


def _rectangles(tensor: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """The tensor as something that is read in rectangles; zeros beyond its edges."""
    assert tensor.is_contiguous()
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], [height, width])
