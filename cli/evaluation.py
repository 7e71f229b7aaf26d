"""The commands that measure artifacts: ``eval`` for one, ``compare`` for several and a report.

Gates are read, and the places of the output checked, before anything is measured.  What was measured is written and shown before a
crossed gate ends the command with its own exit code, so that a failed job still has its report.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import MAXIMUM_WORKERS, AsJson, expand
from .run import print_json, reporting
from .signals import error_data, stopping_on_signals

if TYPE_CHECKING:
    from quantkit.evaluation import Evaluation
    from quantkit.gates import FailedGate, Gate

_MEASURE = "Measurement"
_OUTPUT = "Output and gates"


def _expand_all(values: list[str]) -> list[str]:
    return [expand(value) or value for value in values]


Reference = Annotated[
    str,
    typer.Option("--reference", metavar="MODEL", callback=expand, help="The BF16 checkpoint that the artifacts were made from."),
]
TextFile = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="TEXT",
        callback=expand,
        help="Text or JSONL file, a directory of them, or a hub dataset. Default: the bundled held-out text.",
        rich_help_panel=_MEASURE,
    ),
]
TextRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub dataset.", rich_help_panel=_MEASURE)]
Window = Annotated[int, typer.Option(metavar="N", min=3, help="Tokens of a window.", rich_help_panel=_MEASURE)]
Windows = Annotated[int | None, typer.Option(metavar="COUNT", min=1, help="Windows. Default: all.", rich_help_panel=_MEASURE)]
Convention = Annotated[
    Literal["full", "llama.cpp"],
    typer.Option(
        metavar="full|llama.cpp",
        help="full: every token of a window counts but its first; llama.cpp: the second half, as llama-perplexity has it.",
        rich_help_panel=_MEASURE,
    ),
]
Golden = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", callback=expand, help="Questions with their answers, as JSONL; they are put too.", rich_help_panel=_MEASURE
    ),
]
MeasureDevice = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it is computed.", rich_help_panel=_MEASURE)]
MeasureWorkers = Annotated[
    int | None, typer.Option(min=1, max=MAXIMUM_WORKERS, help="Cores to compute on. Default: all.", rich_help_panel=_MEASURE)
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        callback=expand,
        help="Where unfinished work and the reference's results are kept. Default: ~/.cache/quantkit/evaluation.",
        rich_help_panel=_MEASURE,
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Tokens held in memory at once. Default: by the model's width.", rich_help_panel=_MEASURE
    ),
]
WindowSeed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Chooses windows, and draws intervals.", rich_help_panel=_MEASURE)
]
Resamples = Annotated[
    int, typer.Option(metavar="N", min=0, help="Draws for the intervals; 0: no intervals.", rich_help_panel=_MEASURE)
]
FloatActivations = Annotated[
    bool,
    typer.Option(
        "--float-activations",
        help="Do not round activations, even where the artifact's scheme has serving engines do so.",
        rich_help_panel=_MEASURE,
    ),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="GATE",
        help="Exit with code 10 when this holds of an artifact: 'kld > 0.02', 'kld.high > 0.02' for the end of the interval, "
        "'size > 70GB', 'NAME: agreement < 0.95' for one of them. Repeatable.",
        rich_help_panel=_OUTPUT,
    ),
]
Save = Annotated[
    str | None,
    typer.Option(metavar="FILE.json", callback=expand, help="Also keep everything measured as JSON.", rich_help_panel=_OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files of an earlier run.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress; of a report, print the files only.", rich_help_panel=_OUTPUT)
]


@dataclass(frozen=True)
class _Job:
    """What both commands do: measure, write, show, check gates."""

    artifacts: list[str]
    options: dict[str, Any]
    save: str | None
    fail_if: list[str]
    output: Path | None
    title: str | None
    force: bool
    quiet: bool
    as_json: bool
    skipped: list[str] | None = None

    def run(self) -> None:
        gates = self._gates()
        with reporting(self.as_json, _what_is_kept):
            from quantkit.gates import failed_gates, failure
            from quantkit.report import check_file, check_report, evaluation_content, json_text, write_report, write_text

            if self.output is not None:
                check_report(self.output, force=self.force)
            if self.save is not None:
                check_file(Path(self.save), force=self.force)
            evaluation = self._evaluate()
            content = evaluation_content(evaluation)
            written: list[Path] = []
            if self.output is not None:
                command = ["quantkit", *sys.argv[1:]]
                written += write_report(evaluation, self.output, title=self.title, command=command, force=self.force)
            if self.save is not None:
                written.append(write_text(Path(self.save), json_text(content), force=self.force))
            failed = failed_gates(evaluation, gates)
            if not self.as_json:
                self._show(evaluation, written)
                if failed:
                    raise failure(failed)
                return
            crossed: dict[str, Any] = {"failed_gates": [_gate_data(one) for one in failed]} if gates else {}
            if self.skipped is not None:
                crossed["skipped"] = self.skipped
            if failed:
                error = failure(failed)
                crossed |= error_data(type(error).__name__, str(error), error.exit_code)
            print_json({**content, **crossed})
            if failed:
                raise typer.Exit(failure(failed).exit_code)

    def _gates(self) -> list[Gate]:
        """The gates, checked as far as that needs no measurement.  A mistake in one is wrong usage."""
        if not self.fail_if:
            return []
        with reporting(self.as_json):
            from quantkit.errors import GateError
            from quantkit.gates import check_gates, parse_gate

            try:
                gates = [parse_gate(text) for text in self.fail_if]
                check_gates(gates, self.artifacts, golden=self.options["golden"] is not None)
                return gates
            except GateError as error:
                mistake = str(error)
        raise typer.BadParameter(mistake, param_hint="--fail-if")

    def _evaluate(self) -> Evaluation:
        from rich.console import Console

        from quantkit.evaluate import evaluate

        from .evaluation_progress import EvaluationDisplay

        stop = threading.Event()
        with stopping_on_signals(stop, announce=not self.as_json), EvaluationDisplay(Console(stderr=True), stop) as display:
            progress = None if self.quiet or self.as_json else display.update
            return evaluate(self.artifacts, progress=progress, stop=stop, **self.options)

    def _show(self, evaluation: Evaluation, written: Sequence[Path]) -> None:
        from rich.console import Console

        from .evaluation_tables import print_evaluation

        if self.quiet and written:
            for path in written:
                print(path)
            return
        console = Console()
        print_evaluation(console, evaluation)
        for path in written:
            console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


def _gate_data(failed: FailedGate) -> dict[str, Any]:
    value = failed.value if failed.value == failed.value else None  # NaN is no JSON
    return {"gate": failed.gate.text, "artifact": failed.artifact, "value": value, "message": failed.message}


def _what_is_kept() -> str:
    command = shlex.join(["quantkit", *sys.argv[1:]])
    return f"what was computed is kept; the same command resumes it:\n  {command}"


def evaluate_command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", callback=expand, help="Directory of an artifact, or a GGUF file.")],
    reference: Reference,
    text: TextFile = None,
    revision: TextRevision = None,
    window: Window = 512,
    windows: Windows = None,
    convention: Convention = "full",
    golden: Golden = None,
    device: MeasureDevice = "cpu",
    workers: MeasureWorkers = None,
    cache: Cache = None,
    batch_tokens: BatchTokens = None,
    seed: WindowSeed = 0,
    resamples: Resamples = 1000,
    float_activations: FloatActivations = False,
    fail_if: FailIf = None,
    save: Save = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how far an artifact is from the model it was made from.

    Its own bytes are run, layer by layer, on the same text as the reference: perplexity, KL divergence, agreement of the most
    likely token and of the routers, with intervals, by kind of text and language.
    The reference's results are kept for the next artifact. A run that was stopped is resumed by the same command.
    """
    options = _options(
        reference=reference,
        text=text,
        revision=revision,
        window=window,
        windows=windows,
        convention=convention,
        golden=golden,
        device=device,
        workers=workers,
        cache=cache,
        batch_tokens=batch_tokens,
        seed=seed,
        resamples=resamples,
        float_activations=float_activations,
    )
    _Job([artifact], options, save, fail_if or [], None, None, force, quiet, as_json).run()


def compare_command(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT...", callback=_expand_all, help="Directories of artifacts, or GGUF files.")
    ],
    reference: Reference,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the report.", rich_help_panel=_OUTPUT)
    ] = Path("report"),
    title: Annotated[str | None, typer.Option(help="Title of the report.", rich_help_panel=_OUTPUT)] = None,
    text: TextFile = None,
    revision: TextRevision = None,
    window: Window = 512,
    windows: Windows = None,
    convention: Convention = "full",
    golden: Golden = None,
    device: MeasureDevice = "cpu",
    workers: MeasureWorkers = None,
    cache: Cache = None,
    batch_tokens: BatchTokens = None,
    seed: WindowSeed = 0,
    resamples: Resamples = 1000,
    float_activations: FloatActivations = False,
    fail_if: FailIf = None,
    save: Save = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare artifacts of one model, and write a report.

    All are measured on the same text against the same reference, so differences between them are known far more sharply than the
    figures themselves. DIR gets report.html, a page that needs nothing else, report.md and report.json.
    A run that was stopped is resumed by the same command.
    """
    options = _options(
        reference=reference,
        text=text,
        revision=revision,
        window=window,
        windows=windows,
        convention=convention,
        golden=golden,
        device=device,
        workers=workers,
        cache=cache,
        batch_tokens=batch_tokens,
        seed=seed,
        resamples=resamples,
        float_activations=float_activations,
    )
    chosen, skipped = _models_among(artifacts)
    for path in skipped:
        print(f"Skipped: {path} (no config.json, GGUF or packed file in it)", file=sys.stderr)
    _Job(chosen, options, save, fail_if or [], output, title, force, quiet, as_json, skipped).run()


def _models_among(paths: list[str]) -> tuple[list[str], list[str]]:
    """Models, and directories that hold none, such as calibrations, which ``out/*`` names too; one path alone is always meant."""
    empty = [path for path in paths if _is_empty(path)]
    chosen = [path for path in paths if path not in empty]
    return (chosen, empty) if chosen else (paths, [])


def _is_empty(path: str) -> bool:
    """Whether this is a directory without files of a model.  One that cannot be listed is left to the library to complain about."""
    try:
        names = os.listdir(path) if os.path.isdir(path) else ["config.json"]
    except OSError:
        return False
    return not any(name == "config.json" or name.endswith((".gguf", ".packed")) for name in names)


def _options(*, golden: str | None, cache: str | None, float_activations: bool, **others: object) -> dict[str, Any]:
    """The arguments of ``evaluate``, by name."""
    places = {name: None if place is None else Path(place) for name, place in (("golden", golden), ("cache", cache))}
    return {**others, **places, "round_activations": not float_activations}
