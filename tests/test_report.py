"""Reports: the page is sound HTML that asks for nothing, names everything, and escapes everything."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import OutputError, RecipeError
from quantkit.evaluation import Difference, Estimate, Evaluation
from quantkit.report import NAMES, write_report
from quantkit.report.markup import Markup, Scale, element, escape, logarithmic_scale
from quantkit.report.words import difference, frontier, headline, interval, number, percent, signed, significant, size, summary
from tests.sample_evaluations import sample, scores, with_golden, without_anything

HOSTILE = "<script>alert('x')</script> & \"q\" | `b` *s* \x00\x1b[31m ￿ 深い"


class Page(html.parser.HTMLParser):
    """Checks nesting, and keeps elements with their attributes, and text."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            one == tag and all(found.get(name) == value for name, value in attributes.items()) for one, found in self.elements
        )


def written(evaluation: Evaluation, directory: Path, **options: Any) -> tuple[Page, str, dict[str, Any]]:
    """The page, the Markdown and the JSON of a report."""
    paths = write_report(evaluation, directory, force=True, **options)
    assert [path.name for path in paths] == list(NAMES)
    page, markdown, content = (path.read_text(encoding="utf-8") for path in paths)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return Page(page), markdown, json.loads(content, parse_constant=refuse)


EVALUATIONS = {
    "scout": lambda: with_golden(sample()),
    "maverick": lambda: sample(3, 48, 128, 2),
    "one": lambda: sample(1),
    "two": lambda: sample(2),
    "twenty": lambda: sample(20, 6, 4),
    "bare": lambda: without_anything(sample(2)),
    "bare, one": lambda: without_anything(sample(1)),
    "one layer": lambda: sample(2, 1, 1),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_kind_of_evaluation_renders(name: str, tmp_path: Path) -> None:
    evaluation = EVALUATIONS[name]()
    page, markdown, content = written(evaluation, tmp_path)
    text = "".join(page.text)
    for own in evaluation.artifacts:
        assert own.name in text
        assert own.name.replace("_", "\\_") in markdown
    assert content["artifacts"][0]["name"] == evaluation.artifacts[0].name
    assert headline(evaluation) in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text.lower())
    assert page.count("h1") == 1
    assert page.count("main") == 1
    assert page.elements[0] == ("html", {"lang": "en"})


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page, _, _ = written(with_golden(sample()), tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "video", "audio", "source", "base", "form", "a", "use", "image")
        for name in ("src", "srcset", "href", "action", "xlink:href", "data", "poster"):
            assert attributes.get(name) in (None, "data:,"), (tag, name)
    assert not re.search(r"https?:|url\(|@import|@font-face|fetch\(|XMLHttp|WebSocket|import\(", source)
    policy = next(found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_charts_and_tables_are_there_and_named(tmp_path: Path) -> None:
    evaluation = with_golden(sample())
    page, markdown, _ = written(evaluation, tmp_path)
    assert page.count("svg", role="img", **{"class": "wide"}) == 1
    assert page.count("svg", role="img", **{"class": "narrow"}) == 1
    heats = page.count("svg", **{"class": "stretch heat"})
    assert heats == 2  # routers, and one calibration that two artifacts share
    cells = sum(tag == "rect" and (found.get("height") == ".94") for tag, found in page.elements)
    assert cells == 5 * 48 + 48 * 16
    assert page.count("rect", **{"class": "none"}) == 1  # the one expert without tokens
    assert page.count("svg", **{"class": "stretch"}) == 3  # roles in the ledger
    assert page.count("svg", **{"class": "dots-plot"}) == 2
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg[^>]*role=\"img\".*?</svg>", source, re.DOTALL):
        assert re.match(r"<svg[^>]*><title>[^<]+</title>", drawing)
    assert page.count("table") == page.count("caption") == page.count("thead") == page.count("tbody")
    assert all(found.get("scope") in ("row", "col") for tag, found in page.elements if tag == "th")
    for heading in ("Differences", "Router agreement", "Golden set", "by language", "by kind", "fallen back", "Weight error"):
        assert heading in markdown
    assert "Q5\\_0 instead of Q4\\_K" in markdown
    assert "Q5_0 instead of Q4_K" in "".join(page.text)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evaluation = with_golden(sample(2, 4, 4))
    own = evaluation.artifacts[1]
    hostile = replace(
        own,
        name=HOSTILE,
        path=HOSTILE,
        format=HOSTILE,
        kinds={HOSTILE: own.scores},
        languages={HOSTILE: own.scores},
        roles=tuple(replace(part, role=HOSTILE, schemes=(HOSTILE,)) for part in own.roles),
        ledger=tuple(replace(cell, role=HOSTILE) for cell in own.ledger),
        coverage={0: (0, 1)},
        fallbacks=(HOSTILE,),
        recipe={HOSTILE: HOSTILE},
        fingerprint={HOSTILE: HOSTILE},
    )
    broken = replace(
        evaluation,
        reference=HOSTILE,
        reference_path=HOSTILE,
        text={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
        convention=HOSTILE,
        environment={HOSTILE: HOSTILE},
        artifacts=(hostile,),
        differences=tuple(replace(pair, second=HOSTILE) for pair in evaluation.differences),
        golden=tuple(replace(one, name=HOSTILE, by_kind={HOSTILE: 1.0}) for one in evaluation.golden),
    )
    page, markdown, content = written(broken, tmp_path, title=HOSTILE, command=["quantkit", HOSTILE])
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["script"] == 1
    assert "b" in tags and "i" in tags  # ours; none from the name
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(&#x27;x&#x27;)" in source
    assert "<script>alert" not in source
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", source)
    assert "<script>" not in markdown.replace(markdown[markdown.index("```") :], "")
    assert content["reference"] == HOSTILE
    rows = [line for line in markdown.splitlines() if line.startswith("|") and "alert" in line]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in rows)


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(with_golden(sample()), tmp_path / name)
    for name in NAMES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_json_holds_everything_and_no_nan(tmp_path: Path) -> None:
    evaluation = without_anything(sample(2))
    _, _, content = written(evaluation, tmp_path)
    divergence = content["artifacts"][0]["scores"]["divergence"]
    assert divergence == {"value": evaluation.artifacts[0].scores.divergence.value, "low": None, "high": None}
    _, _, full = written(sample(4), tmp_path)
    assert full["artifacts"][2]["coverage"]["1"] == list(sample(4).artifacts[2].coverage[1])
    assert full["artifacts"][0]["bits_per_weight"] == pytest.approx(8.04)


def test_an_existing_report_stays(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(OutputError, match=r"report\.md exists already.*--force"):
        write_report(sample(1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"
    write_report(sample(1), tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("directory", ["", 5, b"report", None, "a\0b"])
def test_a_directory_that_is_no_path(directory: Any) -> None:
    with pytest.raises(RecipeError, match=r"directory is .*; expected a path"):
        write_report(sample(1), directory)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write_report(sample(1), tmp_path / "file")
    with pytest.raises(OutputError, match="cannot make"):
        write_report(sample(1), tmp_path / "file" / "inner")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        write_report(sample(1), tmp_path, force=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(sample(1), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="disk is full"):
        write_report(sample(2), tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert stat.S_IMODE((tmp_path / "report.md").stat().st_mode) & 0o444


# --------------------------------------------------------------------------------------------------------------- findings


def test_the_headline_says_which_artifact_at_which_size() -> None:
    assert headline(sample()) == (
        "fp8-dynamic is closest to the reference; for less memory, Q6_K at 88.5 GB, Q4_K_M at 65.3 GB and w4a16-gptq at 61.0 GB"
    )
    assert "same next token" in headline(sample(1))
    evaluation = sample(2)
    best = replace(evaluation.artifacts[0], bytes=1000)
    assert "both the smallest and the closest" in headline(replace(evaluation, artifacts=(best, evaluation.artifacts[1])))


def test_the_frontier_holds_what_no_other_beats() -> None:
    evaluation = sample(20)
    best = {own.name for own in frontier(evaluation)}
    for own in evaluation.artifacts:
        beaten = any(
            other.bytes <= own.bytes
            and other.scores.divergence.value <= own.scores.divergence.value
            and (other.bytes, other.scores.divergence.value) != (own.bytes, own.scores.divergence.value)
            for other in evaluation.artifacts
        )
        assert (own.name not in best) == beaten


def test_whether_differences_are_noise_is_said() -> None:
    certain = sample()
    assert any("All differences named here are more than noise" in line for line in summary(certain))
    assert any("for all 10 pairs of artifacts together, at 95 % with Holm's correction" in line for line in summary(certain))
    one = summary(sample(2))[-1]
    assert one == "The difference named here is more than noise: its 95 % interval leaves out zero."
    wide = tuple(
        replace(pair, divergence=Estimate(pair.divergence.value, -1, 1), divergence_p_value=0.9) for pair in certain.differences
    )
    text = " ".join(summary(replace(certain, differences=wide)))
    assert "more than noise" not in text
    assert text.count("may be noise") == 4 + 1  # the last says how that is judged
    assert any("cannot be said" in line for line in summary(without_anything(sample(2))))
    assert len(summary(sample(1))) == 1
    worse = replace(certain.artifacts[1], bytes=certain.artifacts[0].bytes + 1)
    two = replace(certain, artifacts=(certain.artifacts[0], worse), differences=wide)
    assert any("cannot be told from Q6_K" in line and line.endswith("leaves zero possible.") for line in summary(two))


def test_an_interval_without_zero_may_still_be_chance(tmp_path: Path) -> None:
    certain = sample()
    unsure = tuple(replace(pair, divergence_p_value=0.2, log_perplexity_p_value=0.06) for pair in certain.differences)
    assert all(pair.divergence.low > 0 or pair.divergence.high < 0 for pair in unsure)
    evaluation = replace(certain, differences=unsure)
    text = " ".join(summary(evaluation))
    assert "more than noise" not in text and text.count("may be noise") == 4 + 1
    assert "for all 10 pairs of artifacts together" in text and "does not suffice" in text
    worse = replace(certain.artifacts[1], bytes=certain.artifacts[0].bytes + 1)
    two = replace(evaluation, artifacts=(certain.artifacts[0], worse))
    assert any(line.endswith("which may be chance among 10 pairs.") for line in summary(two))
    page, markdown, content = written(evaluation, tmp_path)
    for shown in ("".join(page.text).replace("\N{NO-BREAK SPACE}", " "), markdown):
        assert shown.count("not significant") == 20
        assert "Verdicts hold for all 10 pairs together at 95 % (Holm's correction)." in shown
    assert content["differences"][0]["divergence_p_value"] == 0.2
    assert "significant when its 95 % interval leaves out zero" in written(sample(2), tmp_path)[1]


def equal_results(low: float, artifacts: int = 2) -> Evaluation:
    """Artifacts with the same scores; the second one is the smallest."""
    evaluation = sample(artifacts, 4, 4)
    first, second, *others = evaluation.artifacts
    same = [replace(own, bytes=first.bytes + 10**9, scores=first.scores, kinds=first.kinds) for own in others]
    same.insert(0, replace(second, bytes=first.bytes - 10**9, scores=first.scores, kinds=first.kinds))
    zero = Estimate(0.0, low, low)
    pairs = tuple(Difference(pair.first, pair.second, zero, zero, 1 + low, 1 + low) for pair in evaluation.differences)
    return replace(evaluation, artifacts=(first, *same), differences=pairs)


@pytest.mark.parametrize("low", [0.0, math.nan])
def test_the_same_results_are_called_the_same(tmp_path: Path, low: float) -> None:
    evaluation = equal_results(low)
    assert headline(evaluation) == "All 2 artifacts gave the same results; Q6_K is the smallest"
    lines = summary(evaluation)
    assert lines[1:] == ["fp8-dynamic gave the same results as Q6_K; it is larger, 108.3 GB against 107.3 GB."]
    page, markdown, _ = written(evaluation, tmp_path)
    assert "no difference" in markdown and "no difference" in "".join(page.text)
    assert "fp8-dynamic (equal to Q6_K)" in " ".join(summary(equal_results(low, 6)))
    chance = replace(evaluation, differences=(replace(evaluation.differences[0], log_perplexity=Estimate(0.1, -1, 1)),))
    assert "fp8-dynamic, at 108.3 GB, is as close as Q6_K, which is smaller." in summary(chance)
    first, second = evaluation.artifacts
    almost = replace(evaluation, artifacts=(first, replace(second, bytes=first.bytes - 1000)))
    assert summary(almost)[1:] == ["fp8-dynamic gave the same results as Q6_K; it is as large."]


def bold(page: str, column: int) -> list[str]:
    """The artifacts whose figure in a column of the main table is marked."""
    table = page[page.index('class="full sortable"') :].split("</table>")[0].split("<tbody>")[1]
    rows = [row for row in table.split("<tr") if "<td" in row]
    marked = [row for row in rows if 'class="best"' in re.findall(r"<td[^>]*>", row)[column : column + 1].pop()]
    return [match[1] for row in marked if (match := re.search(r'data-value="([^"]*)"', row))]


def test_the_best_perplexity_is_the_nearest_not_the_lowest(tmp_path: Path) -> None:
    evaluation = sample(3, 4, 4)
    artifacts = []
    for own, ratio in zip(evaluation.artifacts, (0.9, 1.002, 0.997), strict=True):
        perplexity = ratio * own.scores.reference_perplexity
        changed = replace(own.scores, ratio=Estimate(ratio, ratio, ratio), perplexity=Estimate(*[perplexity] * 3))
        artifacts.append(replace(own, scores=changed))
    written(replace(evaluation, artifacts=tuple(artifacts)), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [bold(page, column) for column in (2, 3)] == [["Q6_K"], ["Q6_K"]]
    assert [bold(page, column) for column in (4, 9)] == [["fp8-dynamic"], ["fp8-dynamic"]]


def test_the_reference_has_bits_in_markdown_too(tmp_path: Path) -> None:
    _, markdown, _ = written(sample(2, 4, 4), tmp_path)
    assert "| Llama-4-Scout-17B-16E-Instruct (reference) | 215.5 GB | 16.00 | 7.812 |" in markdown


def test_names_with_control_characters_keep_lines_whole(tmp_path: Path) -> None:
    evaluation = sample(2, 4, 4)
    named = replace(evaluation.artifacts[0], name="two\nlines\r\x1b[31m\u2028end")
    _, markdown, _ = written(replace(evaluation, artifacts=(named, evaluation.artifacts[1]), differences=()), tmp_path)
    assert "two lines \N{REPLACEMENT CHARACTER}\\[31m end" in markdown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", markdown)
    assert all("lines" in line for line in markdown.splitlines() if re.search(r"\btwo\b.*\|", line))


def test_kinds_without_intervals_are_drawn(tmp_path: Path) -> None:
    bare = without_anything(sample(2, 4, 4))
    own = bare.artifacts[0].scores
    kinds = {"code.go": replace(own, positions=1511), "prose.en": replace(own, divergence=Estimate(0.0, math.nan, math.nan))}
    artifacts = tuple(replace(own, kinds=kinds) for own in bare.artifacts)
    page, markdown, _ = written(replace(bare, artifacts=artifacts), tmp_path)
    text = "".join(page.text).replace("\N{NO-BREAK SPACE}", " ")
    assert page.count("svg", **{"class": "dots-plot"}) == 1
    assert page.count("line", **{"class": "whisker"}) == 0
    assert "no intervals, as with few windows" in text and "interval \N{EN DASH}" not in text
    assert "| code.go | 1,511 |" in markdown and "1,511" in text


def test_a_difference_may_be_stored_either_way_round() -> None:
    evaluation = sample(2)
    first, second = evaluation.artifacts
    forward, backward = difference(evaluation, first, second), difference(evaluation, second, first)
    assert forward is not None and backward is not None
    assert backward.divergence == Estimate(-forward.divergence.value, -forward.divergence.high, -forward.divergence.low)
    assert difference(replace(evaluation, differences=()), first, second) is None


@pytest.mark.parametrize(("p_value", "known"), [(0.0, True), (0.049, True), (0.051, False), (1.0, False), (math.nan, None)])
def test_significance(p_value: float, known: bool | None) -> None:
    assert significant(p_value) is known


def test_extreme_figures_render(tmp_path: Path) -> None:
    evaluation = sample(4, 2, 2)
    values = (0.0, 1e-12, math.nan, math.inf)
    artifacts = []
    for own, value in zip(evaluation.artifacts, values, strict=True):
        changed = replace(
            scores(0.01), divergence=Estimate(value, value, value), divergence_percentiles={}, perplexity=Estimate(*[value] * 3)
        )
        artifacts.append(replace(own, scores=changed, kinds={"a.b": changed}, router_agreement=(1.0, 1.0)))
    page, _, _ = written(replace(evaluation, artifacts=tuple(artifacts)), tmp_path)
    assert page.count("svg", **{"class": "wide"}) == 1
    alone = replace(evaluation, artifacts=(artifacts[2],), differences=())
    assert "No divergence" in headline(alone)
    written(alone, tmp_path)


# ---------------------------------------------------------------------------------------------------------- numbers, markup


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01868, "0.0187"),
        (0, "0"),
        (12.345, "12.3"),
        (1042.4, "1,042"),
        (0.99996, "1.00"),
        (2.14e-6, "2.14e\N{MINUS SIGN}06"),
        (-0.5, "\N{MINUS SIGN}0.500"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_what_is_unknown_is_a_dash() -> None:
    assert number(math.nan) == percent(math.nan) == interval(Estimate(1, math.nan, math.nan)) == "\N{EN DASH}"
    assert number(math.inf) == "∞"
    assert signed(0.5) == "+0.500"
    assert percent(0.99999) == "> 99.99 %"
    assert percent(1.0) == "100.00 %"
    assert interval(Estimate(0.0187, 0.01811, 0.01934)) == "0.0181 to 0.0193"
    assert size(65_331_000_000) == "65.3 GB"


@given(st.text())
def test_any_text_stays_text(text: str) -> None:
    page = Page(element("p", text, title=text))
    assert [tag for tag, _ in page.elements] == ["p"]
    assert isinstance(escape(text), Markup)
    plain = [character for character in text if character not in "\r\ufffd" and escape(character) != "\ufffd"]
    assert [character for character in "".join(page.text) if character not in "\r\ufffd"] == plain


@given(st.lists(st.floats(1e-9, 1e6), min_size=1), st.booleans())
def test_scales_keep_order_and_bounds(values: list[float], reverse: bool) -> None:
    scale = logarithmic_scale(values, *((100, 0) if reverse else (0, 100)))
    places = [scale.at(value) for value in sorted(values)]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places, reverse=reverse)
    assert 1 <= len(scale.ticks(5)) <= 12
    assert all(scale.low <= tick <= scale.high * (1 + 1e-9) for tick in scale.ticks(5))


def test_scales_of_one_value() -> None:
    assert Scale(5, 5, 0, 100).at(5) == 50
    assert Scale(5, 5, 0, 100).ticks() == [5]
