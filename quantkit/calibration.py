"""Calibration: the corpus goes through the model layer by layer, and every unit gets evidence of what it receives.

For each unit the inputs of all tokens are summed to a Hessian, their mean square and their peak; a routed expert is shown only the
tokens that the router sends to it, scaled by their score as in the model.  A Hessian is formed, used and dropped before the next
one, so memory is that of one expert, and the work grows with the tokens, not with tokens times experts.

An expert that received fewer than twice as many tokens as it has inputs is lent others, as many as it has or a few: those for
which the router likes it best among the tokens it did not get, scaled by that expert's own score for them, as if they had been
sent to it.  A borrowed token counts less than an own one.  How many were lent stands in the ledger and in the
coverage.  (``benchmarks/results/cold_experts.md`` compares with shrinking the Hessian toward that of the layer.)

Routed experts also make up for their shared expert.  Every token passes through both, so a routed expert that is quantized after
the shared one can be asked for its own output plus what the shared one now lacks: the down projection is then rounded toward the
least squares solution of that, for its own tokens; for borrowed ones it shall stay what it is.  Of all that was tried this gains
most, a quarter of the divergence and more.

What later layers see is the reference by default: then all artifacts of a run share one calibration.  With ``sequential`` they see
what the layers before became, and each artifact has a calibration of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from quantkit import forward
from quantkit.calibration_state import CalibrationState
from quantkit.checkpoint import Checkpoint
from quantkit.corpus import Corpus, Packing
from quantkit.engine import INTERRUPTED
from quantkit.errors import CalibrationError, Interrupted
from quantkit.evidence import Evidence, Received
from quantkit.language_model import embed
from quantkit.layer_pass import Borrowed, LayerPass, Samples
from quantkit.llama4 import Unit
from quantkit.smoothing import inner_unit, smoothing_factors
from quantkit.statistics import ExpertCounts, Statistics, merge
from quantkit.team import Team, add_gram, add_product, spans
from quantkit.workspace import Workspace

BORROWED_WEIGHT = 0.25  # what a lent token counts beside an own one
ENOUGH_ROWS = 2.0  # own tokens for each input of an expert's down projection from which nothing is lent
LEAST_ROWS = 0.5  # and how many for each input are lent at most to one that has fewer of its own; else as many as it has
LEAST_TO_LEARN = 0.25  # own tokens for each input from which an expert makes up for the shared one


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    corpus: a file, directory or hub dataset; None for the bundled corpus.
    samples: how many, None for all.
    sequence_length: tokens of each.
    seed: chooses among more samples than asked for.
    packing: ``packed`` joins documents, ``documents`` cuts each.
    minimum_expert_tokens: fail when a routed expert gets fewer.
    sequential: later layers see quantized inputs.
    statistics: of a former calibration, for recipes that need no Hessians.
    device: ``cpu``, or ``cuda`` for large products, attention and GPTQ on a GPU (extra "cuda").
    """

    corpus: str | Path | None = None
    samples: int | None = None
    sequence_length: int = 2048
    seed: int = 0
    packing: Packing = "packed"
    minimum_expert_tokens: int = 0
    sequential: bool = False
    statistics: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length", "seed", "minimum_expert_tokens"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int)) and not (name == "samples" and value is None):
                raise CalibrationError(f"{name} is {value!r}; expected a whole number")
        if self.minimum_expert_tokens < 0:
            raise CalibrationError(f"minimum_expert_tokens is {self.minimum_expert_tokens}; expected 0 or more")

    def accelerator(self) -> torch.device | None:
        """The GPU that ``device`` names, None for the CPU.  Raises CalibrationError when there is no such GPU."""
        if self.device == "cpu":
            return None
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise CalibrationError(f"device is {self.device!r}; expected cpu, cuda or cuda:N") from error
        count = torch.cuda.device_count()
        if device.type != "cuda" or (device.index or 0) >= count:
            there = "no CUDA GPU" if not count else "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            advice = ""
            if device.type == "cuda" and torch.version.cuda is None:
                advice = f" This torch ({torch.__version__}) is built without CUDA: install one with it, and quantkit[cuda]."
            elif device.type == "cuda" and not count:
                advice = " nvidia-smi tells whether the driver sees a GPU; CUDA_VISIBLE_DEVICES may hide it."
            raise CalibrationError(
                f"there is no device {self.device!r} here: expected cpu, or a GPU, and torch sees {there}.{advice}"
            )
        # the current device is a thread's own: by its number it is the same one in all threads
        return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a unit.

    missing: by number of the artifact, ``Evidence.missing`` of an expert that makes up for the shared one.  smoothing: the factors
    of the MLP that the unit belongs to, if its down projection's inputs are known by now.  cache_peaks: largest key and value of
    the layer, known from its output projection on.
    """

    evidence: Evidence
    received: Received
    cache_peaks: tuple[float, float]
    missing: Mapping[int, torch.Tensor]
    smoothing: torch.Tensor | None = None


class Handler(Protocol):
    """What is done with the units as calibration comes to them."""

    def wants_hessian(self, unit: Unit) -> bool:
        """Whether the Hessian of the unit's inputs is needed."""

    def makes_up(self, unit: Unit) -> Sequence[int]:
        """The numbers of the artifacts in which this unit makes up for what the shared expert of its layer lacks."""

    def convert(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str], seen: Seen) -> list[torch.Tensor] | None:
        """All is known of a unit; what is returned only matters in a sequential pass.  See ``layer_pass.Observer``."""

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What the shared expert became, artifact by artifact; see ``layer_pass.Observer``."""


def run_layers(
    checkpoint: Checkpoint,
    corpus: Corpus,
    units: Sequence[Unit],
    state: CalibrationState,
    team: Team,
    *,
    handler: Handler,
    first: int,
    sequential: bool = False,
    minimum_expert_tokens: int = 0,
    stop: threading.Event | None = None,
) -> Statistics:
    """Send the corpus through all layers.

    handler: is given every unit with matrices, in the order of the model.  first: the first layer with anything left to do;
    calibration begins there if its input is on disk, else before.

    Raises CalibrationError for values that are not finite (with layer, expert and sample) and for too little data, OutputError,
    Interrupted.
    """
    layers = checkpoint.config.num_layers
    samples = Samples.of(corpus.lengths, corpus.tokens.shape[1])
    width = max(checkpoint.config.hidden_size, checkpoint.config.num_heads * checkpoint.config.head_dim)
    start = state.resume(first)
    if start == 0:
        embed(checkpoint, corpus.tokens.reshape(-1).to(torch.int64), state.hidden(0))
        state.commit(0, None)
    parts = [state.statistics(layer) for layer in range(start)]
    for part in parts:  # of a former run, which may have asked for less
        check_tokens(part, minimum_expert_tokens)
    for layer in range(start, layers):
        workspace = Workspace()  # of this layer's widths: dense layers are wider than experts
        watcher = Watcher(corpus, samples, layer, team, workspace, handler, state.scratch, minimum_expert_tokens, stop)
        own = [unit for unit in units if unit.layer == layer]
        layer_pass = LayerPass(checkpoint, own, layer, samples, team, watcher, sequential=sequential, workspace=workspace)
        layer_pass.run(state.hidden(layer), state.hidden(layer + 1), state.scratch("context", width))
        statistics = watcher.statistics()
        state.commit(layer + 1, statistics)
        parts.append(statistics)
    return merge(parts)


def check_tokens(statistics: Statistics, minimum: int) -> None:
    """Raise CalibrationError when a routed expert received fewer tokens than ``minimum``."""
    for layer, counts in statistics.experts.items():
        few = [f"expert {expert} ({int(tokens)})" for expert, tokens in enumerate(counts.tokens) if tokens < minimum]
        if few:
            more = f" and {len(few) - 8} more" if len(few) > 8 else ""
            raise CalibrationError(
                f"layer {layer}: {len(few)} experts received fewer than {minimum} tokens: {', '.join(few[:8])}{more}. Calibrate on "
                "more samples or on text closer to their use, or lower the minimum."
            )


def rows_to_lend(own: int, width: int) -> int:
    """How many tokens an expert with so many of its own and a down projection of so many inputs shall borrow.

    At most as many as it has, so that experts with little never cost more than twice what their tokens do.
    """
    return max(0, min(int(ENOUGH_ROWS * width) - own, max(own, int(LEAST_ROWS * width))))


class _Inputs:
    """Sums over the inputs of one unit.  missing: by number of an artifact, the sum of ``deviation^T row``."""

    def __init__(self, width: int, gram: torch.Tensor | None, missing: Mapping[int, torch.Tensor]) -> None:
        self.total = 0.0  # weight of all rows
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.peak = torch.zeros(width)
        self.gram = gram
        self.missing = missing

    def add(self, team: Team, rows: torch.Tensor, weight: float, deviations: Mapping[int, torch.Tensor]) -> None:
        if not len(rows):
            return
        self.total += weight * len(rows)
        for part in spans(len(rows)):  # a copy of all rows would be the largest thing held here
            self.peak = torch.maximum(self.peak, rows[part].abs().amax(0))
            self.squares += weight * rows[part].square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            add_gram(team, rows if weight == 1.0 else rows * weight**0.5, self.gram)
        for number, total in self.missing.items() if weight == 1.0 else ():  # an expert is not bent for tokens it only borrows
            add_product(team, deviations[number], rows, total)

    def evidence(self, tokens: int) -> Evidence:
        total = max(self.total, 1e-30)
        mean_square = (self.squares / total).to(torch.float32)
        for missing in self.missing.values():
            missing.div_(total)
        hessian = None if self.gram is None else self.gram.div_(total)
        return Evidence(tokens, mean_square, self.peak, hessian, rows=self.total)


class Watcher:
    """The observer of a calibrated layer pass: sums up what each unit is shown and hands it on when the unit is complete."""

    def __init__(
        self,
        corpus: Corpus,
        samples: Samples,
        layer: int,
        team: Team,
        workspace: Workspace,
        handler: Handler,
        scratch: Callable[[str, int], torch.Tensor],
        minimum_expert_tokens: int,
        stop: threading.Event | None,
    ) -> None:
        self._corpus, self._samples, self._layer, self._team, self._workspace = corpus, samples, layer, team, workspace
        self._handler, self._scratch, self._stop = handler, scratch, stop
        self._minimum = minimum_expert_tokens
        self._deviations: dict[int, torch.Tensor] = {}  # by number of the artifact
        self._kinds = corpus.token_kinds.reshape(-1).to(torch.int64)
        self._open: dict[str, _Inputs] = {}
        self._inputs: dict[str, Evidence] = {}
        self._routing: tuple[torch.Tensor, forward.Routing] | None = None
        self._counts: ExpertCounts | None = None
        self._experts_per_token = 1
        self._key_peaks = torch.zeros(samples.count)
        self._value_peaks = torch.zeros(samples.count)

    # ---------------------------------------------------------------------------------------------------------- observer

    def routed(self, layer: int, tokens: torch.Tensor, routing: forward.Routing) -> None:
        """Count what each expert receives."""
        experts, chosen = routing.logits.shape[1], routing.experts.shape[1]
        self._check(routing.logits, tokens, "router")
        self._routing, self._experts_per_token = (tokens, routing), chosen
        count = torch.zeros(experts, dtype=torch.int64)
        mass, margin = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        kinds = torch.zeros(experts, len(self._corpus.kinds), dtype=torch.int64)
        largest = routing.logits.topk(min(chosen + 1, experts), dim=-1).values
        for slot in range(chosen):
            expert = routing.experts[:, slot]
            count.index_add_(0, expert, torch.ones_like(expert))
            mass.index_add_(0, expert, routing.scores[:, slot].to(torch.float64))
            margin.index_add_(0, expert, (largest[:, slot] - largest[:, -1]).to(torch.float64))
            kinds.index_put_((expert, self._kinds[tokens]), torch.ones_like(expert), accumulate=True)
        self._counts = ExpertCounts(layer, count, mass, margin / count.clamp(min=1), kinds, torch.zeros_like(count))
        check_tokens(self.statistics(), self._minimum)  # before any of them is quantized

    def lend(self, unit: Unit) -> Borrowed | None:
        """Tokens for an expert that received too few, best liked first."""
        assert self._routing is not None and self._counts is not None and unit.expert is not None
        (tokens, routing), expert = self._routing, unit.expert
        own = int(self._counts.tokens[expert])
        wanted = rows_to_lend(own, unit.matrices[0].shape[0])
        if wanted <= 0:
            return None
        others = (routing.experts != expert).all(dim=1).nonzero()[:, 0]
        best = torch.argsort(routing.logits[others, expert], descending=True, stable=True)[:wanted]
        chosen = tokens[others[best]].sort().values
        self._counts.borrowed[expert] = len(chosen)
        return Borrowed(chosen, BORROWED_WEIGHT)

    def shown(self, unit: Unit, rows: torch.Tensor, tokens: torch.Tensor, weight: float) -> None:
        """Add a portion of a unit's inputs to its sums."""
        if self._stop is not None and self._stop.is_set():
            raise Interrupted(INTERRUPTED)
        self._check(rows, tokens, unit.key)
        sums = self._sums(unit)
        sums.add(self._team, rows, weight, {number: self._deviations[number][tokens] for number in sums.missing})

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor, sample: int) -> None:
        """Note the largest key and value of a sample."""
        self._key_peaks[sample], self._value_peaks[sample] = keys.abs().max(), values.abs().max()

    def complete(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str]) -> list[torch.Tensor] | None:
        """Hand the unit on with its evidence."""
        sums, tokens, received = self._sums(unit), len(self._samples.tokens), None
        if unit.expert is not None:
            assert self._counts is not None
            tokens = int(self._counts.tokens[unit.expert])
            received = Received(tokens, int(self._counts.borrowed[unit.expert]), float(self._counts.score_mass[unit.expert]))
        evidence = sums.evidence(tokens)
        self._inputs[unit.key] = Evidence(tokens, evidence.mean_square, evidence.peak)
        missing = sums.missing if tokens >= LEAST_TO_LEARN * len(evidence.peak) else {}
        seen = Seen(evidence, received or Received(tokens, 0, float(tokens)), self._cache_peaks(), missing, self._smoothing(unit))
        replaced = self._handler.convert(unit, weights, digests, seen)
        del self._open[unit.key]
        return replaced

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What the shared expert became in each artifact whose routed experts make up for it."""
        return self._handler.became(gate_up, down)

    def deviated(self, number: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep what the shared expert of an artifact lacks; with several experts for a token each makes up for its share."""
        if number not in self._deviations:
            self._deviations[number] = self._scratch(f"deviation-{number}", rows.shape[1])
        self._deviations[number][tokens] = rows / self._experts_per_token

    # -------------------------------------------------------------------------------------------------------------- parts

    def statistics(self) -> Statistics:
        """What was seen in this layer."""
        return Statistics(
            inputs=self._inputs,
            experts={} if self._counts is None else {self._layer: self._counts},
            cache_peaks={self._layer: self._cache_peaks()},
            kinds=self._corpus.kinds,
            description={},
        )

    def _smoothing(self, unit: Unit) -> torch.Tensor | None:
        inner = self._open.get(inner_unit(unit.key) or "")
        return None if inner is None else smoothing_factors(inner.peak)

    def _cache_peaks(self) -> tuple[float, float]:
        return float(self._key_peaks.max()), float(self._value_peaks.max())

    def _sums(self, unit: Unit) -> _Inputs:
        if unit.key not in self._open:
            height, width = unit.matrices[0].shape
            name = "down" if unit.matrices[0].projection == "down_proj" else "input"  # these two are summed side by side
            gram = self._zeros(f"hessian {name}", width, width) if self._handler.wants_hessian(unit) else None
            missing = {number: self._zeros(f"missing {number}", height, width) for number in self._handler.makes_up(unit)}
            self._open[unit.key] = _Inputs(width, gram, missing)
        return self._open[unit.key]

    def _zeros(self, name: str, *shape: int) -> torch.Tensor:
        return self._workspace.tensor(name, torch.float32, *shape).zero_()

    def _check(self, rows: torch.Tensor, tokens: torch.Tensor, what: str) -> None:
        """Raise CalibrationError when a value is not finite, with the sample that it belongs to."""
        if bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all()):
            return
        row = int(torch.isfinite(rows).all(dim=1).logical_not().nonzero()[0])
        sample, position = divmod(int(tokens[row]), self._samples.length)
        raise CalibrationError(
            f"layer {self._layer}, input of {what}: NaN or infinite at token {position} of sample {sample} "
            f"({self._corpus.sample_names[sample]}). The weights before it are damaged, or this text drives the model out of "
            "range: check the source, or leave the text out."
        )
