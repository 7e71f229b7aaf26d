"""The progress of a conversion or calibration: two live lines on a terminal, plain lines elsewhere; and of a verification.

``convert`` calls back after each unit.  The display starts with the first call, so that a download's own progress bars, which come
before, are not overdrawn, and is refreshed by the clock, so that the time left counts down between units.  It writes to stderr.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import text
from .signals import STOPPING

if TYPE_CHECKING:
    from quantkit import Progress

RATE_WINDOW_SECONDS = 30.0
RATE_SAMPLES = 5  # before these, a rate says more of kernels being compiled than of the run
PLAIN_INTERVAL_SECONDS = 10.0
LABELS = {"prepare": "Preparing", "calibrate": "Calibrating", "convert": "Converting", "check": "Checking"}


class Meter:
    """Rate over the last seconds: samples of (seconds, bytes or units done) that come in order."""

    def __init__(self, window: float = RATE_WINDOW_SECONDS):
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, seconds: float, done: int) -> None:
        """Take a sample."""
        self._samples.append((seconds, done))
        while len(self._samples) > RATE_SAMPLES and self._samples[1][0] <= seconds - self._window:
            self._samples.popleft()

    def rate(self) -> float | None:
        """What is done in a second, None before there are enough samples."""
        if len(self._samples) < RATE_SAMPLES:
            return None
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None


@contextmanager
def hashing_progress(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for files being hashed, fed with (bytes done, bytes in all); None where stderr is no terminal or it is not wanted."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("Hashing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("hash", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ProgressDisplay:
    """A context manager whose ``update`` is what ``convert`` takes as ``progress``."""

    def __init__(self, console: Console, stop: threading.Event):
        self._console, self._stop = console, stop
        self._live: Live | None = None
        self._last: Progress | None = None
        self._received = 0.0
        self._printed = -PLAIN_INTERVAL_SECONDS
        self._meter = Meter()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Take a snapshot; called from worker threads, one call at a time."""
        if self._last is None or (progress.phase, _extent(progress)[1]) != (self._last.phase, _extent(self._last)[1]):
            self._meter, self._printed = Meter(), -PLAIN_INTERVAL_SECONDS
        self._meter.add(progress.seconds, _extent(progress)[0])
        self._last, self._received = progress, time.monotonic()
        if not self._console.is_terminal:
            self._print_line(progress)
        elif self._live is None:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    # -------------------------------------------------------------------------------------------------------- plain lines

    def _print_line(self, progress: Progress) -> None:
        done, total = _extent(progress)
        finished = done >= total
        if not finished and progress.seconds - self._printed < PLAIN_INTERVAL_SECONDS:
            return
        self._printed = progress.seconds
        share = text.percent(done, total)
        file: IO[str] = self._console.file
        file.write(f"{LABELS[progress.phase]}: {', '.join((share, *self._figures(progress), *_position(progress)))}\n")
        file.flush()

    # --------------------------------------------------------------------------------------------------------- live lines

    def __rich__(self) -> Group:
        """The two lines as they stand now."""
        progress = self._last
        assert progress is not None  # the display starts with the first snapshot
        done, total = _extent(progress)
        bar = ProgressBar(total=max(1, total), completed=done)
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        figures = [text.percent(done, total), *self._figures(progress)]
        first.add_row(Text(LABELS[progress.phase], style="bold"), bar, Text("  ".join(figures)))
        if self._stop.is_set():
            second = Text(STOPPING, style="yellow")
        else:
            second = Text(", ".join(_position(progress)), style="dim")
        second.no_wrap, second.overflow = True, "ellipsis"
        return Group(first, second)

    def _figures(self, progress: Progress) -> list[str]:
        """Bytes if they are counted, rate and time left."""
        done, total = _extent(progress)
        figures = [text.size_of(done, total)] if progress.bytes_total else []
        rate = self._meter.rate()
        if rate is not None and done < total:
            left = (total - done) / rate - (time.monotonic() - self._received)
            figures += [
                f"{text.size(rate) if progress.bytes_total else f'{rate:.1f} units'}/s",
                f"{text.duration(max(0.0, left))} left",
            ]
        return figures


def _extent(progress: Progress) -> tuple[int, int]:
    """What is done, of how much: in bytes, or in units where bytes are not counted."""
    if progress.bytes_total:
        return progress.bytes_done, progress.bytes_total
    return progress.units_done, progress.units_total


def unit_progress(update: Callable[[Progress], None]) -> Callable[[int, int, str], None]:
    """What ``calibrate`` takes as ``progress``: units done, of how many, and the key of the last."""
    from quantkit import Progress

    began = time.monotonic()
    return lambda done, total, key: update(Progress("calibrate", done, total, 0, 0, 0, 0, key, time.monotonic() - began))


def _position(progress: Progress) -> list[str]:
    """Where the run is: unit, bytes written, layer and expert; or the artifact that is read back."""
    if progress.phase == "prepare":
        return [f"kernels for {progress.current}; the first time on a machine they are compiled"]
    if progress.phase == "check":
        return [f"{progress.current} is read back before it gets its final name"]
    resumed = f" ({progress.units_resumed} resumed)" if progress.units_resumed else ""
    units = f"unit {progress.units_done}/{progress.units_total}{resumed}"
    written = [f"{text.size(progress.bytes_written)} written"] if progress.phase == "convert" or progress.bytes_written else []
    return [units, *written, text.place(progress.current)]
