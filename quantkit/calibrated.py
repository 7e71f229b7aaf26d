"""The calibrated half of a conversion: which recipes need the corpus, what their units are given, which pass serves whom.

Recipes that only ask for ranges (FP8 static, FP8 KV cache) can take them from saved statistics; then their units are converted like all
others.  A method with Hessians needs the corpus to go through the model.  In that case every unit with matrices is converted as the
pass comes to it, for all artifacts of the run, so that weights are read once; data-free artifacts ride along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import grid
from quantkit.calibrate import identity, open_corpus, run_calibration, statistics_directory
from quantkit.calibration import CalibrationOptions
from quantkit.checkpoint import Checkpoint
from quantkit.corpus import Corpus
from quantkit.errors import CalibrationError
from quantkit.estimate import available_cores
from quantkit.evidence import Evidence, Received
from quantkit.formats import FORMATS
from quantkit.llama4 import Unit
from quantkit.plan import Plan
from quantkit.recipe import METHODS_WITH_EVIDENCE, Recipe
from quantkit.statistics import Statistics, check_statistics, load_statistics
from quantkit.team import Team
from quantkit.tensor_files import TORCH_DTYPES
from quantkit.unit_work import Run, Seen, quantize_unit
from quantkit.workspace import Workspace


class Calibrated:
    """What calibration contributes to one conversion.  needs_pass: the corpus goes through the model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: CalibrationOptions,
        output: Path,
        corpus: Corpus | None,
        statistics: Statistics | None,
    ) -> None:
        self._checkpoint, self._options, self._output = checkpoint, options, output
        self._corpus, self._statistics = corpus, statistics
        self.needs_pass = corpus is not None

    @classmethod
    def open(cls, checkpoint: Checkpoint, recipes: Sequence[Recipe], options: CalibrationOptions, output: Path) -> Calibrated:
        """Load the corpus or the statistics that the recipes need.  Raises CorpusError, CalibrationError."""
        if not any(recipe.needs_calibration for recipe in recipes):
            return cls(checkpoint, options, output, None, None)
        if options.statistics is None:
            return cls(checkpoint, options, output, open_corpus(checkpoint, options), None)
        hungry = [recipe.name for recipe in recipes if recipe.needs_hessians]
        if hungry:
            raise CalibrationError(
                f"{', '.join(hungry)}: its method needs Hessians, which saved statistics do not hold; give a corpus instead of --statistics"
            )
        statistics = load_statistics(options.statistics)
        check_statistics(statistics, checkpoint.config, checkpoint.provenance())
        return cls(checkpoint, options, output, None, statistics)

    def fingerprint(self, recipe: Recipe) -> dict[str, Any]:
        """What a partial artifact of ``recipe`` must have been calibrated on to be resumed; nothing for a data-free one."""
        if not recipe.needs_calibration:
            return {}
        if self._corpus is not None:
            return {"calibration": identity(self._checkpoint, self._corpus, self._options, recipe)}
        assert self._statistics is not None
        return {"calibration": self._statistics.description}

    def known(self, unit: Unit) -> Seen | None:
        """What saved statistics say of a unit."""
        if self._statistics is None or unit.key not in self._statistics.inputs:
            return None
        evidence = self._statistics.inputs[unit.key]
        received = Received(evidence.tokens, 0, float(evidence.tokens))
        if unit.expert is not None and unit.layer is not None:
            counts = self._statistics.experts[unit.layer]
            received = Received(evidence.tokens, int(counts.borrowed[unit.expert]), float(counts.score_mass[unit.expert]))
        return Seen(evidence, received, self._statistics.cache_peaks[unit.layer or 0])

    def run(
        self,
        plan: Plan,
        runs: Sequence[Run],
        *,
        workers: int | None,
        restart: bool,
        report: Callable[[Unit, int], None],
        stop: threading.Event | None,
    ) -> None:
        """Send the corpus through the model and convert every unit with matrices on the way; nothing when no recipe asks for it.

        report: told each unit that was converted, and the bytes written, once for every pass.  Raises what ``run_calibration`` and ``quantize_unit`` raise.
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
        report: Callable[[Unit, int], None],
        stop: threading.Event | None,
    ) -> None:
        assert self._corpus is not None
        work = [unit for unit in plan.units if unit.matrices]
        todo = {unit.key: [run for run in runs if unit.key not in run.writer.completed] for unit in work}
        unfinished = [unit.layer for unit in work if todo[unit.key] and unit.layer is not None]
        lead, recipe, workspace = runs[0], runs[0].plan.recipe, Workspace()

        def handle(
            unit: Unit,
            weights: Sequence[torch.Tensor],
            digests: Sequence[str],
            evidence: Evidence,
            received: Received,
            cache_peaks: tuple[float, float],
        ) -> list[torch.Tensor] | None:
            replaced: list[torch.Tensor] | None = None
            seen = Seen(evidence, received, cache_peaks)
            for run in todo[unit.key]:
                done = quantize_unit(self._checkpoint, unit, weights, digests, run, workspace, seen, team)
                if run is lead and self._options.sequential:
                    replaced = _stored_values(unit, weights, done)
            if todo[unit.key]:
                report(unit, sum(tensor.nbytes for run in todo[unit.key] for tensor in run.plan.outputs[unit.key]))
            elif self._options.sequential:
                replaced = _stored_values(unit, weights, _read_back(unit, lead))
            return replaced

        named = identity(self._checkpoint, self._corpus, self._options, recipe)
        with Team(workers or available_cores()) as team:
            run_calibration(
                self._checkpoint,
                self._corpus,
                work,
                statistics_directory(self._output, named),
                self._options,
                team=team,
                handle=handle,
                hessians={unit.key for unit in work if any(_wants_hessian(unit, run) for run in todo[unit.key])},
                first=min(unfinished, default=plan.config.num_layers),
                restart=restart,
                recipe=recipe,
                stop=stop,
            )


def _wants_hessian(unit: Unit, run: Run) -> bool:
    """Whether a unit's method in that artifact asks for a Hessian."""
    given = [run.plan.assignments[matrix.name] for matrix in unit.matrices]
    return any(assignment.scheme is not None and assignment.method in METHODS_WITH_EVIDENCE for assignment in given)


def _stored_values(
    unit: Unit, weights: Sequence[torch.Tensor], quantized: Mapping[str, grid.QuantizedTensor]
) -> list[torch.Tensor]:
    """What the unit is in the artifact, float32 ``[out, in]``."""
    return [
        grid.dequantize(quantized[matrix.name]) if matrix.name in quantized else weight.to(torch.float32)
        for matrix, weight in zip(unit.matrices, weights, strict=True)
    ]


def _read_back(unit: Unit, run: Run) -> dict[str, grid.QuantizedTensor]:
    """What a former run wrote of the unit.  Raises OutputError."""
    form = FORMATS[run.plan.recipe.format]
    stored = {}
    for tensor in run.plan.outputs[unit.key]:
        data = torch.frombuffer(bytearray(run.writer.read(tensor.name)), dtype=TORCH_DTYPES[tensor.dtype])
        stored[tensor.name] = data.view(tensor.shape)
    decoded = {}
    for matrix in unit.matrices:
        scheme = run.plan.assignments[matrix.name].scheme
        if scheme is not None:
            decoded[matrix.name] = form.decode(matrix.name, stored, scheme)
    return decoded
