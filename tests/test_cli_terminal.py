"""Commands in a real pseudo terminal: what the live lines show, what Ctrl-C does to them, and what is left when they end."""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from quantkit_cli.display import STOPPING, Meter
from quantkit_cli.signals import holding_signals, raising_on_signals, stopping_on_signals
from tests.terminals import Ended, Screen, run_in_terminal
from tests.tiny_models import write_tiny_model

WIDTHS = (40, 80, 200)

# A call of the library that is amid its work until it is stopped, and then takes a moment to end.
WORK = """
import sys, time
from quantkit_cli.display import View, watching

def view_of(done):
    return View("Converting", "job", done, 10, float(done), f"{done}.0/10.0 GB", PLACE, lambda rate: f"{rate:.1f} GB")

print("before", file=sys.stderr)
try:
    with watching(view_of, quiet=False, as_json=False) as (progress, stop):
        for done in range(1, 7):
            progress(done)
        try:
            stop.wait(60)
        except KeyboardInterrupt:
            time.sleep(0.6)
            raise
except KeyboardInterrupt:
    print("after", file=sys.stderr)
    sys.exit(130)
"""
PLACE = "unit 60/100, 6.0 GB written, layer 12, expert 127, gate_up_proj"


def work(columns: int, at: str = "60 %", screen: Screen | None = None, **environment: str) -> Ended:
    """The work in a terminal, stopped by Ctrl-C when that is shown."""
    command = [sys.executable, "-c", WORK.replace("PLACE", repr(PLACE))]
    ended = run_in_terminal(command, columns, interrupt_at=at, environment=environment, screen=screen)
    assert ended.exit_code == 130
    return ended


# ----------------------------------------------------------------------------------------------------------- live display


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_live_lines_are_two_and_leave_nothing_behind(columns: int) -> None:
    ended = work(columns)
    drawn = ended.before_key
    assert drawn[0] == "before" and len(drawn) == 3, drawn
    assert drawn[1].startswith("Converting \N{BOX DRAWINGS HEAVY HORIZONTAL}")
    assert "60 %" in drawn[1] and drawn[1].endswith("s left"), "what is needed most stays on narrow terminals"
    assert all((words in drawn[1]) == (columns > 40) for words in ("6.0/10.0 GB", "1.0 GB/s"))
    assert drawn[2] == (PLACE if columns > 70 else PLACE[: columns - 3] + "…"), "two columns are left for ^C"
    assert ended.screen.lines == ["before", "after"]
    assert ended.screen.cursor


def test_ctrl_c_is_answered_in_the_live_lines() -> None:
    shown: list[list[str]] = []

    class Noting(Screen):
        def feed(self, written: str) -> None:
            super().feed(written)
            shown.append(self.lines)

    ended = work(80, screen=Noting(80))
    [stopping] = {tuple(lines[:1] + lines[2:]) for lines in shown if STOPPING in lines}
    assert stopping == ("before", STOPPING)
    assert not any(line.startswith("Converting") for line in ended.screen.lines)


def test_without_colours_the_bar_still_tells_how_far() -> None:
    ended = work(80, NO_COLOR="1")
    bar = ended.before_key[1].removeprefix("Converting ").split("60 %")[0]
    assert 0.5 < len(bar.rstrip()) / (len(bar) - 1) < 0.7
    assert ended.screen.lines == ["before", "after"]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    left = work(200, at="10 %", TERM="dumb").screen.lines
    assert left[1].startswith("Converting: 10 %, 1.0/10.0 GB, unit")
    assert STOPPING in left and left[-1] == "after"


# -------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("terminal") / "model"
    write_tiny_model(directory, "scout", seed=5)
    return directory


def test_a_command_that_ends_leaves_its_results_only(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantkit_cli", "convert", str(source), "--to", "w8a8-rtn", "-o", str(tmp_path / "out")]
    ended = run_in_terminal(command, 80)
    assert ended.exit_code == 0, ended.screen.lines
    assert ended.screen.lines[:2] == ["", "w8a8-rtn"] and ended.screen.cursor
    text = "\n".join(ended.screen.lines)
    assert "routed expert" in text and "1 artifact from" in text
    assert "Converting" not in text and "Checking" not in text


def test_json_is_all_of_stdout_also_where_stderr_is_a_terminal(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantkit_cli", "convert", str(source), "--to", "w8a8-rtn", "-o", str(tmp_path / "out")]
    command += ["--json", "--quiet"]
    ended = run_in_terminal(["sh", "-c", f"{shlex.join(command)} > {shlex.quote(str(tmp_path / 'answer'))}"], 80)
    assert ended.exit_code == 0 and ended.screen.lines == []
    [artifact] = json.loads((tmp_path / "answer").read_text())["artifacts"]
    assert artifact["name"] == "w8a8-rtn"


def test_ctrl_c_ends_a_conversion_with_one_message(tmp_path: Path) -> None:
    code = f"""
import sys, quantkit
from quantkit_cli.__main__ import main

def convert(*arguments, progress, stop, **options):
    for done in range(1, 4):
        progress(quantkit.Progress("convert", done, 4, 0, done * 100, 400, done * 50, "model.layers.1.self_attn.qkv", float(done)))
    stop.wait(60)
    raise quantkit.Interrupted("stopped")

quantkit.convert = convert
sys.argv = ["quantkit", "convert", "model", "--to", "w4a16-rtn", "-o", {str(tmp_path)!r}]
main()
"""
    ended = run_in_terminal([sys.executable, "-c", code], 80, interrupt_at="75 %")
    assert ended.exit_code == 130
    assert ended.before_key[1] == "unit 3/4, 150 bytes written, layer 1, qkv"
    joined = "".join(ended.screen.lines)
    assert joined.startswith("Interrupted: nothing unfinished is left in") and "Converting" not in joined
    assert f"  quantkit convert model --to w4a16-rtn -o {tmp_path}" in joined
    assert ended.screen.cursor


# --------------------------------------------------------------------------------------------------------------- signals


def interrupt_amid_a_callback() -> None:
    """Ctrl-C while compiled code calls back; what is raised there gets lost."""
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()


def test_an_interruption_amid_a_callback_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    def wait() -> None:
        with raising_on_signals():
            interrupt_amid_a_callback()
            time.sleep(60)
            raise AssertionError("nothing came")

    with pytest.raises(KeyboardInterrupt):
        wait()
    stop = threading.Event()
    with stopping_on_signals(stop, None):
        interrupt_amid_a_callback()
    assert stop.is_set()
    assert "Traceback" not in capfd.readouterr().err


def test_held_signals_come_at_the_end() -> None:
    finished = []

    def finish() -> None:
        with raising_on_signals(), holding_signals():
            signal.raise_signal(signal.SIGINT)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        finish()
    assert finished


# ------------------------------------------------------------------------------------------------------------- time left


def test_the_time_left_of_work_in_layers_does_not_jump() -> None:
    """Layers of 300 seconds, of which 200 pass before the first of their 50 units: far more than a window of 30 seconds.

    Of these seconds alone the estimates would be from a third of the truth to thirteen times as much.
    """
    meter, shares = Meter(window=30), []
    for layer in range(19):
        for unit in range(1, 51):
            seconds, done = 300 * layer + 200 + 2 * unit, 50 * layer + unit
            meter.add(seconds, done)
            rate = meter.rate()
            if layer >= 4:
                assert rate is not None
                shares.append((1000 - done) / rate / (6000 - seconds))
    assert min(shares) > 0.8 and max(shares) < 1.6
