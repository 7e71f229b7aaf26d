"""Products of a few tokens with stored weights: codes are dequantized in registers and never written anywhere.

With one token a product does two operations for each weight, so the time is that of reading the weights; a byte for each code is a
quarter of what a float32 matrix takes.  Four tokens share what it costs to expand a code; from some ``MOST`` tokens on a product of
BLAS with a dequantized tile is faster.  Sums are taken lane by lane, group by group, in an order that no thread changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantkit.kernels.dequantize import FLOAT8, TABLE, WHOLE, Prepared, float8
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_bfloat16, load_float16, load_float32, load_int8, load_uint8, store
from quantkit.kernels.simd import doubles, floats, fused, ints, lane_sum, lookup

MOST = 8  # tokens

_HALVES = {torch.bfloat16: 3, torch.float16: 4}  # kinds besides those of ``dequantize``


def prepare_floating(weight: torch.Tensor) -> Prepared | None:
    """A BF16 or FP16 matrix whose rows lie one behind the other as the kernel takes it; None for any other."""
    if weight.dtype not in _HALVES or not weight.is_contiguous():
        return None
    (rows, columns), none = weight.shape, np.empty(0, np.float32)
    codes = weight.view(torch.uint8).numpy().reshape(-1)
    centres, table = np.zeros(1, np.int8), np.zeros(16, np.float32)
    return Prepared(
        rows, columns, codes, _HALVES[weight.dtype], columns, max(rows, 1), np.ones(1, np.float32), none, centres, table
    )


def fits(factor: Prepared, tokens: int) -> bool:
    """Whether :func:`dots` takes this weight and is the fastest for so many tokens."""
    return tokens <= MOST and factor.width % 16 == 0


def dots(x: torch.Tensor, factor: Prepared, rows: slice, out: torch.Tensor) -> None:
    """``out [tokens, rows] = x @ weight[rows]^T``.  x: contiguous float32 ``[tokens, in]``.  out: float32, rows contiguous."""
    _dots(
        x.numpy(),
        factor.codes,
        rows.start,
        rows.stop,
        factor.kind,
        factor.width,
        factor.rows_per_step,
        factor.steps,
        factor.minimums,
        factor.centres,
        factor.table,
        out.numpy(),
    )


# ---------------------------------------------------------------------------------------------------------------- kernels


@compiled
def _expanded(kind: int, codes: Any, index: int, centre: Any, levels: Any) -> Any:
    """16 codes from ``index`` on, without their step."""
    if kind == WHOLE:
        return floats(load_int8(codes, index) - centre)
    if kind == TABLE:
        return lookup(levels, load_uint8(codes, index))
    if kind == FLOAT8:
        return float8(load_uint8(codes, index))
    if kind == 3:
        return load_bfloat16(codes, index)
    return load_float16(codes, index)


@compiled
def _one_token(
    x: Any,
    codes: Any,
    first: int,
    last: int,
    kind: int,
    width: int,
    rows_per_step: int,
    steps: Any,
    minimums: Any,
    centres: Any,
    levels: Any,
    sums: Any,
    out: Any,
) -> None:
    groups, shifted = x.size // max(width, 1), minimums.size > 0
    for row in range(first, last):
        result, at = floats(0.0), row // rows_per_step * groups
        for group in range(groups):
            centre = ints(centres[at + group] if centres.size > 1 else centres[0])
            source, target, part = row * x.size + group * width, group * width, floats(0.0)
            for index in range(0, width, 16):
                value = _expanded(kind, codes, source + index, centre, levels)
                part = fused(value, load_float32(x, target + index), part)
            result = fused(part, floats(steps[at + group]), result)
            if shifted:
                result = fused(load_float32(sums, 16 * group), floats(-minimums[at + group]), result)
        out[row - first] = lane_sum(doubles(result))


@kernel
def _dots(
    x: Any,
    codes: Any,
    first: int,
    last: int,
    kind: int,
    width: int,
    rows_per_step: int,
    steps: Any,
    minimums: Any,
    centres: Any,
    table: Any,
    out: Any,
) -> None:
    tokens, columns = x.shape
    levels, groups, shifted = load_float32(table, 0), columns // max(width, 1), minimums.size > 0
    sums = np.empty((tokens, 16 * groups if shifted else 0), np.float32)  # of the inputs of each group, lane by lane
    if shifted:
        for token in range(tokens):
            for group in range(groups):
                total = floats(0.0)
                for index in range(group * width, (group + 1) * width, 16):
                    total = total + load_float32(x[token], index)
                store(sums[token], 16 * group, total)
    for token in range(0, tokens, 4):
        if tokens - token == 1:
            _one_token(
                x[token], codes, first, last, kind, width, rows_per_step, steps, minimums, centres, levels, sums[token], out[token]
            )
            return
        second, third, fourth = min(token + 1, tokens - 1), min(token + 2, tokens - 1), min(token + 3, tokens - 1)
        x0, x1, x2, x3 = x[token], x[second], x[third], x[fourth]
        for row in range(first, last):
            zero, at = floats(0.0), row // rows_per_step * groups
            r0, r1, r2, r3 = zero, zero, zero, zero
            for group in range(groups):
                centre = ints(centres[at + group] if centres.size > 1 else centres[0])
                source, target = row * columns + group * width, group * width
                a, b, c, d = zero, zero, zero, zero
                for index in range(0, width, 16):
                    value = _expanded(kind, codes, source + index, centre, levels)
                    a = fused(value, load_float32(x0, target + index), a)
                    b = fused(value, load_float32(x1, target + index), b)
                    c = fused(value, load_float32(x2, target + index), c)
                    d = fused(value, load_float32(x3, target + index), d)
                step = floats(steps[at + group])
                r0, r1, r2, r3 = fused(a, step, r0), fused(b, step, r1), fused(c, step, r2), fused(d, step, r3)
                if shifted:
                    less, place = floats(-minimums[at + group]), 16 * group
                    r0 = fused(load_float32(sums[token], place), less, r0)
                    r1 = fused(load_float32(sums[second], place), less, r1)
                    r2 = fused(load_float32(sums[third], place), less, r2)
                    r3 = fused(load_float32(sums[fourth], place), less, r3)
            out[token, row - first] = lane_sum(doubles(r0))
            out[second, row - first] = lane_sum(doubles(r1))
            out[third, row - first] = lane_sum(doubles(r2))
            out[fourth, row - first] = lane_sum(doubles(r3))
