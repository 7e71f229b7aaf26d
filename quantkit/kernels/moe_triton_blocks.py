"""Products with blocks of llama.cpp's types Q8_0, Q4_K and Q6_K on a Hopper GPU, for rows that are sorted by expert.

:mod:`quantkit.kernels.device_blocks` says how blocks lie on a device.  No stored value is rounded on its way to the tensor core:

    Q8_0   codes are whole numbers that BF16 holds, scales act on sums of 32: the kernel for INT8 in groups of 32, with FP16 scales
    Q4_K   group scale * code is at most 63 * 15, which FP16 holds.  So FP16 numbers are multiplied, 256 inputs in one sum, and only
           the block's scale acts on sums.  Group minimums are eight more inputs, times sums of 32 values of a row
    Q6_K   group scale * (code - 32) is at most 4096, which FP16 holds but for its last bit.  The product is therefore two FP16
           numbers, what it rounds to and what that leaves, and the tensor core multiplies both

Sums of 32 (or 16) that were scaled one by one would cost an operation for each result and group, as much as the products themselves
where tiles are large; multiplying the scale into the weights costs none for Q4_K, where it takes the place of a subtraction.

For this rows are FP16 too: BF16 numbers times a power of two, one for each row, so that its largest is between 512 and 1024.  That
is exact for what is at least 2^-26 of the largest, and off by 2^-34 of it otherwise, far below the rounding of the row itself.

``ASSEMBLY`` chooses between instructions for two numbers at once and plain arithmetic, which gives the same bits.  This module
imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit.kernels import moe_tiles, moe_triton_integer
from quantkit.kernels.device_blocks import CODE_WORDS, NUMBERS
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.moe_tiles import Rows, Shape, Tiles
from quantkit.kernels.moe_triton_parts import Launch, joined, launch_of_tiles, store_tile, tile_of
from quantkit.scheme import parse_scheme

BLOCK, GROUPS = 256, 8  # inputs of a block, and runs of 32 in it
_BLOCK, _GROUPS, _NUMBERS = tl.constexpr(BLOCK), tl.constexpr(GROUPS), tl.constexpr(NUMBERS)


# ------------------------------------------------------------------------------------------------------- instructions


def _scale_pairs(signed: bool) -> str:
    """Four bytes of a word to pairs of FP16 numbers, the same twice: 1024 + byte less 1024, or less 1152 with its sign turned."""
    lines = ["{", ".reg .b32 t, m;", f"mov.b32 m, {'0xe480e480' if signed else '0xe400e400'};"]
    source = "$4"
    if signed:
        lines += [".reg .b32 u;", "xor.b32 u, $4, 0x80808080;"]
        source = "u"
    for byte in range(4):
        lines += [f"prmt.b32 t, {source}, 0x64646464, 0x4{byte}4{byte};", f"add.rn.f16x2 ${byte}, t, m;"]
    return "\n".join([*lines, "}"])


def _nibble(source: str, place: int) -> list[str]:
    """t = 1024 + the nibble at ``place`` of both halves."""
    shifted = [f"shr.u32 t, {source}, {4 * place};"] if place else []
    return [*shifted, f"lop3.b32 t, {'t' if place else source}, 0x000f000f, 0x64006400, 0xea;"]


def _times_four_bits() -> str:
    """Eight fields of words $8, $9 times their group's scale, to $0..$7: scales in $10, $12, $14, $16, then -1024 times each."""
    lines = ["{", ".reg .b32 a, b, t;", "prmt.b32 a, $8, $9, 0x5410;", "prmt.b32 b, $8, $9, 0x7632;"]
    for field in range(8):
        group = field // 2
        lines += _nibble("a" if field < 4 else "b", field % 4)
        lines.append(f"fma.rn.f16x2 ${field}, t, ${10 + 2 * group}, ${18 + 2 * group};")
    return "\n".join([*lines, "}"])


def _times_six_bits(quarter: int) -> str:
    """Four fields of two words, upper bits from $10, $11, times $12, $14, $16, $18: $0..$3 what it rounds to, $4..$7 what is left.

    quarter: which four of the sixteen fields of a block; two quarters make a half, whose lower bits share words.
    """
    low, top = ("0x7632" if part else "0x5410" for part in (quarter % 2, quarter // 2))
    lines = ["{", ".reg .b32 a, c, t, u, n, m;", "mov.b32 m, 0xe420e420;"]
    lines += [f"prmt.b32 a, $8, $9, {low};", f"prmt.b32 c, $10, $11, {top};"]
    for field in range(4):
        lines += _nibble("a", field)
        shift = 2 * (4 * (quarter % 2) + field) - 4  # two bits to places 4 and 5
        lines.append(f"{'shr.u32' if shift >= 0 else 'shl.b32'} u, c, {abs(shift)};")
        lines += ["lop3.b32 t, u, 0x00300030, t, 0xea;", "add.rn.f16x2 t, t, m;"]  # less 1056
        lines += [f"mul.rn.f16x2 ${field}, t, ${12 + 2 * field};", f"neg.f16x2 n, ${field};"]
        lines.append(f"fma.rn.f16x2 ${4 + field}, t, ${12 + 2 * field}, n;")
    return "\n".join([*lines, "}"])


_UNSIGNED_PAIRS, _SIGNED_PAIRS = tl.constexpr(_scale_pairs(False)), tl.constexpr(_scale_pairs(True))
_FOUR_BITS = tl.constexpr(_times_four_bits())
_SIX_BITS = tl.constexpr(tuple(_times_six_bits(quarter) for quarter in range(4)))
_EIGHT_OF_18 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 18))
_EIGHT_OF_12 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))
_FOUR_OF_1 = tl.constexpr(",".join(["=&r"] * 4 + ["r"]))
_LESS_1024 = tl.constexpr("{\n.reg .b32 m;\nmov.b32 m, 0xe400e400;\nmul.rn.f16x2 $0, $1, m;\n}")


@triton.jit
def _side_by_side(t0, t1, t2, t3, t4, t5, t6, t7):
    return joined(joined(joined(t0, t1), joined(t2, t3)), joined(joined(t4, t5), joined(t6, t7)))


@triton.jit
def _fields(words, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Eight fields of ``words [outputs, 16]``, from ``FIRST`` on, one behind the other: int32 ``[outputs, 128]``."""
    shifts = (FIRST + tl.arange(0, 8)) * BITS
    return tl.reshape((words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1), (words.shape[0], 128))


@triton.jit
def _pairs(word, SIGNED: tl.constexpr):
    """The four bytes of ``word [outputs]`` as FP16 numbers, each twice in a word."""
    asm: tl.constexpr = _SIGNED_PAIRS if SIGNED else _UNSIGNED_PAIRS
    return tl.inline_asm_elementwise(asm, _FOUR_OF_1, [word], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def _spread(pair, words):
    return tl.broadcast_to(pair[:, None], words.shape)


@triton.jit
def _times_less_1024(pair):
    return tl.inline_asm_elementwise(_LESS_1024, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _bytes_of(word, COUNT: tl.constexpr, EACH: tl.constexpr):
    """The bytes of ``word [outputs]`` from the lowest on, each ``EACH`` times, then again: int32 ``[outputs, COUNT]``."""
    return (word[:, None] >> (tl.arange(0, COUNT) // EACH % 4 * 8)[None, :]) & 255


@triton.jit
def four_bits(words, scales, ASSEMBLY: tl.constexpr):
    """Codes of 128 inputs times their group's scale: FP16 ``[outputs, 128]``.  scales: the word with those of four groups."""
    if ASSEMBLY:
        s0, s1, s2, s3 = _pairs(scales, False)
        f0, f1, f2, f3, f4, f5, f6, f7 = tl.inline_asm_elementwise(
            _FOUR_BITS,
            _EIGHT_OF_18,
            [
                words,
                _spread(s0, words),
                _spread(s1, words),
                _spread(s2, words),
                _spread(s3, words),
                _spread(_times_less_1024(s0), words),
                _spread(_times_less_1024(s1), words),
                _spread(_times_less_1024(s2), words),
                _spread(_times_less_1024(s3), words),
            ],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return _side_by_side(f0, f1, f2, f3, f4, f5, f6, f7)
    else:
        steps = tl.broadcast_to(_bytes_of(scales, 8, 2)[:, :, None], (words.shape[0], 8, 16))
        return (_fields(words, 4, 0) * tl.reshape(steps, (words.shape[0], 128))).to(tl.float32).to(tl.float16)


@triton.jit
def _quarter(words, top, scales, QUARTER: tl.constexpr):
    """Four fields times their scales, in instructions: what they round to, and what is left."""
    s0, s1, s2, s3 = _pairs(scales, True)
    given = [words, top, _spread(s0, words), _spread(s1, words), _spread(s2, words), _spread(s3, words)]
    asm: tl.constexpr = _SIX_BITS[QUARTER]
    return tl.inline_asm_elementwise(
        asm,
        _EIGHT_OF_12,
        given,
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def six_bits(words, top, scales, others, HALF: tl.constexpr, ASSEMBLY: tl.constexpr):
    """(code - 32) of 128 inputs times their group's scale, as two summands FP16 ``[outputs, 128]``.  scales, others: four each."""
    if ASSEMBLY:
        p0, p1, p2, p3, r0, r1, r2, r3 = _quarter(words, top, scales, 2 * HALF)
        p4, p5, p6, p7, r4, r5, r6, r7 = _quarter(words, top, others, 2 * HALF + 1)
        return _side_by_side(p0, p1, p2, p3, p4, p5, p6, p7), _side_by_side(r0, r1, r2, r3, r4, r5, r6, r7)
    else:
        codes = _fields(words, 4, 0) + (_fields(top, 2, 8 * HALF) << 4) - 32
        steps = tl.where((tl.arange(0, 8) < 4)[None, :], _bytes_of(scales, 8, 1), _bytes_of(others, 8, 1))
        steps = tl.broadcast_to(((steps ^ 128) - 128)[:, :, None], (words.shape[0], 8, 16))
        exact = (codes * tl.reshape(steps, (words.shape[0], 128))).to(tl.float32)
        product = exact.to(tl.float16)
        return product, (exact - product.to(tl.float32)).to(tl.float16)


@triton.jit
def _words(numbers, step, WORD: tl.constexpr, block, OUTPUTS: tl.constexpr):
    """One of the five words of a step, int32 ``[outputs]``."""
    return tl.reshape(numbers.load([step * _NUMBERS + WORD, block * OUTPUTS]), (OUTPUTS,))


@triton.jit
def _half_number(word, SHIFT: tl.constexpr):
    """One of the two FP16 numbers of ``word [outputs]``, float32."""
    return ((word >> SHIFT) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


# ------------------------------------------------------------------------------------------------------------- products


@triton.jit(do_not_specialize=["rows", "split_steps"])
def products(
    values,
    sums,
    codes,
    numbers,
    out,
    factors,
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
    MINIMUMS: tl.constexpr,
    WORDS: tl.constexpr,
    PAIRED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of rows, one block of outputs, ``split_steps`` blocks of 256 inputs: Q4_K with ``MINIMUMS``, else Q6_K."""
    tiles = tl.load(tile_count)
    blocks = tl.cdiv(weight_rows, OUTPUTS)
    program, split = tl.program_id(0), tl.program_id(1)
    if program >= tiles * blocks:
        return
    expert, first, last, block = tile_of(program, tiles, blocks, tile_expert, tile_first, tile_last, GROUP)
    weight_row = expert * weight_rows + block * OUTPUTS
    begin = split * split_steps
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in range(begin, tl.minimum(begin + split_steps, steps)):
        scale = _words(numbers, expert * steps + step, 0, block, OUTPUTS)
        one = _words(numbers, expert * steps + step, 1, block, OUTPUTS)
        two = _words(numbers, expert * steps + step, 2, block, OUTPUTS)
        three = _words(numbers, expert * steps + step, 3, block, OUTPUTS)
        four = _words(numbers, expert * steps + step, 4, block, OUTPUTS)
        low = codes.load([weight_row, step * WORDS])
        high = codes.load([weight_row, step * WORDS + 16])
        left = tl.trans(values.load([first, step * _BLOCK]))
        right = tl.trans(values.load([first, step * _BLOCK + 128]))
        if MINIMUMS:
            part = tl.dot(four_bits(low, one, ASSEMBLY), left)
            part = tl.dot(four_bits(high, two, ASSEMBLY), right, part)
            total += part * _half_number(scale, 0)[:, None]
            first_four = (tl.arange(0, 16) & 4) == 0
            least = tl.where(first_four[None, :], three[:, None], four[:, None]) >> ((tl.arange(0, 16) & 3) * 8)[None, :]
            least = ((least & 255) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
            part = tl.dot(least, tl.trans(sums.load([first, step * 16])))
            total -= part * _half_number(scale, 16)[:, None]
        else:
            top = codes.load([weight_row, step * WORDS + 32])
            product, rest = six_bits(low, top, one, two, 0, ASSEMBLY)
            part = tl.dot(product, left)
            part = tl.dot(rest, left, part)
            product, rest = six_bits(high, top, three, four, 1, ASSEMBLY)
            part = tl.dot(product, right, part)
            part = tl.dot(rest, right, part)
            total += part * _half_number(scale, 0)[:, None]
    row = first + tl.arange(0, ROWS)
    total *= tl.load(factors + row, mask=row < last, other=0.0)[None, :]
    store_tile(total, out, split, rows, first, last, block, outputs, width, PAIRED, OUTPUTS, ROWS)


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class PreparedRows:
    """Rows as these kernels multiply them.

    values: FP16 ``[rows, inputs]``.  factors: float32 ``[rows]``, powers of two that make them what they were.  sums: FP16
    ``[rows, inputs / 16]``, for each 256 inputs the sums of eight runs of 32 values, rounded, and then what that left of them.
    """

    values: torch.Tensor
    factors: torch.Tensor
    sums: torch.Tensor


@triton.jit
def prepare_rows(values, halves, factors, sums, columns, MOST: tl.constexpr):
    """One row of ``values [rows, columns]``; ``MOST`` runs of 32 or more are in it."""
    number = tl.program_id(0).to(tl.int64)
    run, within = tl.arange(0, MOST), tl.arange(0, 32)
    place = run[:, None] * 32 + within[None, :]
    inside = place < columns
    x = tl.load(values + number * columns + place, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.max(tl.abs(x), 1), 0)
    exponent = tl.minimum(263 - (peak.to(tl.int32, bitcast=True) >> 23), 253)  # of 2^(136 - exponent of the peak), plus 127
    tl.store(factors + number, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    x *= (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(halves + number * columns + place, x.to(tl.float16), mask=inside)
    total = tl.sum(x, 1)
    rounded = total.to(tl.float16)
    place = number * (columns // 16) + run // _GROUPS * 16 + run % _GROUPS
    tl.store(sums + place, rounded, mask=run * 32 < columns)
    tl.store(sums + place + _GROUPS, (total - rounded.to(tl.float32)).to(tl.float16), mask=run * 32 < columns)


def prepared(values: torch.Tensor) -> PreparedRows:
    """values: BF16 ``[rows, inputs]``, contiguous, inputs a multiple of 256."""
    count, columns = values.shape
    assert values.is_contiguous() and columns % BLOCK == 0
    device = values.device
    halves = torch.empty((count, columns), dtype=torch.float16, device=device)
    factors = torch.empty(count, device=device)
    sums = torch.empty((count, columns // 16), dtype=torch.float16, device=device)
    most = triton.next_power_of_2(columns // 32)
    prepare_rows[(count,)](values, halves, factors, sums, columns, MOST=most, num_warps=max(4, most // 64), enable_fp_fusion=False)
    return PreparedRows(halves, factors, sums)


# ------------------------------------------------------------------------------------------------------------ launchers


def shape_of_tile(weight: DeviceWeight, tokens: int) -> Shape:
    """The entry of the table for tiles of so many rows."""
    assert weight.scheme is not None
    if _is_integer(weight):
        return moe_triton_integer.shape_of_tile(as_integer(weight), tokens)
    return moe_tiles.shape_of(weight.scheme.name, tokens)


def gate_up(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """silu(gate) * up; see :mod:`quantkit.kernels.moe_triton`."""
    assert weight.paired
    if _is_integer(weight):
        moe_triton_integer.gate_up(rows, as_integer(weight), tiles, out)
    else:
        launch_of(prepared(rows.values), weight, tiles, out[None], assembly=out.is_cuda).run()


def matmul(rows: Rows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor) -> None:
    """Products; see :mod:`quantkit.kernels.moe_triton`."""
    assert not weight.paired
    if _is_integer(weight):
        moe_triton_integer.matmul(rows, as_integer(weight), tiles, out)
    else:
        launch_of(prepared(rows.values), weight, tiles, out, assembly=out.is_cuda).run()


def round_rows(values: torch.Tensor, weight: DeviceWeight, expert_of_row: torch.Tensor) -> Rows:
    """Rows as they are: llama.cpp's types ask for no rounding of their own."""
    return Rows(values)


def as_integer(weight: DeviceWeight) -> DeviceWeight:
    """Q8_0 is INT8 in groups of 32 but for the number of its scales, which the kernel takes as it is."""
    return replace(weight, kind="integer", scheme=parse_scheme("int8-g32"))


def _is_integer(weight: DeviceWeight) -> bool:
    return weight.scheme is not None and weight.scheme.name == "Q8_0"


def launch_of(
    rows: PreparedRows, weight: DeviceWeight, tiles: Tiles, out: torch.Tensor, *, assembly: bool, shape: Shape | None = None
) -> Launch:
    """For Q4_K or Q6_K.  out: ``[splits, rows, width]``, as many rows as there are."""
    assert weight.scheme is not None and rows.values.shape == (out.shape[1], weight.padded_inputs)
    shape = shape or shape_of_tile(weight, tiles.tokens)
    operands = (
        TensorDescriptor.from_tensor(rows.values, [tiles.tokens, 128]),
        TensorDescriptor.from_tensor(rows.sums, [tiles.tokens, 16]),
        TensorDescriptor.from_tensor(weight.codes, [shape.outputs, 16]),
        TensorDescriptor.from_tensor(weight.tables["numbers"], [1, shape.outputs]),
        out,
        rows.factors,
    )
    name = weight.scheme.name
    constants: dict[str, object] = {"MINIMUMS": name == "Q4_K", "WORDS": CODE_WORDS[name], "ASSEMBLY": assembly}
    return launch_of_tiles(products, shape, operands, weight, tiles, out, BLOCK, constants)
