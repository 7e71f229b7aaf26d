"""Greedy generation: token for token what transformers generates, whatever else runs beside it and however weights are kept."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit import convert
from quantkit.encoder import Continuation, Encoder
from quantkit.errors import ArtifactError, CorpusError, Interrupted
from quantkit.generation import Answer, Prompt, end_tokens, generate
from quantkit.inference import Inference
from quantkit.kept_model import KeptModel
from quantkit.likelihood import Likelihood, log_likelihoods, sweeps
from quantkit.stored_model import StoredModel, open_model
from quantkit.team import Team
from tests.reference_model import load_reference

DEMO = Path(__file__).resolve().parent.parent / "demo/tiny-scout"
TEXTS = (
    "The history of the city begins",
    "def main():\n    ",
    "Die",
    "NAME\n       ls - list directory contents\n\nSYNOPSIS\n       ls [OPTION]... [FILE]...\n\nDESCRIPTION\n",
    "#include <stdio.h>\n\nint main(",
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(DEMO)


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(DEMO)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts")
    convert(DEMO, ["w4a16-rtn", "fp8-dynamic", "Q8_0"], output)
    return output


@pytest.fixture(scope="module")
def kept() -> Iterator[KeptModel]:
    with open_model(DEMO) as model:
        yield KeptModel(model)


def answers(
    model: StoredModel, prompts: Sequence[Prompt], encoder: Encoder, ends: frozenset[int] = frozenset(), **others: Any
) -> tuple[Answer, ...]:
    with Team(1) as team:
        return generate(Inference(model, team), prompts, encoder.tokenizer, ends, **others).answers


def expected_tokens(reference: Any, prompt: Sequence[int], count: int, ends: list[int]) -> list[int]:
    """By transformers' own loop, one prompt at a time."""
    output = reference.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=ends or None, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


# -------------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_transformers(reference: Any, encoder: Encoder, kept: KeptModel) -> None:
    prompts = [Prompt(encoder.encode(text), 12 + 2 * number) for number, text in enumerate(TEXTS)]
    found = answers(kept, prompts, encoder)
    for prompt, answer in zip(prompts, found, strict=True):
        assert list(answer.tokens) == expected_tokens(reference, prompt.tokens, prompt.max_tokens, [])
        assert answer.reason == "length" and len(answer.tokens) == prompt.max_tokens
        assert answer.text == encoder.tokenizer.decode(list(answer.tokens))


def test_end_tokens_end_an_answer_as_in_transformers(reference: Any, encoder: Encoder, kept: KeptModel) -> None:
    prompts = [Prompt(encoder.encode(text), 16) for text in TEXTS]
    without = answers(kept, prompts, encoder)
    ends = sorted({answer.tokens[3] for answer in without[:2]})  # any tokens may end a text, given as such
    found = answers(kept, prompts, encoder, frozenset(ends))
    for prompt, answer in zip(prompts, found, strict=True):
        assert list(answer.tokens) == expected_tokens(reference, prompt.tokens, 16, ends)
        ended = answer.tokens[-1] in ends
        assert answer.reason == ("end" if ended else "length")
    assert {answer.reason for answer in found[:2]} == {"end"}
    # An ordinary token that ends an answer is not part of its text.
    assert found[0].text == encoder.tokenizer.decode(list(found[0].tokens[:-1]))


def test_a_prompt_is_answered_as_if_alone(encoder: Encoder, artifacts: Path) -> None:
    prompts = [Prompt(encoder.encode(text), 10) for text in TEXTS]
    with open_model(artifacts / "w4a16-rtn") as model:
        kept = KeptModel(model)
        together = answers(kept, prompts, encoder)
        alone = [answers(kept, [prompt], encoder)[0] for prompt in prompts]
        backwards = answers(kept, prompts[::-1], encoder)[::-1]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in backwards]


def test_many_prompts_go_in_several_sweeps(encoder: Encoder, kept: KeptModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(encoder.encode(text), 4 + number) for number, text in enumerate(TEXTS)]
    expected = answers(kept, prompts, encoder)
    monkeypatch.setattr("quantkit.generation.CACHE_BYTES", 1 << 18)
    told: list[tuple[int, int]] = []
    found = answers(kept, prompts, encoder, progress=lambda *figures: told.append(figures))
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert told[-1] == (5, sum(prompt.max_tokens for prompt in prompts))
    assert told == sorted(told)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120))
def test_sweeps_hold_every_text_once_and_no_more_rows_than_allowed(lengths: list[int], rows: int) -> None:
    parts = list(sweeps(lengths, rows))
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[index] for index in part) <= rows for part in parts)


# --------------------------------------------------------------------------------------------------------------------- stops


def test_a_stop_string_is_cut_off_with_what_follows_it(encoder: Encoder, kept: KeptModel) -> None:
    prompt = encoder.encode(TEXTS[0])
    whole = answers(kept, [Prompt(prompt, 20)], encoder)[0].text
    stop = whole[9:12]  # may begin and end inside tokens
    (found,) = answers(kept, [Prompt(prompt, 20, ("never in there", stop))], encoder)
    assert found.reason == "stop"
    assert found.text == whole[: whole.index(stop)]
    assert len(found.tokens) < 20


def test_a_special_token_may_be_a_stop_string(encoder: Encoder, kept: KeptModel) -> None:
    """It is no part of decoded text."""
    name, identity = next((token.content, number) for number, token in encoder.tokenizer.get_added_tokens_decoder().items())
    with Team(1) as team:
        inference = Inference(kept, team)
        shape = inference.logits

        def always(hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            shape(hidden, out)[:, identity] = 1e9
            return out

        inference.logits = always  # type: ignore[method-assign]
        (found,) = generate(inference, [Prompt((5, 6), 9, (name,))], encoder.tokenizer, frozenset()).answers
    assert (found.tokens, found.text, found.reason) == ((identity,), "", "stop")


def test_stopping_raises_before_the_next_layer(encoder: Encoder, kept: KeptModel) -> None:
    stop = threading.Event()
    with pytest.raises(Interrupted):
        answers(kept, [Prompt((5, 6), 9)], encoder, progress=lambda *_: stop.set(), stop=stop)
    with Team(1) as team, pytest.raises(Interrupted):
        log_likelihoods(Inference(kept, team), [Continuation((5,), (6,))], stop=stop)


def test_prompts_that_mean_nothing_are_errors(encoder: Encoder, kept: KeptModel) -> None:
    with pytest.raises(CorpusError, match="Prompt 1 holds no token"):
        answers(kept, [Prompt((3,), 1), Prompt((), 1)], encoder)
    with pytest.raises(CorpusError, match="Prompt 0 may have 0 tokens"):
        answers(kept, [Prompt((3,), 0)], encoder)
    with pytest.raises(ArtifactError, match="has no token 9999"):
        answers(kept, [Prompt((9999,), 1)], encoder)
    assert answers(kept, [], encoder) == ()


# ---------------------------------------------------------------------------------------------------------------- end tokens


def test_end_tokens_of_each_format(artifacts: Path, tmp_path: Path) -> None:
    for path in (DEMO, artifacts / "w4a16-rtn", artifacts / "Q8_0"):
        with open_model(path) as model:
            found = end_tokens(model, tmp_path)
        assert 2037 in found, path  # <|eot|>, as generation_config.json has it
    listed = tmp_path / "listed"
    listed.mkdir()
    for path in DEMO.iterdir():
        (listed / path.name).symlink_to(path)
    (listed / "generation_config.json").unlink()
    (listed / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 2037]}))
    with open_model(listed) as model:
        assert end_tokens(model, DEMO) == {7, 9, 2037}
    (listed / "generation_config.json").write_text("{}")
    with open_model(listed) as model:
        assert end_tokens(model, DEMO) == {2037}  # of the config


# --------------------------------------------------------------------------------------------------------------- likelihoods


def scored(model: StoredModel, items: Sequence[Continuation]) -> list[Likelihood]:
    with Team(1) as team:
        return log_likelihoods(Inference(model, team), items)


def test_log_likelihoods_are_those_of_transformers(
    reference: Any, encoder: Encoder, kept: KeptModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        encoder.continuation(TEXTS[0], " in the"),
        encoder.continuation(TEXTS[2], " Stadt ist sehr alt."),
        encoder.continuation(TEXTS[1], "print(1)"),
        Continuation((5,), (6, 7, 8)),
    ]
    with torch.no_grad():
        for limit in (1 << 28, 1 << 14):  # at once, and in portions
            monkeypatch.setattr("quantkit.likelihood.LOGITS_BYTES", limit)
            monkeypatch.setattr("quantkit.likelihood.HIDDEN_BYTES", limit)
            for item, found in zip(items, scored(kept, items), strict=True):
                logits = reference(input_ids=torch.tensor([item.context + item.tokens])).logits[0]
                rows = logits[len(item.context) - 1 : -1].to(torch.float64)
                expected = rows.log_softmax(-1)[range(len(item.tokens)), item.tokens].sum()
                assert math.isclose(found.value, float(expected), rel_tol=1e-4)
                assert found.greedy == (rows.argmax(-1).tolist() == list(item.tokens))


def test_what_is_generated_is_greedy(encoder: Encoder, kept: KeptModel) -> None:
    prompt = encoder.encode(TEXTS[3])
    (answer,) = answers(kept, [Prompt(prompt, 6)], encoder)
    other = (*answer.tokens[:-1], (answer.tokens[-1] + 1) % 2000)
    found = scored(kept, [Continuation(prompt, answer.tokens), Continuation(prompt, other)])
    assert [item.greedy for item in found] == [True, False]
    assert found[0].value > found[1].value
    with pytest.raises(ArtifactError, match="has no token 2048"):
        scored(kept, [Continuation(prompt, (2048,))])


# -------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["w4a16-rtn", "fp8-dynamic", "Q8_0"])
def test_kept_models_give_the_same_numbers_within_their_budget(name: str, encoder: Encoder, artifacts: Path) -> None:
    items = [encoder.continuation(text, " and so on") for text in TEXTS[:3]]
    with open_model(artifacts / name) as model:
        expected = scored(model, items)
        for budget in (0, 3 << 20, 64 << 20, 1 << 30):  # nothing, a part, all as it is stored, all in float32
            kept = KeptModel(model, budget)
            for found, right in zip(scored(kept, items) + scored(kept, items), expected * 2, strict=True):
                assert math.isclose(found.value, right.value, rel_tol=1e-5)
            assert kept.kept <= budget
        assert (kept.name, kept.bytes, kept.fingerprint()) == (model.name, model.bytes, model.fingerprint())
        assert kept.kept > model.bytes
        kept.close()
        assert kept.kept == 0


def test_a_kept_model_reads_each_matrix_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(DEMO) as model:
        reads: list[str] = []
        read = model.read
        monkeypatch.setattr(model, "read", lambda matrix: (reads.append(matrix.name), read(matrix))[1])
        answers(KeptModel(model), [Prompt(encoder.encode(text), 5) for text in TEXTS], encoder)
        assert reads and len(reads) == len(set(reads))
