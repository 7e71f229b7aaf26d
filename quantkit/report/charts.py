"""Charts that fill whatever width the page has: errors by layer as lines, divergence by kind of text as dots.

The drawing area is an SVG that stretches, in which lines keep their width; what is written beside it is HTML, which keeps its size.
So one copy serves a phone, a desktop screen and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from quantkit.evaluation import Estimate, Evaluation, LedgerCell, Scores
from quantkit.report.markup import (
    Markup,
    Scale,
    dash,
    element,
    join,
    key,
    logarithmic_scale,
    marker,
    plain,
    series_class,
    tick_label,
)
from quantkit.report.words import named_interval, number, role

_LINES_HEIGHT = 190
MANY = 8  # with more artifacts than these, whiskers and dots would only hide each other
_ROW_HEIGHT = 20

Ticks = Sequence[tuple[float, str]]  # (share of the extent, text)


def legend(evaluation: Evaluation, sign: Callable[[int], Markup] = key) -> Markup:
    """All artifacts with their signs, or what else ``sign`` makes; pressing one dims the others."""
    if len(evaluation.artifacts) < 2:
        return Markup("")
    buttons = (
        element("button", sign(place), element("span", own.name), type="button", data_focus=str(place), aria_pressed="false")
        for place, own in enumerate(evaluation.artifacts)
    )
    return element("div", *buttons, class_="legend", role="group", aria_label="Artifacts; press one to single it out")


def frame(area: str, height: int, across: Ticks, up: Ticks, note: str = "", *, twice: bool = False) -> Markup:
    """A drawing area with ticks at its left and below, and if ``twice`` above too; where there is little room every second one."""
    left = (element("span", text, style=f"top:{plain(100 * share)}%") for share, text in up)
    marks = join(
        element("span", text, style=f"left:{plain(100 * share)}%", class_="second" if place % 2 else None)
        for place, (share, text) in enumerate(across)
    )
    return element(
        "div",
        element("div", marks, class_="above", aria_hidden="true") if twice else "",
        element("div", *left, class_="up", aria_hidden="true"),
        element("div", area, class_="area"),
        element("div", marks, element("i", note) if note else "", class_="across", aria_hidden="true"),
        class_="plot",
        style=f"--height:{height}px",
    )


def layer_ticks(layers: int) -> list[tuple[float, str]]:
    """Layers whose numbers stand below a chart that gives each layer the same width."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 1 << 30) if layers / step <= 13)
    return [((layer + 0.5) / layers, str(layer)) for layer in range(0, layers, step)]


# ------------------------------------------------------------------------------------------------- errors by layer and role


def ledger_layers(evaluation: Evaluation) -> int:
    """Layers of the model, as far as anything here knows them."""
    cells = [cell.layer for own in evaluation.artifacts for cell in own.ledger if cell.layer is not None]
    return max([*(layer + 1 for layer in cells), *(len(own.router_agreement) for own in evaluation.artifacts)], default=0)


def error_panels(evaluation: Evaluation) -> list[tuple[str, Markup]]:
    """(role, chart) for every role with quantized layers: each artifact's weight error from layer to layer, on one scale."""
    cells = [cell for own in evaluation.artifacts for cell in own.ledger if cell.layer is not None and cell.relative_error > 0]
    roles = list(dict.fromkeys(cell.role for cell in cells))
    layers = ledger_layers(evaluation)
    scale = logarithmic_scale((cell.relative_error for cell in cells), 100, 0)
    ticks = [(scale.at(value) / 100, tick_label(value)) for value in scale.ticks(5)]
    panels = []
    for name in roles:
        lines = [_grid(ticks)]
        for place, own in enumerate(evaluation.artifacts):
            found = [(cell.layer, cell) for cell in own.ledger if cell.role == name and cell.layer is not None]
            usable = [item for item in found if item[1].relative_error > 0 and math.isfinite(item[1].relative_error)]
            usable.sort(key=lambda item: item[0])
            if usable:
                lines.append(
                    _error_line(place, own.name, usable, layers, scale, len(evaluation.artifacts) <= MANY and layers <= 64)
                )
        area = element(
            "svg",
            element("title", f"Weight error by layer: {role(name)}"),
            *lines,
            role="img",
            viewBox="0 0 100 100",
            preserveAspectRatio="none",
            class_="stretch",
        )
        panels.append((name, frame(area, _LINES_HEIGHT, layer_ticks(layers), ticks, "layer")))
    return panels


def _grid(ticks: Ticks) -> Markup:
    return element("path", class_="grid", d="".join(f"M0 {plain(100 * share)}H100" for share, _ in ticks))


def _error_line(place: int, name: str, cells: Sequence[tuple[int, LedgerCell]], layers: int, scale: Scale, dotted: bool) -> Markup:
    points = [f"{plain(100 * (layer + 0.5) / layers)} {plain(scale.at(cell.relative_error))}" for layer, cell in cells]
    worst_layer, worst = max(cells, key=lambda item: item[1].worst)
    mean = sum(cell.relative_error for _, cell in cells) / len(cells)
    note = f"{name}: mean {number(mean)}; the worst matrix, in layer {worst_layer}, {number(worst.worst)}"
    dots = element("path", class_="dots", d="".join(f"M{point}h0" for point in points)) if dotted else ""
    line = element("path", class_="line", d="M" + "L".join(points), stroke_dasharray=dash(place))
    return element("g", element("title", note), line, dots, class_=series_class(place), data_series=str(place))


def layerless_errors(evaluation: Evaluation) -> list[tuple[str, str, LedgerCell]]:
    """(artifact, role, cell) of quantized tensors that belong to no layer."""
    return [(own.name, cell.role, cell) for own in evaluation.artifacts for cell in own.ledger if cell.layer is None]


# ------------------------------------------------------------------------------------------------------------ dots by label


def dot_plot(evaluation: Evaluation, groups: Mapping[str, Sequence[Estimate | None]], title: str) -> Markup:
    """Rows of dots with intervals on a logarithmic scale: by label the divergence of each artifact, None where there is none."""
    estimates = [estimate for row in groups.values() for estimate in row if estimate is not None]
    scale = logarithmic_scale([end for one in estimates for end in (one.value, one.low, one.high)], 0, 100)
    ticks = scale.ticks(6)
    height = _ROW_HEIGHT * len(groups)
    parts = [element("title", title)]
    for place in range(0, len(groups), 2):
        parts.append(element("rect", class_="band", x=0, y=place * _ROW_HEIGHT, width="100%", height=_ROW_HEIGHT))
    for value in ticks:
        share = f"{plain(scale.at(value))}%"
        parts.append(element("line", class_="grid", x1=share, x2=share, y1=0, y2=height))
    for number_of_row, (label, row) in enumerate(groups.items()):
        middle = (number_of_row + 0.5) * _ROW_HEIGHT
        spread = min(2.0, 14 / max(1, len(row)))
        for place, estimate in enumerate(row):
            if estimate is not None and math.isfinite(estimate.value):
                y = middle + (place - (len(row) - 1) / 2) * spread
                parts.append(_dot(place, evaluation, label, estimate, scale, y))
    area = element("svg", *parts, role="img", width="100%", height=height, class_="dots-plot")
    rows = [((place + 0.5) / len(groups), label) for place, label in enumerate(groups)]
    marks = [(scale.at(value) / 100, tick_label(value)) for value in ticks]
    return element("div", frame(area, height, marks, rows, twice=len(groups) > 12), class_="labelled")


def _dot(place: int, evaluation: Evaluation, label: str, estimate: Estimate, scale: Scale, y: float) -> Markup:
    whisker = []
    if len(evaluation.artifacts) <= MANY and math.isfinite(estimate.low) and math.isfinite(estimate.high):
        places = [f"{plain(scale.at(end))}%" for end in (estimate.low, estimate.high)]
        whisker = [element("line", class_="whisker", x1=places[0], x2=places[1], y1=y, y2=y)]
    note = f"{label}, {evaluation.artifacts[place].name}: {number(estimate.value)}, {named_interval(estimate)}"
    sign = element(
        "svg", marker(place, 0, 0, 3.6), x=f"{plain(scale.at(estimate.value))}%", y=y, overflow="visible", width=1, height=1
    )
    return element("g", element("title", note), *whisker, sign, class_=f"mark {series_class(place)}", data_series=str(place))


def by_label(evaluation: Evaluation, attribute: str) -> dict[str, list[Estimate | None]]:
    """The divergence by ``kinds`` or ``languages``, most divergent first, by the geometric mean over the artifacts."""
    tables = [getattr(own, attribute) for own in evaluation.artifacts]
    labels = list(dict.fromkeys(label for table in tables for label in table))
    groups = {label: [table[label].divergence if label in table else None for table in tables] for label in labels}

    def order(label: str) -> tuple[float, str]:
        values = [math.log(one.value) for one in groups[label] if one is not None and math.isfinite(one.value) and one.value > 0]
        return -sum(values) / len(values) if values else math.inf, label

    return {label: groups[label] for label in sorted(groups, key=order)}


def label_positions(evaluation: Evaluation, attribute: str, label: str) -> int:
    """How many positions of the text are of a kind or language; the same for all artifacts that know it."""
    tables: list[dict[str, Scores]] = [getattr(own, attribute) for own in evaluation.artifacts]
    return max(table[label].positions for table in tables if label in table)


def scale_bar(colors: Sequence[str], ticks: Ticks, note: str) -> Markup:
    """A legend for colours: a bar from left to right, with numbers below."""
    marks = (element("span", text, style=f"left:{plain(100 * share)}%") for share, text in ticks)
    bar = element("div", class_="bar", style=f"background:linear-gradient(to right,{','.join(colors)})")
    return element("div", element("p", note), bar, element("div", *marks, class_="marks"), class_="scale")


def swatch(text: str) -> Markup:
    """A legend's entry for experts without tokens."""
    return join([element("span", class_="swatch"), text])
