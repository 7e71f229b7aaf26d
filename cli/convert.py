"""``quantkit convert``: a checkpoint to one or several artifacts, or with ``--dry-run`` to the plan of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    CALIBRATION_TOKENS,
    DEFAULT_CONTEXT,
    AsJson,
    CalibrationChoice,
    ConversionWishes,
    Restart,
    Source,
    Targets,
    shard_bytes,
    spread,
)
from .plan import show_plan
from .run import print_json, reporting, silence_downloads, what_is_left

if TYPE_CHECKING:
    from quantkit import ConvertResult, Recipe


@spread
def convert_command(
    *,
    source: Source,
    to: Targets,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Each artifact is written to OUT/PRESET.")],
    wishes: ConversionWishes,
    calibration: CalibrationChoice,
    sequential: Annotated[
        bool,
        typer.Option("--sequential/--no-sequential", help="Later layers see quantized ones.", rich_help_panel="Calibration"),
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Use these statistics of quantkit calibrate, or an importance file (imatrix) of llama.cpp.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source, print the plan and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace finished artifacts of the same name.")] = False,
    restart: Restart = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the artifacts' directories only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to one or several quantized artifacts.

    The source is read once for all targets. Memory stays within a few experts, however large the model is.
    A run that was killed or stopped is resumed by the same command.
    An artifact gets its final name only when it is complete, read back and checked.
    """
    if statistics is not None and (calibration.chooses_text or sequential):
        raise typer.BadParameter(
            "saved statistics take the place of a calibration: leave out --calibration, --samples, --sequence-length, --seed, "
            "--packing and --sequential",
            param_hint="--statistics",
        )
    with reporting(as_json, lambda: what_is_left(to, wishes.method, output, sys.argv[1:])):
        targets = wishes.targets(to)
        if statistics is not None or calibration.corpus is not None:
            _check_use("--calibration" if statistics is None else "--statistics", targets)
        options = calibration.options(sequential=sequential, statistics=statistics)
        max_shard_bytes = shard_bytes(wishes.max_shard_size)
        if dry_run:
            from quantkit import plan

            planned = plan(source, targets, revision=wishes.revision, max_shard_bytes=max_shard_bytes, calibration=options)
            tokens = (calibration.samples or 0) * calibration.sequence_length or CALIBRATION_TOKENS
            show_plan(planned, source, output, wishes.workers, DEFAULT_CONTEXT, as_json, tokens)
            return
        if quiet or as_json:
            silence_downloads(source)
        from quantkit import convert

        from .display import watching
        from .progress import conversion_view

        with watching(conversion_view, quiet=quiet, as_json=as_json) as (progress, stop):
            result = convert(
                source,
                targets,
                output,
                revision=wishes.revision,
                workers=wishes.workers,
                max_shard_bytes=max_shard_bytes,
                calibration=options,
                force=force,
                restart=restart,
                progress=progress,
                stop=stop,
            )
        _show(result, quiet, as_json)


def _check_use(option: str, targets: list[Recipe]) -> None:
    """Say which targets the option changes nothing of.  Raises RecipeError when it changes none."""
    from quantkit import RecipeError

    idle = [recipe.name for recipe in targets if not recipe.needs_calibration]
    names = ", ".join(idle)
    if len(idle) == len(targets):
        raise RecipeError(
            f"{names}: nothing here is calibrated, so {option} would change nothing. Leave it out; or, for GGUF file types, add "
            "--method importance"
        )
    if idle:
        typer.echo(f"Note: these targets are not calibrated: {names}", err=True)


def _show(result: ConvertResult, quiet: bool, as_json: bool) -> None:
    if result.statistics is not None:
        from .coverage import warn_of_cold

        warn_of_cold(result.statistics)
    if as_json:
        from .data import convert_data

        print_json(convert_data(result))
    elif quiet:
        for artifact in result.artifacts:
            print(artifact.directory)
    else:
        from rich.console import Console

        from .tables import print_conversion

        print_conversion(Console(), result)
