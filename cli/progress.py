"""What the display of a conversion, a calibration or a repacking shows; and the progress of a verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from . import text
from .display import View

if TYPE_CHECKING:
    from quantkit import Progress

LABELS = {"prepare": "Preparing", "calibrate": "Calibrating", "convert": "Converting", "check": "Checking"}


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


def conversion_view(progress: Progress) -> View:
    """Bytes, or units where bytes are not counted."""
    counted = progress.bytes_total > 0
    done, total = (progress.bytes_done, progress.bytes_total) if counted else (progress.units_done, progress.units_total)
    return View(
        label=LABELS[progress.phase],
        job=(progress.phase, progress.current if progress.phase == "check" else total),
        done=done,
        total=total,
        seconds=progress.seconds,
        amount=text.size_of(done, total) if counted else "",
        place=", ".join(_place(progress)),
        per_second=text.size if counted else _units,
    )


def _units(rate: float) -> str:
    return f"{rate:.1f} units"


def unit_progress(update: Callable[[Progress], None]) -> Callable[[int, int, str], None]:
    """What ``calibrate`` takes as ``progress``: units done, of how many, and the key of the last."""
    from quantkit import Progress

    began = time.monotonic()
    return lambda done, total, key: update(Progress("calibrate", done, total, 0, 0, 0, 0, key, time.monotonic() - began))


def _place(progress: Progress) -> list[str]:
    """Where the run is: unit, bytes written, layer and expert; or the artifact that is read back."""
    if progress.phase == "prepare":
        return [f"kernels for {progress.current}; the first time on a machine they are compiled"]
    if progress.phase == "check":
        return [f"{progress.current} is read back before it gets its final name"]
    resumed = f" ({progress.units_resumed} resumed)" if progress.units_resumed else ""
    units = f"unit {progress.units_done}/{progress.units_total}{resumed}"
    written = [f"{text.size(progress.bytes_written)} written"] if progress.phase == "convert" or progress.bytes_written else []
    return [units, *written, text.place(progress.current)]
