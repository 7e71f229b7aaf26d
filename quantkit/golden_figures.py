"""Figures of a golden set: from what was answered, and from how long it took.

Shares of right answers have Wilson's intervals.  Reference and artifact answer the same questions, so what tells them apart are the
questions that only one of them answers right: if they were equally good, each such question would fall to either like a coin.

Times are those of one machine, which others may use too: a mean would hold every disturbance of it.  So a speed is that of the step
which made the median token, and beside it stands where most steps lay, which is no interval of confidence but what to expect of
measuring it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from quantkit.evaluation import Estimate, GoldenAnswers, GoldenComparison
from quantkit.generation import Step
from quantkit.metrics import holm

NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %: both ends together leave out 5 %
SPREAD = (0.1, 0.9)  # ends of the spread of a speed, as shares of the tokens
CLOCK_SECONDS = 1e-9  # no clock tells less
FEW_STEPS = 5  # fewer have no spread


def wilson_interval(right: int, count: int) -> Estimate:
    """A share and its 95 % interval by Wilson's score, which stays between 0 and 1 and has a width also at both ends."""
    share, square = right / count, NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Estimate(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def sign_test(gained: int, lost: int) -> float:
    """How likely a fair coin is to fall at least as unevenly as ``gained`` to ``lost``, either way round (McNemar's exact test)."""
    thrown = gained + lost
    fewer = sum(math.comb(thrown, heads) for heads in range(min(gained, lost) + 1))
    return min(1.0, 2 * fewer / (1 << thrown))


def beside_reference(answers: Sequence[GoldenAnswers]) -> tuple[GoldenAnswers, ...]:
    """``answers`` of the reference and of artifacts to the same questions, those of the artifacts compared with the first."""
    reference, *artifacts = answers
    counts = []
    for one in artifacts:
        pairs = [(good, base) for (_, good, _), (_, base, _) in zip(one.answers, reference.answers, strict=True)]
        counts.append((sum(good and not base for good, base in pairs), sum(base and not good for good, base in pairs)))
    p_values = [sign_test(*count) for count in counts]
    compared = (
        replace(one, beside_reference=GoldenComparison(*count, p_value, adjusted))
        for one, count, p_value, adjusted in zip(artifacts, counts, p_values, holm(p_values), strict=True)
    )
    return reference, *compared


def speed(steps: Sequence[Step]) -> Estimate:
    """Tokens per second: half of all tokens were made in steps at least that fast, and four of five between the ends.

    A step of many texts counts by its tokens.  NaN where no token was made; the ends also when there were few steps.
    """
    rates = sorted((step.tokens / max(step.seconds, CLOCK_SECONDS), step.tokens) for step in steps)
    total = sum(tokens for _, tokens in rates)

    def reached(share: float) -> float:
        seen = 0
        for rate, tokens in rates:
            seen += tokens
            if seen >= share * total:
                return rate
        return math.nan

    low, high = (reached(share) if len(rates) >= FEW_STEPS else math.nan for share in SPREAD)
    return Estimate(reached(0.5), low, high)


def typical(times: Sequence[float]) -> Estimate:
    """The median of a time that was measured once or more, and the shortest and the longest; NaN for these when measured once."""
    ends = (min(times), max(times)) if len(times) > 1 else (math.nan, math.nan)
    return Estimate(median(times), *ends)
