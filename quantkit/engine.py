"""Runs independent units of work on a few threads of this machine.

Threads, because the kernels, the hashes and the reads and writes all release the interpreter lock, and because one address space
lets every worker keep its scratch memory (:class:`Workspace`) warm.  A unit is never cut short: when the user interrupts, when
``stop`` is set or when a unit fails, no further unit is begun and those in flight are finished, so that what they wrote counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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
    halt = threading.Event()
    turn = threading.Lock()
    queue = iter(enumerate(units))
    failures: dict[int, BaseException] = {}
    left = len(units)

    def run() -> None:
        nonlocal left
        workspace = Workspace()
        while True:
            with turn:
                if halt.is_set() or (stop is not None and stop.is_set()):
                    return
                index, unit = next(queue, (None, None))
                if index is None:
                    return
                left -= 1
            try:
                work(unit, workspace)  # type: ignore[arg-type]
            except BaseException as error:
                failures[index] = error
                halt.set()
                return

    threads = [threading.Thread(target=run, name=f"quantkit-unit-{number}") for number in range(min(workers, len(units)))]
    interrupted = False
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            interrupted = True
            halt.set()
    if failures:
        raise failures[min(failures)]
    if interrupted or left:
        raise Interrupted(INTERRUPTED)
