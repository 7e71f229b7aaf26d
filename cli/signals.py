"""Ctrl-C and SIGTERM: at any moment exit code 130 and one message, never a traceback.

A command has three stages.  While modules load nothing has to be cleaned up, and an exception amid the import of torch could come
out as any other one, or be swallowed: the process ends on the spot.  While a command works, both signals are a KeyboardInterrupt.
While ``convert`` works, they also set the event that its workers heed.  This module imports nothing that takes time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED_EXIT_CODE = 130
STDOUT, STDERR = 1, 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOO_EARLY = "the command was stopped before it began any work"


def error_data(kind: str, message: str, exit_code: int) -> dict[str, Any]:
    """The object that stands for an error in ``--json`` mode."""
    return {"error": {"type": kind, "message": message, "exit_code": exit_code}}


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Handler for the time before a command works."""
    if "--json" in sys.argv:
        answer = json.dumps(error_data("Interrupted", TOO_EARLY, INTERRUPTED_EXIT_CODE), indent=2)
        os.write(STDOUT, f"{answer}\n".encode())
    else:
        os.write(STDERR, f"Interrupted: {TOO_EARLY}\n".encode())
    os._exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(handle):
        yield


@contextmanager
def stopping_on_signals(stop: threading.Event, announce: Callable[[], None] | None) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM set ``stop`` and, the first time, call ``announce`` and raise KeyboardInterrupt.

    The engine turns the interrupt into an orderly end: units in flight are finished and journalled.  Pressing again changes nothing
    of that, and must not raise amid it.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            return
        stop.set()
        if announce is not None:
            announce()
        raise KeyboardInterrupt

    with _handling(handle):
        yield


@contextmanager
def holding_signals() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM wait for its end."""
    held: list[int] = []
    with _handling(lambda number, frame: held.append(number)):
        yield
    if held:
        signal.raise_signal(held[-1])


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)
