"""Runs independent units of work on a few threads of this machine.

Threads, because the kernels, the hashes and the reads and writes all release the interpreter lock, and because one address space
lets every worker keep its scratch memory (:class:`Workspace`) warm.  A unit is never cut short: when the user interrupts, when
``stop`` is set or when a unit fails, no further unit is begun and those in flight are finished, so that what they wrote counts.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from quantkit.errors import Interrupted
from quantkit.workspace import Workspace

T = TypeVar("T")

INTERRUPTED = "stopped before all units were done; finished units are kept: run the same command again to continue"


def run_units(
    units: Sequence[T],
    work: Callable[[T, Workspace], None],
    *,
    workers: int,
    stop: threading.Event | None = None,
) -> None:
    """Call ``work(unit, workspace)`` for every unit, in order of start, ``workers`` at a time.

    Raises what the first failed unit raised (the earliest in ``units`` when several fail), or Interrupted after a keyboard
    interrupt or when ``stop`` was set while units were left.  Returns or raises only once no unit is running any more.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one is needed")
    turn = threading.Lock()
    queue = iter(enumerate(units))
    failures: dict[int, BaseException] = {}
    left, running, halted = len(units), min(workers, len(units)), False
    idle = threading.Event()

    def next_unit() -> tuple[int, T] | None:
        nonlocal left
        with turn:
            if halted or failures or not left or (stop is not None and stop.is_set()):
                return None
            left -= 1
            return next(queue)

    def run() -> None:
        nonlocal running
        workspace = Workspace()
        while (item := next_unit()) is not None:
            try:
                work(item[1], workspace)
            except BaseException as error:  # raised by the caller's thread below
                failures[item[0]] = error
        with turn:
            running -= 1
            if not running:
                idle.set()

    def halt() -> None:
        nonlocal halted
        halted = True

    with _noting_interrupts(halt):
        for number in range(running):
            threading.Thread(target=run, name=f"quantkit-unit-{number}").start()
        while running:
            try:
                idle.wait()  # not Thread.join: interrupted, it takes a running thread for finished (Python before 3.13)
                break
            except KeyboardInterrupt:  # of another signal than Ctrl-C
                halt()
    if failures:
        raise failures[min(failures)]
    if halted or left:
        raise Interrupted(INTERRUPTED)


@contextmanager
def _noting_interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Within the block Ctrl-C calls ``note`` and raises nothing.

    An exception could come at any instruction, and a second one amid the handling of the first would leave units running whose
    files are about to be closed.  A handler that the program has installed is called too.
    """
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        note()
        if former is not signal.default_int_handler:
            with contextlib.suppress(KeyboardInterrupt):
                former(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
