"""An evaluation as rich tables that fit 80 columns; where names are longer, names and not figures are broken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import text
from .tables import UNBOUNDED, make_table, many, print_heading, print_note, print_table, without_edge

if TYPE_CHECKING:
    from quantkit.evaluation import ArtifactEvaluation, Difference, Evaluation, Scores

MOST_PAIRS = 15
WIDE = 104  # columns of a terminal that has room for more figures
WORST = 5  # kinds of text that are named


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """All figures of one artifact, or of several side by side, and what they amount to."""
    from quantkit.report.words import one_line, summary

    console = without_edge(console)
    if len(evaluation.artifacts) == 1:
        _print_one(console, evaluation, evaluation.artifacts[0])
    else:
        _print_several(console, evaluation)
    if evaluation.golden:
        print_heading(console, "Golden set")
        _print_golden(console, evaluation)
    for own in evaluation.artifacts:
        for line in own.fallbacks:
            print_note(console, one_line(f"Note: {own.name}: {line}"), "yellow")
    if len(evaluation.artifacts) > 1:
        print_heading(console, "Findings")
        _print_sentences(console, summary(evaluation))
    console.print()
    of = f"{many(evaluation.windows, 'window')} of {evaluation.window:,} tokens, convention {evaluation.convention}"
    print_note(console, f"{of}; {text.duration(evaluation.seconds)}. Brackets: 95 % intervals.", "dim")


def _print_sentences(console: Console, lines: Iterable[str]) -> None:
    from quantkit.report.words import one_line

    findings = Table.grid(padding=(0, 1))
    findings.add_column()
    findings.add_column(overflow="fold")
    for line in map(one_line, lines):
        if console.width == UNBOUNDED:
            console.print(Text(f"- {line}"), soft_wrap=True)
        else:
            findings.add_row("-", Text(line))
    if findings.row_count:
        console.print(findings)


def _print_one(console: Console, evaluation: Evaluation, own: ArtifactEvaluation) -> None:
    from quantkit.report.words import interval, main_columns, number, one_line, percent

    print_heading(console, one_line(f"{own.name} beside {evaluation.reference}"))
    table = make_table(("figure",), ("value", "interval"))
    for name, figure, ends in main_columns():
        table.add_row(name, figure(own), ends(own))
    scores = own.scores
    table.add_row("Reference's perplexity", number(scores.reference_perplexity, 4), "")
    table.add_row("Standard error of perplexity", number(scores.perplexity_error), "")
    shift = scores.probability_shift
    table.add_row("Shift of the right token", number(shift.value), interval(shift))
    known = [(share, layer) for layer, share in enumerate(own.router_agreement) if share is not None]
    if known:
        table.add_row("Router agreement, mean", percent(sum(share for share, _ in known) / len(known)), "")
        lowest, layer = min(known)
        table.add_row("Router agreement, lowest", percent(lowest), f"layer {layer}")
    print_table(console, table)
    if len(own.kinds) > 1:
        worst = sorted(own.kinds.items(), key=_divergence, reverse=True)[:WORST]
        parts = (f"{kind} {number(scores.divergence.value)}" for kind, scores in worst)
        print_note(console, one_line(f"Most divergent kinds of text: {', '.join(parts)}"))


def _divergence(item: tuple[str, Scores]) -> float:
    value = item[1].divergence.value
    return -math.inf if math.isnan(value) else value


def _print_several(console: Console, evaluation: Evaluation) -> None:
    from quantkit.report.words import interval, number, one_line, percent, ratio, signed, size, verdict

    print_heading(console, one_line(f"Compared with {evaluation.reference}, {size(evaluation.reference_bytes)}"))
    wide = console.width >= WIDE
    more = ("perplexity", "99 %") if wide else ()
    table = make_table(("artifact",), ("size", "bits", "ratio", "mean KLD", "interval", "top-1", *more), wrap="artifact")
    for own in evaluation.artifacts:
        scores = own.scores
        figures = (ratio(scores.ratio.value), number(scores.divergence.value), interval(scores.divergence))
        tail = (number(scores.perplexity.value, 4), number(scores.divergence_percentiles.get("99", math.nan))) if wide else ()
        same = percent(scores.agreement.value, 1)
        table.add_row(Text(one_line(own.name)), size(own.bytes), f"{own.bits_per_weight:.2f}", *figures, same, *tail)
    print_table(console, table)
    if 0 < len(evaluation.differences) <= MOST_PAIRS:
        names = ("artifact", "minus")
        table = make_table(names, ("mean KLD", "interval", "verdict"), wrap=names)
        for pair in evaluation.differences:
            apart = pair.divergence
            table.add_row(*_names(pair), signed(apart.value), interval(apart), verdict(apart, pair.divergence_p_value))
        print_table(console, table)


def _names(pair: Difference) -> tuple[Text, Text]:
    from quantkit.report.words import one_line

    return Text(one_line(pair.first)), Text(one_line(pair.second))


def _print_golden(console: Console, evaluation: Evaluation) -> None:
    from quantkit.report.golden_words import answer_time, gained_and_lost, golden_findings, p_value, time_spread
    from quantkit.report.words import interval, number, one_line, percent, percent_interval, size

    answers = make_table(("model",), ("size", "right", "interval", "gained, lost", "sign test"), wrap="model")
    times = make_table(("model",), ("time", "spread", "tokens/s", "spread"), wrap="model")
    for one in evaluation.golden:
        name, speed = Text(one_line(one.name)), one.tokens_per_second
        right = (percent(one.accuracy.value, 1), percent_interval(one.accuracy, 1))
        answers.add_row(name, size(one.bytes), *right, gained_and_lost(one), p_value(one))
        times.add_row(name, answer_time(one.latency.value), time_spread(one.latency), number(speed.value), interval(speed))
    print_table(console, answers)
    print_table(console, times)
    _print_sentences(console, golden_findings(evaluation))
