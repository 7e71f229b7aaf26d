"""Grids of the codebook types as the search wants them, made once for each type.

A point is cut into two halves.  For one run of weights the costs of all first halves and of all second halves are small tables, 81
or 64 entries each; the nearest point of the grid is then the least sum of a first half and one of the second halves that the grid
joins to it.  That is the exact minimum over the whole grid at one addition for each point or less, and needs no neighbour lists.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantkit.codebooks import CODEBOOKS, grid_digits


class Grid(NamedTuple):
    """A codebook type as plain numbers and flat arrays.

    length: weights of a point.  digits: levels of one weight.  digit_bits: bits of a digit in a payload.  group: weights of a
    scale.  highest: largest group scale.  fraction: see :mod:`quantkit.codebooks`.  signs: 0 none, 1 free, 2 an even number in 8.
    shifted: weights that are moved up or down together, by 1; 0 where none are.  levels: float32 ``[digits]``, before they are
    moved. base, step, extra: a level is ``base + step * digit``, and ``extra`` more for the last digit.  rms: of the levels of
    all points. payloads: int32 ``[halves]``, the digits of each half side by side.

    Of the first halves that the grid holds, those with most partners first, so that loops over partners rarely change their length:
    first_payloads: int32, payloads as part of the whole.  lefts, rights: int64, where the costs of its own two parts stand in their
    tables.  starts: int64, where its partners begin in ``partners``, int64, which are places in the table of second halves.
    usual: payload of some point.
    """

    length: int
    digits: int
    digit_bits: int
    group: int
    highest: int
    fraction: float
    signs: int
    shifted: int
    base: float
    step: float
    extra: float
    levels: Any
    rms: float
    payloads: Any
    first_payloads: Any
    lefts: Any
    rights: Any
    starts: Any
    partners: Any
    usual: int


class Search(NamedTuple):
    """What is tried.

    mix: where between its typical and its largest magnitude a group's reference step lies, 0 .. 1.  factors: float32, the steps
    tried for each group, as multiples of the reference.  multiples: float32, the odd numbers (and some between them) that the
    largest step may become.  offsets: float32, group scales tried around the nearest one, 0 first.
    """

    mix: float
    factors: Any
    multiples: Any
    offsets: Any


@functools.cache
def search_plan(name: str, searched: int) -> Search:
    """How a type is searched; without search the steps are the reference ones."""
    book = CODEBOOKS[name]
    top, none = 2 * book.highest + 1, _floats([0])
    mix = 1.0 if len(book.levels) == 8 else 0.2 if book.shifted else 0.35
    small = np.arange(top // 2, 0, -2)  # for weights so small that the block's scale would else be rounded to zero
    if not searched:
        return Search(mix, _floats([1]), _floats([top, *small]), none)
    multiples = _floats([*np.arange(top + 2, top / 2, -0.5), *small])
    if book.shifted:
        return Search(mix, _floats([0.8, 1.0, 1.25]), multiples, none)
    return Search(mix, _floats([0.72, 0.85, 0.98, 1.12, 1.3]), multiples, _floats([0, -1, 1]))


def _floats(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@functools.cache
def grid_tables(name: str) -> Grid:
    """The tables of one type."""
    book, points = CODEBOOKS[name], grid_digits(name).astype(np.int64)
    half, count = book.length // 2, len(book.levels)
    powers = count ** np.arange(half)[::-1]  # the first digit of a half is the slowest
    first, second = points[:, :half] @ powers, points[:, half:] @ powers
    counts = np.bincount(first, minlength=count**half)
    halves = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    order = np.lexsort((second, rank[first]))
    digits = np.arange(count**half)[:, None] // powers % count  # [halves, half]
    payloads = digits @ (1 << (book.digit_bits * np.arange(half)))
    levels = np.array(book.levels, np.float32)
    return Grid(
        length=book.length,
        digits=count,
        digit_bits=book.digit_bits,
        group=book.group,
        highest=book.highest,
        fraction=book.fraction,
        signs={"none": 0, "free": 1, "even": 2}[book.signs],
        shifted=book.shifted,
        base=float(levels[0]),
        step=float(levels[1] - levels[0]),
        extra=float(levels[count - 1] - levels[0] - (count - 1) * (levels[1] - levels[0])),
        levels=levels,
        rms=float(np.sqrt(np.mean(np.square(levels[points])))),
        payloads=payloads.astype(np.int32),
        first_payloads=(payloads[halves] << 8).astype(np.int32),
        lefts=32 * (halves // count ** (half // 2)),
        rights=32 * (halves % count ** (half // 2)),
        starts=np.append(0, np.cumsum(counts[halves])),
        partners=32 * second[order],
        usual=int(payloads[first[0]] << 8 | payloads[second[0]]),
    )
