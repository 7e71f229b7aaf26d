"""The adapter for lm-evaluation-harness, on a class that has its interface; the harness itself is not installed for tests."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import CorpusError, QuantkitError
from quantkit.harness import harness_model, model_class
from tests.reference_model import load_reference

DEMO = Path(__file__).resolve().parent.parent / "demo/tiny-scout"


class CacheHook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def add_partial(self, method: str, arguments: Any, result: Any) -> None:
        self.seen.append((method, arguments, result))


class Stub:
    """What ``lm_eval.api.model.LM`` gives to its subclasses."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()


@dataclass(frozen=True)
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with model_class(Stub)(DEMO, threads=1, max_length=64, batch_size=1) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(DEMO)


def log_probabilities(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Of each token but the first, float64."""
    with torch.no_grad():
        rows = reference(input_ids=torch.tensor([tokens])).logits[0, :-1].to(torch.float64).log_softmax(-1)
    return rows[range(len(rows)), tokens[1:]]


def test_loglikelihood(model: Any, reference: Any) -> None:
    begin, tokenizer = model._encoder.begin, model._encoder.tokenizer
    pairs = [("The history of the city ", "begins in the"), ("#include", " <stdio.h>"), ("", "Die Stadt")]
    found = model.loglikelihood([Request(pair) for pair in pairs])
    assert [type(greedy) for _, greedy in found] == [bool] * 3
    for (context, text), (value, _) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context.rstrip(), add_special_tokens=False).ids
        whole = tokenizer.encode(context + text, add_special_tokens=False).ids
        assert whole[: len(before)] == before and len(whole) > len(before)
        expected = log_probabilities(reference, [begin, *whole])[len(before) :].sum()
        assert math.isclose(value, float(expected), rel_tol=1e-4)
    assert [entry[:2] for entry in model.cache_hook.seen[-3:]] == [("loglikelihood", pair) for pair in pairs]


def test_a_context_that_is_too_long_loses_its_beginning(model: Any, reference: Any) -> None:
    context, text = "the city of " * 60, "the city"
    ((value, _),) = model.loglikelihood([Request((context, text))])
    whole = model._encoder.tokenizer.encode(context + text, add_special_tokens=False).ids
    before = len(model._encoder.tokenizer.encode(context.rstrip(), add_special_tokens=False).ids)
    count = len(whole) - before
    expected = log_probabilities(reference, whole[-65:])[-count:].sum()  # 64 are read, the last is predicted
    assert math.isclose(value, float(expected), rel_tol=1e-4)
    with pytest.raises(CorpusError, match="more than max_length 64"):
        model.loglikelihood([Request(("a", context))])


@pytest.mark.parametrize("text", ["Die Stadt liegt am Fluss.", "def main():\n    return 0\n" * 30])
def test_rolling_predicts_every_token_once(model: Any, reference: Any, text: str) -> None:
    (value,) = model.loglikelihood_rolling([Request((text,))])
    tokens = [model._encoder.begin, *model._encoder.tokenizer.encode(text, add_special_tokens=False).ids]
    expected, predicted = 0.0, 1
    while predicted < len(tokens):  # the harness's rule: full windows, each new token predicted from as much as there is room for
        end = min(predicted + 64, len(tokens))
        expected += float(log_probabilities(reference, tokens[max(0, end - 65) : end])[-(end - predicted) :].sum())
        predicted = end
    assert math.isclose(value, expected, rel_tol=1e-4)


@given(length=st.integers(1, 300), limit=st.integers(2, 40))
def test_windows_of_a_text(model: Any, length: int, limit: int) -> None:
    class Numbers:
        begin = -1

        def encode(self, text: str) -> tuple[int, ...]:
            return (-1, *range(length))

    other = object.__new__(type(model))
    other._encoder, other._max_length = Numbers(), limit
    windows = list(other._windows("text"))
    assert [token for window in windows for token in window.tokens] == list(range(length))
    for window in windows:
        joined = [*window.context, *window.tokens]
        assert joined == list(range(joined[0], joined[0] + len(joined))) and window.context
        assert len(joined) - 1 == min(limit, window.tokens[-1] + 1)  # as much is read as there is, and room for


def test_generate_until(model: Any, reference: Any) -> None:
    context = "The history of the city begins"
    tokens = torch.tensor([model._encoder.encode(context)])
    output = reference.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model._encoder.tokenizer.decode(output[0, tokens.shape[1] :].tolist())
    word = expected.split()[2]
    requests = [
        Request((context, {"until": [], "max_gen_toks": 12})),
        Request((context, {"until": [word, "unheard of"], "max_new_tokens": 12, "do_sample": False, "temperature": 0.7})),
        Request((context, {"until": word, "max_gen_toks": 12, "temperature": 0.0})),
    ]
    cut = expected[: expected.index(word)]
    assert model.generate_until(requests) == [expected, cut, cut]
    assert model.cache_hook.seen[-1] == ("generate_until", requests[-1].args, cut)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"do_sample": True, "temperature": 1}, {"num_beams": 4}])
def test_sampling_is_an_error(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="generation is greedy"):
        model.generate_until([Request(("a", options))])
    with pytest.raises(QuantkitError, match="max_length 64"):
        model.generate_until([Request(("a", {"max_gen_toks": 64}))])


def test_chats(model: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    begun = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n"
    assert model.apply_chat_template(chat) == begun
    prefixed = [*chat, {"role": "assistant", "content": "Answer:"}]
    assert model.apply_chat_template(prefixed, add_generation_prompt=False) == begun + "Answer:"
    assert model.chat_template(True).endswith("chat_template.jinja") and model.chat_template(False) is None
    assert model.tokenizer_name.startswith("tiny-scout-")
    # The template writes the begin token, so no other is put before it.
    assert model._encoder.encode(begun).count(model._encoder.begin) == 1


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QuantkitError, match=r"pip install quantkit\[harness\]"):
        harness_model(DEMO)
    with pytest.raises(QuantkitError, match="max_gen_toks 0"):
        model_class(Stub)(DEMO, max_length=64, max_gen_toks=0)
    with pytest.raises(QuantkitError, match="more than the 32,768 positions"):
        model_class(Stub)(DEMO, max_length=32_769)
