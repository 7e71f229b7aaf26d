"""The whole model on the CPU, from token ids to logits, with one part of it in memory at a time.

A forward pass is three steps, and each of them streams: the embedding goes through its table from front to back and keeps the rows
asked for; every layer is a :class:`~quantkit.layer_pass.LayerPass`; the head meets the vocabulary in portions, for the rows that
the caller gives.  So memory is the hidden states plus one portion, whatever the model's size: the two tables of a Scout have 2 GB
each.

Arithmetic is float32 and follows transformers; the bytes do not depend on the number of threads (see :mod:`quantkit.team`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from quantkit import forward
from quantkit.checkpoint import Checkpoint
from quantkit.config import Llama4Config
from quantkit.errors import CalibrationError
from quantkit.layer_pass import PORTION, Borrowed, LayerPass, Samples
from quantkit.llama4 import Unit, units, units_by_layer
from quantkit.team import Team, multiply
from quantkit.tensor_files import TORCH_DTYPES

TABLE_ROWS = 2048  # of the embedding, or of the head, at a time


class Unobserved:
    """An observer that watches nothing and replaces nothing."""

    def routed(self, layer: int, tokens: torch.Tensor, routing: forward.Routing) -> None:
        """Nothing."""

    def lend(self, unit: Unit) -> Borrowed | None:
        """Nothing is lent."""
        return None

    def shown(self, unit: Unit, rows: torch.Tensor, tokens: torch.Tensor, weight: float) -> None:
        """Nothing."""

    def became(self, gate_up: Unit, down: Unit) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Nothing was replaced."""
        return iter(())

    def deviated(self, number: int, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """Nothing."""

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor, sample: int) -> None:
        """Nothing."""

    def complete(self, unit: Unit, weights: Sequence[torch.Tensor], digests: Sequence[str]) -> list[torch.Tensor] | None:
        """The unit stays as it is."""
        return None


def embed(checkpoint: Checkpoint, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Write the embeddings of ``tokens`` (int64 ``[count]``) to ``out`` (float32 ``[count, hidden]``, may be a mapped file).

    Raises CalibrationError for an id outside the vocabulary.
    """
    _check_ids(tokens, checkpoint.config.vocab_size)
    gather(_table(checkpoint, embedding_name(checkpoint.config)), tokens, out)


def gather(tables: Iterable[tuple[int, torch.Tensor]], tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Write the rows ``tokens`` (int64 ``[count]``) of a table to ``out`` (float32 ``[count, hidden]``).

    tables: the table from first to last, as the number of a first row and some rows; each is looked at once.
    """
    ids, places = torch.sort(tokens, stable=True)
    for first, table in tables:
        start, stop = torch.searchsorted(ids, torch.tensor([first, first + len(table)])).tolist()
        for begin in range(start, stop, PORTION):  # a frequent id may fill gigabytes of ``out``
            part = slice(begin, min(begin + PORTION, stop))
            out[places[part]] = table[ids[part] - first].to(torch.float32)


def hidden_states(checkpoint: Checkpoint, tokens: torch.Tensor, samples: Samples, team: Team) -> torch.Tensor:
    """What leaves the last layer, before the final norm: float32 ``[rows, hidden]``.

    tokens: int64 ``[rows]``, laid out as ``samples`` says; padding holds any id of the vocabulary, and what its rows return means
    nothing.
    """
    config = checkpoint.config
    hidden = torch.empty(len(tokens), config.hidden_size)
    embed(checkpoint, tokens, hidden)
    output = torch.zeros_like(hidden)
    scratch = torch.zeros(len(tokens), max(config.hidden_size, config.num_heads * config.head_dim))
    for layer, parts in units_by_layer(units(config), config.num_layers).items():
        LayerPass(checkpoint, parts, layer, samples, team, Unobserved()).run(hidden, output, scratch)
        hidden, output = output, hidden
    return hidden


def head(checkpoint: Checkpoint, hidden: torch.Tensor, team: Team) -> Iterator[tuple[int, torch.Tensor]]:
    """Final norm and logits of ``hidden`` (float32 ``[count, hidden]``), by portions of the vocabulary in order.

    Yields the first id of a portion and its logits, float32 ``[count, portion]``.  The caller bounds the memory: by taking a few
    thousand rows at a time, and by reducing each portion before it asks for the next.
    """
    config = checkpoint.config
    norm = checkpoint.read_slice(f"{config.prefix}model.norm.weight").to(torch.float32)
    rows = forward.rms_norm(hidden, config.rms_norm_eps, norm)
    for first, table in _table(checkpoint, head_name(config)):
        yield first, multiply(team, rows, table.to(torch.float32).t(), torch.empty(len(rows), len(table)))


def logits(checkpoint: Checkpoint, tokens: torch.Tensor, *, threads: int) -> torch.Tensor:
    """Logits of all positions, float32 ``[samples, length, vocabulary]``, all at once: for models and samples that are small.

    tokens: int64 ``[samples, length]``.  Raises CalibrationError for an id outside the vocabulary.
    """
    count, length = tokens.shape
    result = torch.empty(count * length, checkpoint.config.vocab_size)
    with Team(threads) as team:
        hidden = hidden_states(checkpoint, tokens.reshape(-1), Samples.of(torch.full((count,), length), length), team)
        for first, portion in head(checkpoint, hidden, team):
            result[:, first : first + portion.shape[1]] = portion
    return result.view(count, length, -1)


def _check_ids(tokens: torch.Tensor, vocabulary: int) -> None:
    wrong = ((tokens < 0) | (tokens >= vocabulary)).nonzero()
    if len(wrong):
        position = int(wrong[0, 0])
        raise CalibrationError(
            f"token {position:,} has id {int(tokens[position])}, but the model's vocabulary has {vocabulary:,} ids "
            f"({len(wrong):,} of {len(tokens):,} tokens are outside it). Tokenize with the tokenizer of this checkpoint."
        )


def embedding_name(config: Llama4Config) -> str:
    """The tensor of the token embedding."""
    return f"{config.prefix}model.embed_tokens.weight"


def head_name(config: Llama4Config) -> str:
    """The tensor that hidden states are multiplied with to give logits."""
    return embedding_name(config) if config.tie_word_embeddings else f"{config.prefix}lm_head.weight"


def _table(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a tensor ``[rows, hidden]`` from first to last: (number of the first row, some rows as they are stored).

    The rows are valid until the next are asked for.
    """
    location = checkpoint.tensors[name]
    row_bytes = location.nbytes // location.shape[0]
    for number, piece in enumerate(checkpoint.chunks(name, TABLE_ROWS * row_bytes)):
        yield number * TABLE_ROWS, torch.frombuffer(piece, dtype=TORCH_DTYPES[location.dtype]).view(-1, location.shape[1])
