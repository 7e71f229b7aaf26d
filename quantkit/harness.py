"""Adapter: lm-evaluation-harness scores an artifact through quantkit's own forward pass, from the artifact's own bytes.

The harness is no dependency.  What it is given is a subclass of its ``LM``, made when asked for, so that nothing here imports it
before that:

    from lm_eval import simple_evaluate
    from quantkit.harness import harness_model

    with harness_model("Scout-w4a16", tokenizer="Llama-4-Scout-17B-16E-Instruct") as model:
        print(simple_evaluate(model, tasks=["hellaswag"]))

Text becomes tokens as in the harness's own adapter for transformers: begin token first, unless the text begins with it, and a
continuation is what the tokens of context and continuation have more than those of the context.  What is longer than ``max_length``
loses its beginning.  Generation is greedy; requests that ask for sampling are an error.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quantkit.calibration import CalibrationOptions
from quantkit.encoder import Continuation, Encoder
from quantkit.errors import CorpusError, QuantkitError
from quantkit.generation import Prompt, end_tokens, generate
from quantkit.inference import keeping_inference
from quantkit.likelihood import log_likelihoods
from quantkit.stored_model import open_model
from quantkit.team import Team

MAX_LENGTH = 8192  # tokens of a request: an attention chunk of Llama 4
MAX_TOKENS = 256  # of an answer, for tasks that do not say; the harness's own default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names by which tasks limit an answer


def harness_model(path: str | Path, **options: Any) -> Any:
    """The model at ``path`` for lm-evaluation-harness; options: as of :func:`model_class`'s constructor.

    Raises QuantkitError when the harness is not installed, and what :func:`~quantkit.stored_model.open_model` raises.
    """
    return model_class()(path, **options)


def model_class(base: type[Any] | None = None) -> type[Any]:
    """A subclass of the harness's ``LM``.  base: another class with its interface."""
    if base is None:
        try:
            base = importlib.import_module("lm_eval.api.model").LM
        except ImportError as error:
            raise QuantkitError(
                f"lm-evaluation-harness cannot be imported: {error}. Install it with `pip install quantkit[harness]`."
            ) from error

    class QuantkitModel(_Requests, base):  # type: ignore[misc, valid-type]
        """A stored model; close it, or use it as a context manager."""

        def __init__(
            self,
            path: str | Path,
            *,
            tokenizer: str | Path | None = None,
            threads: int | None = None,
            device: str | None = None,
            max_length: int | None = None,
            max_gen_toks: int = MAX_TOKENS,
            kept_bytes: int | None = None,
            round_activations: bool = True,
            **ignored: Any,
        ) -> None:
            """path: what :func:`~quantkit.stored_model.open_model` opens.  tokenizer: directory of the tokenizer files, those of
            ``path`` by default.  threads: of the CPU, all by default.  device: None and ``cpu`` are the CPU.  max_length: tokens
            read at once, by default 8192 or what the model knows.  kept_bytes: of weights that stay from one step to the next,
            see :func:`~quantkit.inference.keeping_inference`.  ignored: what the harness's command line gives to every model,
            such as ``batch_size``."""
            super().__init__()
            self._open(path, tokenizer, threads, device, max_length, max_gen_toks, kept_bytes, round_activations)

    return QuantkitModel


class _Requests:
    """Everything but the base class."""

    def _open(
        self,
        path: str | Path,
        tokenizer: str | Path | None,
        threads: int | None,
        device: str | None,
        max_length: int | None,
        max_gen_toks: int,
        kept_bytes: int | None,
        round_activations: bool,
    ) -> None:
        if (max_length is not None and max_length < 2) or max_gen_toks < 1:
            raise QuantkitError(f"max_length is {max_length} and max_gen_toks {max_gen_toks}; expected at least 2, and at least 1.")
        where = CalibrationOptions(device=str(device or "cpu")).accelerator()  # which says what is wrong with a device
        self._encoder = Encoder.load(path if tokenizer is None else tokenizer)
        self._model = open_model(path)
        known = self._model.config.max_positions
        if max_length is not None and max_length > known:
            self._model.close()
            raise QuantkitError(f"max_length is {max_length:,}, more than the {known:,} positions that {path} knows. Lower it.")
        self._ends = end_tokens(self._model, self._encoder.directory)
        self._max_length, self._max_tokens = max_length or min(MAX_LENGTH, known), max_gen_toks
        self._team = Team(threads or os.cpu_count() or 1)
        self._inference = keeping_inference(self._model, self._team, where, kept_bytes, round_activations)

    def close(self) -> None:
        """Close the files of the model."""
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log likelihood, whether it is what greedy decoding gives) of each request's (context, continuation)."""
        pairs = [self._shortened(self._pair(*request.args)) for request in requests]
        with self._team:
            found = log_likelihoods(self._inference, pairs)
        results = [(item.value, item.greedy) for item in found]
        self._remember("loglikelihood", requests, results)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of each whole text, whose tokens are all predicted, the first from the begin token."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        with self._team:
            found = iter(log_likelihoods(self._inference, [window for text in windows for window in text]))
        results = [sum(next(found).value for _ in text) for text in windows]
        self._remember("loglikelihood_rolling", requests, results)
        return results

    def _pair(self, context: str, text: str) -> Continuation:
        if context:
            return self._encoder.continuation(context, text)
        return Continuation((self._prefix(),), self._plain(text))

    def _plain(self, text: str) -> tuple[int, ...]:
        """Tokens of a text without the begin token."""
        ids = self._encoder.encode(text)
        ids = ids[1:] if ids[:1] == (self._encoder.begin,) else ids
        if not ids:
            raise CorpusError(f"The text {text[:40]!r} has no token of its own, so nothing can be scored.")
        return ids

    def _prefix(self) -> int:
        """What the first token of a text is predicted from."""
        if self._encoder.begin is not None:
            return self._encoder.begin
        if self._ends:
            return min(self._ends)
        raise CorpusError(
            f"{self._encoder.directory} names neither a begin token nor an end token, so nothing predicts the first token of a "
            "text. Set bos_token in tokenizer_config.json."
        )

    def _shortened(self, item: Continuation) -> Continuation:
        """Without what lies before the last ``max_length`` tokens that are read."""
        if len(item.tokens) > self._max_length:
            raise CorpusError(f"A continuation has {len(item.tokens)} tokens, more than max_length {self._max_length}. Raise it.")
        room = self._max_length + 1 - len(item.tokens)  # the last token is predicted, not read
        return Continuation(item.context[-room:], item.tokens)

    def _windows(self, text: str) -> Iterator[Continuation]:
        """Each token is predicted once, and the last window is as full as the others."""
        tokens = (self._prefix(), *self._plain(text))
        for start in range(1, len(tokens), self._max_length):
            end = min(start + self._max_length, len(tokens))
            yield Continuation(tokens[max(0, end - 1 - self._max_length) : start], tokens[start:end])

    # ------------------------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What greedily follows each request's context, up to its stop strings."""
        prompts = [self._prompt(*request.args) for request in requests]
        with self._team:
            answers = generate(self._inference, prompts, self._encoder.tokenizer, self._ends).answers
        results = [answer.text for answer in answers]
        self._remember("generate_until", requests, results)
        return results

    def _prompt(self, context: str, options: Mapping[str, Any]) -> Prompt:
        temperature, beams = float(options.get("temperature") or 0), int(options.get("num_beams") or 1)
        if (temperature > 0 and options.get("do_sample") is not False) or beams > 1:
            what = f"a temperature of {temperature}" if beams == 1 else f"{beams} beams"
            raise QuantkitError(f"A task asks for {what}, but generation is greedy. Give gen_kwargs do_sample=False, num_beams=1.")
        limit = next((int(options[name]) for name in _LENGTHS if options.get(name) is not None), self._max_tokens)
        until = options.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        room = self._max_length - limit
        if room < 1:
            raise QuantkitError(f"A task asks for {limit} tokens of answer; max_length {self._max_length} must be larger.")
        tokens = self._encoder.encode(context) or (self._prefix(),)
        return Prompt(tokens[-room:], limit, tuple(text for text in stop if text))

    # ----------------------------------------------------------------------------------------------------------------- chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text; otherwise than for a new answer, its last message is one to be continued and loses its end."""
        if add_generation_prompt:
            return self._encoder.question(chat_history)
        *earlier, last = chat_history
        return self._encoder.question(earlier) + last["content"]

    @property
    def tokenizer_name(self) -> str:
        """What tells whether cached requests were made with the same tokenizer and chat format."""
        return f"{self._encoder.directory.resolve().name}-{self._encoder.digest}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Where the chat format comes from, for the record; asking for another one by name is an error."""
        if isinstance(chat_template, str):
            raise QuantkitError(f"There is no chat template {chat_template!r}: the checkpoint's own is used. Do not name one.")
        return self._encoder.chat.name if chat_template else None

    def _remember(self, method: str, requests: Sequence[Any], results: Sequence[Any]) -> None:
        """Let the harness's cache know; it looks answers up by method and arguments."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(method, request.args, result)  # type: ignore[attr-defined]
