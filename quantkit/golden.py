"""How models answer the golden set: right or wrong, how fast, from how many bytes.

Generation is greedy, so an artifact answers the same today and tomorrow, and differences to the reference are due to the artifact.
Every model gets the same token ids, from the reference's tokenizer; an answer ends where the model's own files say.

Times are not the same tomorrow.  Before a model is asked, a token goes through it untimed, which compiles kernels and brings
weights to a device.  A model that answers within seconds is asked in several rounds, in each of which all have their turn, so
that whatever else the machine does meets all of them; a large one takes long enough, and is asked once.
"""

from __future__ import annotations

import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.encoder import Continuation, Encoder
from quantkit.errors import CorpusError
from quantkit.evaluation import GoldenAnswers
from quantkit.generation import Prompt, Step, end_tokens, generate
from quantkit.golden_figures import beside_reference, speed, typical, wilson_interval
from quantkit.golden_set import KINDS, Question, read_questions
from quantkit.inference import keeping_inference
from quantkit.likelihood import log_likelihoods
from quantkit.stored_model import StoredModel
from quantkit.team import Team

Progress = Callable[[str, int, int], None]  # name of a model, questions answered, questions
Guard = Callable[[int], AbstractContextManager[None]]
ROUNDS = 5  # at most
REPEAT_SECONDS = 8.0  # that all further rounds of a model may take


@dataclass(frozen=True)
class _Asked:
    """Questions as token ids, by their numbers: prompts of those that are generated, choices of the others."""

    encoder: Encoder
    questions: tuple[Question, ...]
    prompts: dict[int, Prompt]
    options: dict[int, list[Continuation]]


@dataclass(frozen=True)
class _Round:
    """What a model answered, whether that is right, and the seconds it took, by question; its steps; the seconds of all answers."""

    results: tuple[tuple[str, bool, float], ...]
    steps: tuple[Step, ...]
    seconds: float


def golden_answers(
    models: Sequence[StoredModel],
    questions: str | Path | Sequence[Question],
    tokenizer_directory: str | Path,
    *,
    team: Team,
    device: torch.device | None = None,
    round_activations: bool = True,
    kept_bytes: int | None = None,
    rounds: int = ROUNDS,
    guard: Guard = lambda _: nullcontext(),
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[GoldenAnswers, ...]:
    """Ask each of ``models``, the reference and then artifacts, all questions: those that are generated together, then the choices
    together.

    questions: or a file, see :func:`read_questions`.  tokenizer_directory: of the reference.  kept_bytes: of weights that stay
    between tokens, see :func:`~quantkit.inference.keeping_inference`.  rounds: of measuring times, as far as a model needs few
    seconds.  guard: given the number of a model, what surrounds its work, as to say whose errors they are.

    The interval of the accuracy is Wilson's.  A latency is the time from when a question was asked, together with the others, to
    the end of its answer; so it compares models that were asked the same questions.

    Raises CorpusError for what the tokenizer, the chat template or one of the models cannot take, before any of them works;
    ArtifactError for a tokenizer of another model; Interrupted when ``stop`` is set.
    """
    if isinstance(questions, str | Path):
        questions = read_questions(questions)
    asked = _encoded(questions, tokenizer_directory, models)
    made: list[list[_Round]] = [[] for _ in models]
    for number in range(rounds):
        for place, (model, own) in enumerate(zip(models, made, strict=True)):
            if own and sum(one.seconds for one in (*own[1:], own[-1])) > REPEAT_SECONDS:
                continue
            with guard(place):
                told = progress if number == 0 else None
                own.append(_round(model, asked, team, device, round_activations, kept_bytes, told, stop))
    return beside_reference([_summary(model, asked.questions, own) for model, own in zip(models, made, strict=True)])


def check_questions(questions: Sequence[Question], tokenizer_directory: str | Path, models: Sequence[StoredModel]) -> None:
    """Raise CorpusError for what the tokenizer or the chat template cannot take, or is longer than one of the models knows."""
    _encoded(questions, tokenizer_directory, models)


def _encoded(questions: Sequence[Question], tokenizer_directory: str | Path, models: Sequence[StoredModel]) -> _Asked:
    encoder = Encoder.load(tokenizer_directory)
    prompts: dict[int, Prompt] = {}
    options: dict[int, list[Continuation]] = {}
    for number, question in enumerate(questions):
        context = _context(question, encoder)
        if question.kind == "choice":
            options[number] = _options(question, context, encoder)
            longest = max(options[number], key=lambda option: len(option.context) + len(option.tokens))
            _check_length(question, len(longest.context), len(longest.tokens), models)
        else:
            prompts[number] = Prompt(encoder.encode(context), question.max_tokens, question.stop)
            _check_length(question, len(prompts[number].tokens), question.max_tokens, models)
    return _Asked(encoder, tuple(questions), prompts, options)


def _check_length(question: Question, tokens: int, more: int, models: Sequence[StoredModel]) -> None:
    for model in models:
        positions = model.config.max_positions
        if tokens + more > positions:
            generated = "its longest choice has" if question.kind == "choice" else "its answer may have (`max_tokens`)"
            raise CorpusError(
                f"{question.where}: the question has {tokens:,} tokens, and {generated} {more:,}: together more than the "
                f"{positions:,} positions that {model.path} knows. Shorten it, or leave it out."
            )


def _round(
    model: StoredModel,
    asked: _Asked,
    team: Team,
    device: torch.device | None,
    round_activations: bool,
    kept_bytes: int | None,
    progress: Progress | None,
    stop: threading.Event | None,
) -> _Round:
    def tell(done: int) -> None:
        if progress is not None:
            progress(model.name, done, len(asked.questions))

    tell(0)
    inference = keeping_inference(model, team, device, kept_bytes, round_activations)
    tokenizer, ends = asked.encoder.tokenizer, end_tokens(model, asked.encoder.directory)
    if asked.prompts:  # untimed, as below: a token to read and one to generate
        generate(inference, [Prompt((0,), 2)], tokenizer, frozenset(), stop=stop)
    else:
        log_likelihoods(inference, [Continuation((0,), (0,))], stop=stop)
    started = time.perf_counter()
    generation = generate(
        inference, list(asked.prompts.values()), tokenizer, ends, progress=lambda finished, _: tell(finished), stop=stop
    )
    began = time.perf_counter()
    likelihoods = iter(log_likelihoods(inference, [option for listed in asked.options.values() for option in listed], stop=stop))
    seconds = time.perf_counter() - began
    results: dict[int, tuple[str, bool, float]] = {}
    for number, answer in zip(asked.prompts, generation.answers, strict=True):
        results[number] = (answer.text, is_right(asked.questions[number], answer.text), answer.seconds)
    for number in asked.options:
        question = asked.questions[number]
        scores = [next(likelihoods).value / (len(choice.encode()) if question.normalized else 1) for choice in question.choices]
        best = question.choices[scores.index(max(scores))]
        results[number] = (best, best in question.answers, seconds)
    tell(len(asked.questions))
    ordered = tuple(results[number] for number in range(len(asked.questions)))
    return _Round(ordered, generation.steps, time.perf_counter() - started)


def is_right(question: Question, answer: str) -> bool:
    """Whether a generated answer is, or contains, one of those expected."""
    found = _compared(answer, question)
    expected = [_compared(text, question) for text in question.answers]
    return found in expected if question.kind == "exact" else any(text in found for text in expected)


def _compared(text: str, question: Question) -> str:
    text = unicodedata.normalize("NFC", text).strip()
    return unicodedata.normalize("NFC", text.casefold()) if question.ignore_case else text


def _context(question: Question, encoder: Encoder) -> str:
    if not question.messages:
        return question.prompt
    try:
        return encoder.question(question.messages)
    except CorpusError as error:
        raise CorpusError(f"{question.where}: {error}") from error


def _options(question: Question, context: str, encoder: Encoder) -> list[Continuation]:
    try:
        return [encoder.continuation(context, choice) for choice in question.choices]
    except CorpusError as error:
        raise CorpusError(f"{question.where}: {error}") from error


def _summary(model: StoredModel, questions: Sequence[Question], made: Sequence[_Round]) -> GoldenAnswers:
    right: dict[str, list[bool]] = {}
    results = made[0].results  # those of all rounds are the same
    for question, (_, is_good, _) in zip(questions, results, strict=True):
        right.setdefault(question.kind, []).append(is_good)
    timed = made[1:] if len(made) > 2 else made  # the first one may have compiled kernels for many rows
    return GoldenAnswers(
        name=model.name,
        bytes=model.bytes,
        questions=len(questions),
        accuracy=wilson_interval(sum(is_good for _, is_good, _ in results), len(questions)),
        by_kind={kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right},
        latency=typical([sum(seconds for _, _, seconds in one.results) / len(questions) for one in timed]),
        tokens_per_second=speed([step for one in timed for step in one.steps]),
        rounds=len(timed),
        answers=tuple(
            (question.identifier, is_good, answer) for question, (answer, is_good, _) in zip(questions, results, strict=True)
        ),
    )
