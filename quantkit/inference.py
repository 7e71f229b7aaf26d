"""A stored model at work: hidden states through one layer at a time, weights read once for all tokens of a sweep.

So a model runs where it does not fit: memory is the hidden states of the sweep, one expert, and portions.  Products go through the
kernels (:mod:`quantkit.kernels.dispatch`), which take each matrix as it is stored; everything between them is that of
:mod:`quantkit.forward`, in float32.  On the CPU the bytes do not depend on the number of threads (see :mod:`quantkit.team`).

With a cache of keys and values the same layers continue texts: then the tokens given are those that follow what the cache holds.
Which weights stay in memory is decided by :mod:`quantkit.ready_weights` and, on the CPU, :mod:`quantkit.kept_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from quantkit import device_attention, forward
from quantkit.device_attention import Padded, Projected
from quantkit.errors import ArtifactError
from quantkit.kept_model import KEPT_BYTES, KeptModel
from quantkit.kernels.device_weights import DeviceWeight
from quantkit.kernels.dispatch import Backend, check_device, dequant_matmul, moe_forward
from quantkit.kernels.moe_tiles import KnownRows
from quantkit.kernels.weights import Weight
from quantkit.layer_pass import PORTION, Samples
from quantkit.llama4 import Unit, units_by_layer
from quantkit.ready_weights import DeviceWeights, ReadyWeights, StoredWeights
from quantkit.stored_model import StoredModel
from quantkit.team import Team, multiply, spans
from quantkit.workspace import Workspace

LOGITS_ROWS = 512  # that a device multiplies at a time: the bits of a product may depend on how many there are
NORMALIZED = 64 * 5120  # numbers that a thread normalizes at a time, so that they stay in its cache

ATTENDED = 64 << 20  # numbers of queries that threads attend with at the same time, each of which needs some three besides

Heads = tuple[slice, slice, slice, slice]  # samples, positions, and columns of queries and of keys


@dataclass
class KeyValueCache:
    """Keys and values of texts that are being continued.

    lengths: tokens that each sample has in the cache.  layers: by layer and sample, keys and values ``[length, key_value_heads,
    head_dim]``; on a device those of all samples are ``padded`` instead.
    """

    lengths: list[int]
    layers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    padded: Padded = field(default_factory=Padded)

    @classmethod
    def of(cls, ends: Sequence[int]) -> KeyValueCache:
        """Nothing yet, of texts that will have at most so many tokens."""
        return cls([0] * len(ends), padded=Padded(max(ends)))

    def advance(self, samples: Samples) -> None:
        """All layers have seen the tokens of ``samples``."""
        self.lengths = [length + more for length, more in zip(self.lengths, samples.lengths, strict=True)]
        self.padded.steps.clear()

    def forget(self, sample: int) -> None:
        """Let go of the keys and values of a finished sample; what is padded goes with the whole cache."""
        for place in [place for place in self.layers if place[1] == sample]:
            del self.layers[place]


class Inference:
    """model: what runs.  team: threads, single-threaded BLAS each.  device: where products are computed, None for the CPU.

    round_activations: round inputs of matrices as clients do where a scheme asks for it.  kept_bytes: of layers and embedding that
    stay on the device from one call to the next, None for as many as it has room for.

    Raises RecipeError where products cannot be computed on the device.
    """

    def __init__(
        self,
        model: StoredModel,
        team: Team,
        *,
        device: torch.device | None = None,
        round_activations: bool = True,
        kept_bytes: int | None = 0,
    ) -> None:
        if device is not None:
            check_device(device)
        self.model, self.config = model, model.config
        self._team, self._device, self._round = team, device, round_activations
        self._backend: Backend | None = None if device is None else "triton"
        self._workspace = Workspace()
        self._known_rows = KnownRows()
        self._weights: ReadyWeights = StoredWeights(model) if device is None else DeviceWeights(model, team, device, kept_bytes)
        self._frequencies = model.frequencies if device is None else model.frequencies.to(device)
        self._layers = units_by_layer(model.units, self.config.num_layers)
        self._placed: tuple[Samples, torch.Tensor] | None = None  # the samples seen last, and the rows of their tokens

    # -------------------------------------------------------------------------------------------------- beginning and end

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of ``tokens`` (int64 ``[rows]``), float32 ``[rows, hidden]``.  Raises ArtifactError for an id beyond the
        vocabulary."""
        vocabulary = self.config.vocab_size
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            wrong = int(tokens[(tokens < 0) | (tokens >= vocabulary)][0])
            raise ArtifactError(
                f"{self.model.path} has no token {wrong}: its vocabulary has {vocabulary:,}. The tokenizer is another model's."
            )
        return self._weights.embed(tokens)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Final norm and head: ``hidden [count, hidden]``, the rows wanted, to ``out`` float32 ``[count, vocabulary]``."""
        rows = self._normalized(hidden, None, self._weights.vector(f"{self.config.prefix}model.norm.weight"))
        for first, table in self._weights.head():
            target = out[:, first : first + len(table)]
            if self._device is None:
                multiply(self._team, rows, table.t(), target)
                continue
            for part in spans(len(rows), LOGITS_ROWS):
                torch.mm(rows[part], table.t(), out=target[part])
        return out

    # ------------------------------------------------------------------------------------------------------------- layers

    def layer(
        self, number: int, hidden: torch.Tensor, samples: Samples, cache: KeyValueCache | None = None
    ) -> forward.Routing | None:
        """Replace ``hidden [rows, hidden]`` by what leaves the layer; where each token went, None in a layer without experts.

        samples: how tokens lie in ``hidden``; rows without a token keep what they hold.  The routing has a row for each token.
        """
        tokens = None if len(samples.tokens) == len(hidden) else self._rows_of(samples, hidden.device)
        base = f"{self.config.prefix}model.layers.{number}."
        matrices = {unit.key.rpartition(".")[2]: unit for unit in self._layers[number] if unit.matrices and unit.expert is None}
        self._attention(number, base, matrices, hidden, samples, tokens, cache)
        rows = self._inputs(self._normalized(hidden, tokens, self._weights.vector(f"{base}post_attention_layernorm.weight")))
        own = matrices["gate_up_proj"], matrices["down_proj"]
        routing = None
        if self.config.moe_layers[number]:
            experts, shared = self._weights.mixture([unit for unit in self._layers[number] if unit.expert is not None], own)
            result, routing = moe_forward(
                rows,
                self._weights.vector(f"{base}feed_forward.router.weight"),
                experts,
                shared,
                experts_per_token=self.config.experts_per_token,
                backend=self._backend,
                round_activations=self._round,
                team=self._team,
                workspace=self._workspace,
            )
        else:
            result = self._dense(rows, *own)
        _add(hidden, tokens, result)
        return routing

    def _attention(
        self,
        number: int,
        base: str,
        matrices: dict[str, Unit],
        hidden: torch.Tensor,
        samples: Samples,
        tokens: torch.Tensor | None,
        cache: KeyValueCache | None,
    ) -> None:
        """tokens: rows of ``hidden`` that hold one, None for all."""
        norm = self._weights.vector(f"{base}input_layernorm.weight")
        joined = self._weights.matrices(matrices["qkv"])
        [out] = self._weights.matrices(matrices["o_proj"])
        biases = [self._bias(f"{base}self_attn.{name}.bias") for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        done = 0
        for group in _groups(samples, cache is not None or self._device is not None):
            begin, end, count = group[0][0], sum(group[-1]), sum(length for _, length in group)
            if tokens is None or end - begin == count:
                there, chosen = hidden[begin:end], None
            else:
                there, chosen = hidden, tokens[done : done + count]
            done += count
            rows = self._inputs(self._normalized(there, chosen, norm))
            query, key, value = (
                _with_bias(self._product(rows, weight), bias) for weight, bias in zip(joined, biases, strict=False)
            )
            del rows  # one window may be all that is in memory: each array counts
            if self._device is not None:
                context = self._attended_there(number, group, samples.length, (query, key, value), cache)
            elif cache is not None:
                context = self._continue(number, group, samples.length, (query, key, value), cache)
            else:
                context = self._gather(number, group, query, key, value)
            del query, key, value
            _add(there, chosen, _with_bias(self._product(context.view(count, -1), out), biases[3]))
            del context

    def _gather(
        self, number: int, group: list[tuple[int, int]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """What attention gathers for samples of equal length, one behind the other; it takes the place of ``query``."""
        shape = (len(group), group[0][1], -1)
        all_queries, all_keys, values = query.view(shape), key.view(shape), value.view(shape)

        def attend(at: Heads) -> None:
            part, positions, queries, keys = at
            all_queries[part, positions, queries] = forward.attend(  # which nobody else reads
                self.config,
                number,
                all_queries[part, positions, queries],
                all_keys[part, positions, keys],
                values[part, positions, keys],
                frequencies=self._frequencies,
                first=positions.start,
            )

        work = self._heads(number, len(group), group[0][1])
        together = max(1, ATTENDED // all_queries[work[0][:3]].numel())
        for some in spans(len(work), len(work) if together >= self._team.threads else together):
            self._team.run(attend, work[some])
        return query

    def _attended_there(
        self, number: int, group: list[tuple[int, int]], length: int, projected: Projected, cache: KeyValueCache | None
    ) -> torch.Tensor:
        """What attention gathers on the device for the samples of ``group``."""
        lengths = [tokens for _, tokens in group]
        if cache is None:
            return device_attention.attend(self.config, number, projected, lengths, self._frequencies)
        numbers = [begin // length for begin, _ in group]
        return device_attention.attend_further(
            self.config, number, projected, numbers, lengths, cache.lengths, cache.padded, self._frequencies
        )

    def _heads(self, number: int, samples: int, length: int) -> list[Heads]:
        """Work on attention for samples of that length: some of them with all heads; or a chunk of one, with the heads that share a
        key, where the layer attends in chunks; or one with a single head."""
        config, together = self.config, PORTION // (4 * length)
        if together:
            return [(part, slice(0, length), slice(None), slice(None)) for part in spans(samples, together)]
        chunked, shared = config.rope_layers[number], config.num_heads // config.num_key_value_heads
        heads = shared if chunked else 1  # keys that are rotated are so once
        return [
            (
                slice(sample, sample + 1),
                positions,
                slice(head * config.head_dim, (head + heads) * config.head_dim),
                slice(head // shared * config.head_dim, (head // shared + 1) * config.head_dim),
            )
            for sample in range(samples)
            for head in range(0, config.num_heads, heads)
            for positions in spans(length, config.attention_chunk_size if chunked else length)
        ]

    def _rows_of(self, samples: Samples, device: torch.device) -> torch.Tensor:
        """Rows that hold a token; they go to the device once, for all layers."""
        if self._placed is None or self._placed[0] is not samples:
            self._placed = (samples, samples.tokens.to(device, non_blocking=True))
        return self._placed[1]

    def _normalized(self, hidden: torch.Tensor, rows: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of some rows of ``hidden``, or of all."""
        epsilon = self.config.rms_norm_eps
        if self._device is not None:
            return forward.rms_norm(hidden if rows is None else hidden[rows], epsilon, weight)
        out = torch.empty(len(hidden) if rows is None else len(rows), hidden.shape[1])

        def work(part: slice) -> None:
            out[part] = forward.rms_norm(hidden[part if rows is None else rows[part]], epsilon, weight)

        self._team.run(work, spans(len(out), max(64, NORMALIZED // hidden.shape[1])))
        return out

    def _continue(
        self,
        number: int,
        group: list[tuple[int, int]],
        length: int,
        projected: Projected,
        cache: KeyValueCache,
    ) -> torch.Tensor:
        """What attention gathers for samples that continue what the cache holds; ``projected``: query, key, value, one behind the
        other as in ``group``."""
        context = torch.empty_like(projected[0])
        ends = list(accumulate(tokens for _, tokens in group))

        def attend(place: int) -> None:
            (begin, tokens), end = group[place], ends[place]
            query, key, value = (rows[None, end - tokens : end] for rows in projected)
            past = self._continued(number, begin // length, key, value, cache)
            context[end - tokens : end] = forward.attend(
                self.config, number, query, key, value, frequencies=self._frequencies, past=past
            )[0]

        self._team.run(attend, range(len(group)))
        return context

    def _continued(
        self, number: int, sample: int, key: torch.Tensor, value: torch.Tensor, cache: KeyValueCache
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the cache holds of a sample, with a dimension for it in front; afterwards the cache holds the new ones, too."""
        past = cache.layers.get((number, sample))
        keys = forward.cached_keys(
            self.config, number, key, frequencies=self._frequencies, first=0 if past is None else len(past[0])
        )[0]
        values = value.view(-1, self.config.num_key_value_heads, self.config.head_dim)
        cache.layers[number, sample] = (
            (keys, values) if past is None else (torch.cat([past[0], keys]), torch.cat([past[1], values]))
        )
        return None if past is None else (past[0][None], past[1][None])

    def _dense(self, rows: torch.Tensor, gate_up: Unit, down_unit: Unit) -> torch.Tensor:
        parts = []
        gate, up = self._weights.matrices(gate_up)
        [down] = self._weights.matrices(down_unit)
        for part in spans(len(rows), PORTION):
            inner = forward.gated(self._product(rows[part], gate), self._product(rows[part], up))
            parts.append(self._product(inner, down))
        return torch.cat(parts) if parts else torch.zeros_like(rows)

    def _product(self, rows: torch.Tensor, weight: Weight | DeviceWeight) -> torch.Tensor:
        product = dequant_matmul(
            self._inputs(rows),
            weight,
            backend=self._backend,
            round_activations=self._round,
            team=self._team,
            workspace=self._workspace,
            known_rows=self._known_rows,
        )
        return product.to(torch.float32)

    def _inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """As the kernels of the device take them."""
        return rows if self._device is None else rows.to(self._device, torch.bfloat16)

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._weights.vector(name) if self.model.has(name) else None


def keeping_inference(
    model: StoredModel, team: Team, device: torch.device | None, kept_bytes: int | None, round_activations: bool = True
) -> Inference:
    """For many steps: at most ``kept_bytes`` of weights stay between them, on the device or in memory.

    None: as many as the device has room for, ``KEPT_BYTES`` of memory.
    """
    if device is not None:
        return Inference(model, team, device=device, round_activations=round_activations, kept_bytes=kept_bytes)
    kept = KeptModel(model, KEPT_BYTES if kept_bytes is None else kept_bytes)
    return Inference(kept, team, round_activations=round_activations)


def _groups(samples: Samples, mixed: bool) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring samples of a portion's tokens at most, of equal length unless ``mixed``: (first row, length) of each."""
    group: list[tuple[int, int]] = []
    total = 0
    for number, length in enumerate(samples.lengths):
        if not length:
            continue
        if group and ((length != group[0][1] and not mixed) or total + length > PORTION):
            yield group
            group, total = [], 0
        group.append((number * samples.length, length))
        total += length
    if group:
        yield group


def _add(hidden: torch.Tensor, rows: torch.Tensor | None, result: torch.Tensor) -> None:
    """Add to some rows of ``hidden``, or to all."""
    if rows is None:
        hidden += result
    else:
        hidden[rows] += result


def _with_bias(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product if bias is None else product.add_(bias)
