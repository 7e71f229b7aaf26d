"""The commands that measure artifacts: ``eval`` for one, ``compare`` for several and a report.

Gates are read, and the places of the output checked, before anything is measured.  What was measured is written and shown before a
crossed gate ends the command with its own exit code, so that a failed job still has its report.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .evaluation_options import OUTPUT, Ending, Measurement
from .options import expand, spread
from .run import print_json, reporting
from .signals import error_data

if TYPE_CHECKING:
    from quantkit.evaluation import Evaluation
    from quantkit.gates import FailedGate, Gate


@dataclass(frozen=True)
class _Report:
    """The report of a comparison.  skipped: paths that hold no model."""

    directory: Path
    title: str | None
    skipped: list[str]


def _expand_all(values: list[str]) -> list[str]:
    return [expand(value) or value for value in values]


@spread
def evaluate_command(
    *,
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", callback=expand, help="Directory of an artifact, or a GGUF file.")],
    measurement: Measurement,
    ending: Ending,
) -> None:
    """Measure how far an artifact is from the model it was made from.

    Its own bytes are run, layer by layer, on the same text as the reference: perplexity, KL divergence, agreement of the most
    likely token and of the routers, with intervals, by kind of text and language.
    The reference's results are kept for the next artifact. A run that was stopped is resumed by the same command.
    """
    _check_paths([artifact], measurement, ending)
    _measure([artifact], measurement, ending, None)


@spread
def compare_command(
    *,
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT...", callback=_expand_all, help="Directories of artifacts, or GGUF files.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the report.", rich_help_panel=OUTPUT)
    ] = Path("report"),
    title: Annotated[str | None, typer.Option(help="Title of the report.", rich_help_panel=OUTPUT)] = None,
    measurement: Measurement,
    ending: Ending,
) -> None:
    """Compare artifacts of one model, and write a report.

    All are measured on the same text against the same reference, so differences between them are known far more sharply than the
    figures themselves. DIR gets report.html, a page that needs nothing else, report.md and report.json.
    A run that was stopped is resumed by the same command.
    """
    _check_paths(artifacts, measurement, ending)
    with reporting(ending.as_json):
        chosen, skipped = _models_among(artifacts)
    for path in skipped:
        print(f"Skipped: {path} (a calibration or a report, no model)", file=sys.stderr)
    _measure(chosen, measurement, ending, _Report(output, title, skipped))


def _models_among(paths: list[str]) -> tuple[list[str], list[str]]:
    """Models, and what ``out/*`` names too: calibrations and reports.  Anything else that holds no model is an error, or a failed
    conversion would pass all gates; so are paths of nothing else."""
    others = [path for path in paths if _is_by_product(Path(path))]
    return ([path for path in paths if path not in others], others) if len(others) < len(paths) else (paths, [])


def _is_by_product(path: Path) -> bool:
    from quantkit.report import is_report
    from quantkit.statistics import is_statistics

    return is_statistics(path) or is_report(path)


def _measure(artifacts: list[str], measurement: Measurement, ending: Ending, report: _Report | None) -> None:
    """What both commands do once paths are checked: measure, write, show, check gates."""
    gates = _gates(artifacts, measurement, ending)
    with reporting(ending.as_json, _what_is_kept):
        from quantkit.evaluate import evaluate
        from quantkit.gates import failed_gates, failure
        from quantkit.report import check_file, check_report, evaluation_content, json_text, write_report, write_text
        from quantkit.report.words import shortened

        from .display import watching
        from .evaluation_progress import STOPPING, evaluation_view

        if report is not None:
            check_report(report.directory, force=ending.force)
        if ending.save is not None:
            check_file(Path(ending.save), force=ending.force)
        with watching(evaluation_view, quiet=ending.quiet, as_json=ending.as_json, stopping=STOPPING) as (progress, stop):
            evaluation = evaluate(artifacts, progress=progress, stop=stop, **measurement.arguments())
        if note := shortened(evaluation):
            print(f"Note: {note}", file=sys.stderr)
        content = evaluation_content(evaluation)
        written: list[Path] = []
        if report is not None:
            command = ["quantkit", *sys.argv[1:]]
            written += write_report(evaluation, report.directory, title=report.title, command=command, force=ending.force)
        if ending.save is not None:
            written.append(write_text(Path(ending.save), json_text(content), force=ending.force))
        failed = failed_gates(evaluation, gates)
        error = failure(failed) if failed else None
        if not ending.as_json:
            _show(evaluation, written, ending.quiet)
            if error is not None:
                raise error
            return
        if gates:
            content["failed_gates"] = [_gate_data(one) for one in failed]
        if report is not None:
            content["skipped"] = report.skipped
        if error is not None:
            content |= error_data(type(error).__name__, str(error), error.exit_code)
        print_json(content)
        if error is not None:
            raise typer.Exit(error.exit_code)


def _check_paths(artifacts: list[str], measurement: Measurement, ending: Ending) -> None:
    """An empty path, or an artifact that is given twice, is wrong usage."""
    with reporting(ending.as_json):
        from quantkit.errors import RecipeError
        from quantkit.evaluation_checks import artifact_paths, checked_path

        try:
            artifact_paths(artifacts)
            for name in ("reference", "text", "golden", "cache"):
                if getattr(measurement, name) is not None:
                    checked_path(f"--{name}", getattr(measurement, name))
            return
        except RecipeError as error:
            mistake = str(error)
    raise typer.BadParameter(mistake)


def _gates(artifacts: list[str], measurement: Measurement, ending: Ending) -> list[Gate]:
    """The gates, checked as far as that needs no measurement.  A mistake in one is wrong usage."""
    if not ending.fail_if:
        return []
    with reporting(ending.as_json):
        from quantkit.errors import GateError
        from quantkit.gates import check_gates, parse_gate

        try:
            gates = [parse_gate(text) for text in ending.fail_if]
            check_gates(gates, artifacts, golden=measurement.golden is not None)
            return gates
        except GateError as error:
            mistake = str(error)
    raise typer.BadParameter(mistake, param_hint="--fail-if")


def _gate_data(failed: FailedGate) -> dict[str, Any]:
    value = failed.value if failed.value == failed.value else None  # NaN is no JSON
    return {"gate": failed.gate.text, "artifact": failed.artifact, "value": value, "message": failed.message}


def _show(evaluation: Evaluation, written: Sequence[Path], quiet: bool) -> None:
    from rich.console import Console

    from .evaluation_tables import print_evaluation

    if quiet and written:
        for path in written:
            print(path)
        return
    console = Console()
    print_evaluation(console, evaluation)
    for path in written:
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


def _what_is_kept() -> str:
    command = shlex.join(["quantkit", *sys.argv[1:]])
    return f"what was saved is kept, but for the last minute or so; the same command resumes it:\n  {command}"
