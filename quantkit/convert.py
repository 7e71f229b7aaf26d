"""The pipeline: BF16 shards in, verified artifacts out, one pass over the source for all of them.

    checkpoint  ->  plan  ->  writers (preallocate or resume)  ->  units in parallel  ->  check, manifest, rename

A unit is read once into a reused buffer, quantized for each artifact that still lacks it, encoded, written at its planned offsets
and committed to that artifact's journal with its ledger lines.  Nothing is held longer than one unit per worker, and the bytes do
not depend on how many workers there are or in which order units finish.  Each artifact keeps its own journal, so a run may be
resumed with more targets than it was started with.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from quantkit import ledger
from quantkit.calibrate import discard_unfinished
from quantkit.calibrated import Calibrated
from quantkit.calibration import CalibrationOptions
from quantkit.checkpoint import Checkpoint, load_config
from quantkit.engine import run_units
from quantkit.errors import OutputError, RecipeError
from quantkit.estimate import default_workers
from quantkit.evidence import Evidence
from quantkit.formats import FORMATS
from quantkit.formats.base import ClientNote
from quantkit.llama4 import Unit
from quantkit.methods import METHODS
from quantkit.plan import ArtifactPlan, Plan, RoleSummary, make_plan, manifest_text, summarize_roles
from quantkit.recipe import WORKING_SUFFIXES, Recipe, resolve_recipe
from quantkit.scheme import BLOCK_SIZE, KEEP
from quantkit.statistics import Statistics
from quantkit.team import Team
from quantkit.unit_work import Run, copy_unit, quantize_unit, source_bytes
from quantkit.version import __version__
from quantkit.workspace import Workspace
from quantkit.writer import ArtifactWriter, finish_clean_up, publish


@dataclass(frozen=True)
class Progress:
    """A snapshot of a running conversion.

    phase: ``prepare`` (kernels are compiled, on first use of a scheme on a machine), ``convert``, ``calibrate`` or
    ``check``.  Bytes count source bytes of finished units, or bytes of the artifact read back.  current: scheme, unit or artifact
    at work.
    """

    phase: str
    units_done: int
    units_total: int
    units_resumed: int
    bytes_done: int
    bytes_total: int
    bytes_written: int
    current: str
    seconds: float


@dataclass(frozen=True)
class ArtifactResult:
    """A published artifact.

    relative_errors: role -> (mean, largest) relative L2 error over its quantized matrices.  roles: its sizes.  notes: which
    clients load it.
    """

    name: str
    directory: Path
    bytes: int
    tensors: int
    units_resumed: int
    relative_errors: dict[str, tuple[float, float]]
    roles: tuple[RoleSummary, ...]
    notes: tuple[ClientNote, ...]


@dataclass(frozen=True)
class ConvertResult:
    """What ``convert`` made.  statistics: of its calibration, None without one."""

    artifacts: tuple[ArtifactResult, ...]
    source_bytes: int
    seconds: float
    statistics: Statistics | None = None


def convert(
    source: str | Path,
    to: Sequence[str | Path | Recipe] | str | Path | Recipe,
    output: str | Path,
    *,
    revision: str | None = None,
    workers: int | None = None,
    max_shard_bytes: int | None = None,
    calibration: CalibrationOptions | None = None,
    force: bool = False,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> ConvertResult:
    """Convert a Llama 4 checkpoint to one or several quantized artifacts, each in ``output/<name>``.

    source: local directory or hub repository id (then ``revision`` applies).
    to: preset names, recipe files or recipes, one or several.
    workers: units worked on at once, and threads of a calibration; default by cores and memory.
    max_shard_bytes: largest tensor file; None: 5 GB for safetensors, GGUF files whole.
    calibration: on what, for recipes that need it; default: the bundled corpus.
    force: replace finished artifacts.
    restart: discard partial ones, and calibrations in ``output`` that were stopped, instead of resuming them.
    progress: called from worker threads after each unit, one call at a time.
    stop: set it to end the run cleanly; the same call later resumes.

    Raises the errors documented in ``quantkit.errors``; whatever is raised, nothing incomplete stands under a final name and
    finished work can be resumed.
    """
    started = time.monotonic()
    recipes = _resolve(to)
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise RecipeError(f"workers is {workers!r}; expected an integer of at least 1")
    with Checkpoint.open(source, revision) as checkpoint:
        plan, calibrated = _plan_calibrated(checkpoint, recipes, max_shard_bytes, calibration or CalibrationOptions(), Path(output))
        runs: list[Run] = []
        try:
            _open_writers(checkpoint, plan, runs, Path(output), max_shard_bytes, calibrated, force, restart)
            if restart:
                discard_unfinished(Path(output))
            count = workers or default_workers(plan)
            report = _Reporter(checkpoint, plan, runs, progress)
            _prepare(runs, report)
            _convert_units(checkpoint, plan, runs, calibrated, count, report, stop)
            calibrated.run(plan, runs, workers=workers, restart=restart, report=report, stop=stop)
            results = [_seal(run, plan, count, report, stop) for run in runs]
            publish([run.writer for run in runs])
        finally:
            for run in reversed(runs):  # the first one made the directory around them, and may remove it when nothing is left in it
                run.writer.close()
        source_bytes_read = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return ConvertResult(tuple(results), source_bytes_read, time.monotonic() - started, calibrated.statistics)


def plan(
    source: str | Path,
    to: Sequence[str | Path | Recipe] | str | Path | Recipe,
    *,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
    calibration: CalibrationOptions | None = None,
) -> Plan:
    """Plan the same run without doing it.

    With weights in a local directory every file size is exact and the source is checked as ``convert`` would; from a hub id, a
    ``config.json`` or a directory that holds only that, no weights are fetched and tensor files, config and index are exact.
    calibration: as for ``convert``; without it no corpus is read, and what calibrated manifests say of it is not counted.
    """
    recipes = _resolve(to)
    path = Path(source).expanduser()
    if os.path.isdir(path) and any(path.glob("*.safetensors")):
        with Checkpoint.open(source, revision) as checkpoint:
            if calibration is None:
                return plan_checkpoint(checkpoint, recipes, max_shard_bytes)
            return _plan_calibrated(checkpoint, recipes, max_shard_bytes, calibration, Path())[0]
    text, config, _ = load_config(source, revision)
    name = path.resolve().parent.name if path.suffix == ".json" else path.name
    return make_plan(text, config, recipes, max_shard_bytes=max_shard_bytes, model_name=name)


def _plan_calibrated(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], max_shard_bytes: int | None, options: CalibrationOptions, output: Path
) -> tuple[Plan, Calibrated]:
    """The plan and its calibration.  A wrong recipe is refused before a corpus is read; without one there is nothing to add."""
    made = plan_checkpoint(checkpoint, recipes, max_shard_bytes)
    calibrated = Calibrated.open(checkpoint, recipes, options, output)
    description = calibrated.description()
    return (made if description is None else plan_checkpoint(checkpoint, recipes, max_shard_bytes, description)), calibrated


def plan_checkpoint(
    checkpoint: Checkpoint,
    recipes: Sequence[Recipe],
    max_shard_bytes: int | None = None,
    calibration: dict[str, Any] | None = None,
) -> Plan:
    """The exact plan for an opened checkpoint; see :func:`quantkit.plan.make_plan`."""
    return make_plan(
        checkpoint.config_text,
        checkpoint.config,
        recipes,
        max_shard_bytes=max_shard_bytes,
        dtypes={name: tensor.dtype for name, tensor in checkpoint.tensors.items()},
        provenance=checkpoint.provenance(),
        carried=checkpoint.carried_files(),
        calibration=calibration,
        model_name=checkpoint.model_name,
        source=checkpoint.directory,
    )


def _resolve(to: Sequence[str | Path | Recipe] | str | Path | Recipe) -> list[Recipe]:
    targets = [to] if isinstance(to, (str, Path, Recipe)) else to
    return [resolve_recipe(target) for target in targets]


def _open_writers(
    checkpoint: Checkpoint,
    plan: Plan,
    runs: list[Run],
    output: Path,
    max_shard_bytes: int | None,
    calibrated: Calibrated,
    force: bool,
    restart: bool,
) -> None:
    """Open a writer for each artifact and append it to ``runs``.  Raises OutputError."""
    source = checkpoint.directory.resolve()
    fingerprints = [
        _fingerprint(checkpoint, artifact, max_shard_bytes) | calibrated.fingerprint(artifact.recipe) for artifact in plan.artifacts
    ]
    finals = [output / artifact.name for artifact in plan.artifacts]
    for final in finals:
        for taken in (final, *(final.with_name(final.name + suffix) for suffix in WORKING_SUFFIXES)):
            if source.is_relative_to(taken.resolve()):
                raise OutputError(f"{taken} holds the source; choose another output directory")
    try:
        for artifact, final, fingerprint in zip(plan.artifacts, finals, fingerprints, strict=True):
            runs.append(Run(artifact, ArtifactWriter(final, artifact.files, fingerprint, force=force, restart=restart)))
    except OutputError:
        for run in runs:
            run.writer.close()
        for final, fingerprint in zip(finals, fingerprints, strict=True):
            finish_clean_up(final, fingerprint)
        raise


def _fingerprint(checkpoint: Checkpoint, artifact: ArtifactPlan, max_shard_bytes: int | None) -> dict[str, object]:
    """What must be equal for a partial output to be resumed."""
    return {
        "version": __version__,
        "source": checkpoint.fingerprint(),
        "recipe": artifact.recipe.to_dict(),
        "max_shard_bytes": "usual" if max_shard_bytes is None else max_shard_bytes,
        "layout": xxhash.xxh3_64_hexdigest(b"".join(file.name.encode() + file.header for file in artifact.files)),
    }


# ----------------------------------------------------------------------------------------------------------------- units


class _Reporter:
    """Turns finished units and bytes read back into Progress snapshots, one call at a time."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, runs: Sequence[Run], progress: Callable[[Progress], None] | None):
        self._sizes = {unit.key: source_bytes(checkpoint, unit) for unit in plan.units}
        self.todo = [unit for unit in plan.units if any(unit.key not in run.writer.completed for run in runs)]
        self._resumed = len(plan.units) - len(self.todo)
        self._units, self._units_total = self._resumed, len(plan.units)
        self._total = sum(self._sizes.values())
        self._bytes = self._total - sum(self._sizes[unit.key] for unit in self.todo)
        self._written = 0
        self._finished: set[str] = set()
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._progress = progress

    def preparing(self, scheme: str) -> None:
        with self._lock:
            self._tell("prepare", self._bytes, self._total, scheme)

    def unit_done(self, unit: Unit, written: int) -> None:
        self._done("convert", unit, written)

    def unit_calibrated(self, unit: Unit, written: int) -> None:
        self._done("calibrate", unit, written)

    def _done(self, phase: str, unit: Unit, written: int) -> None:
        with self._lock:
            if unit.key not in self._finished:  # a sequential calibration comes to a unit once for each artifact
                self._finished.add(unit.key)
                self._units += 1
                self._bytes += self._sizes[unit.key]
            self._written += written
            self._tell(phase, self._bytes, self._total, unit.key)

    def checking(self, artifact: ArtifactPlan) -> Callable[[int], None]:
        """A callback that is told how many bytes of ``artifact`` have just been read back."""
        done = 0

        def checked(count: int) -> None:
            nonlocal done
            with self._lock:
                done += count
                self._tell("check", done, artifact.tensor_bytes, artifact.name)

        return checked

    def _tell(self, phase: str, done: int, total: int, current: str) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - self._started
            self._progress(
                Progress(phase, self._units, self._units_total, self._resumed, done, total, self._written, current, seconds)
            )


def _prepare(runs: Sequence[Run], report: _Reporter) -> None:
    """Quantize a tiny matrix with each scheme, so that kernels are compiled once, and the rate of units means something."""
    assignments = {assignment for run in runs for assignment in run.plan.assignments.values()}
    width = 2 * BLOCK_SIZE  # a whole block of llama.cpp's types
    workspace, weight, ones = Workspace(), torch.ones((BLOCK_SIZE, width), dtype=torch.bfloat16), torch.ones(width)
    evidence = Evidence(1, ones, ones, torch.eye(width))
    with Team(1) as team:
        for assignment in sorted(assignments, key=repr) if report.todo else ():
            if assignment.scheme is not None:
                report.preparing(assignment.scheme.name)
                METHODS[assignment.method](
                    [weight],
                    assignment.scheme,
                    clip_search=assignment.clip_search,
                    workspace=workspace,
                    evidence=evidence,
                    team=team,
                )


def _convert_units(
    checkpoint: Checkpoint,
    plan: Plan,
    runs: Sequence[Run],
    calibrated: Calibrated,
    workers: int,
    report: _Reporter,
    stop: threading.Event | None,
) -> None:
    """The units that need no pass of the corpus through the model, on worker threads."""

    first_inputs = next((unit for unit in plan.units if unit.layer == 0 and unit.key.endswith("self_attn.qkv")), None)

    def work(unit: Unit, workspace: Workspace) -> None:
        pending = [run for run in runs if unit.key not in run.writer.completed]
        if unit.copies:
            copy_unit(checkpoint, unit, pending, workspace, first_inputs)
        else:
            weights, digests = checkpoint.read_unit(unit, workspace)
            for run in pending:
                quantize_unit(checkpoint, unit, weights, digests, run, workspace, calibrated.known(unit))
        report.unit_done(unit, sum(tensor.nbytes for run in pending for tensor in run.plan.outputs[unit.key]))

    todo = [unit for unit in report.todo if unit.copies or not calibrated.needs_pass]
    run_units(todo, work, workers=workers, stop=stop)


# ------------------------------------------------------------------------------------------------------------------ seal


def _seal(run: Run, plan: Plan, workers: int, report: _Reporter, stop: threading.Event | None) -> ArtifactResult:
    """Check the ledger and every written byte, and add the small files; afterwards only the rename is missing."""
    entries = [ledger.LedgerEntry(**line) for unit in plan.units for line in run.writer.completed[unit.key]["ledger"]]
    ledger.check(entries, run.plan.assignments)
    sidecars = run.plan.sidecars | {"ledger.json": ledger.ledger_text(run.plan.name, entries)}
    provenance = plan.provenance or {}
    run.writer.seal(
        sidecars,
        [path for path in plan.carried if FORMATS[run.plan.recipe.format].carries(path.name)],
        lambda files: manifest_text(run.plan.recipe, provenance, files, plan.calibration),
        workers=workers,
        stop=stop,
        checked=report.checking(run.plan),
    )
    errors: dict[str, list[float]] = {}
    for entry in entries:
        if entry.applied != KEEP:
            errors.setdefault(entry.role, []).append(entry.relative_error)
    summary = {role: (sum(values) / len(values), max(values)) for role, values in errors.items()}
    return ArtifactResult(
        name=run.plan.name,
        directory=run.writer.final,
        bytes=run.plan.total_bytes,
        tensors=len(entries),
        units_resumed=run.writer.resumed,
        relative_errors=summary,
        roles=tuple(summarize_roles(plan, run.plan)),
        notes=run.plan.notes,
    )
