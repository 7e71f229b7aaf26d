"""Coverage: what every routed expert received in a calibration, as rows, summaries and a picture.

A router that sends an expert too little text leaves its quantization to chance, and nothing else shows it: the perplexity of common
text does not need the expert.  So every number is kept by layer and expert, the coldest experts are named, and the heat map shows
all of them at once.  An expert is cold by comparison with its fair share of the tokens of its layer; counts are drawn on a
logarithmic scale, in a palette whose lightness rises with the count.  The picture is plain SVG written here: the same statistics
give the same bytes, numbers are shown on pointing at a cell, and it can be read on light and on dark pages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.journal import output_errors, sync_directory, write_all
from quantkit.statistics import ExpertCounts, Statistics

HEAT_MAP_NAME = "coverage.svg"
COLD_SHARE = 16  # an expert that got less than its fair share divided by this is cold

# Lightness rises evenly from dark to bright (the colours of viridis), so order is seen without a legend and without colour vision.
_PALETTE = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)


@dataclass(frozen=True)
class CoverageRow:
    """One expert.

    share: of the tokens of its layer.  mean_score: what the router gave its tokens, 0 without tokens.  margin: mean distance of the
    chosen logit from the first one not chosen.  borrowed: tokens lent to it.  effective_kinds: how many kinds of text it sees,
    counted as the exponential of their entropy: 1 when all tokens are of one kind, 0 without tokens.
    """

    layer: int
    expert: int
    tokens: int
    share: float
    score_mass: float
    mean_score: float
    margin: float
    borrowed: int
    effective_kinds: float


@dataclass(frozen=True)
class LayerCoverage:
    """The experts of one layer.

    tokens: routed in all.  least, median, most: tokens of an expert.  cold: experts below the threshold ``cold_below``.  lent_to:
    experts that were lent tokens.  balance: entropy of the shares over that of even shares; 1 when all experts get the same, 0 when
    one gets everything.
    """

    layer: int
    experts: int
    tokens: int
    least: int
    median: float
    most: int
    cold_below: int
    cold: int
    lent_to: int
    balance: float


@dataclass(frozen=True)
class KindCoverage:
    """One kind of text, or one language.

    tokens: routed in each MoE layer, on average.  share: of all.  effective_experts: how many experts a layer uses for it, counted
    as the exponential of their entropy, on average over the layers.
    """

    name: str
    tokens: float
    share: float
    effective_experts: float


def coverage_rows(statistics: Statistics) -> list[CoverageRow]:
    """Every routed expert, by layer and number."""
    rows = []
    for layer, counts in sorted(statistics.experts.items()):
        total = max(1, int(counts.tokens.sum()))
        masses, margins, lent = counts.score_mass.tolist(), counts.margin.tolist(), counts.borrowed.tolist()
        kinds = _effective(counts.kinds).tolist()
        for expert, tokens in enumerate(counts.tokens.tolist()):
            mean = masses[expert] / tokens if tokens else 0.0
            share = tokens / total
            rows.append(
                CoverageRow(layer, expert, tokens, share, masses[expert], mean, margins[expert], lent[expert], kinds[expert])
            )
    return rows


def coldest(statistics: Statistics, count: int) -> list[CoverageRow]:
    """The experts with the smallest share of their layer's tokens, coldest first."""
    return sorted(coverage_rows(statistics), key=lambda row: (row.share, row.layer, row.expert))[:count]


def cold_threshold(counts: ExpertCounts) -> int:
    """Experts with fewer tokens are cold: below a sixteenth of the fair share of their layer's tokens, or without any."""
    return max(1, -(-int(counts.tokens.sum()) // (COLD_SHARE * max(1, len(counts.tokens)))))


def check_coverage(statistics: Statistics, minimum: int | None = None) -> list[tuple[int, int, int]]:
    """(layer, expert, tokens) of every expert with fewer than ``minimum`` tokens; None: than ``cold_threshold`` of its layer."""
    below = []
    for layer, counts in sorted(statistics.experts.items()):
        threshold = cold_threshold(counts) if minimum is None else minimum
        below += [(layer, expert, tokens) for expert, tokens in enumerate(counts.tokens.tolist()) if tokens < threshold]
    return below


def layer_coverage(statistics: Statistics) -> list[LayerCoverage]:
    """Every MoE layer."""
    layers = []
    for layer, counts in sorted(statistics.experts.items()):
        tokens, experts = sorted(counts.tokens.tolist()), len(counts.tokens)
        if not experts:
            continue
        median = (tokens[(experts - 1) // 2] + tokens[experts // 2]) / 2
        threshold = cold_threshold(counts)
        balance = math.log(max(1.0, float(_effective(counts.tokens[None])[0]))) / math.log(experts) if experts > 1 else 1.0
        cold, lent_to = sum(count < threshold for count in tokens), int((counts.borrowed > 0).sum())
        layers.append(
            LayerCoverage(layer, experts, sum(tokens), tokens[0], median, tokens[-1], threshold, cold, lent_to, min(1.0, balance))
        )
    return layers


def kind_coverage(statistics: Statistics) -> list[KindCoverage]:
    """Every kind of text, in the order of the corpus."""
    return _by_label(statistics, statistics.kinds)


def language_coverage(statistics: Statistics) -> list[KindCoverage]:
    """Every language: what stands behind the last dot of the kinds, as in "prose.de" and "code.python".  Most tokens first."""
    languages = tuple(kind.rpartition(".")[2] for kind in statistics.kinds)
    return sorted(_by_label(statistics, languages), key=lambda row: (-row.tokens, row.name))


def _by_label(statistics: Statistics, labels: Sequence[str]) -> list[KindCoverage]:
    names = list(dict.fromkeys(labels))
    layers = max(1, len(statistics.experts))
    tokens = torch.zeros(len(names), dtype=torch.float64)
    used = torch.zeros(len(names), dtype=torch.float64)
    index = torch.tensor([names.index(label) for label in labels], dtype=torch.int64)
    for counts in statistics.experts.values():
        merged = torch.zeros(len(names), len(counts.tokens), dtype=torch.int64).index_add_(0, index, counts.kinds.t().contiguous())
        tokens += merged.sum(1)
        used += _effective(merged)
    total = max(1.0, float(tokens.sum()))
    return [
        KindCoverage(name, count / layers, count / total, experts / layers)
        for name, count, experts in zip(names, tokens.tolist(), used.tolist(), strict=True)
    ]


def _effective(counts: torch.Tensor) -> torch.Tensor:
    """Of counts ``[rows, n]``: exponential of the entropy of each row, between 1 and n; 0 for a row without any."""
    totals = counts.sum(1, keepdim=True).clamp(min=1).to(torch.float64)
    shares = counts.to(torch.float64) / totals
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    return torch.where(counts.sum(1) > 0, entropy.exp(), 0.0)


# -------------------------------------------------------------------------------------------------------------- heat map


@dataclass(frozen=True)
class ColorScale:
    """Logarithmic: ``least`` tokens are darkest, ``most`` brightest.  An expert without tokens is outside of the scale."""

    least: int
    most: int

    @classmethod
    def of(cls, statistics: Statistics) -> ColorScale:
        """From the coldest expert that got tokens to the warmest one."""
        counts = [tokens for at in statistics.experts.values() for tokens in at.tokens.tolist() if tokens]
        return cls(min(counts, default=1), max(counts, default=1))

    def position(self, tokens: int) -> float:
        """From 0, the darkest, to 1."""
        if self.most <= self.least:
            return 1.0
        return min(1.0, max(0.0, math.log(max(1, tokens) / self.least) / math.log(self.most / self.least)))

    def color(self, tokens: int) -> str:
        """As ``#rrggbb``."""
        return palette_color(self.position(tokens))

    def ticks(self) -> list[int]:
        """Numbers for a legend: least, most, and powers of ten between them that stand apart from both."""
        powers = [10**exponent for exponent in range(20) if self.least < 10**exponent < self.most]
        apart = [power for power in powers if 0.12 < self.position(power) < 0.85]
        return [self.least, *apart, self.most] if self.most > self.least else [self.most]


def palette_color(position: float) -> str:
    """The palette at a position from 0 to 1, as ``#rrggbb``."""
    place = position * (len(_PALETTE) - 1)
    first = min(int(place), len(_PALETTE) - 2)
    low, high = _PALETTE[first], _PALETTE[first + 1]
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in zip(low, high, strict=True))


_STYLE = """
text{font:12px system-ui,sans-serif;fill:#1b1b1f}
.h{font-size:15px;font-weight:600}
.q{fill:#55555f}
.p,.g{fill:#ffffff}
.n{fill:#ffffff;stroke:#c62828;stroke-width:1.5}
@media (prefers-color-scheme:dark){
text{fill:#ececf1}
.q{fill:#a9a9b6}
.p{fill:#17171b}
.g{fill:#5c5c66}
.n{fill:#17171b;stroke:#ff6b6b}
}
"""
_LEFT, _TOP, _MARGIN = 64, 66, 16
_LEGEND_WIDTH, _LEGEND_STEPS = 320, 64


def heat_map_svg(statistics: Statistics) -> str:
    """Layers by experts, each cell in the colour of its tokens on a logarithmic scale; a self-contained SVG."""
    scale = ColorScale.of(statistics)
    layers = sorted(statistics.experts.items())
    experts = max((len(counts.tokens) for _, counts in layers), default=0)
    cell_width = max(5, min(34, 1040 // max(1, experts)))
    cell_height = 16 if len(layers) <= 48 else 10
    width = max(_LEFT + experts * cell_width, _LEFT + _LEGEND_WIDTH + 150) + _MARGIN
    bottom = _TOP + len(layers) * cell_height
    height = bottom + 92
    size = f'width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img" aria-describedby="description">',
        "<title>Calibration coverage by layer and expert</title>",
        f'<desc id="description">{_description(statistics)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="p" {size}/>',
        f'<text class="h" x="{_MARGIN}" y="26">Tokens that the router sent to each expert</text>',
        f'<text class="q" x="{_MARGIN}" y="44">{_description(statistics)}</text>',
    ]
    lines.append(f'<text class="q" x="{_LEFT - 8}" y="{_TOP - 6}" text-anchor="end">expert</text>')
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if step * cell_width >= 24)
    lines += [
        f'<text class="q" x="{_LEFT + expert * cell_width + cell_width // 2}" y="{_TOP - 6}" text-anchor="middle">{expert}</text>'
        for expert in range(0, experts, step)
    ]
    grid = f'width="{experts * cell_width + 1}" height="{len(layers) * cell_height + 1}"'
    lines.append(f'<rect class="g" x="{_LEFT - 1}" y="{_TOP - 1}" {grid}/>')  # between cells, so that dark ones end on dark pages
    for number, (layer, counts) in enumerate(layers):
        y = _TOP + number * cell_height
        if cell_height >= 12 or number % 2 == 0:
            lines.append(f'<text class="q" x="{_LEFT - 8}" y="{y + cell_height - 4}" text-anchor="end">layer {layer}</text>')
        lines.append(f'<g transform="translate({_LEFT} {y})">')
        lines += _cells(layer, counts, scale, cell_width, cell_height)
        lines.append("</g>")
    lines += _legend(scale, bottom + 30)
    return "\n".join([*lines, "</svg>", ""])


def save_heat_map(directory: Path, statistics: Statistics) -> Path:
    """Write the heat map into a directory and return its path.  Raises OutputError."""
    path = directory / HEAT_MAP_NAME
    with output_errors(f"write {path}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, heat_map_svg(statistics).encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(directory)
    return path


def _description(statistics: Statistics) -> str:
    layers = layer_coverage(statistics)
    if not layers:
        return "This model has no routed experts."
    experts, cold = sum(layer.experts for layer in layers), sum(layer.cold for layer in layers)
    tokens = max(layer.tokens for layer in layers)
    few = f"{cold:,} of {experts:,} experts got less than 1/{COLD_SHARE} of their fair share"
    return f"{tokens:,} tokens in each of {len(layers)} layers; {few}."


def _cells(layer: int, counts: ExpertCounts, scale: ColorScale, width: int, height: int) -> list[str]:
    total = max(1, int(counts.tokens.sum()))
    lent = counts.borrowed.tolist()
    lines = []
    for expert, tokens in enumerate(counts.tokens.tolist()):
        note = f"layer {layer}, expert {expert}: {tokens:,} tokens, {100 * tokens / total:.2f} % of the layer"
        if lent[expert]:
            note += f", {lent[expert]:,} lent"
        if tokens:
            shape = f'<rect x="{expert * width}" width="{width - 1}" height="{height - 1}" fill="{scale.color(tokens)}">'
        else:
            shape = f'<rect class="n" x="{expert * width + 1}" y="1" width="{width - 3}" height="{height - 3}">'
        lines.append(f"{shape}<title>{note}</title></rect>")
    return lines


def _legend(scale: ColorScale, top: int) -> list[str]:
    step = _LEGEND_WIDTH // _LEGEND_STEPS
    lines = [f'<text x="{_LEFT}" y="{top - 4}">tokens, logarithmic scale</text>']
    lines += [
        f'<rect x="{_LEFT + number * step}" y="{top + 4}" width="{step}" height="14" '
        f'fill="{palette_color(number / (_LEGEND_STEPS - 1))}" shape-rendering="crispEdges"/>'
        for number in range(_LEGEND_STEPS)
    ]
    for tick in scale.ticks():
        x = _LEFT + round(scale.position(tick) * _LEGEND_WIDTH)
        anchor = "start" if x == _LEFT else "end" if x == _LEFT + _LEGEND_WIDTH else "middle"
        lines.append(f'<text class="q" x="{x}" y="{top + 34}" text-anchor="{anchor}">{tick:,}</text>')
    x = _LEFT + _LEGEND_WIDTH + 28
    lines.append(f'<rect class="n" x="{x}" y="{top + 5}" width="14" height="12"/>')
    lines.append(f'<text x="{x + 22}" y="{top + 15}">no token</text>')
    return lines
