"""The engine: every unit once, units are never cut short, the first failure or interrupt stops the rest."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from quantkit.engine import run_units
from quantkit.errors import Interrupted
from quantkit.workspace import Workspace


class Gate:
    """Units that wait to be let through, so that tests know what is in flight."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self.open = threading.Event()

    def work(self, unit: int, workspace: Workspace) -> None:
        self.started.append(unit)
        assert self.open.wait(20)
        self.finished.append(unit)

    def wait_for(self, count: int) -> None:
        while len(self.started) < count:
            time.sleep(0.001)


@pytest.mark.parametrize("workers", [1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_every_unit_is_done_once(workers: int, count: int) -> None:
    done: list[int] = []
    run_units(range(count), lambda unit, workspace: done.append(unit), workers=workers)
    assert sorted(done) == list(range(count))
    assert workers > 1 or done == list(range(count))


def test_units_run_side_by_side_each_worker_with_one_workspace() -> None:
    barrier = threading.Barrier(3)
    workspaces: dict[int, set[int]] = {}
    kept: list[Workspace] = []  # so that no id is used twice

    def work(unit: int, workspace: Workspace) -> None:
        barrier.wait(20)  # passes only when three units are in flight
        kept.append(workspace)
        workspaces.setdefault(threading.get_ident(), set()).add(id(workspace))

    run_units(range(30), work, workers=3)
    assert len(workspaces) == 3
    assert all(len(owned) == 1 for owned in workspaces.values())
    assert len(set.union(*workspaces.values())) == 3


def test_no_more_units_are_in_flight_than_workers() -> None:
    gate = Gate()
    runner = threading.Thread(target=run_units, args=(range(10), gate.work), kwargs={"workers": 2})
    runner.start()
    gate.wait_for(2)
    time.sleep(0.05)
    assert gate.started == [0, 1]
    gate.open.set()
    runner.join()
    assert sorted(gate.finished) == list(range(10))


def test_a_failure_stops_the_rest_but_lets_units_in_flight_finish() -> None:
    gate = Gate()

    def work(unit: int, workspace: Workspace) -> None:
        if unit == 1:
            gate.wait_for(1)
            threading.Timer(0.05, gate.open.set).start()
            raise KeyError("unit 1")
        gate.work(unit, workspace)

    with pytest.raises(KeyError, match="unit 1"):
        run_units(range(100), work, workers=2)
    assert gate.finished == [0]


def test_of_several_failures_the_earliest_unit_is_named() -> None:
    barrier = threading.Barrier(4)

    def work(unit: int, workspace: Workspace) -> None:
        barrier.wait(20)
        time.sleep(0.01 * (4 - unit))  # the last unit fails first
        raise ValueError(f"unit {unit}")

    with pytest.raises(ValueError, match="unit 0"):
        run_units(range(4), work, workers=4)


def test_stop_finishes_what_is_in_flight_and_raises_interrupted() -> None:
    gate, stop = Gate(), threading.Event()

    def stop_then_open() -> None:
        gate.wait_for(2)
        stop.set()
        gate.open.set()

    threading.Thread(target=stop_then_open).start()
    with pytest.raises(Interrupted, match="run the same command again"):
        run_units(range(100), gate.work, workers=2, stop=stop)
    assert sorted(gate.finished) == gate.started == [0, 1]


def test_stop_after_the_last_unit_began_is_no_interruption() -> None:
    stop = threading.Event()
    done: list[int] = []

    def work(unit: int, workspace: Workspace) -> None:
        if unit == 2:
            stop.set()
        done.append(unit)

    run_units(range(3), work, workers=1, stop=stop)
    assert done == [0, 1, 2]


def test_a_failure_is_raised_rather_than_the_stop_that_came_with_it() -> None:
    stop = threading.Event()

    def work(unit: int, workspace: Workspace) -> None:
        stop.set()
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        run_units(range(3), work, workers=1, stop=stop)


def test_ctrl_c_finishes_what_is_in_flight_even_when_pressed_again() -> None:
    gate = Gate()

    def press() -> None:
        gate.wait_for(2)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        gate.open.set()

    threading.Thread(target=press).start()
    with pytest.raises(Interrupted):
        run_units(range(100), gate.work, workers=2)
    assert sorted(gate.finished) == gate.started == [0, 1]


def test_no_workers_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one"):
        run_units(range(3), lambda unit, workspace: None, workers=0)
