"""How likely a model finds given continuations: the score of multiple choice, and of everything that asks for log likelihoods.

Each continuation runs behind its context in one sweep through the layers, many of them at a time, so a weight is read once for all.
Only positions that predict a token of a continuation meet the head.  Log softmax and sums are taken in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from quantkit.encoder import Continuation
from quantkit.errors import ArtifactError, Interrupted
from quantkit.inference import Inference
from quantkit.layer_pass import Samples

HIDDEN_BYTES = 256 << 20  # of the hidden states of a sweep
LOGITS_BYTES = 128 << 20  # of the logits looked at together
STOPPED = "Stopped while the model was answering. Nothing of its answers was kept; run the same command again."


@dataclass(frozen=True)
class Likelihood:
    """value: natural logarithm of the probability of all tokens of a continuation.  greedy: whether each was the most likely."""

    value: float
    greedy: bool


def check_stop(stop: threading.Event | None) -> None:
    """Raise Interrupted when ``stop`` is set."""
    if stop is not None and stop.is_set():
        raise Interrupted(STOPPED)


def log_likelihoods(
    inference: Inference,
    continuations: Sequence[Continuation],
    *,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[Likelihood]:
    """Score every continuation, in order.  progress: told how many are scored.

    Raises Interrupted when ``stop`` is set, ArtifactError for token ids that the model does not have.
    """
    largest, vocabulary = max((max(item.tokens) for item in continuations), default=0), inference.config.vocab_size
    if largest >= vocabulary:
        raise ArtifactError(
            f"{inference.model.path} has no token {largest}: its vocabulary has {vocabulary:,}. The tokenizer is another model's."
        )
    found: dict[int, Likelihood] = {}
    lengths = [len(item.context) + len(item.tokens) - 1 for item in continuations]
    for sweep in sweeps(lengths, HIDDEN_BYTES // (4 * inference.config.hidden_size)):
        for number, likelihood in zip(sweep, _scored(inference, [continuations[index] for index in sweep], stop), strict=True):
            found[number] = likelihood
        if progress is not None:
            progress(len(found))
    return [found[number] for number in range(len(continuations))]


def sweeps(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Indices of texts that run together, the longest first: as many as have at most ``rows`` rows, filled up to the longest."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # stable: neighbours are of like length
    while order:
        count = max(1, rows // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Samples]:
    """Token ids of ``texts`` one behind the other, filled up with 0 to the longest: int64 ``[rows]``; and how they lie."""
    lengths = torch.tensor([len(text) for text in texts])
    samples = Samples.of(lengths, int(lengths.max()))
    tokens = torch.zeros(samples.count * samples.length, dtype=torch.int64)
    tokens[samples.tokens] = torch.tensor([token for text in texts for token in text])
    return tokens, samples


def _scored(inference: Inference, items: Sequence[Continuation], stop: threading.Event | None) -> Iterator[Likelihood]:
    tokens, samples = padded([[*item.context, *item.tokens[:-1]] for item in items])
    hidden = inference.embed(tokens)
    for number in range(inference.config.num_layers):
        check_stop(stop)
        inference.layer(number, hidden, samples)
    rows: list[int] = []
    targets: list[int] = []
    for sample, item in enumerate(items):
        first = sample * samples.length + len(item.context) - 1
        rows += range(first, first + len(item.tokens))
        targets += item.tokens
    values, greedy = _predictions(inference, hidden, torch.tensor(rows), torch.tensor(targets))
    start = 0
    for item in items:
        own = slice(start, start + len(item.tokens))
        yield Likelihood(float(values[own].sum()), bool(greedy[own].all()))
        start = own.stop


def _predictions(
    inference: Inference, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probability of each target at its row, float64 ``[count]``, and whether it is the most likely token, bool."""
    vocabulary, rows, targets = inference.config.vocab_size, rows.to(hidden.device), targets.to(hidden.device)
    values = torch.empty(len(rows), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(rows), dtype=torch.bool, device=hidden.device)
    at_once = max(1, LOGITS_BYTES // (4 * vocabulary))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        wanted = targets[part]
        logits = inference.logits(hidden[rows[part]], hidden.new_empty(len(wanted), vocabulary))
        largest, best = logits.max(-1)
        rest = torch.log(torch.exp((logits - largest[:, None]).to(torch.float64)).sum(-1))  # of the sum, beside the largest
        values[part] = (logits.gather(1, wanted[:, None])[:, 0] - largest).to(torch.float64) - rest
        greedy[part] = best == wanted
    return values.cpu(), greedy.cpu()
