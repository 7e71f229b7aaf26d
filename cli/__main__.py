"""Entry point of the ``quantkit`` script and of ``python -m quantkit_cli``."""

from __future__ import annotations

import signal
import sys
from typing import Any

from .signals import SIGNALS, end_at_once


def main() -> None:
    """Run the command line and exit with its code."""
    for number in SIGNALS:
        signal.signal(number, end_at_once)
    try:
        code = _run(as_json="--json" in sys.argv)
    except KeyboardInterrupt:  # between two stages
        end_at_once(signal.SIGINT, None)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)  # the answer is given; what is left is to flush it
    sys.exit(code)


def _run(as_json: bool) -> int | str | None:
    """The exit code.  With ``--json`` the message of a usage error is put into an object too."""
    import typer

    from .app import app
    from .run import print_json
    from .signals import error_data

    usage_error: Any = typer.BadParameter.__mro__[1]  # the parser's class; where it is imported from depends on typer's release
    try:
        code: int | None = app(prog_name="quantkit", standalone_mode=not as_json)
    except SystemExit as ending:
        return ending.code
    except usage_error as error:
        error.show()
        print_json(error_data("UsageError", error.format_message(), error.exit_code))
        return int(error.exit_code)
    return code


if __name__ == "__main__":
    main()
