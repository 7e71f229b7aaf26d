"""Coverage: numbers against arithmetic spelled out, the heat map as XML and as colours, what the terminal shows."""

from __future__ import annotations

import io
import itertools
import math
import statistics as arithmetic
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from quantkit.coverage import (
    ColorScale,
    check_coverage,
    cold_threshold,
    coldest,
    coverage_rows,
    heat_map_svg,
    kind_coverage,
    language_coverage,
    layer_coverage,
    palette_color,
    save_heat_map,
)
from quantkit.errors import OutputError
from quantkit.statistics import Statistics
from quantkit_cli.coverage import CELLS, cold_warning, heat_lines, print_coverage
from tests.sample_statistics import sample_counts

SVG = "{http://www.w3.org/2000/svg}"


def made_of(layers: dict[int, list[list[int]]], kinds: tuple[str, ...]) -> Statistics:
    """layers: by number, tokens ``[experts, kinds]``."""
    counts = {layer: sample_counts(layer, torch.tensor(table), lent_below=5) for layer, table in layers.items()}
    return Statistics({}, counts, {}, kinds, {})


SMALL = made_of({1: [[90, 10], [0, 0], [30, 30], [0, 4]], 3: [[41, 0], [0, 41], [41, 0], [0, 41]]}, ("code.python", "prose.de"))


def large(layers: int, experts: int) -> Statistics:
    generator = torch.Generator().manual_seed(3)
    tables = {layer: (10 ** (4 * torch.rand(experts, 2, generator=generator)) - 1).long().tolist() for layer in range(layers)}
    return made_of(tables, ("code.python", "prose.de"))


# --------------------------------------------------------------------------------------------------------------- numbers


def test_rows() -> None:
    rows = coverage_rows(SMALL)
    assert [(row.layer, row.expert, row.tokens) for row in rows[:4]] == [(1, 0, 100), (1, 1, 0), (1, 2, 60), (1, 3, 4)]
    assert rows[0].share == pytest.approx(100 / 164)
    assert rows[0].effective_kinds == pytest.approx(math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))))
    assert (rows[1].mean_score, rows[1].effective_kinds, rows[1].share) == (0, 0, 0)
    assert rows[2].effective_kinds == pytest.approx(2) and rows[3].effective_kinds == pytest.approx(1)
    assert [row.borrowed for row in rows[:4]] == [0, 64, 0, 64]
    for row in rows:
        counts = SMALL.experts[row.layer]
        assert row.mean_score * row.tokens == pytest.approx(float(counts.score_mass[row.expert]))
        assert row.margin == float(counts.margin[row.expert])


def test_layers() -> None:
    first, second = layer_coverage(SMALL)
    assert (first.layer, first.experts, first.tokens, first.least, first.median, first.most) == (1, 4, 164, 0, 32, 100)
    assert (first.cold_below, first.cold, first.lent_to) == (3, 1, 2)  # 164 / 4 / 16 = 2.6
    shares = [100 / 164, 60 / 164, 4 / 164]
    assert first.balance == pytest.approx(-sum(share * math.log(share) for share in shares) / math.log(4))
    assert second.balance == pytest.approx(1) and second.balance <= 1 and second.cold == 0
    alone = made_of({0: [[1000], *[[0]] * 15]}, ("a",))
    assert layer_coverage(alone)[0].balance == 0


def test_thresholds() -> None:
    assert check_coverage(SMALL) == [(1, 1, 0)]
    assert check_coverage(SMALL, 0) == []
    assert check_coverage(SMALL, 4) == [(1, 1, 0)]
    assert check_coverage(SMALL, 5) == [(1, 1, 0), (1, 3, 4)]
    assert len(check_coverage(SMALL, 42)) == 6
    assert [(row.layer, row.expert) for row in coldest(SMALL, 3)] == [(1, 1), (1, 3), (3, 0)]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_cold_is_below_a_sixteenth_of_the_fair_share(tokens: list[int]) -> None:
    found = made_of({0: [[count] for count in tokens]}, ("a",))
    threshold, fair = cold_threshold(found.experts[0]), arithmetic.mean(tokens)
    assert threshold >= 1
    assert all((count < threshold) == (count < fair / 16 or count == 0) for count in tokens)
    [layer] = layer_coverage(found)
    assert layer.median == arithmetic.median(tokens) and 0 <= layer.balance <= 1
    assert layer.cold == len(check_coverage(found))


def test_kinds_and_languages() -> None:
    python, german = kind_coverage(SMALL)
    assert (python.name, german.name) == ("code.python", "prose.de")
    assert python.tokens == pytest.approx((120 + 82) / 2) and python.share == pytest.approx(202 / 328)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert python.effective_experts == pytest.approx((math.exp(entropy) + 2) / 2)
    mixed = made_of({0: [[5, 1, 2], [5, 0, 3]]}, ("dialogue.de", "prose.de", "prose.en"))
    assert [(row.name, row.tokens) for row in language_coverage(mixed)] == [("de", 11), ("en", 5)]
    assert language_coverage(mixed)[1].effective_experts == pytest.approx(math.exp(-0.4 * math.log(0.4) - 0.6 * math.log(0.6)))


def test_no_experts_and_no_tokens() -> None:
    dense = Statistics({}, {}, {0: (1.0, 1.0)}, ("a",), {})
    assert coverage_rows(dense) == [] and layer_coverage(dense) == [] and check_coverage(dense, 9) == []
    assert kind_coverage(dense)[0].tokens == 0
    assert "no routed experts" in heat_map_svg(dense)
    nothing = made_of({0: [[0], [0]]}, ("a",))
    assert check_coverage(nothing) == [(0, 0, 0), (0, 1, 0)]
    ET.fromstring(heat_map_svg(nothing))


# -------------------------------------------------------------------------------------------------------------- heat map


def lightness(color: str) -> float:
    """L* of CIELAB, from the definition."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_the_palette_rises_evenly_in_lightness() -> None:
    ladder = [lightness(palette_color(step / 32)) for step in range(33)]
    steps = [after - before for before, after in itertools.pairwise(ladder)]
    assert min(steps) > 0 and max(steps) < 3 * arithmetic.mean(steps)
    assert ladder[-1] - ladder[0] > 70


def test_the_scale_is_logarithmic() -> None:
    scale = ColorScale(1, 10_000)
    assert [scale.position(tokens) for tokens in (1, 10, 100, 1000, 10_000)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert scale.ticks() == [1, 10, 100, 1000, 10_000]
    assert ColorScale.of(SMALL) == ColorScale(4, 100)
    assert ColorScale(7, 7).position(7) == 1 and ColorScale(7, 7).ticks() == [7]


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (48, 16), (24, 128), (48, 128), (60, 300)])
def test_every_expert_has_its_cell_in_the_picture(layers: int, experts: int) -> None:
    found = large(layers, experts)
    text = heat_map_svg(found)
    assert text == heat_map_svg(found) and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    root = ET.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert root.attrib["viewBox"] == f"0 0 {width:.0f} {height:.0f}"
    groups = root.findall(f"{SVG}g")
    assert len(groups) == layers
    scale = ColorScale.of(found)
    for (layer, counts), group in zip(sorted(found.experts.items()), groups, strict=True):
        left, top = map(float, group.attrib["transform"].removeprefix("translate(").removesuffix(")").split())
        cells = group.findall(f"{SVG}rect")
        assert len(cells) == experts
        for expert, (cell, tokens) in enumerate(zip(cells, counts.tokens.tolist(), strict=True)):
            title = cell.findtext(f"{SVG}title") or ""
            assert title.startswith(f"layer {layer}, expert {expert}: {tokens:,} tokens, ")
            assert cell.get("fill") == (scale.color(tokens) if tokens else None)
            assert float(cell.attrib["width"]) >= 2
            assert left + float(cell.attrib["x"]) + float(cell.attrib["width"]) <= width
            assert top + float(cell.attrib["height"]) <= height
    labels = [element.text for element in root.findall(f"{SVG}text")]
    assert "no token" in labels and f"{scale.most:,}" in labels and "layer 0" in labels
    assert "prefers-color-scheme:dark" in (root.findtext(f"{SVG}style") or "")


def test_the_picture_is_saved(tmp_path: Path) -> None:
    path = save_heat_map(tmp_path, SMALL)
    assert path == tmp_path / "coverage.svg" and path.read_text(encoding="utf-8") == heat_map_svg(SMALL)
    with pytest.raises(OutputError, match="cannot write"):
        save_heat_map(tmp_path / "nowhere", SMALL)


# -------------------------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (48, 16), (24, 128), (3, 300), (2, 1)])
@pytest.mark.parametrize("colored", [False, True])
def test_the_terminal_shows_it_in_80_columns(layers: int, experts: int, colored: bool) -> None:
    found, stream = large(layers, experts), io.StringIO()
    print_coverage(Console(file=stream, width=80, color_system="truecolor" if colored else None, force_terminal=colored), found)
    lines = stream.getvalue().splitlines()
    if colored:
        assert "48;2;" in stream.getvalue()
    else:
        assert max(len(line) for line in lines) <= 80
        assert all(ord(letter) < 128 or letter in "─" for letter in stream.getvalue())
    assert any("Coldest experts" in line for line in lines) and any("Heat map" in line for line in lines)


@given(st.lists(st.integers(0, 10**6), max_size=1000))
def test_no_cold_expert_is_lost_in_the_heat_map(tokens: list[int]) -> None:
    lines = heat_lines(tokens)
    cells = [cell for line in lines for cell in line]
    assert len(lines) <= 2 and all(len(line) <= CELLS for line in lines)
    assert min(cells, default=None) == min(tokens, default=None)
    if len(tokens) <= 2 * CELLS:
        assert cells == tokens


def test_languages_are_listed_where_kinds_have_them() -> None:
    for kinds, listed in ((("code.python", "prose.de"), True), (("notes", "mail"), False)):
        stream = io.StringIO()
        print_coverage(Console(file=stream, width=80), made_of({0: [[5, 1], [5, 1]]}, kinds))
        assert ("by language" in stream.getvalue()) == listed


def test_the_warning_names_the_coldest() -> None:
    warning = cold_warning(SMALL)
    assert warning.startswith("1 expert got less than 1/16") and "layer 1, expert 1 the fewest: 0" in warning
    assert "--samples" in warning
    assert cold_warning(made_of({0: [[5], [5]]}, ("a",))) == ""


def test_labels_of_any_kind_are_shown_safely() -> None:
    kinds = ("\x1b[31mred", "a\ud800", "x" * 100)
    stream = io.StringIO()
    print_coverage(Console(file=stream, width=80), made_of({0: [[5, 1, 1], [5, 1, 1]]}, kinds))
    assert "?[31mred" in stream.getvalue() and "a?" in stream.getvalue()
    stream.getvalue().encode("utf-8")
