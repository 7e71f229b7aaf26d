"""What a report says in words and numbers, the same in HTML, Markdown and on a terminal.

A reader should learn from the first lines which artifact is best at which size, and whether the differences are more than noise.
"Better" means a smaller mean divergence from the reference: unlike perplexity it cannot improve by luck.  A difference is called
significant, or more than noise, by its p-value, which is adjusted for all pairs: with one pair when the interval of the difference
leaves out zero, with more when it does so clearly.  Numbers are rounded to what their interval supports, and what is not known is a
dash, never a zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from quantkit.evaluation import INTERVAL, ArtifactEvaluation, Difference, Estimate, Evaluation

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
PER_CENT = f"{100 * INTERVAL:g} %"
MOST_STEPS = 4  # findings of one sort that are spelled out
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# --------------------------------------------------------------------------------------------------------------- numbers


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent from 0.0001 on: ``0.0187``, ``12.3``, ``1,042``, ``2.1e-06``."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    if abs(value) < 0.9995e-4:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return f"{value:,.{_decimals(value, digits)}f}".replace("-", MINUS)


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many digits of a value."""
    if not math.isfinite(value) or value == 0:
        return digits
    return max(0, digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))))


def interval(estimate: Estimate, digits: int = 3) -> str:
    """``0.0181 to 0.0193``, with the decimals of the estimate; a dash where it is not known."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return UNKNOWN
    if not all(map(math.isfinite, (estimate.value, estimate.low, estimate.high))) or 0 < abs(estimate.value) < 1e-4:
        return f"{number(estimate.low, digits)} to {number(estimate.high, digits)}"
    decimals = _decimals(estimate.value, digits)
    return f"{estimate.low:,.{decimals}f} to {estimate.high:,.{decimals}f}".replace("-", MINUS)


def named_interval(estimate: Estimate) -> str:
    """``interval 0.0181 to 0.0193``, or ``no interval``."""
    ends = interval(estimate)
    return "no interval" if ends == UNKNOWN else f"interval {ends}"


def ratio(value: float) -> str:
    """A ratio near 1: ``1.0079``."""
    return f"{value:,.4f}" if math.isfinite(value) else number(value)


def ratio_interval(estimate: Estimate) -> str:
    """``1.0070 to 1.0089``."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return UNKNOWN
    return f"{ratio(estimate.low)} to {ratio(estimate.high)}"


def signed(value: float, digits: int = 3) -> str:
    """A difference, with its sign."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def percent(share: float, decimals: int = 2) -> str:
    """``94.12 %``; 100 only for all."""
    if math.isnan(share):
        return UNKNOWN
    shown = f"{100 * share:.{decimals}f}".replace("-", MINUS)
    if share < 1 and shown == f"{100:.{decimals}f}":
        return f"> {100 - 10**-decimals:.{decimals}f} %"
    return f"{shown} %"


def percent_interval(estimate: Estimate, decimals: int = 2) -> str:
    """``93.80 to 94.41 %``."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return UNKNOWN
    return f"{100 * estimate.low:.{decimals}f} to {100 * estimate.high:.{decimals}f} %".replace("-", MINUS)


def size(count: float) -> str:
    """Bytes, decimal: ``64.9 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(count: float) -> str:
    """``48 s``, ``12 min``, ``3 h 5 min``."""
    if math.isnan(count):
        return UNKNOWN
    if count < 99.5:
        return f"{count:.1f} s" if count < 9.95 else f"{count:.0f} s"
    minutes = round(count / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def listing(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def many(count: int, noun: str) -> str:
    """``1 window``, ``2,304 windows``."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def one_line(text: str) -> str:
    """Text whose line breaks are spaces, and whose other control characters, which a terminal would obey, are seen as such."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def role(name: str) -> str:
    """``routed expert``, ``dense MLP``."""
    return " ".join({"mlp": "MLP", "lm": "LM"}.get(word, word) for word in name.split("_"))


# --------------------------------------------------------------------------------------------------------------- findings


def ranked(evaluation: Evaluation) -> list[ArtifactEvaluation]:
    """Closest to the reference first; what has no divergence comes last, equals in the order given."""

    def order(artifact: ArtifactEvaluation) -> tuple[bool, float, int]:
        value = artifact.scores.divergence.value
        return math.isnan(value), 0.0 if math.isnan(value) else value, artifact.bytes

    return sorted(evaluation.artifacts, key=order)


def frontier(evaluation: Evaluation) -> list[ArtifactEvaluation]:
    """The artifacts that no other beats in size without losing in divergence, closest first."""
    best: list[ArtifactEvaluation] = []
    for artifact in ranked(evaluation):
        if not math.isnan(artifact.scores.divergence.value) and (not best or artifact.bytes < best[-1].bytes):
            best.append(artifact)
    return best


def difference(evaluation: Evaluation, first: ArtifactEvaluation, second: ArtifactEvaluation) -> Difference | None:
    """First minus second, whichever way round it was computed."""
    for pair in evaluation.differences:
        if (pair.first, pair.second) == (first.name, second.name):
            return pair
        if (pair.first, pair.second) == (second.name, first.name):
            divergence, log_perplexity = _negative(pair.divergence), _negative(pair.log_perplexity)
            return replace(pair, first=first.name, second=second.name, divergence=divergence, log_perplexity=log_perplexity)
    return None


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def significant(p_value: float) -> bool | None:
    """Whether a difference is more than noise, by its adjusted p-value; None where there is none."""
    return None if math.isnan(p_value) else p_value < 1 - INTERVAL


def _judged(evaluation: Evaluation) -> int:
    """For how many pairs it is known whether they differ."""
    return sum(significant(pair.divergence_p_value) is not None for pair in evaluation.differences)


def judgement(evaluation: Evaluation) -> str:
    """How verdicts on differences come about."""
    count = _judged(evaluation)
    if count < 2:
        return f"A difference is significant when its {PER_CENT} interval leaves out zero."
    return (
        f"Verdicts hold for all {count:,} pairs together at {PER_CENT} (Holm's correction). Intervals are those of single "
        "differences, so one that leaves out zero need not be significant."
    )


def nothing_between(estimate: Estimate) -> bool:
    """Whether a difference is exactly zero, in every window as far as there are intervals."""
    return estimate.value == 0 and not estimate.low < 0 and not estimate.high > 0


def identical(evaluation: Evaluation, first: ArtifactEvaluation, second: ArtifactEvaluation) -> bool:
    """Whether two artifacts gave the same results, as the same weights in two formats do."""
    pair = difference(evaluation, first, second)
    return pair is not None and _same(pair)


def _same(pair: Difference) -> bool:
    return nothing_between(pair.divergence) and nothing_between(pair.log_perplexity)


def verdict(estimate: Estimate, p_value: float) -> str:
    """A difference in one or two words."""
    if nothing_between(estimate):
        return "no difference"
    return {None: "no interval", True: "significant", False: "not significant"}[significant(p_value)]


def title(evaluation: Evaluation) -> str:
    """What the report is about."""
    count = len(evaluation.artifacts)
    return f"{evaluation.reference}, quantized" + (f": {count} artifacts compared" if count > 1 else "")


def headline(evaluation: Evaluation) -> str:
    """The finding in one sentence."""
    best = frontier(evaluation)
    if not best:
        return "No divergence from the reference could be measured"
    closest = best[0]
    if len(evaluation.artifacts) == 1:
        shared = (
            f"finds the same next token most likely as the reference at {percent(closest.scores.agreement.value, 1)} of positions"
        )
        return f"{closest.name}, {size(closest.bytes)}, {shared}"
    others = [artifact for artifact in evaluation.artifacts if artifact is not closest]
    if all(identical(evaluation, closest, other) for other in others):
        smallest = f"; {closest.name} is the smallest" if any(other.bytes > closest.bytes for other in others) else ""
        return f"All {len(evaluation.artifacts)} artifacts gave the same results{smallest}"
    if len(best) == 1:
        return f"{closest.name} is both the smallest and the closest to the reference"
    smaller = best[1:] if len(best) <= 4 else [best[len(best) // 3], best[2 * len(best) // 3], best[-1]]
    parts = [f"{artifact.name} at {size(artifact.bytes)}" for artifact in smaller]
    among = " for example" if len(best) > 4 else ""
    return f"{closest.name} is closest to the reference; for less memory,{among} {listing(parts)}"


def summary(evaluation: Evaluation) -> list[str]:
    """The findings, one each: figures of the closest, whether its lead is real, which sizes are worth it and which are not."""
    best = frontier(evaluation)
    if not best:
        return []
    closest, scores = best[0], best[0].scores
    of = (
        f"{size(closest.bytes)} at {closest.bits_per_weight:.2f} bits per weight, of {size(evaluation.reference_bytes)} unquantized"
    )
    figures = f"a mean divergence from the reference of {_with_interval(scores.divergence)} nats and a perplexity"
    same = f"finds the same token most likely at {percent(scores.agreement.value)} of {scores.positions:,} positions"
    lines = [f"{closest.name} takes {of}. It has {figures} {ratio(scores.ratio.value)} times the reference's, and {same}."]
    others = [artifact for artifact in ranked(evaluation) if artifact is not closest]
    if others and (len(best) == 1 or others[0] is not best[1]) and not identical(evaluation, closest, others[0]):
        lines.append(_lead(evaluation, closest, others[0]))
    behind = [artifact for artifact in others if artifact not in best]
    certain = _all_certain(evaluation, best, behind)
    lines += [_step(evaluation, larger, smaller, certain) for larger, smaller in pairwise(best[: MOST_STEPS + 1])]
    if len(best) > MOST_STEPS + 1:
        lines.append(
            f"Smaller ones that are best at their size: {listing([artifact.name for artifact in best[MOST_STEPS + 1 :]])}."
        )
    lines += _behind(evaluation, best, behind)
    apart = [pair for pair in evaluation.differences if not _same(pair)]
    if apart and (certain or _judged(evaluation) > 1):
        lines.append(_sureness(evaluation, certain))
    if others and (apart or not evaluation.differences) and all(significant(pair.divergence_p_value) is None for pair in apart):
        lines.append(
            "Whether these differences are more than noise cannot be said: they have no intervals, as with a single window of text."
        )
    return lines


def _sureness(evaluation: Evaluation, certain: bool) -> str:
    """What the words about noise rest on."""
    count = _judged(evaluation)
    if count == 1:
        return f"The difference named here is more than noise: its {PER_CENT} interval leaves out zero."
    together = f"for all {count:,} pairs of artifacts together, at {PER_CENT} with Holm's correction"
    if certain:
        return f"All differences named here are more than noise; this holds {together}."
    return f"What may be noise is judged {together}: an interval that leaves out zero does not suffice."


def _with_interval(estimate: Estimate) -> str:
    ends = interval(estimate)
    return number(estimate.value) + (f" ({PER_CENT} interval {ends})" if ends != UNKNOWN else " (no interval)")


def _lead(evaluation: Evaluation, closest: ArtifactEvaluation, second: ArtifactEvaluation) -> str:
    if math.isnan(second.scores.divergence.value):
        return "It is the only one whose divergence is known."
    pair = difference(evaluation, closest, second)
    known = None if pair is None else significant(pair.divergence_p_value)
    if pair is None or known is None:
        return f"{second.name} comes next."
    by = f"the difference of their mean divergence is {_with_interval(_negative(pair.divergence))}"
    if known:
        return f"It is closer than {second.name}, which comes next, by more than noise: {by}."
    apart = pair.divergence.low > 0 or pair.divergence.high < 0
    doubt = f"which may be chance among {_judged(evaluation):,} pairs" if apart else "which leaves zero possible"
    return f"It cannot be told from {second.name}, which comes next: {by}, {doubt}."


def _step(evaluation: Evaluation, larger: ArtifactEvaluation, smaller: ArtifactEvaluation, certain: bool) -> str:
    saved = size(larger.bytes - smaller.bytes)
    start = f"{smaller.name}, {size(smaller.bytes)} at {smaller.bits_per_weight:.2f} bits, saves {saved} on {larger.name}"
    low, high = larger.scores.divergence.value, smaller.scores.divergence.value
    times = f", {number(high / low, 2)} times as much" if low > 0 else ""
    noise = {None: "", True: "; the difference is more than noise", False: "; the difference may be noise"}
    return f"{start} at a divergence of {number(high)}{times}{'' if certain else noise[_known(evaluation, larger, smaller)]}."


def _rival(best: Sequence[ArtifactEvaluation], artifact: ArtifactEvaluation) -> ArtifactEvaluation:
    """The smallest of the best that is at least as close as an artifact that is not among them; it is no larger either."""
    return next(other for other in reversed(best) if other.scores.divergence.value <= artifact.scores.divergence.value)


def _all_certain(evaluation: Evaluation, best: Sequence[ArtifactEvaluation], behind: Sequence[ArtifactEvaluation]) -> bool:
    """Whether every difference that the findings name is significant; where results are the same there is none."""
    known = [artifact for artifact in behind if not math.isnan(artifact.scores.divergence.value)]
    pairs = [*pairwise(best), *((_rival(best, artifact), artifact) for artifact in known)]
    pairs = [(first, second) for first, second in pairs if not identical(evaluation, first, second)]
    return bool(pairs) and all(_known(evaluation, first, second) for first, second in pairs)


def _known(evaluation: Evaluation, first: ArtifactEvaluation, second: ArtifactEvaluation) -> bool | None:
    pair = difference(evaluation, first, second)
    return None if pair is None else significant(pair.divergence_p_value)


def _behind(evaluation: Evaluation, best: Sequence[ArtifactEvaluation], artifacts: Sequence[ArtifactEvaluation]) -> list[str]:
    """Of those that are not best at their size: one line each, or one for all where they are many."""
    unknown = [artifact.name for artifact in artifacts if math.isnan(artifact.scores.divergence.value)]
    lines, names = [], []
    for artifact in artifacts:
        if artifact.name in unknown:
            continue
        rival = _rival(best, artifact)
        as_close = rival.scores.divergence.value == artifact.scores.divergence.value
        if as_close and (rival.bytes == artifact.bytes or identical(evaluation, rival, artifact)):
            lines.append(_equal(evaluation, rival, artifact))
            names.append(f"{artifact.name} (equal to {rival.name})")
            continue
        if as_close:
            lines.append(f"{artifact.name}, at {size(artifact.bytes)}, is as close as {rival.name}, which is smaller.")
            names.append(f"{artifact.name} ({rival.name}, as close)")
            continue
        doubt = ", though that may be noise" if _known(evaluation, rival, artifact) is False else ""
        place = f"at {size(artifact.bytes)} and a divergence of {number(artifact.scores.divergence.value)}"
        lines.append(f"{artifact.name}, {place}, is behind: {rival.name} is no larger and closer to the reference{doubt}.")
        names.append(f"{artifact.name} ({rival.name}{', perhaps' if doubt else ''})")
    if len(lines) > MOST_STEPS:
        lines = [f"These are behind another, named in brackets, that is no larger and closer to the reference: {listing(names)}."]
    return lines + ([f"No divergence is known of {listing(unknown)}."] if unknown else [])


def _equal(evaluation: Evaluation, rival: ArtifactEvaluation, artifact: ArtifactEvaluation) -> str:
    if not identical(evaluation, rival, artifact):
        return f"{artifact.name} is as large and as close as {rival.name}."
    shown, other = size(artifact.bytes), size(rival.bytes)
    sizes = "as large" if shown == other else f"larger, {shown} against {other}"
    return f"{artifact.name} gave the same results as {rival.name}; it is {sizes}."


Column = tuple[str, Callable[[ArtifactEvaluation], str], Callable[[ArtifactEvaluation], str]]


def main_columns() -> list[Column]:
    """The main table: heading, figure and interval of each column; a dash where there is none."""

    def percentile(name: str) -> Callable[[ArtifactEvaluation], str]:
        return lambda artifact: number(artifact.scores.divergence_percentiles.get(name, math.nan))

    def none(artifact: ArtifactEvaluation) -> str:
        return ""

    return [
        ("Size", lambda own: size(own.bytes), none),
        ("Bits per weight", lambda own: f"{own.bits_per_weight:.2f}", none),
        ("Perplexity", lambda own: number(own.scores.perplexity.value, 4), lambda own: interval(own.scores.perplexity, 4)),
        ("Ratio", lambda own: ratio(own.scores.ratio.value), lambda own: ratio_interval(own.scores.ratio)),
        ("KLD mean", lambda own: number(own.scores.divergence.value), lambda own: interval(own.scores.divergence)),
        ("KLD median", percentile("50"), none),
        ("KLD 99 %", percentile("99"), none),
        ("KLD 99.9 %", percentile("99.9"), none),
        ("KLD max", percentile("100"), none),
        ("Top-1 agreement", lambda own: percent(own.scores.agreement.value), lambda own: percent_interval(own.scores.agreement)),
    ]


def shortened(evaluation: Evaluation) -> str:
    """That windows are shorter than what was asked for; empty where they are not."""
    asked, reduced = evaluation.text.get("sequence_length"), evaluation.text.get("window_reduced_to")
    if not isinstance(asked, int) or not isinstance(reduced, int):
        return ""
    return f"no text fills a window of {asked:,} tokens; the longest has {reduced:,}"


def text_facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How it was measured, as label and value; lists in the text's record are left out."""
    conventions = {
        "full": "full: every token of a window is predicted but its first",
        "llama.cpp": "llama.cpp: each window begins with the start token, and only its second half counts",
    }
    positions = evaluation.artifacts[0].scores.positions if evaluation.artifacts else 0
    rounded = "rounded as serving engines round them" if evaluation.rounded_activations else "kept in floating point"
    windows = f"{evaluation.windows:,} of {evaluation.window:,} tokens; {positions:,} positions predicted"
    facts = [
        ("Reference", f"{evaluation.reference} ({size(evaluation.reference_bytes)}), {evaluation.reference_path}"),
        ("Windows", "; ".join(filter(None, (windows, shortened(evaluation))))),
        ("Convention", conventions.get(evaluation.convention, evaluation.convention)),
        ("Activations", f"{rounded}, where a scheme quantizes them"),
        ("Time", seconds(evaluation.seconds)),
    ]
    simple = {name: value for name, value in evaluation.text.items() if isinstance(value, str | int | float)}
    facts += [(f"Text: {role(str(name))}", _value(value)) for name, value in simple.items() if name != "convention"]
    return facts


def _value(value: str | float) -> str:
    """A value of the text's record."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def default_command(evaluation: Evaluation) -> list[str]:
    """The words of a command that measures the same again, as far as the evaluation says."""
    words = ["quantkit", "compare", *(artifact.path for artifact in evaluation.artifacts), "--reference", evaluation.reference_path]
    words += ["--window", str(evaluation.window), "--windows", str(evaluation.windows), "--convention", evaluation.convention]
    return words if evaluation.rounded_activations else [*words, "--float-activations"]
