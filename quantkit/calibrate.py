"""A calibration from beginning to end: its directory, the trial before the long run, the published statistics.

    out/calibration-1f2e3d4c.partial/     hidden states, while it runs (see :mod:`quantkit.calibration_state`)
    out/calibration-1f2e3d4c/             statistics.safetensors, statistics.json

The name holds a digest of all that the numbers depend on: version, source, corpus and settings.  So artifacts that were made from
the same calibration find it again, and one of another corpus stands beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from quantkit.calibration import CalibrationOptions, Handler, Seen, check_tokens, run_layers
from quantkit.calibration_cost import calibration_memory
from quantkit.calibration_state import JOURNAL, CalibrationState
from quantkit.checkpoint import Checkpoint
from quantkit.corpus import Corpus, load_corpus
from quantkit.coverage import save_heat_map
from quantkit.errors import CalibrationError, CorpusError, OutputError
from quantkit.estimate import available_cores, available_memory
from quantkit.imatrix import check_place, imatrix_from_statistics, write_imatrix
from quantkit.journal import Journal, output_errors, sync_directory
from quantkit.llama4 import Unit, units
from quantkit.recipe import Recipe
from quantkit.statistics import Statistics, check_statistics, load_statistics, save_statistics
from quantkit.team import Team
from quantkit.version import __version__


@dataclass(frozen=True)
class CalibrateResult:
    """Where the statistics are, and what they say.  imatrix: the importance file, where one was asked for."""

    directory: Path
    statistics: Statistics
    seconds: float
    imatrix: Path | None = None


def calibrate(
    source: str | Path,
    output: str | Path,
    *,
    calibration: CalibrationOptions | None = None,
    revision: str | None = None,
    workers: int | None = None,
    force: bool = False,
    restart: bool = False,
    imatrix: str | Path | None = None,
    legacy_imatrix: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    stop: threading.Event | None = None,
) -> CalibrateResult:
    """Send the corpus through the model and save what every unit and expert receives; nothing is quantized.

    output: directory of the statistics.  imatrix: importance file for llama.cpp to write as well, in its older format if
    ``legacy_imatrix``; statistics of this corpus that are finished are then used.  progress: called after each unit with how many
    are done, of how many, and its key.  Other arguments as for ``convert``.

    Raises CheckpointError, CorpusError, CalibrationError, OutputError, Interrupted; a run that was stopped or killed is resumed by
    the same call.
    """
    started, options = time.monotonic(), calibration or CalibrationOptions()
    final = Path(os.path.realpath(output))
    exported = None if imatrix is None else Path(imatrix)
    if exported is not None:
        check_place(exported, force)  # now, and not after hours
    with Checkpoint.open(source, revision) as checkpoint:
        if final.exists() and not (final / "statistics.json").is_file():
            raise OutputError(f"{final} holds no statistics of quantkit and is not replaced: move it away")
        corpus = open_corpus(checkpoint, options)
        if final.exists() and not force:
            # Killed between its publication and its clean-up, a calibration of this very corpus only has to be cleaned up.
            unfinished = final.with_name(final.name + ".partial").exists()
            found = load_statistics(final) if unfinished or exported is not None else None
            if found is None or found.description.get("corpus") != corpus.description:
                raise OutputError(f"{final} exists already: choose another output directory, or replace it with --force")
            check_statistics(found, checkpoint.config, checkpoint.provenance())
        work = [unit for unit in units(checkpoint.config) if unit.matrices]
        with Team(workers or available_cores(), options.accelerator()) as team:
            statistics = run_calibration(
                checkpoint,
                corpus,
                work,
                final,
                options,
                team=team,
                handler=_Onlooker(work, progress),
                first=checkpoint.config.num_layers,
                restart=restart,
                renew=force or not final.exists(),
                stop=stop,
            )
        if exported is not None:
            importance = imatrix_from_statistics(statistics, checkpoint.config)
            write_imatrix(exported, importance, legacy=legacy_imatrix, force=force)
    return CalibrateResult(final, statistics, time.monotonic() - started, exported)


class _Onlooker:
    """Counts units and changes nothing."""

    def __init__(self, work: Sequence[Unit], progress: Callable[[int, int, str], None] | None) -> None:
        self._numbers = {unit.key: number for number, unit in enumerate(work, 1)}
        self._progress = progress

    def wants_hessian(self, unit: Unit) -> bool:
        """No method is waiting for one."""
        return False

    def makes_up(self, unit: Unit) -> Sequence[int]:
        """Nothing is lacking."""
        return ()

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """It stays as it is."""
        return iter(())

    def convert(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str], seen: Seen) -> None:
        """Say which unit it is."""
        if self._progress is not None:
            self._progress(self._numbers[unit.key], len(self._numbers), unit.key)


def open_corpus(checkpoint: Checkpoint, options: CalibrationOptions) -> Corpus:
    """The corpus that the options name, in tokens of the checkpoint's own tokenizer.  Raises CorpusError."""
    if options.sequence_length > checkpoint.config.max_positions:
        raise CorpusError(
            f"a sequence length of {options.sequence_length} is more than the {checkpoint.config.max_positions} positions that "
            "this model knows; ask for fewer"
        )
    return load_corpus(
        options.corpus,
        checkpoint.directory,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        packing=options.packing,
        vocab_size=checkpoint.config.vocab_size,
    )


def identity(checkpoint: Checkpoint, corpus: Corpus, options: CalibrationOptions, recipe: Recipe | None = None) -> dict[str, Any]:
    """What must be equal for a calibration to be resumed or used again.

    recipe: of the artifact that a sequential one is for.
    """
    return {
        "version": __version__,
        "source": checkpoint.fingerprint(),
        "corpus": corpus.description,
        "sequential": options.sequential,
        **({} if options.accelerator() is None else {"device": options.device}),
        "recipe": recipe.to_dict() if recipe is not None and options.sequential else None,
    }


def discard_unfinished(output: Path) -> None:
    """Remove the hidden states of calibrations in ``output`` that were stopped, whatever they were for; not those at work.

    Raises OutputError.
    """
    for partial in sorted(output.glob("calibration-*.partial")):
        if (partial / JOURNAL).is_file():
            with output_errors(f"discard {partial}"):
                Journal(partial / JOURNAL).close()  # OutputError when another run holds it
                shutil.rmtree(partial)


def statistics_directory(output: Path, identity: dict[str, Any]) -> Path:
    """Where a conversion into ``output`` keeps the statistics of this calibration."""
    digest = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
    return Path(os.path.realpath(output)) / f"calibration-{digest[:8]}"


def run_calibration(
    checkpoint: Checkpoint,
    corpus: Corpus,
    work: Sequence[Unit],
    final: Path,
    options: CalibrationOptions,
    *,
    handler: Handler,
    first: int,
    team: Team,
    restart: bool = False,
    renew: bool = False,
    recipe: Recipe | None = None,
    stop: threading.Event | None = None,
) -> Statistics:
    """Calibrate, or resume, and publish the statistics as ``final``; see ``calibration.run_layers`` for the arguments.

    renew: replace ``final``, whatever it holds; else it is of this calibration, and used when nothing is left to do.

    Raises CalibrationError, OutputError, Interrupted.
    """
    named = identity(checkpoint, corpus, options, recipe)
    partial, shape = final.with_name(final.name + ".partial"), (corpus.tokens.numel(), checkpoint.config.hidden_size)
    if not (restart or renew) and first == checkpoint.config.num_layers and (final / "statistics.json").is_file():
        if partial.exists():  # a former run had come as far as this, and was killed when it cleaned up
            CalibrationState(partial, json.loads(json.dumps(named)), shape).remove()
        finished = load_statistics(final)
        check_tokens(finished, options.minimum_expert_tokens)
        return finished
    hessians = any(handler.wants_hessian(unit) for unit in work)
    need = calibration_memory(checkpoint.config, corpus.tokens.numel(), hessians)
    free = available_memory()
    if need > free:
        raise CalibrationError(
            f"calibration needs {need / 1e9:.1f} GB of memory beside the hidden states, and {free / 1e9:.1f} GB are free: close "
            "other programs or use a machine with more. The need follows from the largest expert, not from the number of samples."
        )
    state = CalibrationState(partial, json.loads(json.dumps(named)), shape, restart=restart)
    try:
        found = run_layers(
            checkpoint,
            corpus,
            work,
            state,
            team,
            handler=handler,
            first=first,
            sequential=options.sequential,
            minimum_expert_tokens=options.minimum_expert_tokens,
            stop=stop,
        )
        description = {
            "corpus": corpus.description,
            "source": checkpoint.provenance(),
            "settings": {"sequential": options.sequential, "recipe": named["recipe"]},
            "version": __version__,
        }
        statistics = Statistics(found.inputs, found.experts, found.cache_peaks, found.kinds, description)
        _publish(statistics, partial / "statistics", final)
        state.remove()
        return statistics
    finally:
        state.close()


def _publish(statistics: Statistics, folder: Path, final: Path) -> None:
    """Save the statistics in ``folder`` and rename it to ``final``.  Raises OutputError."""
    former = folder.with_name("former")
    with output_errors(f"write {final}", resumable=True):
        for path in (folder, former):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir()
        save_statistics(folder, statistics)
        save_heat_map(folder, statistics)
        if (final / "statistics.json").is_file():
            final.rename(former)  # the same calibration, or one that is to be replaced; whole or not there, whenever a kill comes
        folder.rename(final)
        sync_directory(final.parent)
