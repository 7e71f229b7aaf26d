"""How a product of rows and weights is cut into tiles on a GPU.  Data and arithmetic only; nothing here needs Triton.

A tile is some rows (tokens) of one expert times some of its outputs.  Rows of a tile are many where experts have many tokens, since
weights are then read and unpacked less often, and few where they have few, since a tile costs the same however many of its rows are
used.  ``TABLE`` says the rest for each number of rows.  It is for an H200 and was chosen from machine code and arithmetic; other
GPUs of its generation get the same, as nothing in it can fail where registers and shared memory are as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOKENS = (16, 32, 64, 128)  # rows of a tile; a power of two, at least what a tensor core takes
FILLED = 0.75  # rows per expert, on average, from which on a tile is worth its size
INPUTS = 128  # inputs of a step: planes and scales are cut so
MOST_SPLITS = 8
MOST_KNOWN = 8  # numbers of rows
LEAST_STEPS = 4  # of a split: below, filling the pipeline takes longer than the work


@dataclass(frozen=True)
class Shape:
    """outputs: of a tile, gate and up counted both.  warps, stages: of a program.  residents: programs that a multiprocessor is
    expected to hold.  group: tiles of rows that share a block of weights before the next block is taken, so that both stay in the
    cache.
    """

    outputs: int
    warps: int
    stages: int
    residents: int
    group: int = 8

    @property
    def most_registers(self) -> int:
        """Registers that a thread may have so that as many programs as expected fit."""
        return min(255, 65536 // (32 * self.warps * self.residents) // 8 * 8)


TABLE: dict[str, dict[int, Shape]] = {  # kind of weight, or type of llama.cpp -> rows of a tile -> the rest
    "integer": {  # up to 4 bits, groups of 128 inputs or whole rows
        16: Shape(128, 4, 5, 3),
        32: Shape(128, 4, 4, 3),
        64: Shape(128, 4, 4, 2),
        128: Shape(128, 8, 3, 1),
    },
    "integer-wide": {  # bytes
        16: Shape(128, 4, 4, 2),
        32: Shape(128, 4, 4, 2),
        64: Shape(128, 8, 3, 1),
        128: Shape(128, 8, 3, 1),
    },
    "integer-halves": {  # two groups in a step of 128 inputs
        16: Shape(128, 4, 4, 2),
        32: Shape(128, 4, 4, 2),
        64: Shape(128, 8, 4, 1),
        128: Shape(128, 8, 4, 1),
    },
    "integer-parts": {  # four groups
        16: Shape(128, 4, 4, 2),
        32: Shape(128, 4, 4, 2),
        64: Shape(128, 8, 4, 1),
        128: Shape(128, 8, 4, 1),
    },
    "integer-planes": {  # two planes
        16: Shape(128, 4, 4, 2),
        32: Shape(128, 4, 4, 2),
        64: Shape(128, 8, 3, 1),
        128: Shape(128, 8, 3, 1),
    },
    "integer-odd": {  # a plane of 1 bit
        16: Shape(64, 4, 4, 2),
        32: Shape(64, 4, 4, 2),
        64: Shape(64, 4, 3, 1),
        128: Shape(64, 4, 3, 1),
    },
    "fp8": {
        16: Shape(64, 4, 6, 3),
        32: Shape(64, 4, 6, 2),
        64: Shape(128, 4, 5, 1),
        128: Shape(128, 8, 4, 1),
    },
    "floating": {
        16: Shape(64, 4, 6, 3),
        32: Shape(64, 4, 6, 2),
        64: Shape(128, 4, 5, 1),
        128: Shape(256, 8, 4, 1),
    },
    "Q4_K": {
        16: Shape(64, 4, 4, 2),
        32: Shape(64, 4, 4, 2),
        64: Shape(128, 8, 3, 1),
        128: Shape(128, 8, 2, 1),
    },
    "Q6_K": {
        16: Shape(64, 4, 4, 2),
        32: Shape(64, 4, 4, 2),
        64: Shape(128, 8, 3, 1),
        128: Shape(64, 8, 2, 1),
    },
}


@dataclass(frozen=True)
class Tiles:
    """Which rows go through which weights, on a device, without the host knowing how many tiles there are.

    expert: int32 ``[most]``, number in the stack of weights.  first, last: int32 ``[most]``, rows from first up to before last, at
    most ``tokens``.  count: int32 ``[1]``, how many of them there are.  most: how many there can be.  tokens: rows of a tile.
    """

    expert: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    count: torch.Tensor
    most: int
    tokens: int


@dataclass(frozen=True)
class AllRows:
    """All rows through the only weight of a stack.  place: int64 zeros ``[rows]``, their place in the stack.  order: int64 ``[1,
    rows]``, one after the other."""

    tiles: Tiles
    place: torch.Tensor
    order: torch.Tensor


class KnownRows:
    """Keeps what says how all rows are taken, which depends on their number alone: in a decoder's step making it anew would take
    more launches than the product."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device], AllRows] = {}

    def all(self, rows: int, device: torch.device) -> AllRows:
        """Of so many rows on the device."""
        key = rows, device
        found = self._known.pop(key) if key in self._known else all_rows(rows, device)
        self._known[key] = found  # the latest stand at the end
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return found


@dataclass(frozen=True)
class Rows:
    """What is multiplied: values ``[rows, inputs]``, contiguous, inputs padded with zeros to a multiple of 128; BF16, or FP8.

    scales: None where values are what they say; float32 ``[rows]``, what a step of each row is worth; or float32
    ``[inputs / 128, rows]``, of each 128 inputs of it.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None


def tokens_of_tile(rows: int, experts: int) -> int:
    """Rows of a tile where so many rows go to so many experts."""
    fitting = [tokens for tokens in TOKENS if tokens * FILLED <= rows / max(experts, 1)]
    return fitting[-1] if fitting else TOKENS[0]


def cut(first: torch.Tensor, last: torch.Tensor, tokens: int, most: int) -> Tiles:
    """Tiles of ``tokens`` rows over the rows ``first .. last`` of each expert, int64 ``[experts]``; there are at most ``most``."""
    ends = torch.cumsum((last - first + tokens - 1) // tokens, 0)
    number = torch.arange(most, device=first.device)
    expert = torch.searchsorted(ends, number, right=True).clamp_(max=len(first) - 1)
    before = torch.where(expert > 0, ends[expert - 1], 0)
    begin = first[expert] + (number - before) * tokens
    end = torch.minimum(begin + tokens, last[expert])
    expert, begin, end, count = (part.to(torch.int32) for part in (expert, begin, end, ends[-1:]))
    return Tiles(expert, begin, end, count, most, tokens)


def all_rows(rows: int, device: torch.device) -> AllRows:
    """All rows through the only weight of a stack.  Nothing is copied from the host, which would wait for the device."""
    tokens = tokens_of_tile(rows, 1)
    most = max(1, -(-rows // tokens))
    first = torch.arange(0, most * tokens, tokens, dtype=torch.int32, device=device)
    count = torch.full((1,), -(-rows // tokens), dtype=torch.int32, device=device)
    tiles = Tiles(torch.zeros_like(first), first, (first + tokens).clamp_(max=rows), count, most, tokens)
    order = torch.arange(rows, device=device)
    return AllRows(tiles, torch.zeros_like(order), order[None])


def splits(blocks: int, steps: int, programs: int) -> int:
    """Into how many parts inputs are cut, in ``steps`` of 128, so that ``blocks`` of outputs keep so many programs busy.

    Twice as many parts as programs: when all take one, and some a second, those some decide how long it takes.
    """
    count = 1
    while count < MOST_SPLITS and blocks * count < 2 * programs and steps >= 2 * count * LEAST_STEPS:
        count *= 2
    return count


def shape_of(kind: str, tokens: int) -> Shape:
    """The entry of the table for tiles of so many rows."""
    return TABLE[kind][tokens]


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none kernels are interpreted, and then few programs are best."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
