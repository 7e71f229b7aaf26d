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
    scale. highest: largest group scale.  fraction: see :mod:`quantkit.codebooks`.  signs: 0 none, 1 free, 2 an even number in 8.
    trials: 2 where levels are moved up or down.  shifted: weights moved together. base, step, extra: a level is ``base + step *
    digit``, and ``extra`` more for the last digit; ``2`` less in the second trial. levels: float32 ``[trials * digits]``.  rms:
    of all levels of all points. firsts: int32, the first halves that the grid holds, as places in the table of first halves, and
    first_payloads: their digits side by side.  starts: int32, where the partners of each begin, and one more.  partners: int32,
    places of second halves. second_payloads: int32, digits of every second half.
    """

    length: int
    digits: int
    digit_bits: int
    group: int
    highest: int
    fraction: float
    signs: int
    trials: int
    shifted: int
    base: float
    step: float
    extra: float
    levels: Any
    rms: float
    firsts: Any
    first_payloads: Any
    starts: Any
    partners: Any
    second_payloads: Any


class Search(NamedTuple):
    """What is tried.

    mix: where between its typical and its largest magnitude a group's reference step lies, 0 .. 1.  factors: float32, the steps
    tried for each group, as multiples of the reference.  multiples: float32, the odd numbers (and some between them) that the
    largest step may become.  offsets: float32, group scales tried around the nearest one, 0 first.  rounds: how often points are
    chosen for the stored scales.
    """

    mix: float
    factors: Any
    multiples: Any
    offsets: Any
    rounds: int


@functools.cache
def search_plan(name: str, searched: int) -> Search:
    """How a type is searched; without search the steps just reach the largest magnitudes."""
    top, digits = 2 * CODEBOOKS[name].highest + 1, len(CODEBOOKS[name].levels)
    if not searched:
        return Search(1.0, _floats([1.0]), _floats([top]), _floats([0.0]), 1)
    multiples = _floats(np.arange(top + 2, top / 2, -0.5))
    if digits == 8:
        return Search(1.0, _floats([0.72, 0.85, 0.98, 1.12, 1.3]), multiples, _floats([0, -1, 1]), 2)
    mix = 0.2 if CODEBOOKS[name].shifted else 0.35
    return Search(mix, _floats([0.72, 0.85, 0.98, 1.12, 1.3]), multiples, _floats([0, -1, 1]), 2)


def _floats(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@functools.cache
def grid_tables(name: str) -> Grid:
    """The tables of one type."""
    book, points = CODEBOOKS[name], grid_digits(name).astype(np.int64)
    half, count = book.length // 2, len(book.levels)
    powers = count ** np.arange(half)[::-1]  # the first digit of a half is the slowest
    first, second = points[:, :half] @ powers, points[:, half:] @ powers
    order = np.lexsort((second, first))
    firsts, starts = np.unique(first[order], return_index=True)
    digits = np.arange(count**half)[:, None] // powers % count  # [halves, half]
    payloads = digits @ (1 << (book.digit_bits * np.arange(half)))
    levels = np.array(book.levels, np.float32)
    moved = np.concatenate([levels + 1, levels - 1]) if book.shifted else levels
    return Grid(
        length=book.length,
        digits=count,
        digit_bits=book.digit_bits,
        group=book.group,
        highest=book.highest,
        fraction=book.fraction,
        signs={"none": 0, "free": 1, "even": 2}[book.signs],
        trials=2 if book.shifted else 1,
        shifted=book.shifted,
        base=float(moved[0]),
        step=float(moved[1] - moved[0]),
        extra=float(moved[count - 1] - moved[0] - (count - 1) * (moved[1] - moved[0])),
        levels=moved.astype(np.float32),
        rms=float(np.sqrt(np.mean(np.square(levels[points])))),
        firsts=firsts.astype(np.int32),
        first_payloads=payloads[firsts].astype(np.int32),
        starts=np.append(starts, len(points)).astype(np.int32),
        partners=second[order].astype(np.int32),
        second_payloads=payloads.astype(np.int32),
    )
