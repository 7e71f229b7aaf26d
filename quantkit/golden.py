"""How a model answers the golden set: right or wrong, how fast, from how many bytes.

Generation is greedy, so an artifact answers the same today and tomorrow, and differences to the reference are due to the artifact.
Every model gets the same token ids, from the reference's tokenizer; an answer ends where the model's own files say.
"""

from __future__ import annotations

import math
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quantkit.encoder import Continuation, Encoder
from quantkit.errors import CorpusError
from quantkit.evaluation import Estimate, GoldenAnswers
from quantkit.generation import Prompt, end_tokens, generate
from quantkit.golden_set import KINDS, Question, read_questions
from quantkit.inference import keeping_inference
from quantkit.likelihood import log_likelihoods
from quantkit.stored_model import StoredModel
from quantkit.team import Team

Progress = Callable[[str, int, int], None]  # name of a model, questions answered, questions
NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %: both ends together leave out 5 %


def golden_answers(
    models: Sequence[StoredModel],
    path: str | Path,
    tokenizer_directory: str | Path,
    *,
    team: Team,
    device: torch.device | None = None,
    round_activations: bool = True,
    kept_bytes: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[GoldenAnswers, ...]:
    """How each of ``models`` answers the golden set at ``path``; see :func:`answer_golden` and :func:`read_questions`."""
    questions = read_questions(path)
    return tuple(
        answer_golden(
            model,
            questions,
            tokenizer_directory,
            team=team,
            device=device,
            round_activations=round_activations,
            kept_bytes=kept_bytes,
            progress=progress,
            stop=stop,
        )
        for model in models
    )


def answer_golden(
    model: StoredModel,
    questions: Sequence[Question],
    tokenizer_directory: str | Path,
    *,
    team: Team,
    device: torch.device | None = None,
    round_activations: bool = True,
    kept_bytes: int | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> GoldenAnswers:
    """Ask ``model`` all questions: those that are generated together, then the choices together.

    tokenizer_directory: of the reference.  kept_bytes: of weights that stay between tokens, see
    :func:`~quantkit.inference.keeping_inference`.

    The interval of the accuracy is Wilson's.  A latency is the time from when a question was asked, together with the others, to
    the end of its answer; so it compares models that were asked the same questions.  On a device the time in
    which weights are first brought there, and kernels are compiled, does not count.

    Raises CorpusError for what the tokenizer or the chat template cannot take, ArtifactError for a tokenizer of another model,
    Interrupted when ``stop`` is set.
    """
    encoder = Encoder.load(tokenizer_directory)
    contexts = [_context(question, encoder) for question in questions]
    generated = [number for number, question in enumerate(questions) if question.kind != "choice"]
    chosen = [number for number, question in enumerate(questions) if question.kind == "choice"]
    prompts = [
        Prompt(encoder.encode(contexts[number]), questions[number].max_tokens, questions[number].stop) for number in generated
    ]
    options = [_options(questions[number], contexts[number], encoder) for number in chosen]

    def tell(done: int) -> None:
        if progress is not None:
            progress(model.name, done, len(questions))

    tell(0)
    inference = keeping_inference(model, team, device, kept_bytes, round_activations)
    if device is not None:
        log_likelihoods(inference, [Continuation((0,), (0,))], stop=stop)
    generation = generate(
        inference,
        prompts,
        encoder.tokenizer,
        end_tokens(model, encoder.directory),
        progress=lambda finished, _: tell(finished),
        stop=stop,
    )
    began = time.perf_counter()
    likelihoods = iter(log_likelihoods(inference, [option for listed in options for option in listed], stop=stop))
    seconds = time.perf_counter() - began
    results: dict[int, tuple[str, bool, float]] = {}  # what was answered, whether it is right, seconds
    for number, answer in zip(generated, generation.answers, strict=True):
        results[number] = (answer.text, is_right(questions[number], answer.text), answer.seconds)
    for number in chosen:
        question = questions[number]
        scores = [next(likelihoods).value / (len(choice.encode()) if question.normalized else 1) for choice in question.choices]
        best = question.choices[scores.index(max(scores))]
        results[number] = (best, best in question.answers, seconds)
    tell(len(questions))
    return _summary(model, questions, [results[number] for number in range(len(questions))], generation.tokens_per_second)


def is_right(question: Question, answer: str) -> bool:
    """Whether a generated answer is, or contains, one of those expected."""
    found = _compared(answer, question)
    expected = [_compared(text, question) for text in question.answers]
    return found in expected if question.kind == "exact" else any(text in found for text in expected)


def wilson_interval(right: int, count: int) -> Estimate:
    """A share and its 95 % interval by Wilson's score, which stays between 0 and 1 and has a width also at both ends."""
    share, square = right / count, NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Estimate(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


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


def _summary(
    model: StoredModel, questions: Sequence[Question], results: Sequence[tuple[str, bool, float]], tokens_per_second: float
) -> GoldenAnswers:
    right: dict[str, list[bool]] = {}
    for question, (_, is_good, _) in zip(questions, results, strict=True):
        right.setdefault(question.kind, []).append(is_good)
    return GoldenAnswers(
        name=model.name,
        bytes=model.bytes,
        questions=len(questions),
        accuracy=wilson_interval(sum(is_good for _, is_good, _ in results), len(questions)),
        by_kind={kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right},
        latency=sum(seconds for _, _, seconds in results) / len(results),
        tokens_per_second=tokens_per_second,
        answers=tuple(
            (question.identifier, is_good, answer) for question, (answer, is_good, _) in zip(questions, results, strict=True)
        ),
    )
