"""What every command shares: errors become one message and an exit code, results may be JSON, signals end a run cleanly.

Results go to stdout and nothing else does; progress, warnings and errors go to stderr.  With ``--json`` stdout holds exactly one
object, a result or ``{"error": {"type", "message", "exit_code"}}``.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

INTERRUPTED_EXIT_CODE = 130
STDERR = 2
STOPPING = "Stopping: units in flight are being finished ..."


def print_json(data: Mapping[str, Any]) -> None:
    """The one JSON object of a ``--json`` run."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def error_data(kind: str, message: str, exit_code: int) -> dict[str, Any]:
    """The object that stands for an error in ``--json`` mode."""
    return {"error": {"type": kind, "message": message, "exit_code": exit_code}}


@contextmanager
def reporting(as_json: bool, resume: Sequence[str] | None = None) -> Iterator[None]:
    """Turn a documented error or an interruption inside the block into a message and the exit of the process.

    resume: the arguments of the command that would resume the work, shown after an interruption.
    """
    from quantkit.errors import Interrupted, QuantkitError

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        message = "the command was stopped"
        if resume is not None:
            message = f"finished work is kept; the same command resumes it:\n  {shlex.join(resume)}"
        _fail("Interrupted", message, INTERRUPTED_EXIT_CODE, as_json)
    except QuantkitError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json)


def _fail(kind: str, message: str, exit_code: int, as_json: bool) -> None:
    if as_json:
        print_json(error_data(kind, message, exit_code))
    else:
        from rich.console import Console

        label = "Interrupted" if kind == "Interrupted" else "Error"
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]{label}:[/] ", end="")
        console.print(message, markup=False, soft_wrap=True)
    raise typer.Exit(exit_code)


def resume_command(arguments: Sequence[str]) -> list[str]:
    """The command line that resumes the run of ``arguments``: the same one, without ``--restart``, which would begin anew."""
    return ["quantkit", *(argument for argument in arguments if argument != "--restart")]


@contextmanager
def stopping_on_signals(stop: threading.Event, announce: bool) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM set ``stop`` and raise KeyboardInterrupt in the main thread.

    The engine turns the interrupt into an orderly end: units in flight are finished and journalled.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        first = not stop.is_set()
        stop.set()
        if announce and first:
            os.write(STDERR, f"\n{STOPPING}\n".encode())  # no lock: the main thread may be amid a print
        raise KeyboardInterrupt

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
