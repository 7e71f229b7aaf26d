"""The tables of the HTML page: real ones, with headings for their rows and columns and a caption.

A wide table scrolls within its own box, which can be reached with the keyboard; the page itself never scrolls sideways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from quantkit.evaluation import ArtifactEvaluation, Estimate, Evaluation
from quantkit.report.charts import by_label, label_positions
from quantkit.report.golden_words import GOLDEN_HEADINGS, answer_time, gained_and_lost, p_value, time_spread
from quantkit.report.heat_maps import router_rows
from quantkit.report.markup import Markup, element, join, key, typeset
from quantkit.report.words import (
    PER_CENT,
    UNKNOWN,
    frontier,
    interval,
    judgement,
    main_columns,
    many,
    number,
    percent,
    percent_interval,
    role,
    seconds,
    signed,
    size,
    verdict,
)

Row = tuple[Markup, Sequence[Markup]]  # heading cell, other cells

# What the columns of the main table are sorted by, in the order of main_columns.
_VALUES: tuple[Callable[[ArtifactEvaluation], float], ...] = (
    lambda own: own.bytes,
    lambda own: own.bits_per_weight,
    lambda own: own.scores.perplexity.value,
    lambda own: own.scores.ratio.value,
    lambda own: own.scores.divergence.value,
    *(lambda own, name=name: own.scores.divergence_percentiles.get(name, math.nan) for name in ("50", "99", "99.9", "100")),
    lambda own: own.scores.agreement.value,
)


# How far from best, of the columns where that is not the value itself: perplexity, ratio, agreement.
_DISTANCES: dict[int, Callable[[ArtifactEvaluation], float]] = {
    2: lambda own: abs(own.scores.perplexity.value - own.scores.reference_perplexity),
    3: lambda own: abs(own.scores.ratio.value - 1),
    9: lambda own: -own.scores.agreement.value,
}


def table(caption: str, headings: Sequence[str], rows: Iterable[Row], *, left: int = 1, kind: str = "") -> Markup:
    """A table in a box that scrolls; the first ``left`` columns are text.  caption: its first sentence is set bold."""
    first, separator, rest = caption.partition(". ")
    title = element("span", element("b", typeset(first + separator.strip())), typeset(f" {rest}") if rest else "")
    heads = (
        element("th", typeset(text), scope="col", class_="left" if place < left else None) for place, text in enumerate(headings)
    )
    body = (element("tr", head, *cells, class_=_row_class(head)) for head, cells in rows)
    return element(
        "div",
        element(
            "table",
            element("caption", title),
            element("thead", element("tr", *heads)),
            element("tbody", *body),
            class_=kind or None,
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=first,
    )


def _row_class(head: Markup) -> str | None:
    return "reference" if "data-reference" in head.partition(">")[0] else None


def head_cell(*content: str, value: str | None = None, reference: bool = False) -> Markup:
    """The heading of a row."""
    return element("th", *content, scope="row", data_value=value, data_reference=reference)


def cell(text: str, below: str = "", *, value: float | None = None, kind: str | None = None) -> Markup:
    """A cell, with a second line in small print; value: what it is sorted by."""
    shown = None if value is None else "" if math.isnan(value) else repr(float(value))
    return element("td", typeset(text), element("small", typeset(below)) if below else "", data_value=shown, class_=kind)


def main_table(evaluation: Evaluation) -> Markup:
    """All figures of all artifacts, the reference first; the best of a column stands out where there is something to compare."""
    columns = main_columns()
    best = {own.name for own in frontier(evaluation)} if len(evaluation.artifacts) > 1 else set()
    rows = []
    if evaluation.artifacts:
        perplexity = evaluation.artifacts[0].scores.reference_perplexity
        bits = 8 * evaluation.reference_bytes / evaluation.artifacts[0].parameters
        known = [cell(size(evaluation.reference_bytes)), cell(f"{bits:.2f}"), cell(number(perplexity, 4))]
        empty = [cell("") for _ in columns[3:]]
        heading = head_cell(evaluation.reference, element("small", "reference"), reference=True)
        rows.append((heading, [*known, *empty]))
    winners = [_winners(evaluation, place) for place in range(len(columns))]
    for place, own in enumerate(evaluation.artifacts):
        tag = element("small", "best at its size", class_="tag") if own.name in best else ""
        heading = head_cell(key(place), own.name, element("small", own.format), tag, value=own.name)
        cells = []
        for column, (_, figure, ends) in enumerate(columns):
            below, value = ends(own), _VALUES[column](own)
            kind = "best" if place in winners[column] else None
            cells.append(cell(figure(own), below if below != UNKNOWN else "no interval", value=value, kind=kind))
        rows.append((heading, cells))
    caption = f"All figures. Below a figure stands its {PER_CENT} interval"
    if len(evaluation.artifacts) > 1:
        caption += "; bold is best in its column, of perplexity and ratio what is nearest to the reference. An artifact is best at "
        caption += "its size when no smaller one, and none of the same size, is closer to the reference"
    caption += "."
    return table(caption, ["Artifact", *(name for name, _, _ in columns)], rows, kind="full sortable")


def _winners(evaluation: Evaluation, column: int) -> set[int]:
    """The artifacts that are best in a column, by place; several when they are equal, none where there is nothing to compare.

    Perplexity below the reference's is a deviation like one above it, not a better result.
    """
    off = _DISTANCES.get(column, _VALUES[column])
    found = {place: off(own) for place, own in enumerate(evaluation.artifacts)}
    found = {place: value for place, value in found.items() if not math.isnan(value)}
    if len(evaluation.artifacts) < 2 or not found:
        return set()
    least = min(found.values())
    return {place for place, value in found.items() if value == least}


def more_table(evaluation: Evaluation) -> Markup:
    """Figures that fewer readers need."""
    rows = []
    for place, own in enumerate(evaluation.artifacts):
        scores = own.scores
        shift = scores.probability_shift
        cells = [
            cell(f"{scores.positions:,}", value=scores.positions),
            cell(number(scores.perplexity_error), value=scores.perplexity_error),
            cell(number(scores.divergence_percentiles.get("90", math.nan))),
            cell(_shift(shift.value), _shift_interval(shift), value=shift.value),
            cell(percent(scores.probability_shift_square), value=scores.probability_shift_square),
            cell(seconds(own.seconds), value=own.seconds),
        ]
        rows.append((head_cell(key(place), own.name, value=own.name), cells))
    headings = ["Artifact", "Positions", "Standard error of perplexity", "KLD 90 %", "Shift of the right token", "Root mean square"]
    caption = "More figures. The standard error takes tokens as independent, as llama.cpp states it."
    return table(caption, [*headings, "Time"], rows, kind="sortable")


def _shift(share: float) -> str:
    return UNKNOWN if math.isnan(share) else f"{signed(100 * share, 2)} %"


def _shift_interval(shift: Estimate) -> str:
    return interval(Estimate(100 * shift.value, 100 * shift.low, 100 * shift.high), 2)


def difference_table(evaluation: Evaluation) -> Markup:
    """Every pair of artifacts."""
    rows = []
    for pair in evaluation.differences:
        known, likewise = (
            verdict(pair.divergence, pair.divergence_p_value),
            verdict(pair.log_perplexity, pair.log_perplexity_p_value),
        )
        cells = [
            cell(pair.second, kind="left"),
            cell(signed(pair.divergence.value), interval(pair.divergence), value=pair.divergence.value),
            cell(known, kind="yes" if known == "significant" else "no"),
            cell(signed(pair.log_perplexity.value), interval(pair.log_perplexity), value=pair.log_perplexity.value),
            cell(likewise, kind="yes" if likewise == "significant" else "no"),
        ]
        rows.append((head_cell(pair.first, value=pair.first), cells))
    headings = ["Artifact", "minus", "Mean KLD", "Verdict", "Log perplexity", "Verdict"]
    caption = "Differences between artifacts. On the same windows; below zero the first is closer to the reference. "
    caption += judgement(evaluation)
    return table(caption, headings, rows, left=2, kind="sortable")


def label_table(evaluation: Evaluation, attribute: str, caption: str) -> Markup:
    """Positions, and divergence and agreement of each artifact, by kind or language."""
    rows = []
    for label, estimates in by_label(evaluation, attribute).items():
        positions = label_positions(evaluation, attribute, label)
        cells = [cell(f"{positions:,}", value=positions)]
        for own, estimate in zip(evaluation.artifacts, estimates, strict=True):
            if estimate is None:
                cells.append(cell(UNKNOWN))
            else:
                agreement = getattr(own, attribute)[label].agreement.value
                cells.append(cell(number(estimate.value), f"{percent(agreement, 1)} agree", value=estimate.value))
        rows.append((head_cell(label, value=label), cells))
    return table(caption, ["Text", "Positions", *(own.name for own in evaluation.artifacts)], rows, kind="sortable")


def router_table(evaluation: Evaluation) -> Markup:
    """Mean and lowest agreement of each artifact."""
    rows = [
        (
            head_cell(name, value=name),
            [cell(percent(mean), value=mean), cell(percent(low), value=low), cell(str(layer), value=layer)],
        )
        for name, mean, low, layer in router_rows(evaluation)
    ]
    return table("Router agreement.", ["Artifact", "Mean", "Lowest", "in layer"], rows, kind="sortable")


def golden_table(evaluation: Evaluation) -> Markup:
    """Accuracy, speed and size on the golden set."""

    def known(text: str) -> str:
        return "" if text == UNKNOWN else text

    kinds = list(dict.fromkeys(kind for one in evaluation.golden for kind in one.by_kind))
    rows = []
    for one in evaluation.golden:
        cells = [
            cell(size(one.bytes), value=one.bytes),
            cell(percent(one.accuracy.value, 1), percent_interval(one.accuracy, 1), value=one.accuracy.value),
            *(cell(percent(one.by_kind.get(kind, math.nan), 1), value=one.by_kind.get(kind, math.nan)) for kind in kinds),
            cell(gained_and_lost(one), "" if one.beside_reference is None else p_value(one)),
            cell(answer_time(one.latency.value), known(time_spread(one.latency)), value=one.latency.value),
            cell(number(one.tokens_per_second.value), known(interval(one.tokens_per_second)), value=one.tokens_per_second.value),
        ]
        rows.append((head_cell(one.name, value=one.name), cells))
    headings = ["Model", "Size", "Right", *kinds, *GOLDEN_HEADINGS]
    count = many(evaluation.golden[0].questions, "question")
    caption = (
        f"Golden set. {count}; right answers by kind of question. Gained and lost: questions that only the artifact, and that only "
        "the reference answers right, with the p-value of the sign test of that artifact alone. Below right answers stands their "
        f"{PER_CENT} interval, below times and speeds their spread."
    )
    return table(caption, headings, rows, kind="sortable")


def answers_table(evaluation: Evaluation) -> Markup | None:
    """The questions that not all models answer alike; None where they agree on all."""
    marks = [{question: (right, said) for question, right, said in one.answers} for one in evaluation.golden]
    questions = list(dict.fromkeys(question for one in marks for question in one))
    rows = []
    for question in questions:
        found = [one.get(question) for one in marks]
        if len({one[0] for one in found if one is not None}) > 1:
            cells = [
                cell(UNKNOWN) if one is None else element("td", "right" if one[0] else "wrong", title=one[1], class_=_right(one[0]))
                for one in found
            ]
            rows.append((head_cell(question, value=question), cells))
    if not rows:
        return None
    caption = "Questions that the models answer differently. Point at a cell to see the answer."
    return table(caption, ["Question", *(one.name for one in evaluation.golden)], rows, kind="sortable")


def _right(right: bool) -> str:
    return "no" if right else "best"


def role_table(own: ArtifactEvaluation) -> Markup:
    """What the tensors of each role are stored as."""
    rows = []
    for part in own.roles:
        bits = f"{8 * part.bytes / part.parameters:.2f}" if part.parameters else UNKNOWN
        schemes = cell(", ".join(part.schemes), kind="left wrap")
        rows.append((head_cell(role(part.role)), [schemes, cell(f"{part.parameters:,}"), cell(size(part.bytes)), cell(bits)]))
    return table(f"{own.name} by role.", ["Role", "Schemes", "Parameters", "Size", "Bits per weight"], rows, left=2)


def layerless_table(rows: Iterable[tuple[str, str, float, float]]) -> Markup:
    """Weight errors outside of layers: (artifact, role, error, worst)."""
    made = [
        (head_cell(name), [cell(role(part), kind="left"), cell(number(error)), cell(number(worst))])
        for name, part, error, worst in rows
    ]
    return table("Weight error outside of the layers.", ["Artifact", "Role", "Error", "Worst matrix"], made, left=2)


def fallback_list(own: ArtifactEvaluation) -> Markup:
    """What differs from what was asked."""
    return element("ul", *(element("li", line) for line in own.fallbacks))


def paragraphs(lines: Iterable[str]) -> Markup:
    """Each line as a paragraph."""
    return join(element("p", typeset(line)) for line in lines)
