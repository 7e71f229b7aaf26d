"""Codes and scales to float32 in one pass: what ``grid.dequantize`` says, bit for bit, at the speed of memory.

Whatever the scheme, a row is runs of weights that share a step, and

    value = (code - centre) * step - minimum            whole numbers: centre is the zero point or a type's offset
    value = table[code] * step                          4-bit floats and ggml's 16 levels
    value = float8(code) * step                         fp8

``prepare`` finds the steps of a matrix once, which is little work as there are 16 or more weights to each; the kernel then fills
any rows, so threads share a matrix and a caller may take it in pieces that stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.codebooks import CODEBOOKS
from quantkit.grid import E8M0_BIAS, FP4_VALUES, QuantizedTensor
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float16, load_float32, load_int8, load_int32, load_uint8, store
from quantkit.kernels.simd import bits, floats, from_bits, ints, lookup, select
from quantkit.scheme import BLOCK_SIZE
from quantkit.team import Team, spans

WHOLE, TABLE, FLOAT8 = range(3)
ROWS = 64  # rows that a thread takes at a time

_FP4 = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)], np.float32)
_NO_TABLE = np.zeros(16, np.float32)


@dataclass(frozen=True)
class Prepared:
    """A matrix ``[out, in]`` as the kernel takes it.

    codes: as stored, uint8 seen flat.  kind: how a code is read.  width: neighbouring inputs that share a step.  rows_per_step:
    rows that share one.  steps, minimums: float32, flat; no minimums where they are 0.  centres: int8, flat, one for each step, or
    a single one.  table: what 16 codes stand for.
    """

    rows: int
    columns: int
    codes: NDArray[np.uint8]
    kind: int
    width: int
    rows_per_step: int
    steps: NDArray[np.float32]
    minimums: NDArray[np.float32]
    centres: NDArray[np.int8]
    table: NDArray[np.float32]

    def into(self, out: torch.Tensor, rows: slice) -> None:
        """Fill ``out [rows, in]``, contiguous float32, with those rows."""
        _fill(
            self.codes,
            out.numpy().reshape(-1),
            rows.start,
            rows.stop,
            self.columns,
            self.kind,
            self.width,
            self.rows_per_step,
            self.steps,
            self.minimums,
            self.centres,
            self.table,
        )


def dequantize_into(quantized: QuantizedTensor, out: torch.Tensor, rows: slice | None = None, team: Team | None = None) -> None:
    """Fill ``out``, contiguous float32 ``[rows, in]``, with ``grid.dequantize(quantized)[rows]``.

    rows: a slice without step; None for all.  Raises ValueError when ``out`` has another shape or type.
    """
    count, columns = quantized.codes.shape
    start, stop, _ = (rows or slice(None)).indices(count)
    if out.shape != (stop - start, columns) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{out.dtype} {list(out.shape)} for rows {start} to {stop} of {columns} values; expected contiguous float32"
        )
    if quantized.codes.is_floating_point() and quantized.scheme.number == "ggml":
        out.copy_(quantized.codes[start:stop])
        return
    prepared = prepare(quantized)
    if team is None:
        prepared.into(out, slice(start, stop))
        return
    team.run(
        lambda part: prepared.into(out[part], slice(start + part.start, start + part.stop)),
        spans(stop - start, ROWS),
    )


def prepare(quantized: QuantizedTensor) -> Prepared:
    """The steps of a matrix; not for ggml's floating types, which have none."""
    scheme, (rows, columns) = quantized.scheme, quantized.codes.shape
    codes = quantized.codes.contiguous().view(torch.uint8).numpy().reshape(-1)
    if scheme.number == "ggml":
        return _prepare_blocks(quantized, codes)
    kind, table = {"fp4": (TABLE, _FP4), "fp8": (FLOAT8, _NO_TABLE)}.get(scheme.number, (WHOLE, _NO_TABLE))
    steps = _steps(quantized)
    centres = np.zeros(1, np.int8) if quantized.zero_point is None else _flat(quantized.zero_point)
    width = columns // max(quantized.scale.shape[1], 1)
    rows_per_step = {"block": BLOCK_SIZE, "tensor": max(rows, 1)}.get(scheme.granularity, 1)
    return Prepared(rows, columns, codes, kind, width, rows_per_step, steps, np.empty(0, np.float32), centres, table)


def _prepare_blocks(quantized: QuantizedTensor, codes: NDArray[np.uint8]) -> Prepared:
    kind, (rows, columns) = quantized.scheme.block_type, quantized.codes.shape
    groups = kind.block // kind.group if kind.group else 1
    fraction, odd = (CODEBOOKS[kind.name].fraction, True) if kind.codebook else (1.0, False)
    if quantized.scheme.scale_number == "e8m0":
        steps, minimums = _power_table(-1)[_flat(quantized.scale)], np.empty(0, np.float32)
    else:
        scales = _flat(quantized.scale.view(torch.int16))
        steps = np.empty(scales.size * groups, np.float32)
        _block_steps(scales, _maybe(quantized.group_scale), groups, odd, fraction, steps)
        minimums = np.empty(0 if quantized.minimum is None else steps.size, np.float32)
        if quantized.minimum is not None:  # types without groups add it
            sign = -1.0 if quantized.group_minimum is None else 1.0
            _block_steps(_flat(quantized.minimum.view(torch.int16)), _maybe(quantized.group_minimum), groups, False, sign, minimums)
    table = _NO_TABLE if kind.levels is None else np.array(kind.levels, np.float32)
    centres = np.array([kind.offset], np.int8)
    width = kind.group or kind.block
    return Prepared(rows, columns, codes, WHOLE if kind.levels is None else TABLE, width, 1, steps, minimums, centres, table)


def _steps(quantized: QuantizedTensor) -> NDArray[np.float32]:
    """``grid.effective_scale``, flat."""
    number, scale = quantized.scheme.scale_number, quantized.scale
    steps: NDArray[np.float32]
    if number == "e8m0":
        steps = _power_table(0)[_flat(scale)]
        return steps
    if number == "fp8":
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
        if quantized.global_scale is not None:
            table /= quantized.global_scale
        steps = table.numpy()[_flat(scale.view(torch.uint8))]
        return steps
    value = scale.to(torch.float32)
    steps = _flat(value if quantized.global_scale is None else value / quantized.global_scale)
    return steps


def _power_table(more: int) -> NDArray[np.float32]:
    """2^(code - 127 + more) of every exponent code."""
    powers: NDArray[np.float32] = torch.ldexp(torch.ones(256), torch.arange(256, dtype=torch.int32) - E8M0_BIAS + more).numpy()
    return powers


def _flat(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.contiguous().numpy().reshape(-1)


def _maybe(tensor: torch.Tensor | None) -> NDArray[np.int8]:
    return np.empty(0, np.int8) if tensor is None else _flat(tensor)


# ---------------------------------------------------------------------------------------------------------------- kernels


@compiled
def _integer(value: Any, odd: bool) -> Any:
    """An integer that stands for 2 i + 1 where ``odd``."""
    return floats(2.0) * floats(value) + floats(1.0) if odd else floats(value)


@kernel
def _block_steps(scales: Any, integers: Any, groups: int, odd: bool, factor: float, out: Any) -> None:
    """out: scales (FP16 bits, one per block) times the group's integer times ``factor``.  groups: of a block, a power of two."""
    lanes, shift, times = np.arange(16).astype(np.int32), 0, floats(factor)
    while 1 << shift < groups:
        shift += 1
    whole = scales.size // 16 * 16
    for first in range(0, whole, 16):
        part = load_float16(scales, first)
        for vector in range(groups):
            at = first * groups + 16 * vector
            if integers.size:
                block = (ints(16 * vector) + load_int32(lanes, 0)) >> ints(shift)
                store(out, at, lookup(part, block) * _integer(load_int8(integers, at), odd) * times)
            else:
                store(out, at, part * times)
    last, integer, found = np.zeros(16, np.int16), np.zeros(16, np.int8), np.empty(16, np.float32)
    for block in range(whole, scales.size):
        last[0] = scales[block]
        scale = load_float16(last, 0)  # in lane 0
        for group in range(block * groups, (block + 1) * groups):
            if integers.size:
                integer[0] = integers[group]
                store(found, 0, scale * _integer(load_int8(integer, 0), odd) * times)
            else:
                store(found, 0, scale * times)
            out[group] = found[0]


@compiled
def float8(code: Any) -> Any:
    """E4M3 numbers without infinity, exactly."""
    magnitude = code & ints(0x7F)
    normal = (magnitude + ints(120 << 3)) << ints(20)
    value = select(magnitude < ints(8), bits(floats(magnitude) * floats(2.0**-9)), normal)
    value = select(magnitude > ints(0x7E), ints(0x7FC00000), value)
    return from_bits(value | ((code & ints(0x80)) << ints(24)))


@kernel
def _fill(
    codes: Any,
    out: Any,
    first: int,
    last: int,
    columns: int,
    kind: int,
    width: int,
    rows_per_step: int,
    steps: Any,
    minimums: Any,
    centres: Any,
    table: Any,
) -> None:
    levels, vectors, groups = load_float32(table, 0), width // 16 * 16, columns // max(width, 1)
    padded, values = np.zeros(16, np.uint8), np.empty(16, np.float32)
    for row in range(first, last):
        source, target = row * columns, (row - first) * columns
        for group in range(groups):
            at = row // rows_per_step * groups + group
            step, minimum = floats(steps[at]), floats(minimums[at] if minimums.size else np.float32(0.0))
            centre = ints(centres[at] if centres.size > 1 else centres[0])
            if kind == WHOLE:
                for index in range(0, vectors, 16):
                    value = floats(load_int8(codes, source + index) - centre) * step - minimum
                    store(out, target + index, value)
            elif kind == TABLE:
                for index in range(0, vectors, 16):
                    store(out, target + index, lookup(levels, load_uint8(codes, source + index)) * step)
            else:
                for index in range(0, vectors, 16):
                    store(out, target + index, float8(load_uint8(codes, source + index)) * step)
            if vectors < width:
                for index in range(vectors, width):
                    padded[index - vectors] = codes[source + index]
                if kind == WHOLE:
                    store(values, 0, floats(load_int8(padded, 0) - centre) * step - minimum)
                elif kind == TABLE:
                    store(values, 0, lookup(levels, load_uint8(padded, 0)) * step)
                else:
                    store(values, 0, float8(load_uint8(padded, 0)) * step)
                for index in range(vectors, width):
                    out[target + index] = values[index - vectors]
            source += width
            target += width
