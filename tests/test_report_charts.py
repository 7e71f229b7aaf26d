"""Charts of a report: names that do not overlap, lines that the legend tells apart, figures of what colours show."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.evaluation import Evaluation
from quantkit.report import write_report
from quantkit.report.size_chart import size_chart
from tests.sample_evaluations import sample


def page_of(evaluation: Evaluation, directory: Path) -> str:
    """The page of a report, with plain spaces."""
    page, *_ = write_report(evaluation, directory)
    return page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


def test_lines_of_one_colour_are_told_apart_by_the_legend(tmp_path: Path) -> None:
    source = page_of(sample(20, 6, 4), tmp_path)
    legend = source[source.index("Inside the model") :].partition("<figure")[0]
    drawn = source[source.index("Weight error by layer: attention") :].partition("</svg>")[0]
    keys = re.findall(r'<path class="line (s\d)" d="[^"]*"(?: stroke-dasharray="([^"]*)")?></path></svg><span>([^<]*)<', legend)
    lines = re.findall(r'<title>(\S+): mean[^<]*</title><path class="line" d="[^"]*"(?: stroke-dasharray="([^"]*)")?>', drawn)
    assert len({key[:2] for key in keys}) == len(keys) == 20
    assert [(name, stroke) for _, stroke, name in keys] == lines


@pytest.mark.parametrize("count", [1, 3, 5])
def test_router_agreement_has_figures(count: int, tmp_path: Path) -> None:
    evaluation = sample(count, 6, 4)
    text = page_of(evaluation, tmp_path)
    lowest = []
    for own in evaluation.artifacts:
        shares = [share for share in own.router_agreement if share is not None]
        for layer, share in enumerate(shares):
            assert f"{own.name}, layer {layer}: {100 * share:.2f} %" in text
        lowest.append((min(shares), f"{100 * min(shares):.2f} % in layer {shares.index(min(shares))} of {own.name}"))
    for place, (_, words) in enumerate(sorted(lowest)):
        assert (words in text) == (count <= 3 or place == 0)


@pytest.mark.parametrize(("count", "width"), [(5, 1072), (5, 358), (12, 358), (20, 1072), (20, 358)])
def test_names_in_the_chart_do_not_overlap(count: int, width: int) -> None:
    chart = size_chart(sample(count), width, 470)
    names = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>([^<]*)<', chart)
    assert len(names) == count
    boxes = []
    for x, y, anchor, text in names:
        length = 7 * len(text)
        left = float(x) - {"start": 0, "middle": length / 2, "end": length}[anchor]
        boxes.append((left, float(y) - 10, left + length, float(y) + 3))
        assert left >= 0 and left + length <= width
    for place, first in enumerate(boxes):
        for second in boxes[:place]:
            assert first[0] >= second[2] or second[0] >= first[2] or first[1] >= second[3] or second[1] >= first[3]


def test_points_on_one_spot_still_get_names() -> None:
    evaluation = sample(5)
    same = tuple(replace(own, bytes=10**9, scores=evaluation.artifacts[0].scores) for own in evaluation.artifacts)
    chart = size_chart(replace(evaluation, artifacts=same), 358, 380)
    assert all(f">{own.name}</text>" in chart for own in same)
