"""Evaluation: how far artifacts are from the model that they were made from, measured on their own bytes.

Every file is checked, text is cut into windows, and the windows go through reference and artifacts layer by layer, so a model need
not fit into memory.  What leaves the last layer is kept on disk; logits are made from it a portion at a time and compared at once.
A sweep (as many windows as are held in memory) is finished for all models before the next begins, so the disk holds the final
states of the reference, which the next evaluation on the same text uses again, and those of one sweep of each artifact.

Whatever ends a run, the same command goes on where it was and gives the same figures, bit for bit: they depend neither on the
number of threads nor on what came from the cache.
"""

from __future__ import annotations

import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from quantkit import metrics
from quantkit.calibration import CalibrationOptions
from quantkit.errors import CalibrationError, Interrupted
from quantkit.estimate import available_cores
from quantkit.evaluation import ArtifactEvaluation, Difference, Evaluation, GoldenAnswers, Scores
from quantkit.evaluation_cache import LIMIT_BYTES, EvaluationCache
from quantkit.evaluation_checks import (
    artifact_paths,
    cache_directory,
    check_arguments,
    check_distinct,
    check_files,
    check_same_model,
    check_same_tokenizer,
    check_window,
    checked_path,
    model_directory,
    open_artifact,
    open_reference,
    read_manifest,
    reference_errors,
)
from quantkit.evaluation_pass import STOPPED, EvaluationProgress, ModelPass, Sweep, Watch, cut_sweeps
from quantkit.evaluation_provenance import Provenance, read_provenance
from quantkit.evaluation_scores import Scorer, SweepScores, scores_folder
from quantkit.file_digests import RememberedDigests
from quantkit.golden import check_questions, golden_answers
from quantkit.golden_set import read_questions
from quantkit.kernels.dispatch import check_device
from quantkit.stored_model import StoredModel
from quantkit.team import Team
from quantkit.version import __version__
from quantkit.windows import Convention, Windows, load_windows

__all__ = ["EvaluationProgress", "evaluate"]

Progress = Callable[[EvaluationProgress], None]
DIGESTS = "file-digests.json"  # in the cache


def evaluate(
    artifacts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    reference: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    window: int = 512,
    windows: int | None = None,
    convention: Convention = "full",
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    batch_tokens: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int | None = None,
    resamples: int = 1000,
    round_activations: bool = True,
    golden: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Evaluation:
    """Compare ``artifacts`` (directories or GGUF files, or one of them) with ``reference``, the checkpoint they were made from.

    text, revision, window, windows, convention, seed: see :func:`quantkit.windows.load_windows`.  workers: threads, None for one a
    core.  batch_tokens: tokens held in memory at once, None for what suits the width of the model.  cache: a directory for what can
    be used again, None for ``~/.cache/quantkit/evaluation``.  cache_limit: bytes that may lie there, None for 20 GB: what was not
    used for longest makes room.  resamples: of the bootstrap; 0 for figures without intervals.
    round_activations: round the inputs of matrices as clients do where a scheme asks for it.  golden: questions that reference and
    artifacts answer besides, a file as :func:`quantkit.golden_set.read_questions` takes, or "bundled".

    Raises ArtifactError, CheckpointError (of the reference), CorpusError, CalibrationError (no such device, or too little memory
    there), RecipeError (an argument that means nothing, an artifact given twice, a device without Triton), OutputError (the cache
    cannot be written), and Interrupted when ``stop`` was set or Ctrl-C pressed; then the same call goes on from there.
    """
    paths = artifact_paths(artifacts)
    reference = checked_path("reference", reference)
    text = None if text is None else checked_path("text", text)
    golden = None if golden is None else checked_path("golden", golden)
    check_arguments(
        round_activations=round_activations,
        revision=revision,
        progress=progress,
        stop=stop,
        window=window,
        windows=windows,
        seed=seed,
        workers=workers,
        batch_tokens=batch_tokens,
        resamples=resamples,
        cache_limit=cache_limit,
    )
    place = cache_directory(cache)
    where = CalibrationOptions(device=device).accelerator()
    if where is not None:
        check_device(where)
    questions = () if golden is None else read_questions(golden)  # what is wrong with them is said before the work
    watch = Watch(progress, stop)
    with ExitStack() as opened:
        try:
            base = opened.enter_context(open_reference(reference))
            models = [opened.enter_context(open_artifact(path)) for path in paths]
            check_distinct(models)
            names = _names(base, models)
            for model in models:
                check_same_model(base, model)
                check_same_tokenizer(base, model)
            directory = model_directory(base)
            check_window(window, (base, *models))
            if questions:
                check_questions(questions, directory, (base, *models))
            cut = load_windows(
                text,
                directory,
                window=window,
                windows=windows,
                convention=convention,
                seed=seed,
                revision=revision,
                vocab_size=base.config.vocab_size,
            )
            store = opened.enter_context(EvaluationCache(place, LIMIT_BYTES if cache_limit is None else cache_limit))
            digests = RememberedDigests(place / DIGESTS)
            keys, provenances = _checked(base, models, digests, watch)  # which takes a while: all other errors come first
            team = opened.enter_context(Team(workers or available_cores(), check=watch.check))
            sweeps = cut_sweeps(cut, base.config.hidden_size, batch_tokens, where)
            passes = [
                ModelPass(
                    model,
                    name,
                    _key(key, cut, device, round_activations, sweeps),
                    cut,
                    team,
                    store,
                    watch,
                    device=where,
                    round_activations=round_activations,
                    is_reference=model is base,
                )
                for model, name, key in zip((base, *models), (base.name, *names), keys, strict=True)
            ]
            store.hold([one.key for one in passes] + [scores_folder(one, passes[0]) for one in passes[1:]])
            scores = _measure(passes[0], passes[1:], cut, sweeps, team, store, watch)
            for one in passes:
                one.release()  # what lies on a device makes room for the weights that stay there while questions are answered
            answers: tuple[GoldenAnswers, ...] = ()
            if questions:
                given = golden_answers(
                    [base, *models],
                    questions,
                    directory,
                    team=team,
                    device=where,
                    round_activations=round_activations,
                    guard=lambda number: passes[number].own_errors(),
                    progress=lambda name, done, total: watch.tell("golden", name, done, total),
                    stop=stop,
                )
                answers = tuple(replace(found, name=one.name) for found, one in zip(given, passes, strict=True))
            summaries = _Summaries(list(zip(names, (_joined(found) for found in scores), strict=True)), cut, resamples, seed, watch)
        except KeyboardInterrupt as error:
            raise Interrupted(STOPPED) from error
        except torch.OutOfMemoryError as error:
            raise CalibrationError(
                f"{where} has too little memory ({error}). End other programs that use the GPU, take fewer tokens at once "
                "(--batch-tokens), or compute on the CPU. What was computed is kept: the same command goes on from there."
            ) from error
        found = [
            _artifact(one, scores[number], summaries, number, provenance)
            for number, (one, provenance) in enumerate(zip(passes[1:], provenances, strict=True))
        ]
        return Evaluation(
            reference=base.name,
            reference_path=str(reference),
            reference_bytes=base.bytes,
            reference_fingerprint=base.fingerprint(),
            text=cut.description,
            convention=convention,
            window=cut.tokens.shape[1],
            windows=len(cut.lengths),
            rounded_activations=round_activations,
            environment=_environment(device),
            artifacts=tuple(found),
            differences=summaries.differences,
            golden=answers,
            seconds=watch.seconds,
        )


def _checked(
    base: StoredModel, models: Sequence[StoredModel], digests: RememberedDigests, watch: Watch
) -> tuple[list[str], list[Provenance]]:
    """What the states of reference and artifacts depend on, and where the artifacts come from.  Raises what is wrong with files."""

    def key(model: StoredModel, manifest: dict[str, Any] | None) -> str:
        def tell(done: int, total: int) -> None:
            watch.tell("check", model.name, done, total)
            watch.check()

        return check_files(model, manifest, digests, tell)

    with reference_errors():
        keys = [key(base, read_manifest(base))]
    provenances = []
    for model in models:
        manifest = read_manifest(model)
        keys.append(key(model, manifest))
        provenances.append(read_provenance(model, manifest))
    return keys, provenances


def _names(base: StoredModel, models: Sequence[StoredModel]) -> list[str]:
    """What tables call the artifacts: their names; of those that share one, with the reference or each other, the paths."""
    seen = Counter(model.name for model in (base, *models))
    paths = [str(model.path) if str(model.path) != base.name else os.path.abspath(model.path) for model in models]
    return [model.name if seen[model.name] == 1 else path for model, path in zip(models, paths, strict=True)]


def _key(files: str, windows: Windows, device: str, round_activations: bool, sweeps: Sequence[Sweep]) -> str:
    """All that final states depend on."""
    parts = (files, windows.digest, __version__, _sources(), device, str(round_activations), str(sweeps[0].part.stop))
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


@lru_cache(maxsize=1)
def _sources() -> str:
    """Digest of quantkit's own code: a version in the making computes today what it did not yesterday."""
    directory = Path(__file__).parent
    digest = xxhash.xxh3_64()
    for path in sorted(directory.rglob("*.py")):
        digest.update(f"{path.relative_to(directory)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _measure(
    base: ModelPass,
    artifacts: Sequence[ModelPass],
    windows: Windows,
    sweeps: Sequence[Sweep],
    team: Team,
    cache: EvaluationCache,
    watch: Watch,
) -> list[list[SweepScores]]:
    """By artifact, the scores of all sweeps."""
    scorer = Scorer(base, windows, team, cache, watch)
    found: list[list[SweepScores]] = [[] for _ in artifacts]
    for sweep in sweeps:
        known = {artifact: scores for artifact in artifacts if (scores := scorer.known(artifact, sweep)) is not None}
        missing = [artifact for artifact in artifacts if artifact not in known]
        if missing:
            known |= dict(zip(missing, scorer.score(missing, sweep), strict=True))
        for number, artifact in enumerate(artifacts):
            found[number].append(known[artifact])
    return found


# ---------------------------------------------------------------------------------------------------------------- results


def _joined(scores: Sequence[SweepScores]) -> metrics.TokenScores:
    return metrics.TokenScores.joined([part.tokens for part in scores])


class _Summaries:
    """Figures over all windows, by kind and by language."""

    def __init__(
        self, artifacts: Sequence[tuple[str, metrics.TokenScores]], windows: Windows, resamples: int, seed: int, watch: Watch
    ) -> None:
        def tell(done: int, total: int) -> None:
            watch.tell("intervals", "", done, total)
            watch.check()

        def predicting(group: metrics.Group) -> bool:
            return any(windows.positions[number] for number in group.windows)

        kinds, languages = ([*filter(predicting, metrics.Group.by(labels))] for labels in (windows.kinds, windows.languages))
        groups = [metrics.Group("", np.arange(len(windows.lengths))), *kinds, *languages]
        summaries = metrics.summarize(artifacts, windows.positions, groups, resamples=resamples, seed=seed, progress=tell)
        named = [(group.name, summary) for group, summary in zip(groups, summaries, strict=True)]
        self._all = summaries[0]
        self._kinds, self._languages = dict(named[1 : 1 + len(kinds)]), dict(named[1 + len(kinds) :])

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Between all artifacts, over all windows."""
        return tuple(self._all.differences.values())

    def of(self, number: int) -> tuple[Scores, dict[str, Scores], dict[str, Scores]]:
        """Of one artifact: over all windows, by kind, by language."""
        kinds, languages = (
            {name: summary.scores[number] for name, summary in table.items()} for table in (self._kinds, self._languages)
        )
        return self._all.scores[number], kinds, languages


def _artifact(
    one: ModelPass, sweeps: Sequence[SweepScores], summaries: _Summaries, number: int, provenance: Provenance
) -> ArtifactEvaluation:
    scores, kinds, languages = summaries.of(number)
    model = one.model
    same = torch.stack([part.same_routes for part in sweeps]).sum(0).tolist()
    routed = sum(part.routed for part in sweeps)
    shares = iter([count / routed for count in same])
    return ArtifactEvaluation(
        name=one.name,
        path=str(model.path),
        format=model.format,
        bytes=model.bytes,
        parameters=model.parameters,
        scores=scores,
        kinds=kinds,
        languages=languages,
        router_agreement=tuple(next(shares) if moe else None for moe in model.config.moe_layers),
        roles=provenance.roles,
        ledger=provenance.ledger,
        coverage=provenance.coverage,
        fallbacks=provenance.fallbacks,
        recipe=provenance.recipe,
        fingerprint=provenance.fingerprint,
        seconds=one.seconds,
    )


def _environment(device: str) -> dict[str, str]:
    environment = {
        "quantkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(available_cores()),
        "device": device,
    }
    if device != "cpu":
        environment["device"] = torch.cuda.get_device_name(torch.device(device))
    return environment


def _processor() -> str:
    """The model of the processor where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines: list[Any] = path.read_text(encoding="utf-8", errors="replace").splitlines() if os.path.exists(path) else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
