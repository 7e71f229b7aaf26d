"""The progress of an evaluation: two live lines on a terminal, plain lines elsewhere; both on stderr.

An evaluation goes from model to model and back for every batch of text, so rate and time left are those of the model that is being
run: its token-layers, or the bytes that are being checked.
"""

from __future__ import annotations

import threading
import time
from typing import IO, TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import text
from .progress import PLAIN_INTERVAL_SECONDS, Meter
from .signals import STOPPING

if TYPE_CHECKING:
    from quantkit.evaluate import EvaluationProgress

LABELS = {"check": "Checking", "reference": "Reference", "artifact": "Artifact", "scores": "Scoring", "golden": "Golden set"}


class EvaluationDisplay:
    """A context manager whose ``update`` is what ``evaluate`` takes as ``progress``."""

    def __init__(self, console: Console, stop: threading.Event):
        self._console, self._stop = console, stop
        self._live: Live | None = None
        self._last: EvaluationProgress | None = None
        self._received = 0.0
        self._printed = -PLAIN_INTERVAL_SECONDS
        self._meter = Meter()

    def __enter__(self) -> EvaluationDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: EvaluationProgress) -> None:
        """Take a snapshot."""
        if self._last is None or (progress.phase, progress.model) != (self._last.phase, self._last.model):
            self._meter, self._printed = Meter(), -PLAIN_INTERVAL_SECONDS
        elif progress.tokens < self._last.tokens:
            self._meter = Meter()  # the next batch of text
        self._meter.add(progress.seconds, progress.tokens)
        self._last, self._received = progress, time.monotonic()
        if not self._console.is_terminal:
            self._print_line(progress)
        elif self._live is None:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    def _print_line(self, progress: EvaluationProgress) -> None:
        if progress.seconds - self._printed < PLAIN_INTERVAL_SECONDS:
            return
        self._printed = progress.seconds
        file: IO[str] = self._console.file
        share = text.percent(progress.tokens, progress.tokens_total)
        file.write(f"{LABELS[progress.phase]}: {', '.join((_position(progress), share, *self._figures(progress)))}\n")
        file.flush()

    def __rich__(self) -> Group:
        """The two lines as they stand now."""
        progress = self._last
        assert progress is not None  # the display starts with the first snapshot
        bar = ProgressBar(total=max(1, progress.tokens_total), completed=progress.tokens)
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        figures = [text.percent(progress.tokens, progress.tokens_total), *self._figures(progress)]
        first.add_row(Text(LABELS[progress.phase], style="bold"), bar, Text("  ".join(figures)))
        second = Text(STOPPING, style="yellow") if self._stop.is_set() else Text(_position(progress), style="dim")
        second.no_wrap, second.overflow = True, "ellipsis"
        return Group(first, second)

    def _figures(self, progress: EvaluationProgress) -> list[str]:
        """Rate and time left, once they are known."""
        rate = self._meter.rate()
        if rate is None or progress.tokens >= progress.tokens_total:
            return []
        left = (progress.tokens_total - progress.tokens) / rate - (time.monotonic() - self._received)
        unit = {"check": "", "scores": " positions", "golden": " questions"}.get(progress.phase, " token-layers")
        amount = text.size(rate) if progress.phase == "check" else f"{text.count(rate)}{unit}"
        return [f"{amount}/s", f"{text.duration(max(0.0, left))} left"]


def _position(progress: EvaluationProgress) -> str:
    """The model, and the layer where there are layers to go through."""
    from quantkit.report.words import one_line

    model = one_line(progress.model)
    if progress.layers:
        return f"{model}, layer {min(progress.layer + 1, progress.layers)} of {progress.layers}"
    return model
