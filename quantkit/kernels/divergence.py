"""How far the predictions of two models are apart: one pass over rows of logits, at the speed of the cache they lie in.

A row is ``vocabulary`` float32 logits of one position.  ``reference_rows`` takes from the rows of the reference what every
comparison needs, so that it is computed once for many artifacts; ``compare_rows`` then gives for each row

    negative log likelihood and probability of the right token, in both models
    the token that each finds most likely
    KL divergence of the artifact's distribution q from the reference's p, in nats

The divergence is summed as p (exp(d) - 1 - d) with d = log q - log p.  That is sum p log(p / q), as both distributions sum to 1,
but no term is negative, so nothing cancels and divergences of 1e-10 are as accurate as those of 1: an error in the log of a sum
changes d by a constant, whose effect on the total is of second order.  Logits are subtracted in float64, where equal parts of both
vanish exactly; exponentials are float32, sums float64, taken lane by lane in a fixed order, so results do not depend on the number
of threads or the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.errors import ArtifactError
from quantkit.kernels.exponential import exponential
from quantkit.kernels.jit import compiled, kernel
from quantkit.kernels.memory import load_float32, store
from quantkit.kernels.simd import bits, doubles, floats, from_bits, fused, ints, lane_sum, largest_lane, maximum, select
from quantkit.team import Team, spans

ROWS = 16  # rows that a thread takes at a time

_INFINITE = 0x7F800000  # bits of the least float that is not finite
_ABSENT = -3.4028234663852886e38  # logit of tokens that are not there: their probability is 0
_SERIES = 0.5  # up to this distance exp(d) - 1 - d comes from its series


@dataclass(frozen=True)
class ReferenceRows:
    """What is known of rows of logits, ``[tokens]`` each.

    largest: the largest logit.  log_sum: log of the sum of exp(logit - largest).  top: where the largest stands, first of equals.
    """

    largest: NDArray[np.float64]
    log_sum: NDArray[np.float64]
    top: NDArray[np.int64]


@dataclass(frozen=True)
class ComparedRows:
    """Two models on the same positions, ``[tokens]`` each, in nats; NaN where a position has no target.

    divergence: KL divergence of the artifact from the reference.  top: the most likely token.
    """

    divergence: NDArray[np.float64]
    reference_loss: NDArray[np.float64]
    loss: NDArray[np.float64]
    reference_probability: NDArray[np.float64]
    probability: NDArray[np.float64]
    reference_top: NDArray[np.int64]
    top: NDArray[np.int64]


def reference_rows(logits: torch.Tensor, team: Team | None = None, name: str = "the reference") -> ReferenceRows:
    """logits: float32 ``[tokens, vocabulary]``, contiguous.

    Raises ArtifactError, with ``name`` and the row, for a logit that is not finite.
    """
    rows = logits.numpy()
    tokens = rows.shape[0]
    found = ReferenceRows(np.empty(tokens), np.empty(tokens), np.empty(tokens, np.int64))
    finite = np.empty(tokens, np.bool_)

    def work(span: slice) -> None:
        _summarize(rows[span], found.largest[span], found.log_sum[span], found.top[span], finite[span])

    _on_threads(team, work, tokens)
    if not finite.all():
        raise not_finite(name, int(np.argmin(finite)), tokens)
    return found


def not_finite(name: str, row: int, tokens: int) -> ArtifactError:
    """The error about a row of logits."""
    return ArtifactError(
        f"{name}: position {row} of {tokens} has logits that are not finite numbers; its weights or scales are damaged, or do "
        "not belong to this config. Run `quantkit verify` on it."
    )


def check_shapes(reference_logits: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
    """Raise ValueError unless all are of the same positions and, ``rows`` of them, already known of the reference."""
    if reference_logits.shape != logits.shape or len(targets) != len(logits) or rows != len(logits):
        raise ValueError(f"logits {list(logits.shape)} against {list(reference_logits.shape)}, {len(targets)} targets")


def target_loss(logits: torch.Tensor, rows: ReferenceRows, targets: torch.Tensor) -> NDArray[np.float64]:
    """Negative log likelihood, float64, of the right tokens int64 ``[tokens]``; NaN where one is negative: no target."""
    there = targets.clamp(min=0)[:, None]
    at_target = torch.gather(logits, 1, there)[:, 0].to(torch.float64).numpy()
    loss: NDArray[np.float64] = np.where(targets.numpy() < 0, np.nan, rows.log_sum - (at_target - rows.largest))
    return loss


def compare_rows(
    reference_logits: torch.Tensor,
    reference: ReferenceRows,
    logits: torch.Tensor,
    targets: torch.Tensor,
    team: Team | None = None,
    name: str = "the artifact",
) -> ComparedRows:
    """Compare the rows of an artifact with those of the reference.

    reference_logits, logits: float32 ``[tokens, vocabulary]``, contiguous.  reference: ``reference_rows(reference_logits)``.
    targets: int64 ``[tokens]``, the right token, negative where there is none.  Raises ArtifactError for a logit of the artifact
    that is not finite, ValueError for shapes that differ.
    """
    check_shapes(reference_logits, logits, targets, len(reference.top))
    own = reference_rows(logits, team, name)
    left, right = reference_logits.numpy(), logits.numpy()
    divergence = np.empty(len(logits))

    def work(span: slice) -> None:
        _diverge(
            left[span],
            right[span],
            reference.largest[span],
            reference.log_sum[span],
            own.largest[span],
            own.log_sum[span],
            divergence[span],
        )

    _on_threads(team, work, len(logits))
    before, after = target_loss(reference_logits, reference, targets), target_loss(logits, own, targets)
    return ComparedRows(divergence, before, after, np.exp(-before), np.exp(-after), reference.top, own.top)


def _on_threads(team: Team | None, work: Callable[[slice], None], tokens: int) -> None:
    if team is None:
        work(slice(0, tokens))
    else:
        team.run(work, spans(tokens, ROWS))


# ---------------------------------------------------------------------------------------------------------------- kernels


@compiled
def _copy_tail(row: Any, tail: Any) -> int:
    """The last elements, fewer than 16, with absent tokens behind them; returns where they begin."""
    whole: int = row.size // 16 * 16
    for lane in range(16):
        tail[lane] = row[whole + lane] if whole + lane < row.size else np.float32(_ABSENT)
    return whole


@kernel
def _summarize(logits: Any, largest: Any, log_sum: Any, top: Any, finite: Any) -> None:
    tail, values, places = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.int32)
    for token in range(logits.shape[0]):
        row = logits[token]
        whole = _copy_tail(row, tail)
        best, at, magnitude = floats(-np.inf), ints(0), ints(0)
        for index in range(0, whole + 1, 16):
            value = load_float32(row, index) if index < whole else load_float32(tail, 0)
            better = value > best
            best, at = select(better, value, best), select(better, ints(index), at)
            magnitude = maximum(magnitude, bits(value) & ints(0x7FFFFFFF))
        store(values, 0, best)
        store(places, 0, at)
        highest, place = values[0], places[0]
        for lane in range(16):
            found = places[lane] + lane
            if values[lane] > highest or (values[lane] == highest and found < place):
                highest, place = values[lane], found
        finite[token] = largest_lane(magnitude) < _INFINITE
        total = doubles(0.0)
        shift = floats(highest)
        for index in range(0, whole, 16):
            total = total + doubles(exponential(load_float32(row, index) - shift))
        total = total + doubles(exponential(load_float32(tail, 0) - shift))
        largest[token], top[token], log_sum[token] = highest, place, math.log(lane_sum(total))


@compiled
def _term(left: Any, right: Any, left_largest: Any, left_log: Any, right_largest: Any, right_log: Any, apart: Any) -> Any:
    """p (exp(d) - 1 - d) for 16 tokens; ``apart``: what the logs of the sums differ by."""
    likely = exponential((left - left_largest) - left_log)
    other = exponential((right - right_largest) - right_log)
    distance = floats(doubles(right) - doubles(left) - apart)
    series = fused(floats(1 / 40320), distance, floats(1 / 5040))
    series = fused(series, distance, floats(1 / 720))
    series = fused(series, distance, floats(1 / 120))
    series = fused(series, distance, floats(1 / 24))
    series = fused(series, distance, floats(1 / 6))
    series = fused(series, distance, floats(1 / 2))
    near = from_bits(bits(distance) & ints(0x7FFFFFFF)) < floats(_SERIES)
    return select(near, likely * (series * distance * distance), (other - likely) - likely * distance)


@kernel
def _diverge(left: Any, right: Any, left_largest: Any, left_log: Any, right_largest: Any, right_log: Any, divergence: Any) -> None:
    left_tail, right_tail = np.empty(16, np.float32), np.empty(16, np.float32)
    for token in range(left.shape[0]):
        left_row, right_row = left[token], right[token]
        whole = _copy_tail(left_row, left_tail)
        _copy_tail(right_row, right_tail)
        apart = doubles((right_largest[token] + right_log[token]) - (left_largest[token] + left_log[token]))
        left_top, left_sum = floats(left_largest[token]), floats(left_log[token])
        right_top, right_sum = floats(right_largest[token]), floats(right_log[token])
        total = doubles(0.0)
        for index in range(0, whole, 16):
            some, other = load_float32(left_row, index), load_float32(right_row, index)
            total = total + doubles(_term(some, other, left_top, left_sum, right_top, right_sum, apart))
        some, other = load_float32(left_tail, 0), load_float32(right_tail, 0)
        total = total + doubles(_term(some, other, left_top, left_sum, right_top, right_sum, apart))
        divergence[token] = lane_sum(total)
