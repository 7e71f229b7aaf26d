"""Heat maps of a report: where routing changed, and which experts calibration reached.

Both have layers from left to right and the palette of ``coverage``, in which dark means trouble: tokens that go elsewhere, experts
that got little.  Lightness carries the order, so it survives grey printing and any kind of colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from quantkit.coverage import ColorScale, palette_color
from quantkit.evaluation import ArtifactEvaluation, Evaluation
from quantkit.report.charts import frame, layer_ticks, ledger_layers, scale_bar, swatch
from quantkit.report.markup import Markup, element, escape, join, plain
from quantkit.report.words import listing, percent

_PALETTE = tuple(palette_color(step / 16) for step in range(17))
_AGREEMENT_ROW = 22
MOST_NAMED = 3  # artifacts in a caption


def router_map(evaluation: Evaluation) -> Markup | None:
    """Artifacts by layers, in the colour of the share of tokens that keep their expert; None without experts anywhere."""
    rows = [(own, own.router_agreement) for own in evaluation.artifacts if _known(own)]
    if not rows:
        return None
    lowest = min(share for own, _ in rows for share in _known(own))
    low = max(0.0, min(0.99, math.floor(lowest * 50) / 50))
    layers = ledger_layers(evaluation)
    cells = []
    for number, (own, shares) in enumerate(rows):
        for layer, share in enumerate(shares):
            if share is not None and math.isfinite(share):
                color = palette_color(min(1.0, max(0.0, (share - low) / (1 - low))))
                cells.append(_cell(layer, number, layers, color, f"{own.name}, layer {layer}: {percent(share)}"))
    area = _area(cells, layers, len(rows), "Router agreement by artifact and layer")
    names = [((number + 0.5) / len(rows), own.name) for number, (own, _) in enumerate(rows)]
    chart = frame(area, _AGREEMENT_ROW * len(rows), layer_ticks(layers), names, "layer")
    marks = [(share, percent(low + share * (1 - low), 0 if round(100 * (1 - low)) % 2 == 0 else 1)) for share in (0, 0.5, 1)]
    bar = scale_bar(_PALETTE, marks, "share of tokens that go to the same expert as in the reference")
    return join([element("div", chart, class_="labelled"), bar])


def _known(own: ArtifactEvaluation) -> list[float]:
    return [share for share in own.router_agreement if share is not None and math.isfinite(share)]


def router_rows(evaluation: Evaluation) -> list[tuple[str, float, float, int]]:
    """(artifact, mean, lowest, layer of the lowest) of every artifact whose routing is known."""
    rows = []
    for own in evaluation.artifacts:
        shares = [(share, layer) for layer, share in enumerate(own.router_agreement) if share is not None and math.isfinite(share)]
        if shares:
            rows.append((own.name, sum(share for share, _ in shares) / len(shares), *min(shares)))
    return rows


def lowest_routers(evaluation: Evaluation) -> str:
    """Where routing changed most, of each artifact as far as a caption has room, else of the worst one."""
    rows = sorted(router_rows(evaluation), key=lambda row: row[2])
    named = [f"{percent(low)} in layer {layer} of {name}" for name, _, low, layer in rows]
    return f"Lowest: {listing(named if len(named) <= MOST_NAMED else named[:1])}."


def coverage_groups(evaluation: Evaluation) -> list[tuple[list[str], dict[int, tuple[int, ...]]]]:
    """(names, coverage): artifacts of one calibration together, those without coverage left out."""
    groups: list[tuple[list[str], dict[int, tuple[int, ...]]]] = []
    for own in evaluation.artifacts:
        if any(own.coverage.values()):
            names = next((names for names, coverage in groups if coverage == own.coverage), None)
            if names is None:
                groups.append(([own.name], own.coverage))
            else:
                names.append(own.name)
    return groups


def coverage_map(names: list[str], coverage: dict[int, tuple[int, ...]]) -> Markup:
    """Experts by layers, in the colour of the tokens that each received."""
    received = [tokens for counts in coverage.values() for tokens in counts if tokens]
    scale = ColorScale(min(received, default=1), max(received, default=1))
    experts = max(map(len, coverage.values()))
    layers = sorted(layer for layer, counts in coverage.items() if counts)
    cells = []
    for column, layer in enumerate(layers):
        for expert, tokens in enumerate(coverage[layer]):
            color = scale.color(tokens) if tokens else None
            cells.append(_cell(column, expert, len(layers), color, f"layer {layer}, expert {expert}: {tokens:,}"))
    area = _area(cells, len(layers), experts, f"Tokens by layer and expert in the calibration of {listing(names)}")
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 1 << 30) if experts / step <= 17)
    row = 13 if experts <= 32 else 6 if experts <= 64 else 4
    up = [((expert + 0.5) / experts, str(expert)) for expert in range(0, experts, step)]
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 1 << 30) if len(layers) / step <= 13)
    across = [((column + 0.5) / len(layers), str(layers[column])) for column in range(0, len(layers), every)]
    ticks = scale.ticks()
    marks = [(scale.position(tick) if len(ticks) > 1 else 1.0, f"{tick:,}") for tick in ticks]
    note = join(["tokens of the calibration text, logarithmic; ", swatch("no token")])
    return join([frame(area, row * experts, across, up, "layer"), scale_bar(_PALETTE, marks, note)])


def _cell(column: int, row: int, columns: int, color: str | None, note: str) -> Markup:
    """One cell with its note; without a colour it is hollow.  Written without ``element``: there may be many thousands."""
    gap = 0.06 * min(1.0, columns / 48)
    place = f'x="{plain(column + gap / 2)}" y="{row + 0.03:.2f}" width="{plain(1 - gap)}" height=".94"'
    look = f'fill="{color}"' if color else 'class="none"'
    return Markup(f"<rect {place} {look}><title>{escape(note)}</title></rect>")


def _area(cells: Iterable[Markup], columns: int, rows: int, title: str) -> Markup:
    return element(
        "svg",
        element("title", title),
        *cells,
        role="img",
        viewBox=f"0 0 {columns} {rows}",
        preserveAspectRatio="none",
        class_="stretch heat",
    )
