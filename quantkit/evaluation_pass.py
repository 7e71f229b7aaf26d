"""One model and the windows of an evaluation: layer by layer, sweep by sweep, to final hidden states on disk.

A *sweep* is as many windows as are held in memory at once; each layer's weights are read once for all of them.  What leaves the
last layer is kept for the positions that count (FP16 with a scale for each row, see :mod:`quantkit.evaluation_cache`), with the
experts that every token went to.  Logits are made from what was kept, also in the run that made it: whether a state came from the
cache or was just computed never shows in a figure.

Within a sweep the hidden states are saved after a layer when a minute has passed since the last time, so a killed run repeats at
most about that and one layer.  How windows are cut into sweeps follows from the model's width alone, not from the memory that
happens to be free: the bytes of a product may depend on how many rows it has, and a resumed run must give what an undisturbed one
does.  On a device sweeps are longer, since bringing weights there takes longer than the products.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from quantkit.errors import ArtifactError, CheckpointError, Interrupted
from quantkit.evaluation_cache import Entry, EvaluationCache, decode_rows, encode_rows
from quantkit.evaluation_checks import artifact_errors, reference_errors
from quantkit.inference import Inference
from quantkit.layer_pass import Samples
from quantkit.stored_model import StoredModel
from quantkit.team import Team, spans
from quantkit.windows import Windows

SAVE_SECONDS = 60.0  # between saved states of an unfinished sweep
SWEEP_ELEMENTS = 16384 * 5120  # of the hidden states of a sweep: 16,384 tokens of a Scout
ENCODED_ROWS = 256  # of final states, by a thread at a time
DEVICE_SWEEP_ELEMENTS = 4 * SWEEP_ELEMENTS  # some 6 GB of a device while a layer is computed
STOPPED = "Stopped. What was saved is kept, but for the last minute or so: the same command goes on from there."


@dataclass(frozen=True)
class EvaluationProgress:
    """Where an evaluation is.

    phase: ``check`` (hashing files), ``reference`` or ``artifact`` (layers), ``scores`` (logits), ``golden``, ``intervals`` (the
    bootstrap).  model: its name, empty for ``intervals``, which are computed for all at once.  tokens: token-layers done of
    ``tokens_total`` of this model; bytes in the phase ``check``, positions in ``scores``, questions in ``golden``, and groups of
    text in ``intervals``.  seconds: since the beginning.
    """

    phase: str
    model: str
    layer: int
    layers: int
    tokens: int
    tokens_total: int
    seconds: float


class Watch:
    """Tells of progress, and hears when to stop."""

    def __init__(self, progress: Callable[[EvaluationProgress], None] | None, stop: threading.Event | None) -> None:
        self._progress, self._stop = progress, stop
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @property
    def stopping(self) -> bool:
        """Whether the run shall end."""
        return self._stop is not None and self._stop.is_set()

    def tell(self, phase: str, model: str, tokens: int, tokens_total: int, layer: int = 0, layers: int = 0) -> None:
        """Tell; see :class:`EvaluationProgress`."""
        if self._progress is not None:
            self._progress(EvaluationProgress(phase, model, layer, layers, tokens, tokens_total, self.seconds))

    def check(self) -> None:
        """Raises Interrupted when the run shall end."""
        if self.stopping:
            raise Interrupted(STOPPED)


@dataclass(frozen=True)
class Sweep:
    """Windows that go through the layers together."""

    number: int
    part: slice


def cut_sweeps(windows: Windows, hidden_size: int, batch_tokens: int | None, device: torch.device | None = None) -> list[Sweep]:
    """All windows in order; ``batch_tokens`` (None: by the model's width) at a time, at least one window."""
    count, length = windows.tokens.shape
    tokens = batch_tokens or (SWEEP_ELEMENTS if device is None else DEVICE_SWEEP_ELEMENTS) // hidden_size
    return [Sweep(number, part) for number, part in enumerate(spans(count, max(1, tokens // length)))]


class ModelPass:
    """The windows through one model.

    name: as tables show it.  key: names everything that its states depend on; also its folder in the cache.  device: where it runs,
    None for the CPU.
    """

    def __init__(
        self,
        model: StoredModel,
        name: str,
        key: str,
        windows: Windows,
        team: Team,
        cache: EvaluationCache,
        watch: Watch,
        *,
        device: torch.device | None,
        round_activations: bool,
        is_reference: bool,
    ) -> None:
        self.model, self.name, self.key = model, name, key
        self.seconds = 0.0  # of work for this model
        self._windows, self._team, self._cache, self._watch = windows, team, cache, watch
        self.device, self._round = device, round_activations
        self._is_reference, self._phase = is_reference, "reference" if is_reference else "artifact"
        self._inference: Inference | None = None
        self._done, self._total = 0, sum(windows.lengths) * model.config.num_layers

    def states(self, sweep: Sweep) -> Entry:
        """The final states of a sweep, to be closed by the caller: from the cache, or computed now.

        Arrays: ``halves`` and ``exponents`` of the predicting rows, ``routes`` int16 ``[tokens, MoE layers, k]``.
        Raises Interrupted, OutputError, and an ArtifactError (of a reference a CheckpointError) for values that are not finite.
        """
        name = f"{self.key}/states-{sweep.number:05d}"
        before, began = self._done, time.monotonic()
        try:
            entry = self._cache.open(name)
            if entry is None:
                with self.own_errors():
                    computed = self._compute(sweep)
                self._cache.save(name, computed)
                entry = self._cache.open(name)
            self._cache.remove(self._unfinished(sweep))
            if entry is None:
                raise ArtifactError(f"{self._cache.directory / name} reads back damaged: check the disk, or choose another cache.")
        finally:
            self.seconds += time.monotonic() - began
        self._done = before + sum(self._windows.lengths[sweep.part]) * self.model.config.num_layers
        return entry

    def forget(self, sweep: Sweep) -> None:
        """Remove the states of a sweep."""
        self._cache.remove(f"{self.key}/states-{sweep.number:05d}")

    def logits(self, states: Entry, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Logits of some predicting rows to ``out``, float32 ``[rows, vocabulary]`` on the device."""
        began = time.monotonic()
        hidden = decode_rows(states.read("halves", rows), states.read("exponents", rows))
        with self.own_errors():
            self._running().logits(hidden if self.device is None else hidden.to(self.device), out)
        self.seconds += time.monotonic() - began
        return out

    def failure(self, what: str, window: str) -> ArtifactError | CheckpointError:
        """An error about values that are not finite."""
        message = f"{self.model.path}: {what} of window {window} are not finite numbers. Its weights or scales are damaged"
        if self._is_reference:
            return CheckpointError(f"{message}: download it again.")
        return ArtifactError(f"{message}: run `quantkit verify` on it, or convert again.")

    def own_errors(self) -> AbstractContextManager[None]:
        """In it an error about files is one about this model's: of the reference a CheckpointError, else an ArtifactError."""
        return reference_errors() if self._is_reference else artifact_errors()

    def rest(self) -> None:
        """Give back memory between two sweeps: on the CPU all of it, on a device all but what is there for the next sweep, too."""
        if self.device is None:
            self.release()

    def release(self) -> None:
        """Give back the memory that layers and head were computed in."""
        self._inference = None

    # ------------------------------------------------------------------------------------------------------------- layers

    def _running(self) -> Inference:
        if self._inference is None:
            self._inference = Inference(self.model, self._team, device=self.device, round_activations=self._round)
        return self._inference

    def _unfinished(self, sweep: Sweep) -> str:
        return f"{self.key}/unfinished-{sweep.number:05d}"

    def _compute(self, sweep: Sweep) -> dict[str, torch.Tensor]:
        inference, samples, layers = self._running(), self._windows.samples(sweep.part), self.model.config.num_layers
        begin, hidden, routes = self._resumed(sweep, samples)
        begun = self._done
        self._told(begin, begun, samples)
        saved = time.monotonic()
        for layer in range(begin, layers):
            self._watch.check()
            routing = inference.layer(layer, hidden, samples)
            if routing is not None:
                routes = torch.cat([routes, routing.experts.to("cpu", torch.int16)[:, None]], 1)
            self._check_finite(hidden, f"hidden states after layer {layer}", sweep)
            self._told(layer + 1, begun, samples)
            if layer + 1 < layers and (self._watch.stopping or time.monotonic() - saved > SAVE_SECONDS):
                arrays = {"layer": torch.tensor([layer + 1]), "hidden": hidden.cpu(), "routes": routes}
                self._cache.save(self._unfinished(sweep), arrays)
                saved = time.monotonic()
        rows, _ = self._windows.predictions(sweep.part)
        halves = torch.empty(len(rows), hidden.shape[1], dtype=torch.float16)
        exponents = torch.empty(len(rows), dtype=torch.int16)

        def encode(part: slice) -> None:
            halves[part], exponents[part] = encode_rows(hidden[rows[part].to(hidden.device)].cpu())

        self._team.run(encode, spans(len(rows), ENCODED_ROWS))
        return {"halves": halves, "exponents": exponents, "routes": routes}

    def _resumed(self, sweep: Sweep, samples: Samples) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The layer to begin with, what enters it, and the routes so far."""
        entry = self._cache.open(self._unfinished(sweep))
        if entry is not None:
            with entry:
                hidden, routes = entry.read("hidden"), entry.read("routes")
                return int(entry.read("layer")), hidden if self.device is None else hidden.to(self.device), routes
        hidden = self._running().embed(self._windows.tokens[sweep.part].reshape(-1))
        self._check_finite(hidden, "embeddings", sweep)
        routes = torch.empty((len(samples.tokens), 0, self.model.config.experts_per_token), dtype=torch.int16)
        return 0, hidden, routes

    def _told(self, layer: int, begun: int, samples: Samples) -> None:
        self._done = begun + layer * len(samples.tokens)
        self._watch.tell(self._phase, self.name, self._done, self._total, layer, self.model.config.num_layers)

    def _check_finite(self, hidden: torch.Tensor, what: str, sweep: Sweep) -> None:
        """Sums of rows find every value that is not finite without a copy; a sum that overflows is looked at again."""
        for row in (~torch.isfinite(hidden.sum(-1))).nonzero()[:, 0].tolist():
            if not bool(torch.isfinite(hidden[row]).all()):
                raise self.failure(what, self._windows.names[sweep.part.start + row // self._windows.tokens.shape[1]])
