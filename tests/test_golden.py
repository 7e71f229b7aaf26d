"""The golden set: strict reading, judging, intervals, and whole models that answer."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from quantkit.evaluation import Estimate, GoldenAnswers, GoldenComparison
from quantkit.generation import Step
from quantkit.golden import check_questions, golden_answers, is_right
from quantkit.golden_figures import beside_reference, sign_test, speed, typical, wilson_interval
from quantkit.golden_set import Question, read_questions
from quantkit.report.golden_words import golden_findings
from quantkit.stored_model import StoredModel, open_model
from quantkit.team import Team
from tests.mutated_json import any_json, places
from tests.reference_model import load_reference
from tests.sample_evaluations import sample

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
    more = {"answer": ["c", "b"], "choices": ["b", "c", "d"], "normalized": True}
    path.write_text("\ufeff" + json.dumps(GOOD | full) + "\n\n" + json.dumps(CHOICE | more) + "\r\n")
    first, second = read_questions(path)
    assert first == Question("x", "exact", ("b",), f"{path} line 1", "a", (), (), False, True, 5, ("\n",), "de", ("t", "u"))
    assert second == Question("3", "choice", ("c", "b"), f"{path} line 3", "a", (), ("b", "c", "d"), True)
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
        (CHOICE | {"answer": ["c", "b"]}, "expected some of the choices, not all"),
        (CHOICE | {"answer": ["c", "b", "c"]}, "expected some of the choices, not all"),
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


def test_sign_test() -> None:
    """Against all ways in which coins can fall, counted one by one; and figures from a table of the binomial distribution."""
    for gained, lost in itertools.product(range(7), range(7)):
        falls = [sum(coins) for coins in itertools.product((0, 1), repeat=gained + lost)]
        uneven = sum(abs(2 * heads - gained - lost) >= abs(gained - lost) for heads in falls)
        assert sign_test(gained, lost) == pytest.approx(uneven / len(falls), rel=1e-12)
    assert sign_test(0, 0) == 1.0
    assert sign_test(1, 9) == sign_test(9, 1) == 22 / 1024
    assert sign_test(0, 6) == 0.03125
    assert 0 < sign_test(0, 1070) < 1e-300 and sign_test(5000, 5000) == 1.0


def answered(name: str, right: str) -> GoldenAnswers:
    """By a model that answers rightly where ``right`` says +."""
    none = Estimate(math.nan, math.nan, math.nan)
    given = tuple((str(number), sign == "+", "") for number, sign in enumerate(right))
    return GoldenAnswers(name, 1, len(right), wilson_interval(right.count("+"), len(right)), {}, none, none, 1, given)


def test_answers_are_paired_with_the_reference() -> None:
    names, marks = ("base", "lossy", "same", "other"), ("+" * 8 + "--", "-" * 8 + "+-", "+" * 8 + "--", "-" + "+" * 8 + "-")
    base, *found = beside_reference([answered(*pair) for pair in zip(names, marks, strict=True)])
    assert base.beside_reference is None
    compared = [one.beside_reference for one in found]
    assert compared[0] == GoldenComparison(1, 8, 20 / 512, 60 / 512)  # two sides of 1 + 9 among 512; three artifacts
    assert compared[1] == GoldenComparison(0, 0, 1.0, 1.0)
    assert compared[2] == GoldenComparison(1, 1, 1.0, 1.0)
    assert [one.answers for one in found] == [answered("", mark).answers for mark in marks[1:]]
    assert len(beside_reference([answered("base", "+")])) == 1


def test_what_the_report_says_of_chance() -> None:
    def said(*marks: str) -> str:
        golden = beside_reference([answered(f"m{number}", mark) for number, mark in enumerate(marks)])
        return " ".join(golden_findings(replace(sample(), golden=golden)))

    assert "cannot tell m1 from m0: with 8 questions none" in said("+" * 8, "-" * 5 + "+++")
    assert "artifacts together" not in said("+" * 8, "-" * 5 + "+++")
    assert "cannot tell the artifacts from m0" in said("+" * 8, "-" * 6 + "++", "+" * 8)  # 0.031 is not enough for one of two
    assert "m1 answers worse than m0, by more than chance: 6 right answers lost, 0 gained" in said("+" * 8, "-" * 6 + "++")
    both = said("-" * 12 + "+", "+" * 12 + "-", "-" * 12 + "+")
    assert "m1 answers better than m0, by more than chance: 1 right answer lost, 12 gained" in both
    assert "cannot tell m2 from m0" in both
    assert "all models or wrong by all" in said("+-+", "+-+", "+-+")
    assert said("+-") == ""


def test_what_the_report_says_of_speed() -> None:
    def said(*speeds: Estimate, rounds: int = 2) -> str:
        golden = [replace(answered(f"m{number}", "+"), tokens_per_second=each, rounds=rounds) for number, each in enumerate(speeds)]
        return golden_findings(replace(sample(), golden=tuple(golden)))[-1]

    quick, close, slow = Estimate(217, 130, 230), Estimate(132, 118, 141), Estimate(60, 50, 70)
    assert "speeds cannot be told apart" in said(quick, close)
    assert said(quick, close, slow) == "m0 generates faster than m2, by more than the spread; it cannot be told from m1 in speed."
    assert said(slow, close) == "m1 generates faster than m0, by more than the spread."
    assert "what else the machine did" in said(slow, close, rounds=1)
    assert "too few steps" in said(Estimate(217, math.nan, math.nan), close)


# -------------------------------------------------------------------------------------------------------------------- times


def test_a_speed_is_that_of_the_median_token() -> None:
    steps = [Step(10, 1.0)] * 6 + [Step(2, 1.0)] * 2 + [Step(10, 50.0)]  # answers end, and something disturbs a step
    tokens = sorted(rate for step in steps for rate in [step.tokens / step.seconds] * step.tokens)
    found = speed(steps)
    assert found.value == 10.0 == tokens[len(tokens) // 2]
    assert (found.low, found.high) == (tokens[math.ceil(0.1 * len(tokens)) - 1], 10.0) == (0.2, 10.0)
    assert speed(list(reversed(steps))) == found
    few = speed(steps[:3])
    assert few.value == 10.0 and math.isnan(few.low) and math.isnan(few.high)
    assert all(map(math.isnan, (speed([]).value, speed([]).low, speed([]).high)))


def test_times_of_rounds() -> None:
    assert typical([3.0, 1.0, 9.0]) == Estimate(3.0, 1.0, 9.0)
    assert typical([2.0]).value == 2.0 and math.isnan(typical([2.0]).low)


@pytest.mark.parametrize(("tick", "rounds"), [(1e-3, 5), (10.0, 1)])
def test_models_take_turns_as_long_as_they_are_quick(
    model: StoredModel, monkeypatch: pytest.MonkeyPatch, tick: float, rounds: int
) -> None:
    clock = itertools.count()  # on which a look at it takes a tick
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) * tick)
    asked: list[int] = []
    told: list[int] = []

    @contextmanager
    def guard(number: int) -> Iterator[None]:
        asked.append(number)
        yield

    questions = [Question("1", "exact", ("b",), "here", "a", max_tokens=3)]
    with Team(1) as team:
        found = golden_answers([model, model], questions, DEMO, team=team, guard=guard, progress=lambda *at: told.append(at[1]))
    assert asked == [0, 1] * rounds
    assert [one.rounds for one in found] == [max(1, rounds - 1)] * 2  # the first is left out where there are others
    assert math.isnan(found[0].latency.low) == (rounds == 1)
    assert told.count(1) < 10 and told == sorted(told[: len(told) // 2]) * 2  # only of the first round
    assert found[0].answers == found[1].answers


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
    assert found.latency.value > 0 and found.tokens_per_second.value > 0 and found.beside_reference is None
    assert told[0] == (model.name, 0, 4) and told[-1] == (model.name, 4, 4)


def test_normalized_choices_go_by_the_likelihood_of_a_byte(model: StoredModel) -> None:
    choices = ("(", "():\n    return")  # the longer one is less likely, but not by as much as it is longer
    plain = Question("1", "choice", (choices[0],), "here", "def main", choices=choices)
    normalized = Question("2", "choice", (choices[1],), "here", "def main", choices=choices, normalized=True)
    with Team(1) as team:
        [found] = golden_answers([model], [plain, normalized], DEMO, team=team)
    assert [answer for _, _, answer in found.answers] == list(choices)
    assert math.isnan(found.tokens_per_second.value)  # nothing was generated
    assert found.by_kind == {"choice": 1.0}


def test_artifacts_answer_the_bundled_set(tmp_path: Path, model: StoredModel) -> None:
    """A tiny model knows no answers; but what is stored exactly answers like the reference, and every question is answered."""
    convert(DEMO, ["F32"], tmp_path / "artifacts")
    questions = [question for question in read_questions("bundled") if question.kind == "choice" or question.max_tokens <= 16]
    with Team(1) as team, open_model(tmp_path / "artifacts" / "F32") as artifact:
        found = golden_answers([model, artifact], questions, DEMO, team=team, rounds=1)
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
            golden_answers([model], [question], DEMO, team=team, stop=stop)
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
        with pytest.raises(CorpusError, match=r"file line 7: .*cannot render"):
            golden_answers([model], [question], tmp_path, team=team)
        (tmp_path / "tokenizer.json").unlink()
        Tokenizer(WordLevel({"a": 3000, "b": 3001, "?": 3}, "?")).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ArtifactError, match="has no token 3000: its vocabulary has 2,048"):
            golden_answers([model], [Question("1", "exact", ("b",), "here", "a")], tmp_path, team=team)


def test_what_is_longer_than_a_model_knows_is_refused(model: StoredModel, tmp_path: Path) -> None:
    positions, length = 40, len(Encoder.load(DEMO).encode("The history of the city"))
    config = replace(model.config, max_positions=positions)
    narrow = mock.Mock(wraps=model, config=config, path="narrow")
    fitting = Question("1", "exact", ("b",), "file line 7", "The history of the city", max_tokens=positions - length)
    check_questions([fitting], DEMO, [model, narrow])
    longer = replace(fitting, max_tokens=fitting.max_tokens + 1)
    check_questions([longer], DEMO, [model])
    chosen = Question("2", "choice", (" b",), "file line 8", "a b " * 40 + "a", choices=(" der Stadt", " b"))
    with Team(1) as team:
        for question in (longer, chosen):
            with pytest.raises(CorpusError, match=rf"{question.where}: the question has .* the 40 positions that narrow knows"):
                golden_answers([model, narrow], [question], DEMO, team=team)
    assert not narrow.read.called


def test_a_stop_is_heard_within_a_layer(model: StoredModel) -> None:
    """Every tile asks, also on several threads."""

    class Halt(Exception):
        pass

    asked = itertools.count()

    def check() -> None:
        if next(asked) >= 3:
            raise Halt

    for threads in (1, 2):
        asked = itertools.count()
        done: list[int] = []
        with Team(threads, check=check) as team, pytest.raises(Halt):
            team.run(done.append, range(100))
        assert len(done) == 3
    asked = itertools.count()
    with Team(1, check=check) as team, pytest.raises(Halt):
        golden_answers([model], [Question("1", "exact", ("b",), "here", "a")], DEMO, team=team)
    assert next(asked) < 10  # a layer alone has more tiles


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
