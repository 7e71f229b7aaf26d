"""Coverage of a calibration on the terminal: summaries by layer, a heat map, the coldest experts, kinds and languages of the text.

Everything fits 80 columns.  In the heat map a cell is an expert; a layer with more experts than fit goes on in a second line, and
beyond that neighbours share a cell that shows the coldest of them, because that is what one looks for.  Where there are no colours,
characters of rising weight stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from . import text
from .tables import make_table, many, print_heading, print_note, print_table

if TYPE_CHECKING:
    from quantkit.coverage import ColorScale, KindCoverage
    from quantkit.statistics import Statistics

CELLS = 64  # in a line
LINES = 2  # for a layer
COLDEST = 10
LISTED_LANGUAGES = 20
SHADES = ".:-=+*#%@"
NOTHING = "x"


def print_coverage(console: Console, statistics: Statistics) -> None:
    """Layers, heat map, coldest experts, kinds and languages."""
    if not statistics.experts:
        console.print("The model has no routed experts, so there is no coverage to show.")
        return
    _print_layers(console, statistics)
    _print_heat_map(console, statistics)
    _print_coldest(console, statistics)
    _print_kinds(console, statistics)


def warn_of_cold(statistics: Statistics) -> None:
    """Say on stderr that some experts are cold, if any are."""
    if warning := cold_warning(statistics):
        print_note(Console(stderr=True), f"Warning: {warning}", "yellow")


def cold_warning(statistics: Statistics) -> str:
    """What there is to say of cold experts; empty when there are none."""
    from quantkit.coverage import COLD_SHARE, check_coverage

    below = check_coverage(statistics)
    if not below:
        return ""
    layer, expert, tokens = min(below, key=lambda item: item[2])
    got = f"{many(len(below), 'expert')} got less than 1/{COLD_SHARE} of the fair share of tokens"
    coldest = f"layer {layer}, expert {expert} the fewest: {tokens:,}"
    return f"{got} ({coldest}). More samples (--samples), or text closer to the model's use (--calibration), reach more experts."


def _print_layers(console: Console, statistics: Statistics) -> None:
    from quantkit.coverage import layer_coverage

    print_heading(console, "Tokens of an expert, by layer")
    table = make_table(("layer",), ("tokens", "least", "median", "most", "cold", "lent to", "balance"))
    for row in layer_coverage(statistics):
        cold = Text(f"{row.cold} (< {row.cold_below:,})" if row.cold else "0", style="yellow" if row.cold else "")
        counts = (f"{row.tokens:,}", f"{row.least:,}", f"{row.median:,.0f}", f"{row.most:,}")
        table.add_row(str(row.layer), *counts, cold, str(row.lent_to), f"{row.balance:.3f}")
    print_table(console, table)
    console.print(Text("cold: below 1/16 of the fair share. balance: entropy; 1 is even.", style="dim"))


def _print_heat_map(console: Console, statistics: Statistics) -> None:
    from quantkit.coverage import ColorScale

    scale = ColorScale.of(statistics)
    colored = console.color_system is not None
    print_heading(console, "Heat map: a line for each layer, a cell for each expert")
    label = len(str(max(statistics.experts)))
    most = max(len(counts.tokens) for counts in statistics.experts.values())
    if (merged := -(-most // (CELLS * LINES))) > 1:
        console.print(Text(f"A cell shows the coldest of {merged} neighbouring experts.", style="dim"))
    for layer, counts in sorted(statistics.experts.items()):
        lines = heat_lines(counts.tokens.tolist())
        width = max(1, min(4, CELLS // max(1, *map(len, lines))))
        for number, cells in enumerate(lines):
            line = Text(f"{layer if number == 0 else '':>{label}} ", style="dim")
            for tokens in cells:
                line.append_text(_cell(tokens, width, scale, colored))
            line.no_wrap = True
            console.print(line)
    legend = Text(" " * (label + 1))
    for tick in scale.ticks():
        legend.append_text(_cell(tick, 2, scale, colored)).append(f" {tick:,}  ")
    legend.append_text(_cell(0, 2, scale, colored)).append(" none")
    console.print(legend)


def heat_lines(tokens: Sequence[int]) -> list[list[int]]:
    """The counts of a layer's experts as cells of one or two lines, of equal length as far as possible."""
    group = max(1, -(-len(tokens) // (CELLS * LINES)))
    cells = [min(tokens[first : first + group]) for first in range(0, len(tokens), group)]
    lines = -(-len(cells) // CELLS)
    length = -(-len(cells) // max(1, lines))
    return [cells[first : first + length] for first in range(0, len(cells), max(1, length))]


def _cell(tokens: int, width: int, scale: ColorScale, colored: bool) -> Text:
    if not tokens:
        return Text(NOTHING.center(width), style="bold red")
    if colored:
        return Text(" " * width, style=f"on {scale.color(tokens)}")
    return Text(SHADES[min(len(SHADES) - 1, int(scale.position(tokens) * len(SHADES)))] * width)


def _print_coldest(console: Console, statistics: Statistics) -> None:
    from quantkit.coverage import coldest

    print_heading(console, "Coldest experts")
    table = make_table((), ("layer", "expert", "tokens", "share", "mean score", "margin", "lent", "kinds seen"))
    for row in coldest(statistics, COLDEST):
        counts = (str(row.layer), str(row.expert), f"{row.tokens:,}", f"{100 * row.share:.2f} %")
        table.add_row(*counts, f"{row.mean_score:.3f}", f"{row.margin:.2f}", f"{row.borrowed:,}", f"{row.effective_kinds:.1f}")
    print_table(console, table)


def _print_kinds(console: Console, statistics: Statistics) -> None:
    from quantkit.coverage import kind_coverage, language_coverage

    groups: tuple[tuple[str, Callable[[Statistics], list[KindCoverage]]], ...] = (
        ("kind", kind_coverage),
        ("language", language_coverage),
    )
    for name, rows_of in groups:
        rows = rows_of(statistics)
        if name == "language" and {row.name for row in rows} == set(statistics.kinds):
            continue  # the kinds have no languages behind their dots
        print_heading(console, f"Tokens by {name} of text")
        table = make_table((name,), ("tokens", "share", "experts used"))
        for row in rows[:LISTED_LANGUAGES] if name == "language" else rows:
            used = f"{row.effective_experts:.1f}"
            table.add_row(_label(row.name), text.count(row.tokens), f"{100 * row.share:.1f} %", used)
        if name == "language" and len(rows) > LISTED_LANGUAGES:
            table.add_row(f"and {len(rows) - LISTED_LANGUAGES:,} more", "", "", "", style="dim")
        print_table(console, table)


def _label(name: str) -> Text:
    """A label of the corpus, which may hold anything, in what a terminal can show."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return Text(plain if len(plain) <= 32 else f"{plain[:29]}...")
