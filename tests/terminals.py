"""A terminal for tests: a command runs in a pseudo terminal, and what it writes becomes a screen.

The screen knows the controls that a live display uses, and fails on any other.  As on a real terminal a line that reaches the edge
goes on in the next one, and a character in the last column leaves the cursor there until another one comes.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TOKENS = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|([^\x1b])", re.DOTALL)
ROWS = 100
CTRL_C = b"\x03"


@dataclass
class Screen:
    """Rows of characters, and whether the cursor is shown."""

    columns: int
    rows: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    cursor: bool = True

    def feed(self, written: str) -> None:
        """Take what was written."""
        end = 0
        for token in TOKENS.finditer(written):
            assert token.start() == end, f"a control that is not known: {written[end : end + 12]!r}"
            end = token.end()
            if token[4] is None:
                self._control(token[1] + token[3], token[2])
            elif token[4] == "\r":
                self.column = 0
            elif token[4] == "\n":
                self._next_row()
            else:
                self._put(token[4])
        assert end == len(written)

    def _control(self, kind: str, number: str) -> None:
        if kind == "A":
            self.row -= int(number or 1)
        elif kind == "K" and number == "2":
            self.rows[self.row] = []
        elif kind in ("?l", "?h") and number == "25":
            self.cursor = kind == "?h"
        else:
            assert kind == "m", f"a control that is not known: {number}{kind}"

    def _next_row(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _put(self, letter: str) -> None:
        if self.column == self.columns:
            self._next_row()
            self.column = 0
        row = self.rows[self.row]
        row += " " * (self.column + 1 - len(row))
        row[self.column] = letter
        self.column += 1

    @property
    def lines(self) -> list[str]:
        """What stands there, up to the last line that is not empty."""
        lines = ["".join(row).rstrip() for row in self.rows]
        return lines[: max((number for number, line in enumerate(lines, 1) if line), default=0)]


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, the screen it left, and the lines that were there when Ctrl-C was typed."""

    exit_code: int
    screen: Screen
    before_key: list[str]


def run_in_terminal(
    command: Sequence[str],
    columns: int,
    *,
    interrupt_at: str | None = None,
    environment: Mapping[str, str] | None = None,
    screen: Screen | None = None,
    seconds: float = 120,
) -> Ended:
    """Run a command in a terminal of so many columns; Ctrl-C is typed once the screen shows ``interrupt_at``.

    screen: one that does more than show.  seconds: how long the command may take.
    """
    screen = Screen(columns) if screen is None else screen
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color", **(environment or {})},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    pending, deadline = b"", time.monotonic() + seconds
    before_key: list[str] = []
    try:
        while True:
            assert time.monotonic() < deadline, "\n".join(screen.lines)
            if not select.select([ours], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(ours, 65536)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not data:
                break
            pending += data
            whole = _whole(pending)
            screen.feed(pending[:whole].decode())
            pending = pending[whole:]
            if interrupt_at is not None and not before_key and interrupt_at in "\n".join(screen.lines):
                before_key = screen.lines
                os.write(ours, CTRL_C)
        assert not pending
        return Ended(process.wait(timeout=seconds), screen, before_key)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Make the terminal that of the session, so that Ctrl-C becomes a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _whole(data: bytes) -> int:
    """How many bytes end neither amid a character nor amid a control."""
    end = len(data)
    begun = data.rfind(b"\x1b")
    if begun >= 0 and not re.match(rb"\x1b\[\??[\d;]*[A-Za-z]", data[begun:]):
        end = begun
    while end:
        try:
            data[:end].decode()
        except UnicodeDecodeError as error:
            end = error.start
        else:
            break
    return end
