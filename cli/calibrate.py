"""``quantkit calibrate``: what every expert receives of a text, kept for conversions and shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MAXIMUM_WORKERS, AsJson, CalibrationChoice, QuietDirectory, Restart, Revision, Source, spread
from .run import print_json, reporting, silence_downloads, what_calibration_left

if TYPE_CHECKING:
    from quantkit import CalibrateResult


@spread
def calibrate_command(
    *,
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the statistics.")],
    revision: Revision = None,
    workers: Annotated[int | None, typer.Option(min=1, max=MAXIMUM_WORKERS, help="Cores to compute on. Default: all.")] = None,
    calibration: CalibrationChoice,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an importance file for llama.cpp.", rich_help_panel="GGUF")
    ] = None,
    imatrix_legacy: Annotated[
        bool, typer.Option("--imatrix-legacy", help="Write it in llama.cpp's older format (.dat).", rich_help_panel="GGUF")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace finished statistics, and the importance file.")] = False,
    restart: Restart = False,
    quiet: QuietDirectory = False,
    as_json: AsJson = False,
) -> None:
    """Run text through the model and keep what every expert receives.

    Shows how many tokens each expert of each layer got, which experts got too few, and which kinds of text reach them.
    DIR holds the statistics, for convert --statistics, and the heat map coverage.svg.
    With --imatrix, statistics of the same text that are finished are not measured again.
    A run that was killed or stopped is resumed by the same command.
    """
    if imatrix_legacy and imatrix is None:
        raise typer.BadParameter("says how --imatrix FILE is written: name the file", param_hint="--imatrix-legacy")
    with reporting(as_json, lambda: what_calibration_left(output, sys.argv[1:])):
        if quiet or as_json:
            silence_downloads(source)
        from quantkit import calibrate

        from .display import watching
        from .progress import conversion_view, unit_progress

        with watching(conversion_view, quiet=quiet, as_json=as_json) as (progress, stop):
            result = calibrate(
                source,
                output,
                calibration=calibration.options(),
                revision=revision,
                workers=workers,
                force=force,
                restart=restart,
                imatrix=imatrix,
                legacy_imatrix=imatrix_legacy,
                progress=None if progress is None else unit_progress(progress),
                stop=stop,
            )
        _show(result, quiet, as_json)


def _show(result: CalibrateResult, quiet: bool, as_json: bool) -> None:
    from .coverage import warn_of_cold

    if as_json:
        from .data import statistics_data

        written = {} if result.imatrix is None else {"imatrix": str(result.imatrix)}
        places = {"directory": str(result.directory), **written}
        print_json({**places, "seconds": result.seconds, **statistics_data(result.statistics)})
        return
    if quiet:
        print(result.directory)
    else:
        from rich.console import Console

        from .tables import print_statistics

        print_statistics(Console(), result.directory, result.statistics)
        if result.imatrix is not None:
            Console().print(f"\nImportance for llama.cpp: {result.imatrix}", markup=False, highlight=False, soft_wrap=True)
    warn_of_cold(result.statistics)
