"""Entry point of the ``quantkit`` script and of ``python -m quantkit_cli``."""

from __future__ import annotations

from .app import app


def main() -> None:
    """Run the command line and exit with its code."""
    app(prog_name="quantkit")


if __name__ == "__main__":
    main()
