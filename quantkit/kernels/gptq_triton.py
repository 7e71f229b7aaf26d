"""The sequential part of GPTQ on a CUDA GPU: ``kernels.gptq.quantize_block`` for the experts of a batch, in one launch per block.

A program takes one expert and ``ROWS`` output rows, one or more to a lane.  ``STEP`` inputs of its rows are held in registers, so
nothing is moved between lanes and no input is picked out of a tile.  For each step it gathers what the earlier inputs of the block
feed forward, rereading their errors, which it wrote itself, and then rounds the inputs one after the other.

Every value gets the same operations in the same order as on the CPU, fused where they are fused there and nowhere else (``launch``
forbids the compiler to fuse more), so codes and errors are bit for bit those of the CPU.  Divisions are correctly rounded; adding a
constant that leaves no room for a fraction rounds to the nearest whole number, ties to even.  Sums are kept per row: no atomics,
the same sums in every run.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator, var-annotated"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit.kernels.gptq import Table

STEP = 8  # inputs held in registers at once
ROWS = 64  # output rows of a program
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # one warp to a program; what rounds twice on the CPU rounds twice here
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers near it are whole


@triton.jit
def _feed_forward(wanted, error, shares, FIRST: tl.constexpr):
    """``wanted[j] + shares[j] * error`` for the inputs from ``FIRST`` on."""
    fed = ()
    for j in tl.static_range(len(wanted)):
        if j < FIRST:
            fed = fed + (wanted[j],)
        else:
            fed = fed + (tl.fma(tl.load(shares + j), error, wanted[j]),)
    return fed


@triton.jit
def quantize_block(
    errors,
    corrections,
    factor,
    variances,
    scales,
    zero_points,
    minimums,
    midpoints,
    levels,
    level_codes,
    groups,
    places,
    codes,
    sums,
    first,
    panel_first,
    panel_inputs,
    inputs,
    rows,
    scale_groups,
    offset,
    lowest,
    highest,
    ZERO_POINTS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    LEVELS: tl.constexpr,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Inputs ``first .. first + COUNT`` of ``ROWS`` rows of one expert; see ``launch``."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    errors += (expert * inputs + first) * rows
    corrections += (expert * panel_inputs + first - panel_first) * rows
    factor += (expert * inputs + first) * inputs + first
    variances += expert * inputs + first
    groups += expert * inputs + first
    places += expert * inputs + first
    scales += expert * scale_groups * rows
    zero_points += expert * scale_groups * rows
    minimums += expert * scale_groups * rows
    codes += expert * inputs * rows
    sums += expert * 3 * rows
    loss = tl.zeros((ROWS,), tl.float32)
    squared = tl.zeros((ROWS,), tl.float32)
    clipped = tl.zeros((ROWS,), tl.float32)
    between = ()
    for number in tl.static_range(LEVELS - 1):
        between = between + (tl.load(midpoints + number),)
    for start in range(0, COUNT, STEP):
        wanted = ()
        for j in tl.static_range(STEP):
            place = (start + j) * rows + row
            wanted = wanted + (tl.load(errors + place) + tl.load(corrections + place),)
        for earlier in range(start):
            error = tl.load(errors + earlier * rows + row)
            wanted = _feed_forward(wanted, error, factor + earlier * inputs + start, 0)
        for j in tl.static_range(STEP):
            k = start + j
            group = tl.load(groups + k) * rows + row
            scale = tl.load(scales + group)
            place = tl.load(places + k) * rows + row
            if LEVELS:
                ratio = tl.div_rn(wanted[j], scale)
                rank = tl.zeros((ROWS,), tl.int32)
                for number in tl.static_range(LEVELS - 1):
                    rank += (ratio > between[number]).to(tl.int32)
                value = tl.load(levels + rank) * scale
                tl.store(codes + place, tl.load(level_codes + rank).to(tl.int8))
            else:
                raised = wanted[j]
                if MINIMUMS:
                    least = tl.load(minimums + group)
                    raised += least
                zero_point = offset
                if ZERO_POINTS:
                    zero_point = tl.load(zero_points + group)
                steps = tl.div_rn(raised, scale) + zero_point
                code = (steps + _WHOLE) - _WHOLE
                inside = tl.minimum(tl.maximum(code, lowest), highest)
                clipped += tl.where((code < lowest) | (code > highest), 1.0, 0.0)  # not where it is 0 / 0
                value = (inside - zero_point) * scale
                if MINIMUMS:
                    value -= least
                tl.store(codes + place, inside.to(tl.int8))
            error = tl.load(errors + k * rows + row) - value
            tl.store(errors + k * rows + row, error)
            rounding = wanted[j] - value
            loss += tl.load(variances + k) * (rounding * rounding)
            squared += error * error
            wanted = _feed_forward(wanted, error, factor + k * inputs + start, j + 1)
        tl.debug_barrier()  # the errors are read again, perhaps by other lanes
    tl.store(sums + row, tl.load(sums + row) + loss.to(tl.float64))
    tl.store(sums + rows + row, tl.load(sums + rows + row) + squared.to(tl.float64))
    tl.store(sums + 2 * rows + row, tl.load(sums + 2 * rows + row) + clipped.to(tl.float64))


def launch(
    errors: torch.Tensor,
    corrections: torch.Tensor,
    factor: torch.Tensor,
    variances: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    groups: torch.Tensor,
    places: torch.Tensor,
    codes: torch.Tensor,
    sums: torch.Tensor,
    *,
    block: slice,
    panel_first: int,
    lowest: int,
    highest: int,
    offset: float = 0.0,
    minimums: torch.Tensor | None = None,
    table: Table | None = None,
    rows_of_program: int = ROWS,
    step: int = STEP,
) -> None:
    """Quantize the inputs ``block`` of all rows of all experts.  All tensors are contiguous and lie on one device.

    errors: float32 ``[experts, in, rows]``, weights on entry and weight - stored value on return.  corrections: float32
    ``[experts, panel, rows]``, what earlier blocks feed forward to the inputs from ``panel_first`` on.  factor: float32
    ``[experts, in, in]``, of which the strictly upper part is used.  variances: float32 ``[experts, in]``.  scales, zero_points,
    minimums: float32 ``[experts, groups, rows]``; ``offset`` is the zero point where there is none for each, and minimums are what
    is subtracted from every stored value.  table: what codes stand for where they are no numbers, as tensors.  groups, places:
    int64 ``[experts, in]``, the group of an input and its row in ``codes``, int8 ``[experts, in, rows]``.  sums: float64
    ``[experts, 3, rows]``, to which are added the sums of variance * (rounding error)^2 and of (weight - stored value)^2, and how
    many codes were cut off.

    Rows are a multiple of ``rows_of_program`` and the block is one of ``step``.
    """
    experts, inputs, rows = errors.shape
    count = block.stop - block.start
    assert rows % rows_of_program == 0 and count % step == 0
    assert all(tensor.is_contiguous() for tensor in (errors, corrections, factor, variances, scales, groups, places, codes, sums))
    assert table is None or (zero_points is None and minimums is None)
    quantize_block[(rows // rows_of_program, experts)](
        errors,
        corrections,
        factor,
        variances,
        scales,
        scales if zero_points is None else zero_points,
        scales if minimums is None else minimums,
        scales if table is None else table.midpoints,
        scales if table is None else table.levels,
        groups if table is None else table.codes,
        groups,
        places,
        codes,
        sums,
        block.start,
        panel_first,
        corrections.shape[1],
        inputs,
        rows,
        scales.shape[1],
        float(offset),
        float(lowest),
        float(highest),
        ZERO_POINTS=zero_points is not None,
        MINIMUMS=minimums is not None,
        LEVELS=0 if table is None else table.levels.shape[0],
        COUNT=count,
        STEP=step,
        ROWS=rows_of_program,
        **OPTIONS,
    )
