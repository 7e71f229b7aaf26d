"""What a report says of the golden set: figures as text, and what they amount to.

Two models are told apart only by more than chance: their answers by the sign test, their speeds when the spreads do not meet.
A model that was timed in a single round may have been disturbed in all of it, so of its speed nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantkit.evaluation import INTERVAL, Estimate, Evaluation, GoldenAnswers
from quantkit.report.words import MINUS, UNKNOWN, interval, listing, many, number, seconds

GOLDEN_HEADINGS = ("Gained and lost", "Time to an answer", "Tokens per second")


def answer_time(value: float) -> str:
    """``31 ms``, ``4.2 s``, ``12 min``."""
    return f"{number(1000 * value, 2)} ms" if value < 0.9995 else seconds(value)


def time_spread(estimate: Estimate) -> str:
    """``28 ms to 40 ms``; a dash where there is none."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return UNKNOWN
    return f"{answer_time(estimate.low)} to {answer_time(estimate.high)}"


def with_spread(figure: str, spread: str) -> str:
    """``132 (118 to 141)``, or the figure alone."""
    return figure if spread == UNKNOWN else f"{figure} ({spread})"


def speed_with_spread(one: GoldenAnswers) -> str:
    """Tokens per second."""
    return with_spread(number(one.tokens_per_second.value), interval(one.tokens_per_second))


def gained_and_lost(one: GoldenAnswers) -> str:
    """Questions that only the artifact, and that only the reference answers right, as ``+3``, ``-1``; a dash for the reference."""
    found = one.beside_reference
    return UNKNOWN if found is None else f"+{found.gained} {MINUS}{found.lost}"


def p_value(one: GoldenAnswers) -> str:
    """Of the sign test."""
    found = one.beside_reference
    return UNKNOWN if found is None else f"p {number(found.p_value, 2)}"


def golden_findings(evaluation: Evaluation) -> list[str]:
    """What the golden set says, in sentences."""
    return [*_of_answers(evaluation.golden), *_of_speeds(evaluation.golden)]


def _of_answers(golden: Sequence[GoldenAnswers]) -> list[str]:
    compared = [(one.name, one.beside_reference) for one in golden if one.beside_reference is not None]
    if not compared:
        return []
    questions, reference = many(golden[0].questions, "question"), golden[0].name
    together = "" if len(compared) == 1 else f", for all {len(compared)} artifacts together by Holm's correction"
    test = f"exact sign test on the questions that only one of the two answers right{together}"
    apart = [(name, found) for name, found in compared if found.adjusted_p_value < 1 - INTERVAL]
    if not apart:
        if not any(found.gained or found.lost for _, found in compared):
            return [f"Every one of {questions} is answered right by all models or wrong by all: the set cannot tell them apart."]
        names = f"{compared[0][0]} from {reference}" if len(compared) == 1 else f"the artifacts from {reference}"
        return [f"The set cannot tell {names}: with {questions} none differs by more than chance ({test})."]
    lines = []
    for name, found in apart:
        way = "worse" if found.lost > found.gained else "better"
        lines.append(
            f"{name} answers {way} than {reference}, by more than chance: {many(found.lost, 'right answer')} lost, {found.gained} "
            f"gained (p = {number(found.adjusted_p_value, 2)})."
        )
    rest = [name for name, found in compared if found.adjusted_p_value >= 1 - INTERVAL]
    if rest:
        lines.append(f"The set cannot tell {listing(rest)} from {reference}.")
    lines[-1] = f"{lines[-1][:-1]}; by the {test}."
    return lines


def _of_speeds(golden: Sequence[GoldenAnswers]) -> list[str]:
    measured = [one for one in golden if not math.isnan(one.tokens_per_second.value)]
    if len(measured) < 2:
        return []
    if any(math.isnan(one.tokens_per_second.low) for one in measured):
        return ["Speeds were measured on too few steps to compare them."]
    if any(one.rounds < 2 for one in measured):
        return [
            "Not all models were timed in several rounds, so differences in time and speed may be due to what else the machine did."
        ]
    fastest = max(measured, key=lambda one: one.tokens_per_second.value)
    others = [one for one in measured if one is not fastest]
    slower = [one.name for one in others if one.tokens_per_second.high < fastest.tokens_per_second.low]
    alike = [one.name for one in others if one.name not in slower]
    if not slower:
        return ["Their speeds cannot be told apart: the spread of each meets that of the fastest."]
    line = f"{fastest.name} generates faster than {listing(slower)}, by more than the spread"
    return [f"{line}; it cannot be told from {listing(alike)} in speed." if alike else f"{line}."]
