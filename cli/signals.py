"""Ctrl-C and SIGTERM: at any moment exit code 130 and one message, never a traceback.

A command has three stages.  While modules load nothing has to be cleaned up, and an exception amid the import of torch could come
out as any other one, or be swallowed: the process ends on the spot.  While a command works, both signals are a KeyboardInterrupt.
While a long call of the library works, they also set the event that it heeds.  This module imports nothing that takes time.
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
AGAIN_SECONDS = 0.1
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

    again: list[threading.Timer] = []

    def send_again() -> None:
        again.append(threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)))
        again[-1].start()

    with _handling(handle, lost=send_again):
        try:
            yield
        finally:
            for timer in again:
                timer.cancel()


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

    with _handling(handle, lost=lambda: None):  # the event was set before
        yield


@contextmanager
def holding_signals() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM wait for its end."""
    held: list[int] = []
    with _handling(lambda number, frame: held.append(number), lost=lambda: None):
        yield
    if held:
        signal.raise_signal(held[-1])


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], lost: Callable[[], None]) -> Iterator[None]:
    """lost: called when the handler's KeyboardInterrupt came amid a callback of compiled code, which cannot pass it on.

    Python then prints a traceback and goes on as if nothing had been pressed.
    """
    show = sys.unraisablehook

    def unraisable(ignored: sys.UnraisableHookArgs) -> None:
        if ignored.exc_type is KeyboardInterrupt:
            lost()
        else:
            show(ignored)

    former = {number: signal.signal(number, handler) for number in SIGNALS}
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = show
        for number, before in former.items():
            signal.signal(number, before)
