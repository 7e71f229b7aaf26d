"""The golden set: prompts with expected answers, as a file of JSON lines, one question each (docs/golden-set.md).

Three kinds of question:

* ``exact``     the generated answer is the expected one, white space at its ends and Unicode normal form apart
* ``contains``  the generated answer contains the expected one
* ``choice``    of the given choices the model finds an expected one most likely, by the sum of its tokens' log probabilities

Reading is strict: what a question cannot mean is an error with file, line and field, not a question that no model answers.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from quantkit.documents import BUNDLED
from quantkit.errors import CheckpointError, CorpusError
from quantkit.strict_json import brief, parse_object

Kind = Literal["exact", "contains", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_TOKENS = 32  # of an answer, unless the question says otherwise
LONGEST_ANSWER = 32_768
_PACKAGE = "quantkit_calibration_data"
_FIELDS = (
    *("id", "prompt", "messages", "kind", "answer", "choices", "normalized"),
    *("ignore_case", "max_tokens", "stop", "language", "tags"),
)
_HELP = "docs/golden-set.md describes the fields."


@dataclass(frozen=True)
class Question:
    """One question.  Either ``prompt``, text to continue, or ``messages``, a chat to answer, is filled.

    answers: each of them is right.  choices: of kind ``choice``.  normalized: divide a choice's log likelihood by its bytes.
    ignore_case: compare without case.  language, tags: for whoever sorts questions.  where: file and line, for errors.
    """

    identifier: str
    kind: Kind
    answers: tuple[str, ...]
    where: str
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()
    normalized: bool = False
    ignore_case: bool = False
    max_tokens: int = MAX_TOKENS
    stop: tuple[str, ...] = ()
    language: str = ""
    tags: tuple[str, ...] = ()


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a file; ``bundled`` is the set that comes with quantkit, where no file of that name exists.

    Raises CorpusError, which names file, line and field.
    """
    target = Path(os.path.expanduser(path))
    try:
        if str(path) == BUNDLED and not target.exists():
            data = importlib.resources.files(_PACKAGE).joinpath("golden", "golden.jsonl").read_bytes()
        else:
            data = target.read_bytes()
    except ModuleNotFoundError as error:
        raise CorpusError("The bundled golden set is not installed. Install quantkit again, or give a file.") from error
    except OSError as error:
        raise CorpusError(
            f"The golden set {path} cannot be read: {error.strerror or error}. Give a JSONL file, or `{BUNDLED}`."
        ) from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded. Convert it to UTF-8.") from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            question = _parse(line, f"{path} line {number}", str(number))
            if question.identifier in questions:
                other = questions[question.identifier].where
                raise CorpusError(f"{question.where}: `id` is {brief(question.identifier)}, as in {other}. Give each its own.")
            questions[question.identifier] = question
    if not questions:
        raise CorpusError(f"{path} holds no question. {_HELP}")
    return tuple(questions.values())


def _parse(line: str, where: str, number: str) -> Question:
    try:
        members = parse_object(line.encode("utf-8", "surrogatepass"), where)
    except CheckpointError as error:
        raise CorpusError(f"{str(error).removesuffix(' Download it again.')} {_HELP}") from error
    for key in members:
        if key not in _FIELDS:
            raise CorpusError(f"{where}: there is no field {brief(key)}. The fields are: {', '.join(_FIELDS)}.")
    kind = members.get("kind")
    if kind not in KINDS:
        raise _wrong(where, "kind", kind, f"one of {', '.join(KINDS)}")
    generated = kind != "choice"
    for key in ("choices", "normalized") if generated else ("max_tokens", "stop", "ignore_case"):
        if key in members:
            raise CorpusError(f"{where}: `{key}` means nothing for a question of kind {kind}. Leave it out.")
    if ("prompt" in members) == ("messages" in members):
        found = "both" if "prompt" in members else "neither"
        raise CorpusError(f"{where} has {found} of `prompt` and `messages`. Give one: text to continue, or a chat to answer.")
    answers = _strings(members, "answer", where, single=True)
    choices = () if generated else _strings(members, "choices", where)
    if not answers:
        raise _wrong(where, "answer", members.get("answer"), "a string, or a list of strings that are all right")
    if not generated:
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise _wrong(where, "choices", members.get("choices"), "a list of two or more strings that all differ")
        for answer in answers:
            if answer not in choices:
                raise _wrong(where, "answer", answer, "one of the choices, character by character")
        if len(set(answers)) == len(choices):
            raise _wrong(where, "answer", members["answer"], "some of the choices, not all of them")
    limit = members.get("max_tokens", MAX_TOKENS)
    if type(limit) is not int or not 1 <= limit <= LONGEST_ANSWER:
        raise _wrong(where, "max_tokens", limit, f"a number from 1 to {LONGEST_ANSWER:,}")
    return Question(
        identifier=_string(members, "id", where, number),
        kind=cast("Kind", kind),
        answers=answers,
        where=where,
        prompt=_string(members, "prompt", where, ""),
        messages=_messages(members["messages"], where) if "messages" in members else (),
        choices=choices,
        normalized=_flag(members, "normalized", where),
        ignore_case=_flag(members, "ignore_case", where),
        max_tokens=limit,
        stop=_strings(members, "stop", where, single=True),
        language=_string(members, "language", where, ""),
        tags=_strings(members, "tags", where),
    )


def _wrong(where: str, field: str, value: object, expected: str) -> CorpusError:
    return CorpusError(f"{where}: `{field}` is {brief(value)}; expected {expected}.")


def _flag(members: Mapping[str, Any], field: str, where: str) -> bool:
    value = members.get(field, False)
    if not isinstance(value, bool):
        raise _wrong(where, field, value, "true or false")
    return value


def _string(members: Mapping[str, Any], field: str, where: str, absent: str) -> str:
    if field not in members:
        return absent
    value = members[field]
    if not _is_text(value):
        raise _wrong(where, field, value, "text that is not empty")
    return str(value)


def _strings(members: Mapping[str, Any], field: str, where: str, single: bool = False) -> tuple[str, ...]:
    """A list of strings, empty when the field is absent; ``single``: one string stands for a list of it alone."""
    value = members.get(field, [])
    listed = [value] if single and isinstance(value, str) else value
    if not isinstance(listed, list) or not all(_is_text(text, blank=field in ("stop", "choices")) for text in listed):
        one = "text, or a list of texts" if single else "a list of texts"
        raise _wrong(where, field, value, f"{one}, none of them empty")
    return tuple(listed)


def _is_text(value: object, blank: bool = False) -> bool:
    """Text that can be tokenized (no half of a surrogate pair) and is not empty, nor white space alone unless ``blank``."""
    if not isinstance(value, str) or not (value if blank else value.strip()):
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    expected = "a list of objects with `role` and `content`, both text, the last one not the assistant's"
    if not isinstance(value, list) or not value:
        raise _wrong(where, "messages", value, expected)
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or not all(map(_is_text, message.values())):
            raise _wrong(where, "messages", message, expected)
    if value[-1]["role"] == "assistant":
        raise _wrong(where, "messages", value[-1], expected)
    return tuple(value)
