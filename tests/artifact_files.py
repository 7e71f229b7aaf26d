"""Files of artifacts as tests compare and change them, and runs that end before their time."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantkit.convert import convert
from quantkit.errors import Interrupted
from quantkit.ledger import LedgerEntry, read_ledger
from quantkit.recipe import Recipe


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def entries(directory: Path) -> dict[str, LedgerEntry]:
    """Of the ledger, by name."""
    return {entry.name: entry for entry in read_ledger((directory / "ledger.json").read_bytes())}


def sign_again(directory: Path) -> None:
    """Make the manifest agree with changed files, so that the checks behind it are what finds the change."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def stop_after(count: int, source: Path, targets: str | Recipe | Sequence[str | Recipe], output: Path, **options: Any) -> None:
    """Convert, and stop when ``count`` units are done."""
    stop = threading.Event()
    with pytest.raises(Interrupted, match="run the same command again"):
        convert(
            source,
            targets,
            output,
            progress=lambda event: stop.set() if event.phase == "convert" and event.units_done >= count else None,
            stop=stop,
            **options,
        )


def run_killed(script: str, *arguments: object) -> None:
    """Run a script that calls ``crash_points.kill_before``, and see it killed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
