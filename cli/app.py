"""The commands."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True)


@app.command()
def version() -> None:
    """Print the version."""
    from quantkit.version import __version__

    print(__version__)
