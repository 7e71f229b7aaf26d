"""What is done with rows before and after the products of a mixture of experts: sort, cut, permute, add up.

Every place among the experts that a token got has a row of its own, so nothing is ever added to memory that two programs share:
results are the same in every run, to the bit.

A decoder's step is short: two products of some ten microseconds, beside which every launch counts.  So few rows are sorted by one
program in one launch; many are sorted by torch, in twenty.

This module imports triton, so nothing imports it before there is work for a GPU.
"""

# Kernels are written in Triton's language, which looks like Python to linters and type checkers but is another one.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quantkit.forward import Routing
from quantkit.kernels.moe_tiles import Tiles

MOST_SORTED = 1024  # rows that one program sorts
COLUMNS = 1024  # of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Order:
    """Rows in the order in which they are multiplied: routed ones by expert, in each by token; then all tokens for the shared one.

    tokens: int64 ``[rows]``.  scores: float32 ``[rows]``.  experts: int64 ``[rows]``, of the layer, the shared one after the
    others.  bounds: int64 ``[experts + 2]``, first row of each expert.  places: int64 ``[1 + slots, tokens]``, the rows of a token,
    the shared expert's first.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    experts: torch.Tensor
    bounds: torch.Tensor
    places: torch.Tensor


@triton.jit(do_not_specialize=["tokens"])
def sort_rows(
    experts,
    scores,
    row_tokens,
    row_scores,
    row_experts,
    bounds,
    places,
    tokens,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """An ``Order`` from ``experts [tokens, SLOTS]`` and ``scores`` of the same shape, by one program."""
    number = tl.arange(0, SIZE)
    routed = tokens * SLOTS
    inside, everyone = number < routed, number < tokens
    expert = tl.load(experts + number, mask=inside, other=EXPERTS + 1).to(tl.int32)
    key = tl.sort(expert * SIZE + number)
    order = key % SIZE
    tl.store(row_tokens + number, (order // SLOTS).to(tl.int64), mask=inside)
    tl.store(row_scores + number, tl.load(scores + order, mask=inside, other=0.0), mask=inside)
    tl.store(row_experts + number, (key // SIZE).to(tl.int64), mask=inside)
    tl.store(places + (1 + order % SLOTS) * tokens + order // SLOTS, number.to(tl.int64), mask=inside)
    tl.store(row_tokens + routed + number, number.to(tl.int64), mask=everyone)
    tl.store(row_scores + routed + number, tl.full((SIZE,), 1.0, tl.float32), mask=everyone)
    tl.store(row_experts + routed + number, tl.full((SIZE,), EXPERTS, tl.int64), mask=everyone)
    tl.store(places + number, (routed + number).to(tl.int64), mask=everyone)
    edge = tl.arange(0, BOUNDS)
    counts = tl.histogram(expert, BOUNDS)
    first = tl.cumsum(counts, 0) - counts
    first = tl.where(edge == EXPERTS + 1, routed + tokens, first)
    tl.store(bounds + edge, first.to(tl.int64), mask=edge < EXPERTS + 2)


@triton.jit(do_not_specialize=["begin", "end"])
def cut_rows(bounds, numbers, experts, firsts, lasts, count, begin, end, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """Tiles of ``TOKENS`` rows of the experts ``numbers [begin .. end]`` of a stack, by one program."""
    member = begin + tl.arange(0, SIZE)
    number = tl.load(numbers + member, mask=member < end, other=0)
    first = tl.load(bounds + number, mask=member < end, other=0).to(tl.int32)
    last = tl.load(bounds + number + 1, mask=member < end, other=0).to(tl.int32)
    tiles = (last - first + TOKENS - 1) // TOKENS
    before = tl.cumsum(tiles, 0) - tiles
    tl.store(count, tl.sum(tiles, 0))
    for turn in range(tl.max(tiles, 0)):
        row = first + turn * TOKENS
        tl.store(experts + before + turn, member, mask=turn < tiles)
        tl.store(firsts + before + turn, row, mask=turn < tiles)
        tl.store(lasts + before + turn, tl.minimum(row + TOKENS, last), mask=turn < tiles)


@triton.jit
def permute_rows(x, tokens, scores, out, columns, width, COLUMNS: tl.constexpr):
    """Row r of ``out [rows, width]`` is row ``tokens[r]`` of ``x [tokens, columns]`` times ``scores[r]``, then zeros."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens + row)
    values = tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32) * tl.load(scores + row)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows", "tokens"])
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


def ordered(routing: Routing, experts: int) -> Order:
    """Rows sorted by expert, stably."""
    tokens, slots = routing.experts.shape
    return _sorted_by_program(routing, experts) if tokens * slots <= MOST_SORTED else sorted_by_torch(routing, experts)


def _sorted_by_program(routing: Routing, experts: int) -> Order:
    tokens, slots = routing.experts.shape
    rows, device = tokens * (slots + 1), routing.experts.device

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    order = Order(empty(rows), torch.empty(rows, device=device), empty(rows), empty(experts + 2), empty(slots + 1, tokens))
    sort_rows[(1,)](
        routing.experts.contiguous(),
        routing.scores.contiguous(),
        order.tokens,
        order.scores,
        order.experts,
        order.bounds,
        order.places,
        tokens,
        SLOTS=slots,
        EXPERTS=experts,
        SIZE=max(16, triton.next_power_of_2(tokens * slots)),
        BOUNDS=triton.next_power_of_2(experts + 2),
        **OPTIONS,
    )
    return order


def sorted_by_torch(routing: Routing, experts: int) -> Order:
    """The same for any number of rows."""
    tokens, slots = routing.experts.shape
    device = routing.experts.device
    flat = routing.experts.flatten()
    by_expert, order = torch.sort(flat, stable=True)
    everyone = torch.arange(tokens, device=device)
    places = torch.empty_like(flat)
    places[order] = torch.arange(len(flat), device=device)
    bounds = torch.searchsorted(by_expert, torch.arange(experts + 2, device=device))
    bounds[experts + 1] = len(flat) + tokens
    return Order(
        torch.cat([order // slots, everyone]),
        torch.cat([routing.scores.flatten()[order], torch.ones(tokens, device=device)]),
        torch.cat([by_expert, torch.full_like(everyone, experts)]),
        bounds,
        torch.cat([everyone[None] + len(flat), places.view(tokens, slots).t()]).contiguous(),
    )


def cut(bounds: torch.Tensor, numbers: torch.Tensor, members: range, tokens: int, most: int) -> Tiles:
    """Tiles of ``tokens`` rows, at most ``most``, of some ``members`` of a stack, whose experts are ``numbers``, int64.

    bounds: of an ``Order``.
    """
    device = bounds.device
    expert, first, last = (torch.empty(most, dtype=torch.int32, device=device) for _ in range(3))
    count = torch.empty(1, dtype=torch.int32, device=device)
    cut_rows[(1,)](
        bounds,
        numbers,
        expert,
        first,
        last,
        count,
        members.start,
        members.stop,
        SIZE=max(16, triton.next_power_of_2(len(members))),
        TOKENS=tokens,
        **OPTIONS,
    )
    return Tiles(expert, first, last, count, most, tokens)


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
