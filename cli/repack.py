"""``quantkit repack``: a finished artifact in another format, with the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import text
from .options import AsJson, QuietDirectory, Restart, ShardSize, Workers, shard_bytes
from .run import print_json, reporting, what_calibration_left


def repack_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory of the artifact.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory of the new one.")],
    to: Annotated[
        Literal["packed", "compressed-tensors"],
        typer.Option("--to", metavar="packed|compressed-tensors", help="The format to write."),
    ] = "packed",
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished artifact of that name.")] = False,
    restart: Restart = False,
    quiet: QuietDirectory = False,
    as_json: AsJson = False,
) -> None:
    """Write an artifact in another format, without loss.

    Between safetensors (compressed-tensors) and quantkit's packed format codes and scales stay the same, and going back gives the
    same bytes. The artifact is verified first. What the other format cannot hold is listed, and nothing is written.
    A run that was killed or stopped is resumed by the same command.
    """
    with reporting(as_json, lambda: what_calibration_left(output, sys.argv[1:])):
        from quantkit.repack import repack

        from .display import watching
        from .progress import conversion_view

        with watching(conversion_view, quiet=quiet, as_json=as_json) as (progress, stop):
            result = repack(
                artifact,
                output,
                to,
                max_shard_bytes=shard_bytes(max_shard_size),
                workers=workers,
                force=force,
                restart=restart,
                progress=progress,
                stop=stop,
            )
        if as_json:
            from dataclasses import asdict

            print_json(asdict(result) | {"directory": str(result.directory)})
        elif quiet:
            print(result.directory)
        else:
            resumed = f", {result.units_resumed} units resumed from an earlier run" if result.units_resumed else ""
            print(f"{result.directory}: {result.format}, {text.size(result.bytes)}, {result.tensors} weights{resumed}")
