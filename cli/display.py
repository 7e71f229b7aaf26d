"""Progress of a long call: two live lines on a terminal, plain lines elsewhere; both on stderr.

A display is told of snapshots.  A function of the command turns each into a :class:`View`, which says what there is to show; how it
is shown is here.  The live lines begin with the first snapshot, so that a download's own progress bars, which come before, are not
overdrawn, and are refreshed by the clock, so that the time left counts down between snapshots.  The second, at whose end the
cursor stands, keeps away from the edge of the terminal: ``^C`` would begin a new line there, and the next refresh miss one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import text
from .signals import STDERR, holding_signals, stopping_on_signals

RATE_WINDOW_SECONDS = 30.0
RATE_SAMPLES, RATE_SECONDS = 5, 1.0  # before these, a rate says more of kernels being compiled than of the run
PLAIN_INTERVAL_SECONDS = 10.0
SHORTEST_BAR = 5  # columns
ECHO = 2  # columns that "^C" takes
STOPPING = "Stopping: units in flight are being finished ..."

Snapshot = TypeVar("Snapshot")


@dataclass(frozen=True)
class View:
    """What there is to show of a snapshot.

    label: what is being done.  job: what it is done to; rate and plain lines begin anew with another one.  seconds: since the
    beginning.  amount: what is done and of how much, where a percentage does not say it all.  place: words for where the run is.
    per_second: a rate in words.  steady: plain lines come by the clock alone, as is fit for many short jobs; else one also comes at
    the beginning and at the end of each.
    """

    label: str
    job: object
    done: int
    total: int
    seconds: float
    amount: str
    place: str
    per_second: Callable[[float], str]
    steady: bool = False


class Meter:
    """Rate over the last seconds, or over the last half of the job where that is longer.

    Samples are (seconds, bytes or units done), in order.  Half of the job: work that comes in layers stands still while the inputs
    of the next one are computed, and a rate over less than some layers would jump.
    """

    def __init__(self, window: float = RATE_WINDOW_SECONDS):
        self._window = window
        self._began: float | None = None
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, seconds: float, done: int) -> None:
        """Take a sample."""
        if self._began is None:
            self._began = seconds
        self._samples.append((seconds, done))
        window = max(self._window, (seconds - self._began) / 2)
        while len(self._samples) > RATE_SAMPLES and self._samples[1][0] <= seconds - window:
            self._samples.popleft()

    def rate(self) -> float | None:
        """What is done in a second, None before there are enough samples."""
        if len(self._samples) < RATE_SAMPLES:
            return None
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end - begin >= RATE_SECONDS and last > first else None

    def interval(self) -> float:
        """Seconds from one sample to the next, on average."""
        return (self._samples[-1][0] - self._samples[0][0]) / max(1, len(self._samples) - 1)


class Display(Generic[Snapshot]):
    """A context manager whose ``update`` is what the library takes as ``progress``."""

    def __init__(
        self, console: Console, stop: threading.Event, view_of: Callable[[Snapshot], View], stopping: str = STOPPING
    ) -> None:
        self._console, self._stop, self._view_of, self._stopping = console, stop, view_of, stopping
        self._live: Live | None = None
        self._view: View | None = None
        self._received = 0.0
        self._printed = -PLAIN_INTERVAL_SECONDS
        self._meter = Meter()

    def __enter__(self) -> Display[Snapshot]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            with holding_signals():  # half ended, it would leave the terminal without a cursor
                self._live.stop()

    def update(self, snapshot: Snapshot) -> None:
        """Take a snapshot; it may come from any thread, one at a time."""
        view, last = self._view_of(snapshot), self._view
        if last is None or view.job != last.job:
            self._meter = Meter()
            self._printed = self._printed if view.steady else -PLAIN_INTERVAL_SECONDS
        elif view.done < last.done:
            self._meter = Meter()  # the same again, for the next part of the text
        self._meter.add(view.seconds, view.done)
        self._view, self._received = view, time.monotonic()
        if not self._console.is_interactive:
            self._print_line(view)
        elif self._live is None:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    def announce(self) -> None:
        """Say that the run is being stopped.  The live lines say so by themselves, and another one would shift them.

        Called by a signal handler: no lock is taken, the main thread may be amid a print.
        """
        if self._live is None:
            os.write(STDERR, f"\n{self._stopping}\n".encode())

    def _print_line(self, view: View) -> None:
        if (view.steady or view.done < view.total) and view.seconds - self._printed < PLAIN_INTERVAL_SECONDS:
            return
        self._printed = view.seconds
        words = (text.percent(view.done, view.total), *self._figures(view), view.place)
        self._console.file.write(f"{view.label}: {', '.join(filter(None, words))}\n")
        self._console.file.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The two lines as they stand now."""
        view = self._view
        assert view is not None  # the lines begin with the first snapshot
        share, (amount, rate, left) = text.percent(view.done, view.total), self._figures(view)
        room = options.max_width - len(view.label) - SHORTEST_BAR - 2
        for figures in ((share, amount, rate, left), (share, amount, left), (share, left), (share,)):
            shown = "  ".join(filter(None, figures))
            if len(shown) <= room:
                break
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(1, view.total), completed=view.done)
        line.add_row(Text(view.label, style="bold"), bar, Text(shown))
        yield line
        below = Text(self._stopping, style="yellow") if self._stop.is_set() else Text(view.place, style="dim")
        below.truncate(max(1, options.max_width - ECHO), overflow="ellipsis")
        yield below

    def _figures(self, view: View) -> Sequence[str]:
        """How much, how fast, and the time left; empty where they are not known.

        The time left stands still when the next snapshot is late: there is then as much to do as before.
        """
        rate = self._meter.rate()
        if rate is None or view.done >= view.total:
            return view.amount, "", ""
        waited = min(time.monotonic() - self._received, self._meter.interval())
        left = max(0.0, (view.total - view.done) / rate - waited)
        return view.amount, f"{view.per_second(rate)}/s", f"{text.duration(left)} left"


@contextmanager
def watching(
    view_of: Callable[[Snapshot], View], *, quiet: bool, as_json: bool, stopping: str = STOPPING
) -> Iterator[tuple[Callable[[Snapshot], None] | None, threading.Event]]:
    """Around a long call: what it takes as ``progress`` and as ``stop``, which Ctrl-C and SIGTERM set.  stopping: said then."""
    stop = threading.Event()
    display = Display(Console(stderr=True), stop, view_of, stopping)
    with display, stopping_on_signals(stop, None if as_json else display.announce):
        yield None if quiet or as_json else display.update, stop
