"""Windows to measure on: against the corpus they come from, and against llama.cpp's own tokens, cut as its program cuts them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quantkit.convert import convert
from quantkit.corpus import load_corpus
from quantkit.errors import CorpusError
from quantkit.windows import Convention, Windows, load_windows
from tests.gguf_models import DEMO, pure, text_file
from tests.llama_cpp import Llama
from tests.speaking_models import random_tokens, words, write_random_texts, write_speaking_model

BEGIN = 2032  # of the demo
TEXT = (Path(__file__).parent.parent / "LICENSE").read_text()


def predicted(windows: Windows) -> list[tuple[int, int, int]]:
    """(window, position, right token) of all predictions, by the vectorized way."""
    length = windows.tokens.shape[1]
    rows, targets = windows.predictions(slice(0, len(windows.lengths)))
    return [(row // length, row % length, target) for row, target in zip(rows.tolist(), targets.tolist(), strict=True)]


def spelled_out(windows: Windows) -> list[tuple[int, int, int]]:
    """The same in words."""
    return [
        (number, position, int(windows.tokens[number, position + 1]))
        for number, length in enumerate(windows.lengths)
        for position in range(length - 1)
        if position >= windows.first
    ]


def test_full_windows_are_those_of_the_held_out_corpus() -> None:
    windows = load_windows(None, DEMO, window=256, windows=20, seed=3)
    corpus = load_corpus(None, DEMO, samples=20, sequence_length=256, seed=3, held_out=True)
    assert torch.equal(windows.tokens, corpus.tokens.to(torch.int64))
    assert windows.first == 0 and windows.positions == (255,) * 20
    assert windows.description["part"] == "held_out" and "window_reduced_to" not in windows.description
    assert windows.kinds == tuple(name.partition(",")[0] for name in windows.names)
    assert [f".{language}" for language in windows.languages] == [kind[kind.rindex(".") :] for kind in windows.kinds]
    assert predicted(windows) == spelled_out(windows)


def test_short_windows_predict_what_they_hold(tmp_path: Path) -> None:
    """Two kinds of some 100 tokens fill no window of 128: each is one shorter window."""
    source = write_speaking_model(tmp_path / "model")
    windows = load_windows(write_random_texts(tmp_path / "texts.jsonl"), source, window=200)
    assert len(windows.lengths) == 2 and max(windows.lengths) < 200
    assert windows.description["window_reduced_to"] == max(windows.lengths)
    assert predicted(windows) == spelled_out(windows)
    assert sum(windows.positions) == len(predicted(windows)) == sum(windows.lengths) - 2
    samples = windows.samples(slice(1, 2))
    assert samples.lengths == windows.lengths[1:] and len(samples.tokens) == windows.lengths[1]


# --------------------------------------------------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    [made] = convert(DEMO, pure("Q8_0"), tmp_path_factory.mktemp("gguf")).artifacts
    return Llama(text_file(made.directory), vocab_only=True)


@pytest.mark.parametrize("window", [31, 64])
def test_second_halves_are_those_of_llama_perplexity(window: int, llama: Llama, tmp_path: Path) -> None:
    text = TEXT[:6000] + " <|eot|> is written here, <|header_start|> too\n\n"
    (tmp_path / "text.txt").write_text(text)
    windows = load_windows(tmp_path / "text.txt", DEMO, window=window, convention="llama.cpp")
    ids = llama.tokenize(text[:-1], add_special=True, parse_special=False)
    assert llama.adds_bos() and ids[0] == BEGIN and 2037 not in ids
    assert len(windows.lengths) == len(ids) // window > 3
    for number, tokens in enumerate(windows.tokens.tolist()):
        assert tokens == [BEGIN, *ids[number * window + 1 : (number + 1) * window]]
    assert windows.first == window // 2 and set(windows.positions) == {window - window // 2 - 1}
    assert predicted(windows) == spelled_out(windows)
    assert windows.kinds[0] == "text" and windows.languages[0] == ""


def test_without_a_begin_token_in_front_nothing_is_replaced(tmp_path: Path) -> None:
    """The tokenizer names a begin token, but does not put it before texts: llama.cpp would not either."""
    source = write_speaking_model(tmp_path / "model")
    tokens = random_tokens(100, 5)
    (tmp_path / "text.txt").write_text(words(tokens))
    windows = load_windows(tmp_path / "text.txt", source, window=30, convention="llama.cpp")
    assert windows.tokens.tolist() == [tokens[0:30], tokens[30:60], tokens[60:90]]
    assert windows.description["begin_token"] is None


def test_each_kind_is_a_text_and_short_kinds_are_told(tmp_path: Path) -> None:
    source = write_speaking_model(tmp_path / "model")
    lines = [("prose.en", random_tokens(40, 1)), ("code", random_tokens(9, 2)), ("prose.en", random_tokens(25, 3))]
    content = "".join(json.dumps({"kind": kind, "text": words(tokens)}) + "\n" for kind, tokens in lines)
    (tmp_path / "texts.jsonl").write_text(content)
    windows = load_windows(tmp_path / "texts.jsonl", source, window=20, convention="llama.cpp")
    joined = lines[0][1] + lines[2][1]
    assert windows.tokens.tolist() == [joined[0:20], joined[20:40], joined[40:60]]
    assert windows.kinds == ("prose.en",) * 3 and windows.description["left_out"] == {"code": 9}


# ------------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("convention", ["full", "llama.cpp"])
def test_some_windows_are_spread_over_all(convention: Convention, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    every = load_windows(tmp_path / "text.txt", DEMO, window=64, convention=convention)
    places = {tuple(tokens): number for number, tokens in enumerate(every.tokens.tolist())}
    for seed in (0, 1, 2):
        some = load_windows(tmp_path / "text.txt", DEMO, window=64, windows=5, convention=convention, seed=seed)
        chosen = [places[tuple(tokens)] for tokens in some.tokens.tolist()]
        steps = {later - earlier for earlier, later in pairwise(chosen)}
        assert max(steps) - min(steps) <= 1 and min(steps) == len(every.lengths) // 5
        assert some.digest != every.digest and some.description["samples"] == 5
    assert load_windows(tmp_path / "text.txt", DEMO, window=64, convention=convention).digest == every.digest


def test_the_convention_is_part_of_the_digest(tmp_path: Path) -> None:
    source = write_speaking_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(random_tokens(60, 1)))
    full = load_windows(tmp_path / "text.txt", source, window=20)
    halves = load_windows(tmp_path / "text.txt", source, window=20, convention="llama.cpp")
    assert torch.equal(full.tokens, halves.tokens) and full.digest != halves.digest
    assert json.loads(json.dumps(full.description)) == full.description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "wikitext"}, "no convention 'wikitext'"),
        ({"windows": 0}, "0 windows were asked for"),
        ({"window": 2}, "hold no context"),
        ({"window": 5000, "convention": "llama.cpp"}, "No text fills a window of 5000 tokens: the longest has 1"),
        ({"vocab_size": 100}, "belongs to another model"),
        ({"vocab_size": 100, "convention": "llama.cpp"}, "belongs to another model"),
    ],
)
def test_what_cannot_be_cut_is_one_error(options: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:400])
    with pytest.raises(CorpusError, match=message):
        load_windows(tmp_path / "text.txt", DEMO, **({"window": 64} | options))  # type: ignore[arg-type]


def test_one_token_predicts_nothing(tmp_path: Path) -> None:
    source = write_speaking_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("<17>")
    with pytest.raises(CorpusError, match="nothing is predicted"):
        load_windows(tmp_path / "text.txt", source, window=20)
