"""The golden set: strict reading, judging, intervals, and whole models that answer."""

from __future__ import annotations

import json
import math
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from quantkit import convert
from quantkit.chat import load_chat_format
from quantkit.encoder import Encoder
from quantkit.errors import ArtifactError, CorpusError, Interrupted
from quantkit.golden import answer_golden, golden_answers, is_right, wilson_interval
from quantkit.golden_set import Question, read_questions
from quantkit.stored_model import StoredModel, open_model
from quantkit.team import Team
from tests.mutated_json import any_json, places
from tests.reference_model import load_reference

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo/tiny-scout"
BUNDLED = ROOT / "calibration_data/golden/golden.jsonl"
ASK = [{"role": "user", "content": "Who?"}]
GOOD: dict[str, Any] = {"prompt": "a", "kind": "exact", "answer": "b"}
CHOICE: dict[str, Any] = {"prompt": "a", "kind": "choice", "answer": "b", "choices": ["b", "c"]}


def write(path: Path, *questions: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


# -------------------------------------------------------------------------------------------------------------------- reading


def test_all_fields(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    full = {"id": "x", "ignore_case": True, "max_tokens": 5, "stop": "\n", "language": "de", "tags": ["t", "u"]}
    path.write_text(
        "\ufeff" + json.dumps(GOOD | full) + "\n\n" + json.dumps(CHOICE | {"answer": ["c", "b"], "normalized": True}) + "\r\n"
    )
    first, second = read_questions(path)
    assert first == Question("x", "exact", ("b",), f"{path} line 1", "a", (), (), False, True, 5, ("\n",), "de", ("t", "u"))
    assert second == Question("3", "choice", ("c", "b"), f"{path} line 3", "a", (), ("b", "c"), True)
    (third,) = read_questions(write(path, {"messages": ASK, "kind": "contains", "answer": ["b", "c"]}))
    assert (third.messages, third.prompt, third.answers, third.max_tokens) == (tuple(ASK), "", ("b", "c"), 32)


@pytest.mark.parametrize(
    ("question", "field"),
    [
        (GOOD | {"anwser": "b"}, "no field 'anwser'"),
        (GOOD | {"kind": "fuzzy"}, "`kind` is 'fuzzy'; expected one of exact, contains, choice"),
        ({"prompt": "a", "answer": "b"}, "`kind` is None"),
        (GOOD | {"messages": ASK}, "both of `prompt` and `messages`"),
        ({"kind": "exact", "answer": "b"}, "neither of `prompt` and `messages`"),
        (GOOD | {"prompt": 3}, "`prompt` is 3"),
        (GOOD | {"prompt": "\ud800"}, "`prompt` is "),
        (GOOD | {"prompt": " "}, "`prompt` is ' '"),
        ({"prompt": "a", "kind": "exact"}, "`answer` is None"),
        (GOOD | {"answer": []}, r"`answer` is \[\]"),
        (GOOD | {"answer": ["b", ""]}, "`answer` is "),
        (GOOD | {"answer": 7}, "`answer` is 7"),
        (GOOD | {"choices": ["b", "c"]}, "`choices` means nothing for a question of kind exact"),
        (GOOD | {"normalized": True}, "`normalized` means nothing"),
        (CHOICE | {"stop": "b"}, "`stop` means nothing for a question of kind choice"),
        (CHOICE | {"max_tokens": 3}, "`max_tokens` means nothing"),
        (CHOICE | {"choices": ["b"]}, "`choices` is"),
        (CHOICE | {"choices": ["b", "b"]}, "`choices` is"),
        (CHOICE | {"choices": "bc"}, "`choices` is 'bc'"),
        (CHOICE | {"answer": "d"}, "`answer` is 'd'; expected one of the choices"),
        (CHOICE | {"normalized": 1}, "`normalized` is 1; expected true or false"),
        (GOOD | {"ignore_case": "yes"}, "`ignore_case` is 'yes'"),
        (GOOD | {"max_tokens": 0}, "`max_tokens` is 0"),
        (GOOD | {"max_tokens": True}, "`max_tokens` is True"),
        (GOOD | {"stop": [""]}, "`stop` is"),
        (GOOD | {"tags": "t"}, "`tags` is 't'; expected a list"),
        (GOOD | {"id": 5}, "`id` is 5"),
        ({"messages": [], "kind": "exact", "answer": "b"}, r"`messages` is \[\]"),
        ({"messages": [{"role": "user"}], "kind": "exact", "answer": "b"}, "`messages` is"),
        ({"messages": [*ASK, {"role": "assistant", "content": "I"}], "kind": "exact", "answer": "b"}, "not the assistant's"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, question: dict[str, Any], field: str) -> None:
    path = write(tmp_path / "questions.jsonl", GOOD, question)
    with pytest.raises(CorpusError, match=rf"questions\.jsonl line 2.*{field}"):
        read_questions(path)


def test_errors_of_files(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with pytest.raises(CorpusError, match=r"questions\.jsonl cannot be read: No such file.*`bundled`"):
        read_questions(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(CorpusError, match="byte 12"):
        read_questions(path)
    path.write_text("\n \n")
    with pytest.raises(CorpusError, match="holds no question"):
        read_questions(path)
    path.write_text("[1]\n")
    with pytest.raises(CorpusError, match=r"line 1 is damaged.*describes the fields"):
        read_questions(path)
    write(path, GOOD | {"id": "2"}, GOOD)  # the second is called by its line
    with pytest.raises(CorpusError, match=r"line 2: `id` is '2', as in .*line 1"):
        read_questions(path)


@given(st.dictionaries(st.sampled_from([*GOOD, "choices", "messages", "id", "stop", "tags", "x"]), st.from_type(object).map(str)))
def test_reading_never_fails_otherwise(tmp_path_factory: pytest.TempPathFactory, members: dict[str, Any]) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", members)
    try:
        read_questions(path)
    except CorpusError as error:
        assert "any.jsonl line 1" in str(error)


_CHAT: dict[str, Any] = {
    "messages": ASK,
    "kind": "contains",
    "answer": ["b", "c"],
    "max_tokens": 9,
    "stop": ["\n"],
    "ignore_case": True,
}
_OPTIONAL: dict[str, Any] = {"id": "q", "language": "en", "tags": ["t"]}
_json = any_json("exact", "choice", "user", "b", "\ud800", 10**40, 32_769)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_questions_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = json.loads(json.dumps(data.draw(st.sampled_from([GOOD, CHOICE | {"normalized": True}, _CHAT])) | _OPTIONAL))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(whole) or [(whole, "prompt")]))
        container[key] = data.draw(_json)
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    path.write_text(json.dumps(whole))
    try:
        [question] = read_questions(path)
    except CorpusError as error:
        assert "mutated.jsonl" in str(error) and len(str(error)) < 2000
        return
    texts = [question.identifier, *question.answers, *question.choices, *question.stop, *question.tags]
    assert all(isinstance(text, str) and text.encode() for text in texts)
    assert bool(question.prompt) != bool(question.messages) and question.answers and 0 < question.max_tokens <= 32_768
    assert set(question.answers) <= set(question.choices) if question.kind == "choice" else not question.choices
    listed = whole["answer"] if isinstance(whole["answer"], list) else [whole["answer"]]
    assert (list(question.answers), question.kind) == (listed, whole["kind"])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = "".join(json.dumps(question) + "\n" for question in (GOOD, CHOICE, _CHAT)).encode()
    at, removed = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 9))
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=5)) + whole[at + removed :])
    try:
        assert 1 <= len(read_questions(path)) <= 6
    except CorpusError as error:
        assert "damaged.jsonl" in str(error)


def test_the_bundled_set_is_what_the_documents_say() -> None:
    questions = read_questions("bundled")
    assert questions == tuple(
        Question(**{**vars(question), "where": question.where.replace(str(BUNDLED), "bundled")})
        for question in read_questions(BUNDLED)
    )
    assert 50 <= len(questions) <= 200
    assert f"{len(questions)} questions" in (ROOT / "docs/golden-set.md").read_text()
    assert f"{len(questions)} questions" in (ROOT / "calibration_data/README.md").read_text()
    assert len({question.language for question in questions}) == 12
    assert min(Counter(question.kind for question in questions).values()) >= 15
    for question in questions:
        if question.kind == "contains":
            asked = question.prompt or question.messages[-1]["content"]
            assert not is_right(question, asked), f"{question.identifier} is answered by its question"
    places = Counter(question.choices.index(question.answers[0]) for question in questions if "letters" in question.tags)
    assert max(places.values()) <= 3


def test_examples_of_the_document(tmp_path: Path) -> None:
    text = (ROOT / "docs/golden-set.md").read_text()
    path = tmp_path / "example.jsonl"
    path.write_text(text.split("```json\n")[1].split("```")[0])
    assert [question.kind for question in read_questions(path)] == ["contains", "exact", "choice"]


# ------------------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("kind", "ignore_case", "answer", "right"),
    [
        ("exact", False, " Café\n", True),
        ("exact", False, unicodedata.normalize("NFD", "Café"), True),
        ("exact", False, "café", False),
        ("exact", True, unicodedata.normalize("NFD", "CAFÉ"), True),
        ("exact", False, "Café.", False),
        ("exact", False, "Straße 5", True),
        ("exact", True, "STRASSE 5", True),
        ("contains", False, "In the Café, of course", True),
        ("contains", False, "in the café", False),
        ("contains", True, "in the café", True),
        ("contains", False, "Caf", False),
    ],
)
def test_judging(kind: Any, ignore_case: bool, answer: str, right: bool) -> None:
    assert is_right(Question("x", kind, ("Café", "Straße 5"), "here", "a", ignore_case=ignore_case), answer) is right


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_interval(shares: tuple[int, int]) -> None:
    """Its ends are the shares p from which what was seen lies 1.96 standard errors, of p itself, away."""
    right, count = shares
    found = wilson_interval(right, count)
    assert 0 <= found.low <= found.value == right / count <= found.high <= 1
    for end in (found.low, found.high):
        error = math.sqrt(end * (1 - end) / count)
        at_border = end in (0.0, 1.0) and found.value == end
        assert at_border or math.isclose(abs(found.value - end), 1.959964 * error, rel_tol=1e-5, abs_tol=1e-9)


# ------------------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def model() -> Iterator[StoredModel]:
    with open_model(DEMO) as model:
        yield model


def expected_text(reference: Any, tokens: list[int], count: int) -> str:
    encoder = Encoder.load(DEMO)
    output = reference.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return encoder.tokenizer.decode(output[0, len(tokens) :].tolist())


def test_answers_and_figures(model: StoredModel, tmp_path: Path) -> None:
    reference, tokenizer = load_reference(DEMO), AutoTokenizer.from_pretrained(DEMO)
    continued = expected_text(reference, [2032, *tokenizer("#include <std", add_special_tokens=False).input_ids], 6)
    chat = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    answered = expected_text(reference, tokenizer(chat, add_special_tokens=False).input_ids, 8)
    path = write(
        tmp_path / "questions.jsonl",
        {"id": "continued", "prompt": "#include <std", "kind": "exact", "answer": continued, "max_tokens": 6},
        {"id": "chosen", "prompt": "#include", "kind": "choice", "answer": " der Stadt", "choices": [" <stdio.h>", " der Stadt"]},
        {"id": "answered", "messages": ASK, "kind": "contains", "answer": answered[2:], "max_tokens": 8},
        {"id": "stopped", "messages": ASK, "kind": "exact", "answer": "nothing like it", "max_tokens": 8, "stop": answered[3]},
    )
    told: list[tuple[str, int, int]] = []
    with Team(1) as team:
        (found,) = golden_answers([model], path, DEMO, team=team, progress=lambda *figures: told.append(figures))
    assert found.answers == (
        ("continued", True, continued),
        ("chosen", False, " <stdio.h>"),
        ("answered", True, answered),
        ("stopped", False, answered[: answered.index(answered[3])]),
    )
    assert (found.name, found.bytes, found.questions) == (model.name, model.bytes, 4)
    assert found.accuracy == wilson_interval(2, 4)
    assert found.by_kind == {"exact": 0.5, "contains": 1.0, "choice": 0.0}
    assert found.latency > 0 and found.tokens_per_second > 0
    assert told[0] == (model.name, 0, 4) and told[-1] == (model.name, 4, 4)


def test_normalized_choices_go_by_the_likelihood_of_a_byte(model: StoredModel) -> None:
    choices = ("(", "():\n    return")  # the longer one is less likely, but not by as much as it is longer
    plain = Question("1", "choice", (choices[0],), "here", "def main", choices=choices)
    normalized = Question("2", "choice", (choices[1],), "here", "def main", choices=choices, normalized=True)
    with Team(1) as team:
        found = answer_golden(model, [plain, normalized], DEMO, team=team)
    assert [answer for _, _, answer in found.answers] == list(choices)
    assert found.tokens_per_second == 0.0  # nothing was generated
    assert found.by_kind == {"choice": 1.0}


def test_artifacts_answer_the_bundled_set(tmp_path: Path, model: StoredModel) -> None:
    """A tiny model knows no answers; but what is stored exactly answers like the reference, and every question is answered."""
    convert(DEMO, ["F32"], tmp_path / "artifacts")
    questions = [question for question in read_questions("bundled") if question.kind == "choice" or question.max_tokens <= 16]
    with Team(1) as team, open_model(tmp_path / "artifacts" / "F32") as artifact:
        found = [answer_golden(each, questions, DEMO, team=team) for each in (model, artifact)]
    assert found[0].answers == found[1].answers
    assert [identifier for identifier, _, _ in found[0].answers] == [question.identifier for question in questions]


def test_errors_while_asking(model: StoredModel, tmp_path: Path) -> None:
    for path in DEMO.iterdir():
        (tmp_path / path.name).symlink_to(path)
    question = Question("1", "exact", ("b",), "file line 7", messages=tuple(ASK))
    stop = threading.Event()
    stop.set()
    with Team(1) as team:
        with pytest.raises(Interrupted):
            answer_golden(model, [question], DEMO, team=team, stop=stop)
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
        with pytest.raises(CorpusError, match=r"file line 7: .*cannot render"):
            answer_golden(model, [question], tmp_path, team=team)
        (tmp_path / "tokenizer.json").unlink()
        Tokenizer(WordLevel({"a": 3000, "b": 3001, "?": 3}, "?")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ArtifactError, match="has no token 3000: its vocabulary has 2,048"):
            answer_golden(model, [Question("1", "exact", ("b",), "here", "a")], tmp_path, team=team)


def test_chats_end_where_the_assistant_answers(tmp_path: Path) -> None:
    """As transformers renders it; without a template, in Llama 4's headers or in paragraphs."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    chat = [{"role": "system", "content": "Be brief."}, *ASK]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert Encoder.load(DEMO).question(chat) == expected
    assert load_chat_format(tmp_path, lambda _: True).render(chat, None, answer=True) == expected
    assert (
        load_chat_format(tmp_path, lambda _: False).render(chat, None, answer=True)
        == "system: Be brief.\n\nuser: Who?\n\nassistant:"
    )
