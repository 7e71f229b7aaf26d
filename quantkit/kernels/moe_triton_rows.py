"""What moves rows before and after the products of a mixture of experts: permute, multiply by the router's score, and add up.

Every place among the experts that a token got has a row of its own, so nothing is ever added to memory that two programs share:
results are the same in every run, to the bit.  This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 1024  # of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def permute_rows(x, tokens, scores, out, columns, width, COLUMNS: tl.constexpr):
    """Row r of ``out [rows, width]`` is row ``tokens[r]`` of ``x [tokens, columns]`` times ``scores[r]``, then zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens + row)
    values = tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32) * tl.load(scores + row)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def combine_rows(parts, places, out, rows, columns, tokens, SPLITS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row t of ``out [tokens, columns]``: rows ``places[:, t]`` of ``parts [SPLITS, rows, columns]``, added in that order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(places + slot * tokens + token)
        for split in tl.static_range(SPLITS):
            place = (split * rows + row) * columns + column
            total += tl.load(parts + place, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


def permute(x: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, width: int) -> torch.Tensor:
    """x: BF16 ``[tokens, columns]``, contiguous.  tokens: int64 ``[rows]``.  scores: float32 ``[rows]``.

    Returns BF16 ``[rows, width]``: products rounded once, zeros from ``columns`` on.
    """
    out = x.new_empty((len(tokens), width))
    permute_rows[(len(tokens), triton.cdiv(width, COLUMNS))](x, tokens, scores, out, x.shape[1], width, COLUMNS=COLUMNS, **OPTIONS)
    return out


def combine(parts: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``out [tokens, columns]``.

    parts: ``[splits, rows, columns]``.  places: int64 ``[slots, tokens]``, rows in the order in which they are added in float32.
    """
    splits, rows, columns = parts.shape
    slots, tokens = places.shape
    combine_rows[(tokens, triton.cdiv(columns, COLUMNS))](
        parts, places, out, rows, columns, tokens, SPLITS=splits, SLOTS=slots, COLUMNS=COLUMNS, **OPTIONS
    )
