"""One decoder layer over all samples, with someone watching what every unit receives.

The layer's units are visited in the order of the model: q/k/v, o, then the dense MLP, or the router, the shared expert and the
routed experts one after the other.  Of the weights only one unit pair is in memory at a time (gate and up with down), of the hidden
states only portions: they live in arrays that may be memory-mapped files.

An observer is shown each unit's inputs in portions and is told when all have been shown; that is when it may quantize the unit.
What later units see is then

* the reference: what the original weights give (``sequential=False``).  Inputs are shown while they are used, in one sweep.
* or what the replacement gives that the observer returns (``sequential=True``).  Inputs of a down projection then depend on how
  gate and up were quantized, so each unit needs a sweep of its own.

Sums are cut into tiles of fixed size (see :mod:`quantkit.team`), so the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit import forward
from quantkit.checkpoint import Checkpoint
from quantkit.llama4 import Unit
from quantkit.team import Team, multiply, spans
from quantkit.workspace import Workspace

PORTION = 4096  # tokens at a time


@dataclass(frozen=True)
class Borrowed:
    """Tokens lent to an expert that received too few: their rows, int64 ``[count]``, and what each counts beside a routed one."""

    tokens: torch.Tensor
    weight: float


class Observer(Protocol):
    """Watches a layer pass."""

    def routed(self, layer: int, tokens: torch.Tensor, routing: forward.Routing) -> None:
        """All tokens of a MoE layer have been routed.  tokens: int64 ``[count]``, the rows of ``routing``."""

    def lend(self, unit: Unit) -> Borrowed | None:
        """Tokens that the routed expert of ``unit`` shall be shown beside its own."""

    def shown(self, unit: Unit, rows: torch.Tensor, tokens: torch.Tensor, weight: float) -> None:
        """A portion of the inputs of ``unit``: float32 ``[count, in]``, of these tokens; each row counts ``weight``."""

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor, sample: int) -> None:
        """Keys and values of one sample as a cache would hold them; called by several threads at once.

        keys: ``[length, key_value_heads, head_dim]``.  values: ``[length, key_value_heads * head_dim]``.
        """

    def complete(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str]) -> list[torch.Tensor] | None:
        """All inputs of ``unit`` were shown.  weights: its matrices ``[out, in]`` with the digests of their source bytes.

        Returns what the unit becomes, float32 ``[out, in]``, or None; only looked at by a sequential pass.  It must stay valid
        until the unit after the next one is complete.
        """

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What the complete shared expert became in each artifact that wants its routed experts to make up for the difference.

        The number of the artifact; gate, up and down, float32 ``[out, in]``.  :meth:`deviated` is called for one before the next
        is asked for.
        """

    def deviated(self, number: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """What the shared expert of artifact ``number`` lacks for these tokens: float32 ``[count, hidden]``, original -
        replaced."""


@dataclass(frozen=True)
class Samples:
    """How tokens lie in the arrays of hidden states: sample s has rows ``s * length .. s * length + lengths[s]``.

    tokens: int64, the rows that hold a token, in order.
    """

    count: int
    length: int
    lengths: tuple[int, ...]
    tokens: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, length: int) -> Samples:
        """lengths: int ``[samples]``; ``length``: rows kept for each."""
        valid = torch.arange(length) < lengths[:, None]
        return cls(len(lengths), length, tuple(lengths.tolist()), valid.reshape(-1).nonzero()[:, 0])


class LayerPass:
    """One layer over all samples.

    hidden: float32 ``[rows, hidden]``, what enters the layer.  output: the same shape, receives what leaves it.  scratch: float32
    ``[rows, max(hidden, heads * head_dim)]``; a third array.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Sequence[Unit],
        layer: int,
        samples: Samples,
        team: Team,
        observer: Observer,
        *,
        sequential: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._layer = layer
        self._samples = samples
        self._team = team
        self._observer = observer
        self._sequential = sequential
        self._workspace = workspace or Workspace()
        self._readers = (Workspace(), Workspace())  # of gate and up, and of down: both are at hand
        self._matrices = {unit.key.rpartition(".")[2]: unit for unit in units if unit.matrices and unit.expert is None}
        self._experts = [unit for unit in units if unit.expert is not None]
        self._base = f"{self._config.prefix}model.layers.{layer}."

    def run(self, hidden: torch.Tensor, output: torch.Tensor, scratch: torch.Tensor) -> None:
        """Compute the layer."""
        self._attention(hidden, output, scratch)
        attended, norm = output, self._vector("post_attention_layernorm.weight")

        def rows_of(tokens: torch.Tensor) -> torch.Tensor:
            return forward.rms_norm(attended[tokens], self._config.rms_norm_eps, norm)

        if not self._config.moe_layers[self._layer]:

            def add(tokens: torch.Tensor, result: torch.Tensor) -> None:
                output[tokens] += result

            self._mlp(self._matrices["gate_up_proj"], self._matrices["down_proj"], self._samples.tokens, rows_of, add)
            return
        self._experts_and_router(rows_of, output, scratch)

    # --------------------------------------------------------------------------------------------------------- attention

    def _attention(self, hidden: torch.Tensor, output: torch.Tensor, scratch: torch.Tensor) -> None:
        config, samples = self._config, self._samples
        norm = self._vector("input_layernorm.weight")
        joined, out = self._matrices["qkv"], self._matrices["o_proj"]
        context = scratch[:, : config.num_heads * config.head_dim]

        def rows_of(tokens: torch.Tensor) -> torch.Tensor:
            return forward.rms_norm(hidden[tokens], config.rms_norm_eps, norm)

        for tokens in self._portions(samples.tokens):
            self._observer.shown(joined, rows_of(tokens), tokens, 1.0)
        device = self._team.device or torch.device("cpu")
        projections = [weight.to(device) for weight in self._ready(joined, self._readers[0])]
        biases = [None if bias is None else bias.to(device) for bias in map(self._bias, ("q_proj", "k_proj", "v_proj"))]

        def attend(sample: int) -> None:
            tokens = torch.arange(sample * samples.length, sample * samples.length + samples.lengths[sample])
            rows = rows_of(tokens).to(device)
            queries, keys, values = (
                rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
                for weight, bias in zip(projections, biases, strict=True)
            )
            self._observer.cached(self._layer, forward.cached_keys(config, self._layer, keys), values, sample)
            context[tokens] = forward.attend(config, self._layer, queries, keys, values).cpu()

        self._team.run(attend, [sample for sample, length in enumerate(samples.lengths) if length])
        for tokens in self._portions(samples.tokens):
            self._observer.shown(out, context[tokens], tokens, 1.0)
        (weight,) = self._ready(out, self._readers[0])
        bias = self._bias("o_proj")
        for tokens in self._portions(samples.tokens):
            result = self._product(context[tokens], weight.t())
            output[tokens] = hidden[tokens] + (result if bias is None else result + bias)

    # ------------------------------------------------------------------------------------------------------ feed forward

    def _experts_and_router(
        self, rows_of: Callable[[torch.Tensor], torch.Tensor], output: torch.Tensor, scratch: torch.Tensor
    ) -> None:
        """Shared expert and routed experts.  ``output`` holds what attention left; what is added to it gathers in ``scratch``."""
        config, tokens = self._config, self._samples.tokens
        added = scratch[:, : config.hidden_size]
        router = self._checkpoint.read_slice(f"{self._base}feed_forward.router.weight").to(torch.float32)
        parts = [forward.route(rows_of(part), router, config.experts_per_token) for part in self._portions(tokens)]
        routing = forward.Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in ("experts", "scores", "logits")))
        del parts
        self._observer.routed(self._layer, tokens, routing)

        def begin(part: torch.Tensor, result: torch.Tensor) -> None:
            added[part] = result

        gate_up, down = self._matrices["gate_up_proj"], self._matrices["down_proj"]
        self._mlp(gate_up, down, tokens, rows_of, begin)
        self._deviations(gate_up, down, rows_of, added)

        def add(part: torch.Tensor, result: torch.Tensor) -> None:
            added[part] += result

        scores = torch.zeros(output.shape[0])  # of the expert at work, by token
        for gate_up, down in zip(self._experts[::2], self._experts[1::2], strict=True):
            expert = gate_up.expert
            assert expert is not None and expert == down.expert
            places, slots = torch.eq(routing.experts, expert).nonzero(as_tuple=True)
            scores[tokens] = torch.sigmoid(routing.logits[:, expert])

            def scaled(part: torch.Tensor) -> torch.Tensor:
                return rows_of(part) * scores[part, None]

            scores[tokens[places]] = routing.scores[places, slots]
            self._mlp(gate_up, down, tokens[places], scaled, add, self._observer.lend(gate_up))
        for part in self._portions(tokens):
            output[part] += added[part]

    def _deviations(
        self, gate_up: Unit, down: Unit, rows_of: Callable[[torch.Tensor], torch.Tensor], results: torch.Tensor
    ) -> None:
        """Tell the observer how each quantized shared expert differs from the original, for the inputs that this pass has seen.

        results: by token, those of the original; in a sequential pass those of the replacement, which has one.
        """
        for number, (gate, up, last) in self._observer.became(gate_up, down):
            if self._sequential:
                gate, up = self._floats("wide", self._read(gate_up, self._readers[0])[0])
                (last,) = self._floats("narrow", self._read(down, self._readers[1])[0])
            for part in self._portions(self._samples.tokens):
                other = self._product(self._gated(rows_of(part), gate, up), last.t())
                self._observer.deviated(number, part, other.sub_(results[part]) if self._sequential else results[part].sub_(other))

    def _mlp(
        self,
        gate_up: Unit,
        down: Unit,
        tokens: torch.Tensor,
        rows_of: Callable[[torch.Tensor], torch.Tensor],
        emit: Callable[[torch.Tensor, torch.Tensor], None],
        borrowed: Borrowed | None = None,
    ) -> None:
        """A gated MLP on ``rows_of(tokens)``; ``emit`` gets tokens and results.  Borrowed tokens are shown and nothing more."""
        shows = [(part, 1.0) for part in self._portions(tokens)]
        emitting = len(shows)
        if borrowed is not None:
            shows += [(part, borrowed.weight) for part in self._portions(borrowed.tokens)]
        if not self._sequential:
            (gate, up), digests = self._read(gate_up, self._readers[0])
            (last,), last_digests = self._read(down, self._readers[1])
            wide, narrow = (self._floats(name, weights) for name, weights in (("wide", (gate, up)), ("narrow", (last,))))
            for number, (part, weight) in enumerate(shows):
                rows = rows_of(part)
                self._observer.shown(gate_up, rows, part, weight)
                inner = self._gated(rows, *wide)
                self._observer.shown(down, inner, part, weight)
                if number < emitting:
                    emit(part, self._product(inner, narrow[0].t()))
                del rows, inner
            del wide, narrow
            if gate_up.expert is None:  # wider than an expert and once in a layer: not kept beside what the methods need
                self._workspace.release("wide 0", "wide 1", "narrow 0")
            self._observer.complete(gate_up, (gate, up), digests)
            self._observer.complete(down, (last,), last_digests)
            return
        for part, weight in shows:
            self._observer.shown(gate_up, rows_of(part), part, weight)
        wide = self._ready(gate_up, self._readers[0], "wide")
        for part, weight in shows:
            self._observer.shown(down, self._gated(rows_of(part), *wide), part, weight)
        (narrow_weight,) = self._ready(down, self._readers[1], "narrow")
        for part, _ in shows[:emitting]:
            emit(part, self._product(self._gated(rows_of(part), *wide), narrow_weight.t()))

    # ------------------------------------------------------------------------------------------------------------- parts

    def _portions(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        return (tokens[portion] for portion in spans(len(tokens), PORTION))

    def _read(self, unit: Unit, reader: Workspace) -> tuple[list[torch.Tensor], list[str]]:
        return self._checkpoint.read_unit(unit, reader)

    def _ready(self, unit: Unit, reader: Workspace, name: str = "wide") -> list[torch.Tensor]:
        """Let the observer complete the unit; the weights to go on with, float32 ``[out, in]``."""
        weights, digests = self._read(unit, reader)
        replaced = self._observer.complete(unit, weights, digests)
        return replaced if self._sequential and replaced is not None else self._floats(name, weights)

    def _floats(self, name: str, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Float32 copies, each with the strides of its source, in reused memory."""
        return [self._float(f"{name} {number}", weight) for number, weight in enumerate(weights)]

    def _float(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        transposed = weight.stride(0) == 1
        stored = weight.t() if transposed else weight
        copy = torch.from_numpy(self._workspace.take(name, 4 * stored.numel())).view(torch.float32).view(stored.shape)

        def convert(rows: slice) -> None:
            copy[rows] = stored[rows]

        self._team.run(convert, spans(stored.shape[0], 512))
        return copy.t() if transposed else copy

    def _product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return multiply(self._team, rows, weight, torch.empty(rows.shape[0], weight.shape[1]))

    def _gated(self, rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return forward.gated(self._product(rows, gate.t()), self._product(rows, up.t()))

    def _vector(self, name: str) -> torch.Tensor:
        return self._checkpoint.read_slice(f"{self._base}{name}").to(torch.float32)

    def _bias(self, projection: str) -> torch.Tensor | None:
        name = f"{self._base}self_attn.{projection}.bias"
        return self._checkpoint.read_slice(name).to(torch.float32) if name in self._checkpoint.tensors else None
