"""Reference and artifacts side by side: from final hidden states to the scores of tokens, a portion of positions at a time.

Logits are never kept: those of a portion are made, compared and overwritten (:mod:`quantkit.kernels.divergence`; on a device, which
they do not leave, :mod:`quantkit.kernels.divergence_device`).  The reference's serve all artifacts of a run.  Scores are a few
numbers for each position, and are kept for each sweep and artifact, so a run that has them needs no hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch

from quantkit.errors import ArtifactError
from quantkit.estimate import available_memory
from quantkit.evaluation_cache import Entry, EvaluationCache
from quantkit.evaluation_pass import ModelPass, Sweep, Watch
from quantkit.kernels import divergence, divergence_device
from quantkit.kernels.divergence import ComparedRows
from quantkit.metrics import TokenScores, same_routes
from quantkit.ready_weights import device_memory
from quantkit.team import Team, spans
from quantkit.windows import Windows

# Positions at a time.  A head that does not fit into memory is read again for each portion, so they should be many; all are
# multiples of the tiles of a product, so figures do not depend on their number.
LEAST_PORTION, LARGEST_PORTION = 512, 4096
MEMORY_SHARE = 16  # of the free memory that logits may take
DEVICE_SHARE = 8  # of the free memory of a device


@dataclass(frozen=True)
class SweepScores:
    """One artifact in one sweep.  same_routes: by MoE layer the tokens that go to the same experts, int64; routed: of how many."""

    tokens: TokenScores
    same_routes: torch.Tensor
    routed: int


class Scorer:
    """Scores artifacts against a reference, by sweeps."""

    def __init__(self, reference: ModelPass, windows: Windows, team: Team, cache: EvaluationCache, watch: Watch) -> None:
        self._reference, self._windows, self._team, self._cache, self._watch = reference, windows, team, cache, watch

    def known(self, artifact: ModelPass, sweep: Sweep) -> SweepScores | None:
        """What the cache has; None when there is nothing sound."""
        entry = self._cache.open(self._name(artifact, sweep))
        if entry is None:
            return None
        with entry:
            tokens = TokenScores(**{field.name: entry.read(field.name) for field in fields(TokenScores)})
            return SweepScores(tokens, entry.read("same_routes"), int(entry.read("routed")))

    def score(self, artifacts: Sequence[ModelPass], sweep: Sweep) -> list[SweepScores]:
        """Compute and keep the scores of ``artifacts``.  Raises what :meth:`ModelPass.states` raises."""
        with ExitStack() as opened:
            states = {one: opened.enter_context(one.states(sweep)) for one in (self._reference, *artifacts)}
            compared = self._compare(states, artifacts, sweep)
            routes = states[self._reference].read("routes")
            found = []
            for artifact in artifacts:
                same = same_routes(routes, states[artifact].read("routes"))
                found.append(SweepScores(compared[artifact], same, len(routes)))
                self._save(artifact, sweep, found[-1])
        for one in (self._reference, *artifacts):
            one.rest()
        for artifact in artifacts:
            if artifact.key != self._reference.key:  # the reference's are used again
                artifact.forget(sweep)
        return found

    def _compare(
        self, states: Mapping[ModelPass, Entry], artifacts: Sequence[ModelPass], sweep: Sweep
    ) -> dict[ModelPass, TokenScores]:
        rows, targets = self._windows.predictions(sweep.part)
        vocabulary, device = self._reference.model.config.vocab_size, self._reference.device
        portion = max(1, min(_portion(vocabulary, device), len(rows)))
        left, right = torch.empty(2, portion, vocabulary, device=device)
        parts: dict[ModelPass, list[TokenScores]] = {artifact: [] for artifact in artifacts}
        for part in spans(len(rows), portion):
            count = part.stop - part.start
            reference_logits = self._reference.logits(states[self._reference], part, left[:count])
            try:
                compare = self._comparison(reference_logits, targets[part])
            except ArtifactError:
                raise self._failure(self._reference, reference_logits, rows[part], sweep) from None
            for artifact in artifacts:
                self._watch.tell("scores", artifact.name, part.start, len(rows))
                self._watch.check()
                logits = artifact.logits(states[artifact], part, right[:count])
                try:
                    compared = compare(logits)
                except ArtifactError:
                    raise self._failure(artifact, logits, rows[part], sweep) from None
                parts[artifact].append(_token_scores(compared))
                self._watch.tell("scores", artifact.name, part.stop, len(rows))
        return {artifact: TokenScores.joined(found) for artifact, found in parts.items()}

    def _comparison(self, reference_logits: torch.Tensor, targets: torch.Tensor) -> Callable[[torch.Tensor], ComparedRows]:
        """What compares logits of an artifact with these.  Both raise ArtifactError for logits that are not finite."""
        if self._reference.device is None:
            known = divergence.reference_rows(reference_logits, self._team)
            return lambda logits: divergence.compare_rows(reference_logits, known, logits, targets, self._team)
        there, wanted = divergence_device.reference_rows(reference_logits), targets.to(reference_logits.device)
        return lambda logits: divergence_device.compare_rows(reference_logits, there, logits, wanted)

    def _failure(self, one: ModelPass, logits: torch.Tensor, rows: torch.Tensor, sweep: Sweep) -> Exception:
        finite = torch.isfinite(logits).all(-1)
        row = int(rows[int(finite.to("cpu", torch.int8).argmin())])
        return one.failure("logits", self._windows.names[sweep.part.start + row // self._windows.tokens.shape[1]])

    def _save(self, artifact: ModelPass, sweep: Sweep, scores: SweepScores) -> None:
        arrays = {field.name: getattr(scores.tokens, field.name) for field in fields(TokenScores)}
        arrays |= {"same_routes": scores.same_routes, "routed": torch.tensor([scores.routed])}
        self._cache.save(self._name(artifact, sweep), arrays)

    def _name(self, artifact: ModelPass, sweep: Sweep) -> str:
        return f"{scores_folder(artifact, self._reference)}/scores-{sweep.number:05d}"


def scores_folder(artifact: ModelPass, reference: ModelPass) -> str:
    """Where the cache keeps the scores of an artifact."""
    return f"{artifact.key}-{reference.key}"


def _portion(vocabulary: int, device: torch.device | None) -> int:
    """Positions whose logits of two models are held at a time."""
    room = available_memory() // MEMORY_SHARE if device is None else device_memory(device) // DEVICE_SHARE
    fitting = room // (2 * 4 * vocabulary)
    return max(LEAST_PORTION, min(LARGEST_PORTION, fitting // LEAST_PORTION * LEAST_PORTION))


def _token_scores(compared: ComparedRows) -> TokenScores:
    def kept(values: object) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32)

    return TokenScores(
        reference_loss=kept(compared.reference_loss),
        loss=kept(compared.loss),
        divergence=kept(compared.divergence),
        agreement=torch.from_numpy(compared.top == compared.reference_top),
        probability_shift=kept(compared.probability - compared.reference_probability),
    )
