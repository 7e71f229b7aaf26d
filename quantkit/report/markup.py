"""HTML and SVG as text that is escaped unless it was made here, and the scales that charts share.

``element`` escapes every child and attribute that is not ``Markup``, so a name in an evaluation can never become part of the page's
structure.  Numbers are cut to two decimals and nothing depends on the time or on hashing: the same evaluation gives the same bytes.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

COLORS = 8  # series after these repeat the colours, with another marker and dash
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_UNIT = re.compile(r"(?<=\d) (?=(?:%|bytes|[kMGT]B|bits?|nats|s|min|h)(?!\w))")
_VOID = ("meta", "link", "br", "col")


class Markup(str):
    """Text that stands in the page as it is."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text as content or attribute value; characters that no page may hold become the replacement character."""
    return text if isinstance(text, Markup) else Markup(html.escape(_CONTROL.sub("\ufffd", text)))


def typeset(text: str) -> str:
    """Running text whose numbers stay on one line with their units."""
    return text if isinstance(text, Markup) else _UNIT.sub("\N{NO-BREAK SPACE}", text)


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Several pieces as one."""
    return Markup(between.join(map(escape, parts)))


def element(tag: str, *children: str, **attributes: str | float | bool | None) -> Markup:
    """``<tag attribute="...">children</tag>``.

    Attributes: ``class_`` is ``class``, other underscores are hyphens; True is an attribute without a value, None and False are
    left out.
    """
    written = []
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{escape(value if isinstance(value, str) else plain(value))}"')
    start = f"<{tag}{''.join(written)}>"
    return Markup(start if tag in _VOID else f"{start}{join(children)}</{tag}>")


def plain(value: float) -> str:
    """A coordinate: at most two decimals, no exponent."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# ---------------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class Scale:
    """From values to coordinates, linear or logarithmic; a value outside of the domain lies at its end."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, value = (self._position(one) for one in (self.low, self.high, max(value, self.low)))
        share = (min(value, high) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values within the domain."""
        if not self.logarithmic:
            return _linear_ticks(self.low, self.high, count)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        choices = ((1, 2, 5), (1, 3), (1,)) if last - first <= count else ((1,),)
        for factors in choices:
            ticks = [factor * 10.0**exponent for exponent in range(first, last + 1) for factor in factors]
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(inside) <= max(count, 3):
                break
        if len(inside) > count:
            inside = inside[:: -(-len(inside) // count)]
        return inside if len(inside) >= 2 else _linear_ticks(self.low, self.high, count)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def logarithmic_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """Over all positive values with room at both ends; six decades below the largest at most, smaller ones lie at the end."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    most, least = max(positive, default=1.0), min(positive, default=0.1)
    least = max(least, most * 1e-6)
    room = max((most / least) ** 0.08, 1.15)
    return Scale(least / room, most * room, start, end, logarithmic=True)


def linear_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """Over all values with room at both ends."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = 0.09 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(max(0.0, low - room) if low >= 0 else low - room, high + room, start, end)


def tick_label(value: float) -> str:
    """``0.002``, ``0.5``, ``20``, ``1e-06``."""
    return f"{value:.0e}" if 0 < abs(value) < 0.99e-4 else f"{value:,.6g}"


# --------------------------------------------------------------------------------------------------------------- markers


def series_class(number: int) -> str:
    """The class that gives the artifact of this number its colour."""
    return f"s{number % COLORS}"


def marker(number: int, x: float, y: float, radius: float = 5.0) -> Markup:
    """The sign of an artifact: shapes differ between neighbours, so that nobody needs the colours."""
    r = plain
    flat, wide = 0.88 * radius, 1.2 * radius
    shape = (number + number // COLORS) % 5
    if shape == 0:
        return element("circle", cx=x, cy=y, r=radius)
    corners = {
        1: [(-flat, -flat), (flat, -flat), (flat, flat), (-flat, flat)],
        2: [(0, -wide), (wide, 0), (0, wide), (-wide, 0)],
        3: [(0, -wide), (wide, 0.85 * radius), (-wide, 0.85 * radius)],
        4: [(0, wide), (wide, -0.85 * radius), (-wide, -0.85 * radius)],
    }[shape]
    return element("path", d="M" + "L".join(f"{r(x + right)} {r(y + down)}" for right, down in corners) + "Z")


def dash(number: int) -> str | None:
    """The line style of an artifact: solid for the first ones."""
    return (None, "5 3", "1.5 3")[number // COLORS % 3]


def key(number: int) -> Markup:
    """The sign of an artifact beside its name, in legends and tables."""
    mark = element("g", marker(number, 7, 7, 4.6), class_=f"mark {series_class(number)}")
    return element("svg", mark, class_="key", width=14, height=14, viewBox="0 0 14 14", aria_hidden="true")


def line_key(number: int) -> Markup:
    """The line of an artifact beside its name, where a chart has lines and no signs."""
    line = element("path", class_=f"line {series_class(number)}", d="M1 7H35", stroke_dasharray=dash(number))
    return element("svg", line, class_="key", width=36, height=14, viewBox="0 0 36 14", aria_hidden="true")
