"""From what two models say about the same tokens to the figures of an evaluation, with intervals.

Every counted position gives five numbers (:class:`TokenScores`).  All figures are sums of them over positions, so the bootstrap,
which draws whole windows with replacement, needs only the sums of each window: the figure of a resample is that of the sums,
weighted by how often each window was drawn.  One matrix product serves all resamples, all figures and all artifacts, and all
artifacts see the same draws: their differences have intervals of their own, which are far narrower than the figures' would suggest.
Windows are drawn because neighbouring tokens are alike; a bootstrap over tokens would promise too much.

Intervals begin with percentiles of the resamples.  Their distances from the figure are too small when windows are few (of four
windows such an interval holds the truth in four of five cases), so they are stretched as Student's t distribution is wider than
the normal one, and by the square root of n / (n - 1), which resampling loses.  Where the two distances differ, windows are skewed;
what the studentized bootstrap would add to the longer one, to first order twice the difference, is added, and the shorter one is
left.  Perplexities are treated as their logarithms.  In simulations of 3 to 50 windows such intervals hold the truth in 94 to 96 %
of all cases for normally distributed windows, in 92 to 94 % for lognormal ones of sigma 0.5, and in 83 to 92 % for those of
sigma 1, where a few windows hold most of the sum.  Below three windows, and with ``resamples=0``, both ends are NaN, and whoever
shows them leaves them out.  The standard error of a perplexity is llama.cpp's, which takes tokens as independent.

Of 66 differences that are none, three would have intervals without zero by chance.  So differences also have p-values, adjusted by
Holm's method over all pairs: whoever calls those below 0.05 significant calls any wrongly in at most about one evaluation of 20.
Percentiles of a thousand resamples say nothing about the far tails that this needs, so the p-value is where Student's t
distribution has zero when its 95 % point lies as far from the figure as the end of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from quantkit.evaluation import INTERVAL, Difference, Estimate, Scores

Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 99, 99.9, 100)
LEAST_WINDOWS = 3  # for an interval: two windows say next to nothing about how windows differ
_PORTION = 1 << 22  # resampled windows at a time
_OWN = 4  # columns of sums for each artifact: loss, divergence, agreement, probability shift


@dataclass(frozen=True)
class TokenScores:
    """What reference and artifact say at each counted position, windows one after the other; all ``[positions]``.

    reference_loss, loss: -log of the probability of the right token, float32.  divergence: Kullback-Leibler divergence of the
    artifact's distribution from the reference's in nats, float32.  agreement: whether both have the same most likely token.
    probability_shift: probability of the right token, artifact - reference, float32.
    """

    reference_loss: torch.Tensor
    loss: torch.Tensor
    divergence: torch.Tensor
    agreement: torch.Tensor
    probability_shift: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """One after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Group:
    """Windows that are summed up together.  windows: their numbers."""

    name: str
    windows: NDArray[np.int64]

    @classmethod
    def by(cls, labels: Sequence[str]) -> list[Group]:
        """One for each label, in the order of the alphabet; windows without a label (an empty one) are in none."""
        names = np.array(labels)
        return [cls(name, np.flatnonzero(names == name)) for name in sorted(set(labels)) if name]


@dataclass(frozen=True)
class Summary:
    """Figures of one group: ``scores`` by artifact, ``differences`` for each pair of them, first - second with first < second."""

    scores: tuple[Scores, ...]
    differences: dict[tuple[int, int], Difference]


def summarize(
    artifacts: Sequence[tuple[str, TokenScores]],
    positions: Sequence[int],
    groups: Sequence[Group],
    *,
    resamples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Summary]:
    """All figures of each group of windows.

    artifacts: with their names, all against one reference.  positions: how many each window has, at least one in every group.
    progress: is told the groups that are done, and of how many.
    """
    counts = np.asarray(positions, dtype=np.int64)
    sums = _window_sums(artifacts, counts)
    found: list[Summary] = []
    for group in groups:
        if progress is not None:
            progress(len(found), len(groups))
        found.append(_summary(artifacts, counts, sums, group, resamples, seed))
    if progress is not None:
        progress(len(found), len(groups))
    return found


def _summary(
    artifacts: Sequence[tuple[str, TokenScores]],
    counts: NDArray[np.int64],
    sums: Floats,
    group: Group,
    resamples: int,
    seed: int,
) -> Summary:
    windows = group.windows[counts[group.windows] > 0]
    own = sums[windows]
    totals = np.concatenate([own.sum(0, keepdims=True), _resampled(own, group.name, resamples, seed)])  # [1 + resamples, columns]
    chosen = _rows_of(windows, counts)
    stretch = _stretch(len(windows))
    scores = tuple(_scores(values, totals, number, chosen, stretch) for number, (_, values) in enumerate(artifacts))
    differences = {}
    for first in range(len(artifacts)):
        for second in range(first + 1, len(artifacts)):
            apart = totals[:, _own(first)][:, :2] - totals[:, _own(second)][:, :2]
            apart = apart / totals[:, :1]
            names = artifacts[first][0], artifacts[second][0]
            differences[first, second] = Difference(*names, _estimate(apart[:, 1], stretch), _estimate(apart[:, 0], stretch))
    return Summary(scores, _judged(differences, len(windows) - 1))


def same_routes(reference: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
    """By MoE layer, how many tokens go to the same experts, int64 ``[layers]``; both int16 ``[tokens, layers, k]``."""
    same = (torch.sort(reference, -1).values == torch.sort(routes, -1).values).all(-1)
    return same.sum(0)


def _scores(values: TokenScores, totals: Floats, number: int, rows: NDArray[np.int64], stretch: float) -> Scores:
    loss, divergence, agreement, shift = (totals[:, _own(number)] / totals[:, :1]).T  # of all windows, then of resamples
    reference = totals[:, 1] / totals[:, 0]
    own, shifts = (tensor.numpy()[rows].astype(np.float64) for tensor in (values.loss, values.probability_shift))
    percentiles = np.percentile(values.divergence.numpy()[rows].astype(np.float64), PERCENTILES)
    perplexity = _exponential(_estimate(loss, stretch))
    return Scores(
        positions=len(rows),
        perplexity=perplexity,
        perplexity_error=perplexity.value * _standard_error(own),
        reference_perplexity=_exponential(_estimate(reference, stretch)).value,
        ratio=_exponential(_estimate(loss - reference, stretch)),
        divergence=_within(_estimate(divergence, stretch), 0, math.inf),
        divergence_percentiles={str(name): float(value) for name, value in zip(PERCENTILES, percentiles, strict=True)},
        agreement=_within(_estimate(agreement, stretch), 0, 1),
        probability_shift=_within(_estimate(shift, stretch), -1, 1),
        probability_shift_square=math.sqrt(float(np.mean(np.square(shifts)))),
    )


def _standard_error(values: Floats) -> float:
    """Of the mean, values taken as independent; NaN for a single one."""
    if len(values) < 2:
        return math.nan
    return math.sqrt(max(0.0, float(np.mean(np.square(values))) - float(np.mean(values)) ** 2) / (len(values) - 1))


def _stretch(windows: int) -> float:
    """By what factor the distances of percentiles from the figure are too small."""
    if windows < LEAST_WINDOWS:
        return math.nan
    quantile = NormalDist().inv_cdf((1 + INTERVAL) / 2)
    return math.sqrt(windows / (windows - 1)) * student_quantile(quantile, windows - 1) / quantile


def student_quantile(normal: float, freedom: int) -> float:
    """Where Student's t distribution has its quantile when the normal one has it at ``normal``: Cornish-Fisher, right to 1 %."""
    square = normal * normal
    terms = (
        (square + 1) / 4,
        ((5 * square + 16) * square + 3) / 96,
        (((3 * square + 19) * square + 17) * square - 15) / 384,
        ((((79 * square + 776) * square + 1482) * square - 1920) * square - 945) / 92160,
    )
    return normal * (1 + sum(term / float(freedom**power) for power, term in enumerate(terms, 1)))


def student_tail(distance: float, freedom: int) -> float:
    """How likely Student's t distribution is to be as far from zero as ``distance``, on either side; freedom: 2 or more."""
    angle = math.atan(distance / math.sqrt(freedom))
    odd = freedom % 2
    steps = 2 * np.arange(1, (freedom - odd) // 2, dtype=np.float64)  # 2, 4, ... freedom - 2 or - 3
    factors = (steps if odd else steps - 1) / (steps + odd) * math.cos(angle) ** 2
    total = (math.cos(angle) if odd else 1.0) * (1 + float(np.cumprod(factors).sum())) * math.sin(angle)
    within = 2 / math.pi * (angle + total) if odd else total
    return min(1.0, max(0.0, 1 - within))


@lru_cache(maxsize=256)
def _student_point(freedom: int) -> float:
    """Beyond which, on both sides, Student's t distribution has what an interval leaves out."""
    low, high = 0.0, 1e3
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - INTERVAL else (low, middle)
    return high


def _p_value(difference: Estimate, freedom: int) -> float:
    """Of there being no difference; below 0.05 exactly when the interval leaves out zero.  NaN where there is none."""
    if not all(map(math.isfinite, (difference.value, difference.low, difference.high))):
        return math.nan
    if difference.value == 0:
        return 1.0
    toward = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    return student_tail(_student_point(freedom) * abs(difference.value) / toward, freedom) if toward > 0 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that all below a level hold together at that level; NaN stays and does not count."""
    adjusted, highest = list(p_values), 0.0
    order = sorted((value, place) for place, value in enumerate(p_values) if not math.isnan(value))
    for number, (value, place) in enumerate(order):
        adjusted[place] = highest = max(highest, min(1.0, (len(order) - number) * value))
    return adjusted


def _judged(differences: dict[tuple[int, int], Difference], freedom: int) -> dict[tuple[int, int], Difference]:
    """With p-values."""
    divergences = holm([_p_value(pair.divergence, freedom) for pair in differences.values()])
    perplexities = holm([_p_value(pair.log_perplexity, freedom) for pair in differences.values()])
    return {
        place: replace(pair, divergence_p_value=divergence, log_perplexity_p_value=perplexity)
        for (place, pair), divergence, perplexity in zip(differences.items(), divergences, perplexities, strict=True)
    }


def _estimate(values: Floats, stretch: float) -> Estimate:
    """values: the figure itself, then those of resamples."""
    figure = float(values[0])
    if len(values) < 2:
        return Estimate(figure, math.nan, math.nan)
    ends = np.percentile(values[1:], [50 * (1 - INTERVAL), 50 * (1 + INTERVAL)])
    below, above = max(0.0, stretch * (figure - float(ends[0]))), max(0.0, stretch * (float(ends[1]) - figure))
    skew = above - below
    return Estimate(figure, figure - below - max(0.0, -skew), figure + above + max(0.0, skew))


def _exponential(estimate: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        return Estimate(*(float(np.exp(end)) for end in (estimate.value, estimate.low, estimate.high)))


def _within(estimate: Estimate, least: float, most: float) -> Estimate:
    """With an interval that does not leave what the figure can be.  A rounding error in the figure itself stays."""
    if math.isnan(estimate.low):
        return estimate
    return Estimate(estimate.value, min(estimate.value, max(least, estimate.low)), max(estimate.value, min(most, estimate.high)))


def _own(number: int) -> slice:
    """Columns of an artifact: loss, divergence, agreement, probability shift."""
    return slice(2 + _OWN * number, 2 + _OWN * (number + 1))


def _window_sums(artifacts: Sequence[tuple[str, TokenScores]], counts: NDArray[np.int64]) -> Floats:
    """float64 ``[windows, columns]``: positions, the reference's loss, then the columns of each artifact."""
    columns = [counts.astype(np.float64), _sum_by_window(artifacts[0][1].reference_loss, counts)]
    for _, values in artifacts:
        for tensor in (values.loss, values.divergence, values.agreement, values.probability_shift):
            columns.append(_sum_by_window(tensor, counts))
    return np.stack(columns, axis=1)


def _sum_by_window(values: torch.Tensor, counts: NDArray[np.int64]) -> Floats:
    numbers = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(numbers, weights=values.numpy().astype(np.float64), minlength=len(counts)).astype(np.float64)


def _rows_of(windows: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of these windows, in order."""
    chosen = np.zeros(len(counts), dtype=bool)
    chosen[windows] = True
    return np.flatnonzero(np.repeat(chosen, counts))


def _resampled(sums: Floats, name: str, resamples: int, seed: int) -> Floats:
    """float64 ``[resamples, columns]``; none where there are too few windows."""
    count = len(sums)
    if count < LEAST_WINDOWS:
        return np.empty((0, sums.shape[1]))
    generator = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(name.encode())])
    totals = [drawn @ sums for drawn in _draws(generator, count, resamples)]
    return np.concatenate(totals) if totals else np.empty((0, sums.shape[1]))


def _draws(generator: np.random.Generator, count: int, resamples: int) -> Iterator[Floats]:
    """How often each of ``count`` windows is drawn, float64 ``[some resamples, count]``: multinomial, row by row."""
    at_once = max(1, _PORTION // count)
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count).astype(np.float64)
