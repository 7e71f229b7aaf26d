"""Entry point of the ``quantkit`` script and of ``python -m quantkit_cli``."""

from __future__ import annotations

import sys

from .app import app
from .run import error_data, print_json

USAGE_EXIT_CODE = 2


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="quantkit")
    except SystemExit as ending:
        if ending.code == USAGE_EXIT_CODE and "--json" in sys.argv:
            print_json(error_data("UsageError", "wrong usage; the message on stderr says what is wrong", USAGE_EXIT_CODE))
        raise


if __name__ == "__main__":
    main()
