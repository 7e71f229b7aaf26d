"""The chart that answers which artifact to take: divergence against size, each point with its name.

Names are placed one by one where they cover no sign, no error bar and no other name: near their point if they can, else farther off
with a line that leads to it.  Text must not shrink with the page: the chart is drawn for two widths, and the style shows the one
that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from quantkit.evaluation import ArtifactEvaluation, Evaluation
from quantkit.report.markup import (
    Markup,
    Scale,
    element,
    join,
    linear_scale,
    logarithmic_scale,
    marker,
    plain,
    series_class,
    tick_label,
)
from quantkit.report.words import frontier, named_interval, number, size

_RADII = (10, 15, 22, 31, 42, 55, 70, 88, 108)
_DIRECTIONS = 16
_LINE_HEIGHT = 15
_CHARACTER = 7.5  # mean width of a character, on the safe side
_LONGEST = 34  # characters of a name
_UNPLACED = 400.0  # what a name without a place costs


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True)
class _Label:
    text: str
    box: _Box
    anchor: str
    x: float
    y: float
    radius: float


def size_chart(evaluation: Evaluation, width: int, height: int) -> Markup:
    """Mean divergence, logarithmic, against bytes; error bars, and the line of those that no other artifact beats."""
    shown = [(place, own) for place, own in enumerate(evaluation.artifacts) if not math.isnan(own.scores.divergence.value)]
    if not shown:
        return element("p", "No divergence is known.", class_="note")
    left, right, top, bottom = 52, width - 14, 28, height - 44
    unit, unit_name = _unit(own.bytes for _, own in shown)
    across = linear_scale((own.bytes / unit for _, own in shown), left, right)
    ends = [end for _, own in shown for end in (own.scores.divergence.low, own.scores.divergence.high, own.scores.divergence.value)]
    up = logarithmic_scale(ends, bottom, top)
    points = {place: (across.at(own.bytes / unit), up.at(own.scores.divergence.value)) for place, own in shown}
    line = [points[evaluation.artifacts.index(own)] for own in frontier(evaluation)]
    bars = {place: _bar(own, up) for place, own in shown}
    labels = _place_labels(
        {place: own.name for place, own in shown}, points, bars, line, _Box(left + 3, top - 6, width - 2, bottom - 3)
    )
    narrow = width < 500
    return element(
        "svg",
        element("title", "Mean KL divergence from the reference against size"),
        element("desc", "; ".join(f"{own.name}: {size(own.bytes)}, {number(own.scores.divergence.value)}" for _, own in shown)),
        _axes(across, up, width, height, unit_name, 4 if narrow else 8),
        element("path", class_="frontier", d="M" + "L".join(f"{plain(x)} {plain(y)}" for x, y in line)),
        *(_leader(label, points[place], place) for place, label in labels.items()),
        *(_point(place, own, points[place], bars[place]) for place, own in shown),
        *(_name(label, place) for place, label in labels.items()),
        role="img",
        class_="narrow" if narrow else "wide",
        viewBox=f"0 0 {width} {height}",
    )


def _unit(sizes: Iterable[int]) -> tuple[float, str]:
    largest = max(sizes)
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((factor, name) for factor, name in units if largest >= factor), (1.0, "bytes"))


def _bar(own: ArtifactEvaluation, up: Scale) -> tuple[float, float] | None:
    """Top and bottom of the error bar."""
    ends = own.scores.divergence
    if math.isnan(ends.low) or math.isnan(ends.high):
        return None
    return up.at(ends.high), up.at(ends.low)


def _axes(across: Scale, up: Scale, width: int, height: int, unit: str, count: int) -> Markup:
    parts = []
    for value in up.ticks(6):
        y = up.at(value)
        parts.append(element("line", class_="grid", x1=across.start, x2=across.end, y1=y, y2=y))
        parts.append(element("text", tick_label(value), class_="tick", x=across.start - 8, y=y + 4, text_anchor="end"))
    parts.append(element("line", class_="axis", x1=across.start, x2=across.end, y1=up.start, y2=up.start))
    for value in across.ticks(count):
        x = across.at(value)
        parts.append(element("line", class_="axis", x1=x, x2=x, y1=up.start, y2=up.start + 5))
        parts.append(element("text", tick_label(value), class_="tick", x=x, y=up.start + 19, text_anchor="middle"))
    parts.append(element("text", "Mean KL divergence, nats (log scale); lower is better", class_="label", x=2, y=12))
    parts.append(element("text", f"Size, {unit}", class_="label", x=width - 14, y=height - 6, text_anchor="end"))
    return join(parts)


def _point(place: int, own: ArtifactEvaluation, point: tuple[float, float], bar: tuple[float, float] | None) -> Markup:
    x, y = point
    value = own.scores.divergence
    taken = f"{size(own.bytes)}, {own.bits_per_weight:.2f} bits per weight"
    note = f"{own.name}: {taken}; divergence {number(value.value)}, {named_interval(value)}"
    whisker = []
    if bar is not None and bar[1] - bar[0] >= 1:
        top, bottom = bar
        ends = "".join(f"M{plain(x - 3.5)} {plain(end)}h7" for end in bar)
        whisker = [element("path", class_="whisker", d=f"M{plain(x)} {plain(top)}V{plain(bottom)}{ends}")]
    return element(
        "g",
        element("title", note),
        *whisker,
        marker(place, x, y, 5.5),
        class_=f"mark {series_class(place)}",
        data_series=str(place),
    )


def _leader(label: _Label, point: tuple[float, float], place: int) -> Markup:
    """The line from a sign to its name where they are far apart; drawn before the signs."""
    if label.radius <= _RADII[1]:
        return Markup("")
    x, y = point
    end_x = min(max(x, label.box.left), label.box.right)
    end_y = min(max(y, label.box.top + 2), label.box.bottom - 2)
    return element("line", class_="leader", x1=x, y1=y, x2=end_x, y2=end_y, data_series=str(place))


def _name(label: _Label, place: int) -> Markup:
    return element("text", label.text, class_="name", x=label.x, y=label.y, text_anchor=label.anchor, data_series=str(place))


# ---------------------------------------------------------------------------------------------------------------- labels


def _place_labels(
    names: dict[int, str],
    points: dict[int, tuple[float, float]],
    bars: dict[int, tuple[float, float] | None],
    line: list[tuple[float, float]],
    bounds: _Box,
) -> dict[int, _Label]:
    """A place for every name that has one; the legend has them all."""
    signs = []
    for place, (x, y) in points.items():
        signs.append(_Box(x - 8, y - 8, x + 8, y + 8))
        bar = bars[place]
        if bar is not None:
            signs.append(_Box(x - 5, bar[0] - 1, x + 5, bar[1] + 1))
    dots = [between for first, second in pairwise(line) for between in _between(first, second)]
    choices = {
        place: [
            (label, label.radius + 4 * sum(_holds(label.box, dot) for dot in dots) + (0 if label.anchor == "start" else 1))
            for label in _candidates(names[place], points[place], bounds)
            if not any(label.box.meets(sign) for sign in signs)
        ]
        for place in points
    }
    crowded = sorted(points, key=lambda place: (-_neighbours(place, points), place))
    across = sorted(points, key=lambda place: points[place][0])
    down = sorted(points, key=lambda place: points[place][1])
    orders = [order for first in (crowded, across, down) for order in (first, first[::-1])]
    placed = [_greedy(order, choices, points, signs) for order in orders]
    return min(placed, key=lambda one: one[0])[1]


def _greedy(
    order: list[int], choices: dict[int, list[tuple[_Label, float]]], points: dict[int, tuple[float, float]], signs: list[_Box]
) -> tuple[float, dict[int, _Label]]:
    """Cost and labels when each name in this order takes the best place that is left."""
    labels: dict[int, _Label] = {}
    leaders: list[tuple[float, float]] = []
    total = 0.0
    for place in order:
        taken = [label.box for label in labels.values()]
        best, least = None, _UNPLACED
        for label, base in choices[place]:
            if base >= least or any(label.box.meets(box) for box in taken):
                continue
            lead = _lead(label, points[place])
            crossed = 2 * sum(_holds(label.box, dot) for dot in leaders)
            crossed += 3 * sum(_holds(box, dot) for dot in lead[8:-1] for box in (*taken, *signs))
            if base + 4 * crossed < least:
                best, least = label, base + 4 * crossed
        total += least
        if best is not None:
            labels[place] = best
            leaders += _lead(best, points[place])
    return total, dict(sorted(labels.items()))


def _lead(label: _Label, point: tuple[float, float]) -> list[tuple[float, float]]:
    """Points along the line from a sign to its name, if the name is far enough off to need one."""
    if label.radius <= _RADII[1]:
        return []
    return _between(point, (min(max(point[0], label.box.left), label.box.right), (label.box.top + label.box.bottom) / 2))


def _neighbours(place: int, points: dict[int, tuple[float, float]]) -> int:
    return sum(math.dist(points[place], other) < 60 for other in points.values())


def _candidates(name: str, point: tuple[float, float], bounds: _Box) -> list[_Label]:
    """Places around a point within the bounds, near ones first."""
    text = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 2]}…"
    width = sum(2 if ord(character) > 0x2E7F else 1 for character in text) * _CHARACTER + 6
    found = []
    for radius in _RADII:
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            x, middle = point[0] + radius * math.cos(angle), point[1] - radius * math.sin(angle)
            anchor = "start" if math.cos(angle) > 0.3 else "end" if math.cos(angle) < -0.3 else "middle"
            left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
            box = _Box(left, middle - _LINE_HEIGHT / 2, left + width, middle + _LINE_HEIGHT / 2)
            if bounds.left <= box.left and box.right <= bounds.right and bounds.top <= box.top and box.bottom <= bounds.bottom:
                found.append(_Label(text, box, anchor, x, middle + 4, radius))
    return found


def _between(first: tuple[float, float], second: tuple[float, float]) -> list[tuple[float, float]]:
    return [(first[0] + (second[0] - first[0]) * step / 24, first[1] + (second[1] - first[1]) * step / 24) for step in range(25)]


def _holds(box: _Box, point: tuple[float, float]) -> bool:
    return box.left < point[0] < box.right and box.top < point[1] < box.bottom
