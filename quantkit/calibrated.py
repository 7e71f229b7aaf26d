"""The calibrated half of a conversion: which recipes need the corpus, what their units are given, which pass serves whom.

Recipes that only ask for ranges (FP8 static, FP8 KV cache) can take them from saved statistics; then their units are converted
like all others.  A method with Hessians needs the corpus to go through the model.  In that case every unit with matrices is
converted as the pass comes to it, for all artifacts of the run, so that weights are read once; data-free artifacts ride along.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from quantkit import grid
from quantkit.assignment import Assignment
from quantkit.calibrate import identity, open_corpus, run_calibration, statistics_directory
from quantkit.calibration import CalibrationOptions, Seen, check_tokens
from quantkit.checkpoint import Checkpoint
from quantkit.corpus import Corpus
from quantkit.errors import CalibrationError
from quantkit.estimate import available_cores
from quantkit.evidence import Evidence, Received
from quantkit.formats import FORMATS
from quantkit.imatrix import read_imatrix, statistics_from_imatrix
from quantkit.llama4 import Unit
from quantkit.methods import gptq
from quantkit.plan import Plan
from quantkit.recipe import METHODS_WITH_HESSIANS, Recipe
from quantkit.scheme import Scheme
from quantkit.smoothing import inner_unit, smoothing_factors
from quantkit.statistics import Statistics, check_statistics, load_statistics, statistics_digest
from quantkit.team import Team
from quantkit.tensor_files import TORCH_DTYPES
from quantkit.unit_work import Run, apply_method, quantize_unit
from quantkit.workspace import Workspace


class Report(Protocol):
    """Who is told how far the work is."""

    def preparing(self, scheme: str) -> None:
        """The largest unit is tried with this scheme."""

    def unit_calibrated(self, unit: Unit, written: int) -> None:
        """A unit was converted, and so many bytes written."""


class Calibrated:
    """What calibration contributes to one conversion.

    needs_pass: the corpus goes through the model.  statistics: as far as they are known; of the last pass, after a sequential one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: CalibrationOptions,
        output: Path,
        corpus: Corpus | None,
        statistics: Statistics | None,
    ) -> None:
        self._checkpoint, self._options, self._output = checkpoint, options, output
        self._corpus, self.statistics = corpus, statistics
        self.needs_pass = corpus is not None

    @classmethod
    def open(cls, checkpoint: Checkpoint, recipes: Sequence[Recipe], options: CalibrationOptions, output: Path) -> Calibrated:
        """Load the corpus or the statistics that the recipes need.  Raises CorpusError, CalibrationError."""
        options.accelerator()  # raises when it is not there
        if not any(recipe.needs_calibration for recipe in recipes):
            return cls(checkpoint, options, output, None, None)
        smooth = [recipe.name for recipe in recipes if any(rule.smooth for rule in recipe.rules)]
        if smooth and options.sequential:
            raise CalibrationError(
                f"{', '.join(smooth)}: smoothing has to know the inputs of a down projection before gate and up are quantized, "
                "which a sequential calibration does not; leave out --sequential"
            )
        if options.statistics is None:
            return cls(checkpoint, options, output, open_corpus(checkpoint, options), None)
        hungry = [recipe.name for recipe in recipes if recipe.needs_hessians]
        if hungry:
            raise CalibrationError(
                f"{', '.join(hungry)}: its method needs Hessians, which saved statistics do not hold; "
                "give a corpus instead of --statistics"
            )
        return cls(checkpoint, options, output, None, _statistics(checkpoint, recipes, options, options.statistics))

    def fingerprint(self, recipe: Recipe) -> dict[str, Any]:
        """What a partial artifact of ``recipe`` must have been calibrated on to be resumed; nothing for a data-free one."""
        if not recipe.needs_calibration:
            return {}
        if self._corpus is not None:
            return {"calibration": identity(self._checkpoint, self._corpus, self._options, recipe)}
        assert self.statistics is not None
        return {"calibration": {"statistics": statistics_digest(self.statistics)}}

    def description(self) -> dict[str, Any] | None:
        """What calibrated artifacts learn from, for their manifests."""
        if self._corpus is not None:
            return {"corpus": self._corpus.description, "sequential": self._options.sequential}
        if self.statistics is None:
            return None
        described = self.statistics.description
        return {"corpus": described["corpus"], "sequential": described["settings"]["sequential"]}

    def known(self, unit: Unit) -> Seen | None:
        """What saved statistics say of a unit."""
        if self.statistics is None or unit.key not in self.statistics.inputs:
            return None
        evidence = self.statistics.inputs[unit.key]
        inner = self.statistics.inputs.get(inner_unit(unit.key) or "")
        received = Received(evidence.tokens, 0, float(evidence.tokens))
        if unit.expert is not None and unit.layer is not None:
            counts = self.statistics.experts[unit.layer]
            received = Received(evidence.tokens, int(counts.borrowed[unit.expert]), float(counts.score_mass[unit.expert]))
        return Seen(
            evidence,
            received,
            self.statistics.cache_peaks.get(unit.layer or 0, (0.0, 0.0)),
            {},
            None if inner is None or not inner.peak.numel() else smoothing_factors(inner.peak),
        )

    def run(
        self,
        plan: Plan,
        runs: Sequence[Run],
        *,
        workers: int | None,
        restart: bool,
        report: Report,
        stop: threading.Event | None,
    ) -> None:
        """Send the corpus through the model and convert every unit with matrices on the way; nothing when no recipe asks for it.

        report: told each unit that was converted and the bytes written, once for every pass.  Raises what ``run_calibration`` and
        ``quantize_unit`` raise.
        """
        if self._corpus is None:
            return
        calibrated = [run for run in runs if run.plan.recipe.needs_calibration]
        free = [run for run in runs if not run.plan.recipe.needs_calibration]
        passes = [[*calibrated, *free]]
        if self._options.sequential:
            passes = [[run, *(free if number == 0 else ())] for number, run in enumerate(calibrated)]
        for served in passes:
            self._one_pass(plan, served, workers, restart, report, stop)

    def _one_pass(
        self,
        plan: Plan,
        runs: Sequence[Run],
        workers: int | None,
        restart: bool,
        report: Report,
        stop: threading.Event | None,
    ) -> None:
        assert self._corpus is not None
        work = [unit for unit in plan.units if unit.matrices]
        todo = {unit.key: [run for run in runs if unit.key not in run.writer.completed] for unit in work}
        unfinished = [unit.layer for unit in work if todo[unit.key] and unit.layer is not None]
        recipe = runs[0].plan.recipe
        named = identity(self._checkpoint, self._corpus, self._options, recipe)
        with Team(workers or available_cores(), self._options.accelerator()) as team:
            handler = _Handler(self._checkpoint, work, runs, todo, self._options.sequential, team, report)
            handler.try_largest()
            self.statistics = run_calibration(
                self._checkpoint,
                self._corpus,
                work,
                statistics_directory(self._output, named),
                self._options,
                team=team,
                handler=handler,
                first=min(unfinished, default=plan.config.num_layers),
                restart=restart,
                recipe=recipe,
                stop=stop,
            )


def _statistics(checkpoint: Checkpoint, recipes: Sequence[Recipe], options: CalibrationOptions, path: Path) -> Statistics:
    """Saved statistics, or an importance file of llama.cpp, which holds less.  Raises CalibrationError."""
    if path.is_dir():
        statistics = load_statistics(path)
        check_statistics(statistics, checkpoint.config, checkpoint.provenance())
        check_tokens(statistics, options.minimum_expert_tokens)
        return statistics
    demanding = [recipe.name for recipe in recipes if recipe.needs_peaks]
    if demanding:
        raise CalibrationError(
            f"{', '.join(demanding)}: asks for the largest inputs, which an importance file does not hold; give the statistics of "
            "`quantkit calibrate`, or a corpus"
        )
    return statistics_from_imatrix(read_imatrix(path), checkpoint.config, checkpoint.provenance())


class _Handler:
    """Converts the units of one pass for its artifacts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Sequence[Unit],
        runs: Sequence[Run],
        todo: Mapping[str, Sequence[Run]],
        sequential: bool,
        team: Team,
        report: Report,
    ) -> None:
        """runs: the artifacts of the pass; later layers of a sequential one see the first.  todo: those that still lack a unit."""
        self._checkpoint, self._units, self._runs, self._todo = checkpoint, units, runs, todo
        self._following: dict[tuple[int | None, str], bool] = {}
        self._sequential, self._team, self._report = sequential, team, report
        self._workspace = Workspace()
        self._layer: int | None = None

    def try_largest(self) -> None:
        """Run each method once on the largest unit that awaits it, with made-up numbers, so that a lack of memory shows at once.

        Raises CalibrationError.
        """
        largest: dict[tuple[str, Scheme], tuple[Unit, Assignment]] = {}
        for unit in sorted(self._units, key=lambda unit: sum(math.prod(matrix.shape) for matrix in unit.matrices)):
            for run in self._todo[unit.key]:
                assignment = run.plan.assignments[unit.matrices[0].name]
                if assignment.scheme is not None and _learns(unit, run):
                    largest[assignment.method, assignment.scheme] = unit, assignment
        for (method, scheme), (unit, assignment) in largest.items():
            self._report.preparing(f"{scheme.name} {method}, {unit.key}")
            width = unit.matrices[0].shape[1]
            weights = [torch.ones(matrix.shape[1], matrix.shape[0], dtype=torch.bfloat16).t() for matrix in unit.matrices]
            missing = torch.zeros(unit.matrices[0].shape) if len(weights) == 1 else None
            try:
                evidence = Evidence(width, torch.ones(width), torch.ones(width), torch.eye(width), missing, float(width))
                apply_method(assignment, scheme, weights, self._workspace, evidence, self._team)
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and "memory" not in str(error):
                    raise
                raise CalibrationError(
                    f"there is not enough memory to quantize {unit.key} to {scheme.name} with {method}: close other programs, or "
                    "use a machine with more memory. The need follows from the largest matrix, not from the number of samples."
                ) from error

    def wants_hessian(self, unit: Unit) -> bool:
        """Whether a method of an artifact that lacks the unit asks for it."""
        return any(_learns(unit, run) for run in self._todo[unit.key])

    def makes_up(self, unit: Unit) -> list[int]:
        """Artifacts that lack this down projection of a routed expert, are to learn it, and have quantized the shared expert."""
        if unit.expert is None or unit.matrices[0].projection != "down_proj":
            return []
        return [number for number, run in enumerate(self._runs) if run in self._todo[unit.key] and self._follows(unit.layer, run)]

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The shared expert of a layer as the artifacts store it whose routed experts make up for it."""
        for number, run in enumerate(self._runs):
            if self._follows(gate_up.layer, run):
                yield number, [*_stored_values(gate_up, run), *_stored_values(down, run)]

    def _follows(self, layer: int | None, run: Run) -> bool:
        """Whether a layer's routed down projections are learned in that artifact, after a shared expert that is not kept."""
        if (layer, run.plan.name) not in self._following:
            experts = [unit for unit in self._units if unit.layer == layer and unit.role == "routed_expert"]
            shared = [
                matrix for unit in self._units if unit.layer == layer and unit.role == "shared_expert" for matrix in unit.matrices
            ]
            kept = all(run.plan.assignments[matrix.name].scheme is None for matrix in shared)
            unfinished = [unit for unit in experts if run in self._todo[unit.key] and unit.matrices[0].projection == "down_proj"]
            self._following[layer, run.plan.name] = not kept and any(_learns(unit, run) for unit in unfinished)
        return self._following[layer, run.plan.name]

    def convert(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str], seen: Seen) -> list[torch.Tensor] | None:
        """Convert a unit for every artifact that lacks it."""
        if unit.layer != self._layer:  # what a dense layer needed is not kept beside the inputs of the next one
            self._layer, self._workspace = unit.layer, Workspace()
        for number, run in enumerate(self._runs):
            if run in self._todo[unit.key]:
                evidence = replace(seen.evidence, missing=seen.missing.get(number))
                own = replace(seen, evidence=evidence)
                quantize_unit(self._checkpoint, unit, weights, digests, run, self._workspace, own, self._team)
                if unit.expert is None:  # once in a layer and perhaps wide: not kept beside the factor of the next unit
                    self._workspace.release(*gptq.SCRATCH)
        if self._todo[unit.key]:
            self._report.unit_calibrated(
                unit, sum(tensor.nbytes for run in self._todo[unit.key] for tensor in run.plan.outputs[unit.key])
            )
        return _stored_values(unit, self._runs[0]) if self._sequential else None


def _learns(unit: Unit, run: Run) -> bool:
    """Whether a method with Hessians is to quantize the unit in that artifact."""
    given = [run.plan.assignments[matrix.name] for matrix in unit.matrices]
    return any(assignment.scheme is not None and assignment.method in METHODS_WITH_HESSIANS for assignment in given)


def _stored_values(unit: Unit, run: Run) -> list[torch.Tensor]:
    """What a finished unit is in the artifact, float32 ``[out, in]``, from the artifact's own bytes.  Raises OutputError."""
    form = FORMATS[run.plan.recipe.format]
    stored = {}
    for tensor in run.plan.outputs[unit.key]:
        data = torch.frombuffer(bytearray(run.writer.read(tensor.name)), dtype=TORCH_DTYPES.get(tensor.dtype, torch.uint8))
        stored[tensor.name] = data.view(tensor.shape if tensor.dtype in TORCH_DTYPES else (tensor.shape[0], -1))
    values = []
    for matrix in unit.matrices:
        scheme = run.plan.assignments[matrix.name].scheme
        if scheme is None:
            [kept] = form.output_tensors(matrix, None, run.plan.outputs[unit.key][0].dtype)
            values.append(stored[kept.name].to(torch.float32))
        else:
            values.append(grid.dequantize(form.decode(matrix.name, stored, scheme)))
    return values
