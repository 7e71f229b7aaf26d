"""What every command shares: errors become one message and an exit code, and results may be JSON.

Results go to stdout and nothing else does; progress, warnings and errors go to stderr.  With ``--json`` stdout holds exactly one
object, a result or ``{"error": {"type", "message", "exit_code"}}``.
"""

from __future__ import annotations

import json
import os
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from .signals import INTERRUPTED_EXIT_CODE, error_data, raising_on_signals

INTERNAL_EXIT_CODE = 1


def print_json(data: Mapping[str, Any]) -> None:
    """The one JSON object of a ``--json`` run."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


@contextmanager
def reporting(as_json: bool, interrupted: Callable[[], str] = lambda: "the command was stopped") -> Iterator[None]:
    """Turn an error or an interruption inside the block into a message and the exit of the process.

    interrupted: says what an interruption left.  An error that is no documented one is a mistake of this program: its traceback
    goes to stderr, and ``--json`` gets an object for it too.
    """
    try:
        from quantkit.errors import Interrupted, QuantkitError  # and with it the whole library: a second or more

        try:
            with raising_on_signals():
                yield
        except (KeyboardInterrupt, Interrupted):
            _fail("Interrupted", interrupted(), INTERRUPTED_EXIT_CODE, as_json)
        except QuantkitError as error:
            _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if not as_json:
            raise
        traceback.print_exc()
        _fail("InternalError", f"{type(error).__name__}: {error}", INTERNAL_EXIT_CODE, as_json)


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


def silence_downloads(source: str) -> None:
    """No progress bars of the hub client, which only a hub source brings in."""
    if not os.path.exists(source):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def what_is_left(targets: Sequence[str], method: str | None, output: Path, arguments: Sequence[str]) -> str:
    """What an interrupted conversion left in ``output``, and the command that goes on from there.

    That is the command line ``arguments`` without ``--restart``, which would begin anew.
    """
    from quantkit.errors import RecipeError
    from quantkit.targets import resolve_targets

    try:
        partial = [output / f"{recipe.name}.partial" for recipe in resolve_targets(targets, method=method)]
    except RecipeError:  # interrupted before the recipes were read
        partial = []
    return _left_in(partial, output, arguments)


def what_calibration_left(output: Path, arguments: Sequence[str]) -> str:
    """The same for a calibration into the directory ``output``."""
    final = Path(os.path.realpath(output))
    return _left_in([final.parent / f"{final.name}.partial"], final.parent, arguments)


def _left_in(partial: Sequence[Path], output: Path, arguments: Sequence[str]) -> str:
    command = shlex.join(["quantkit", *(argument for argument in arguments if argument != "--restart")])
    if any(path.is_dir() for path in partial):
        return f"finished work is kept; the same command resumes it:\n  {command}"
    return f"nothing unfinished is left in {output}; the same command starts again:\n  {command}"
