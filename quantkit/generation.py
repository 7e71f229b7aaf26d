"""Greedy generation for many prompts at once, one layer in memory at a time.

The first step takes whole prompts, of any lengths; each later one takes a token of every prompt that is not finished.  A step
passes all of them through all layers, so weights are read once per step, whatever the number of prompts; with a
:class:`~quantkit.kept_model.KeptModel` those of a small model are read once.  Prompts do not see each other: what a prompt is
answered does not depend on the others but for the last bits of float32 sums, whose order depends on how many rows are multiplied.

A prompt ends with one of the model's own end tokens, with a stop string of its own, or with as many tokens as it may have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from quantkit.checkpoint import CONFIG_NAME
from quantkit.errors import CorpusError
from quantkit.inference import Inference, KeyValueCache
from quantkit.layer_pass import Samples
from quantkit.likelihood import LOGITS_BYTES, check_stop, padded, sweeps
from quantkit.stored_model import CheckpointModel, GgufModel, StoredModel
from quantkit.strict_json import parse_object
from quantkit.tensor_files import SIDECAR_BYTES, read_small_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CACHE_BYTES = 3 << 30  # at most, of keys, values and hidden states of the prompts that run together
GENERATION_CONFIG = "generation_config.json"
_GGUF_ENDS = ("eos", "eot", "eom")  # as in the keys tokenizer.ggml.*_token_id


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, with at most ``max_tokens`` more.  stop: strings that end the answer and do not belong to it."""

    tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What followed a prompt.

    tokens: all that were generated, an end token included.  text: without special tokens, cut before the stop string.  reason: what
    ended it.  seconds: from the start of the prompts that ran together to this one's end.
    """

    tokens: tuple[int, ...]
    text: str
    reason: Literal["end", "stop", "length"]
    seconds: float


@dataclass(frozen=True)
class Step:
    """One pass through the layers: how many prompts got a token, and the seconds until all of them had it."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Generation:
    """The answers, in the order of the prompts, and the seconds that all of it took.

    steps: those that took one token of each prompt; not the first ones, which read whole prompts and, often, weights that later
    steps find in memory.
    """

    answers: tuple[Answer, ...]
    seconds: float
    steps: tuple[Step, ...]


def end_tokens(model: StoredModel, directory: Path) -> frozenset[int]:
    """Ids that end an answer, as the model's files say it: the generation config, else the config; a GGUF file in its header.

    directory: of the tokenizer, asked when the model says nothing.  Ids beyond the vocabulary, which some configs have, never come.
    """
    found: list[int] = []
    if isinstance(model, GgufModel):
        metadata = model.files.sets[0].header.metadata
        entries = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _GGUF_ENDS]
        found = [entry.value for entry in entries if entry is not None and isinstance(entry.value, int)]
    elif isinstance(model, CheckpointModel):
        found = _listed_ends(model.checkpoint.directory)
    elif model.path.is_dir():
        found = _listed_ends(model.path)
    return frozenset(found or _listed_ends(directory))


def _listed_ends(directory: Path) -> list[int]:
    for name in (GENERATION_CONFIG, CONFIG_NAME):
        path = directory / name
        if not path.is_file():
            continue
        content = parse_object(read_small_file(path, SIDECAR_BYTES), str(path))
        for section in (content, content.get("text_config")):
            value: Any = section.get("eos_token_id") if isinstance(section, Mapping) else None
            listed = value if isinstance(value, list) else [value]
            if ids := [number for number in listed if type(number) is int]:
                return ids
    return []


def generate(
    inference: Inference,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    ends: frozenset[int],
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Generation:
    """Continue every prompt with the most likely token, again and again.

    ends: see :func:`end_tokens`.  progress: told how many prompts are finished and how many tokens there are.  Raises Interrupted
    when ``stop`` is set, ArtifactError for token ids that the model does not have.
    """
    for number, prompt in enumerate(prompts):
        if not prompt.tokens or prompt.max_tokens < 1:
            what = "holds no token" if not prompt.tokens else f"may have {prompt.max_tokens} tokens of answer"
            raise CorpusError(f"Prompt {number} {what}. Give at least one.")
    added = {token.content: identity for identity, token in tokenizer.get_added_tokens_decoder().items()}
    began = time.perf_counter()
    found: dict[int, Answer] = {}
    steps: list[Step] = []
    total = 0
    config = inference.config
    width = config.hidden_size + 2 * config.num_layers * config.num_key_value_heads * config.head_dim  # numbers of one token
    for sweep in sweeps([len(prompt.tokens) + prompt.max_tokens for prompt in prompts], CACHE_BYTES // (4 * width)):
        started = time.perf_counter()
        texts = {index: _Text(prompts[index], tokenizer, ends, added) for index in sweep}
        for number, (following, seconds) in enumerate(_steps(inference, texts, stop)):
            if number:
                steps.append(Step(len(following), seconds))
            for index, token in following.items():
                total += 1
                if texts[index].take(token):
                    found[index] = texts[index].answer(time.perf_counter() - started)
                if progress is not None:
                    progress(len(found), total)
    return Generation(tuple(found[index] for index in range(len(prompts))), time.perf_counter() - began, tuple(steps))


class _Text:
    """A prompt and what has followed it."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, ends: frozenset[int], added: Mapping[str, int]) -> None:
        self.prompt, self.tokens = prompt, list[int]()
        self.reason: Literal["end", "stop", "length"] | None = None
        self._tokenizer, self._ends = tokenizer, ends
        # Special tokens are not in the decoded text: as stop strings they are looked for among the tokens.
        self._stop_tokens = {added[text] for text in prompt.stop if text in added}
        self._stop = tuple(text for text in prompt.stop if text not in added)
        self._text = ""

    def take(self, token: int) -> bool:
        """The next token; whether it was the last."""
        self.tokens.append(token)
        if token in self._ends:
            self.reason = "end"
        elif token in self._stop_tokens:
            self.reason = "stop"
        else:
            self._text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
            places = [place for place in map(self._text.find, self._stop) if place >= 0]
            if places:
                self._text, self.reason = self._text[: min(places)], "stop"
            elif len(self.tokens) == self.prompt.max_tokens:
                self.reason = "length"
        return self.reason is not None

    def answer(self, seconds: float) -> Answer:
        assert self.reason is not None, "asked for when it is finished"
        return Answer(tuple(self.tokens), self._text, self.reason, seconds)


def _steps(
    inference: Inference, texts: Mapping[int, _Text], stop: threading.Event | None
) -> Iterator[tuple[dict[int, int], float]]:
    """Step after step, the next token of all texts that are not finished, by index, and the seconds it took."""
    indices = list(texts)
    cache = KeyValueCache.of([len(text.prompt.tokens) + text.prompt.max_tokens for text in texts.values()])
    tokens, samples = padded([texts[index].prompt.tokens for index in indices])
    while True:
        began = time.perf_counter()
        hidden = inference.embed(tokens)
        running = [sample for sample, length in enumerate(samples.lengths) if length]
        last = torch.tensor([sample * samples.length + samples.lengths[sample] - 1 for sample in running])
        rows = None if len(last) == len(hidden) else last.to(hidden.device, non_blocking=True)  # before a device is busy
        for number in range(inference.config.num_layers):
            check_stop(stop)
            inference.layer(number, hidden, samples, cache)
        cache.advance(samples)
        following = _most_likely(inference, hidden if rows is None else hidden[rows])
        yield {indices[sample]: token for sample, token in zip(running, following, strict=True)}, time.perf_counter() - began
        tokens, lengths = torch.zeros(len(indices), dtype=torch.int64), torch.zeros(len(indices), dtype=torch.int64)
        for sample, token in zip(running, following, strict=True):
            if texts[indices[sample]].reason is None:
                tokens[sample], lengths[sample] = token, 1
            else:
                cache.forget(sample)
        if not lengths.any():
            return
        samples = Samples.of(lengths, 1)


def _most_likely(inference: Inference, hidden: torch.Tensor) -> list[int]:
    """The token that follows each of the rows ``[count, hidden]``; of equally likely ones the first."""
    vocabulary = inference.config.vocab_size
    parts = torch.split(hidden, max(1, LOGITS_BYTES // (4 * vocabulary)))
    found = [inference.logits(part, part.new_empty(len(part), vocabulary)).argmax(-1) for part in parts]
    return torch.cat(found).tolist()
