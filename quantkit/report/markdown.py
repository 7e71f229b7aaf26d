"""The report as Markdown: what fits into a pull request, the same findings and tables without the charts.

Names are escaped, so that none of them is taken for markup or for the border of a cell.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence

from quantkit.evaluation import Estimate, Evaluation
from quantkit.report.charts import by_label, label_positions
from quantkit.report.glossary import GLOSSARY
from quantkit.report.golden_words import (
    GOLDEN_HEADINGS,
    answer_time,
    gained_and_lost,
    golden_findings,
    p_value,
    speed_with_spread,
    time_spread,
    with_spread,
)
from quantkit.report.heat_maps import router_rows
from quantkit.report.words import (
    PER_CENT,
    UNKNOWN,
    default_command,
    headline,
    interval,
    judgement,
    main_columns,
    number,
    one_line,
    percent,
    percent_interval,
    role,
    signed,
    size,
    summary,
    text_facts,
    verdict,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def escape(text: str) -> str:
    """Text without meaning to Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", one_line(text)).replace("&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def markdown_report(evaluation: Evaluation, title: str, command: Sequence[str] | None) -> str:
    """The whole document."""
    parts = [
        f"# {escape(title)}",
        f"**{escape(headline(evaluation))}**",
        "\n".join(f"- {escape(line)}" for line in summary(evaluation)),
        "## The figures",
        f"In brackets: {PER_CENT} intervals.",
        _main_table(evaluation),
    ]
    if evaluation.differences:
        parts += [
            "## Differences",
            f"On the same windows; below zero the first is closer to the reference. {judgement(evaluation)}",
            _differences(evaluation),
        ]
    for attribute, heading in (("languages", "language"), ("kinds", "kind")):
        groups = by_label(evaluation, attribute)
        if groups:
            rows = [
                [label, f"{label_positions(evaluation, attribute, label):,}", *(_figure(estimate) for estimate in row)]
                for label, row in groups.items()
            ]
            headings = ["Text", "Positions", *(own.name for own in evaluation.artifacts)]
            parts += [f"## Mean KL divergence by {heading}", _table(headings, rows)]
    routers = [[name, percent(mean), f"{percent(low)} in layer {layer}"] for name, mean, low, layer in router_rows(evaluation)]
    if routers:
        parts += ["## Router agreement", _table(["Artifact", "Mean", "Lowest"], routers)]
    errors = _errors(evaluation)
    if errors:
        parts += ["## Weight error by role", _table(["Artifact", "Role", "Mean over layers", "Worst matrix"], errors)]
    if evaluation.golden:
        parts += ["## Golden set", _golden(evaluation)]
    parts += ["## What was fallen back", _fallbacks(evaluation)]
    facts = [[name, value] for name, value in (*text_facts(evaluation), *evaluation.environment.items())]
    fence = "```"
    words = shlex.join(command if command is not None else default_command(evaluation)).replace(fence, "'''")
    parts += ["## How it was measured", _table(["", ""], facts), f"{fence}\n{words}\n{fence}"]
    parts += ["## What the figures mean", "\n".join(f"- **{escape(name)}**: {escape(text)}" for name, text in GLOSSARY.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, *rows]
    written = [f"| {' | '.join(escape(text) for text in line)} |" for line in lines]
    rule = f"| {' | '.join(['---', *['---:'] * (len(headings) - 1)])} |"
    return "\n".join([written[0], rule, *written[1:]])


def _main_table(evaluation: Evaluation) -> str:
    columns = main_columns()
    rows = []
    for own in evaluation.artifacts:
        cells = [own.name]
        for _, figure, ends in columns:
            below = ends(own)
            cells.append(f"{figure(own)} ({below})" if below not in ("", UNKNOWN) else figure(own))
        rows.append(cells)
    reference = [f"{evaluation.reference} (reference)", size(evaluation.reference_bytes), *[""] * (len(columns) - 1)]
    if evaluation.artifacts:
        reference[2] = f"{8 * evaluation.reference_bytes / evaluation.artifacts[0].parameters:.2f}"
        reference[3] = number(evaluation.artifacts[0].scores.reference_perplexity, 4)
    return _table(["Artifact", *(name for name, _, _ in columns)], [reference, *rows])


def _differences(evaluation: Evaluation) -> str:
    def cells(estimate: Estimate, p_value: float) -> list[str]:
        return [f"{signed(estimate.value)} ({interval(estimate)})", verdict(estimate, p_value)]

    rows = []
    for pair in evaluation.differences:
        figures = cells(pair.divergence, pair.divergence_p_value) + cells(pair.log_perplexity, pair.log_perplexity_p_value)
        rows.append([pair.first, pair.second, *figures])
    return _table(["Artifact", "minus", "Mean KLD", "", "Log perplexity", ""], rows)


def _figure(estimate: Estimate | None) -> str:
    return UNKNOWN if estimate is None else number(estimate.value)


def _errors(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for own in evaluation.artifacts:
        for name in dict.fromkeys(cell.role for cell in own.ledger):
            cells = [cell for cell in own.ledger if cell.role == name]
            mean = sum(cell.relative_error for cell in cells) / len(cells)
            rows.append([own.name, role(name), number(mean), number(max(cell.worst for cell in cells))])
    return rows


def _golden(evaluation: Evaluation) -> str:
    kinds = list(dict.fromkeys(kind for one in evaluation.golden for kind in one.by_kind))
    rows = []
    for one in evaluation.golden:
        right = f"{percent(one.accuracy.value, 1)} ({percent_interval(one.accuracy, 1)})"
        by_kind = [percent(one.by_kind.get(kind, math.nan), 1) for kind in kinds]
        beside = with_spread(gained_and_lost(one), p_value(one))
        time = with_spread(answer_time(one.latency.value), time_spread(one.latency))
        rows.append([one.name, size(one.bytes), right, *by_kind, beside, time, speed_with_spread(one)])
    table = _table(["Model", "Size", "Right", *kinds, *GOLDEN_HEADINGS], rows)
    return "\n\n".join([table, "\n".join(f"- {escape(line)}" for line in golden_findings(evaluation))])


def _fallbacks(evaluation: Evaluation) -> str:
    lines = [f"- {escape(own.name)}: {escape(line)}" for own in evaluation.artifacts for line in own.fallbacks]
    return "\n".join(lines) or "Nothing."
