"""The corpus against tokenizers and plain lists: tokens, packing, choice, order, sources, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from quantkit.corpus import Corpus, apportion, load_corpus, phase, spread
from quantkit.errors import CorpusError

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"
BOS = 2032  # <|begin_of_text|> of the demo model
WORDS = ("river", "Straße", "काम", "ไทย", "code", "مرحبا", "nine", "\n", "über", "if (x) {", "42")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def prose(words: int, start: int = 0) -> str:
    return " ".join(f"{WORDS[(start + number) % len(WORDS)]} {number * number + start}" for number in range(words))


def write_lines(path: Path, *members: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in members), encoding="utf-8")
    return path


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def rows(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens[row, :length].tolist() for row, length in enumerate(corpus.lengths.tolist())]


# ---------------------------------------------------------------------------------------------------------------- tokens, packing


def test_a_plain_text_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = prose(300)
    (tmp_path / "story.txt").write_bytes(text.encode())
    ids = encode(tokenizer, text)
    windows = [ids[first : first + 64] for first in range(0, len(ids) - 63, 64)]
    corpus = load_corpus(tmp_path / "story.txt", DEMO, sequence_length=64)
    assert rows(corpus) == windows, "no BOS token, exact windows, the remainder dropped"
    assert corpus.kinds == ("story",)
    assert corpus.sample_names[2] == "story, document 1, token 128"
    assert corpus.tokens.dtype == corpus.lengths.dtype == torch.int32
    assert corpus.token_kinds.dtype == torch.int16
    few = load_corpus(str(tmp_path / "story.txt"), str(DEMO), sequence_length=64, samples=7)
    assert rows(few) == [windows[index * len(windows) // 7] for index in range(7)]
    assert few.description["samples"] == few.description["samples_asked"] == 7
    assert few.description["samples_available"] == len(windows)


def test_json_lines_are_packed_by_kind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [prose(40, 1), prose(70, 2), prose(30, 3), "tiny"]
    path = write_lines(
        tmp_path / "mixed.jsonl",
        {"kind": "prose", "language": "de", "text": texts[0]},
        {"text": texts[1]},
        {"kind": "prose", "language": "de", "text": texts[2]},
        {"kind": "note", "text": texts[3]},
    )
    corpus = load_corpus(path, DEMO, sequence_length=32)
    ids = [[BOS, *encode(tokenizer, text)] for text in texts]
    expected = {"prose.de": ids[0] + ids[2], "mixed": ids[1], "note": ids[3]}
    assert corpus.kinds == ("mixed", "note", "prose.de")
    for number, kind in enumerate(corpus.kinds):
        mine = [row for row, name in zip(rows(corpus), corpus.sample_names, strict=True) if name.startswith(f"{kind},")]
        joined = expected[kind]
        assert mine == [joined[first : first + 32] for first in range(0, max(len(joined) - 31, 1), 32)]
        assert corpus.description["tokens_per_kind"][kind] == sum(map(len, mine))
        valid = torch.arange(corpus.tokens.shape[1]) < corpus.lengths[:, None]
        assert int(((corpus.token_kinds == number) & valid).sum()) == sum(map(len, mine))
    second = next(name for name in corpus.sample_names if name.startswith("prose.de, document 2"))
    offset = int(second.split("token ")[1])
    assert (len(ids[0]) + offset) % 32 == 0
    short = corpus.sample_names.index("note, document 1, token 0")
    assert corpus.lengths[short] == len(ids[3]) < 32, "a kind that fills no window is there all the same"
    assert not corpus.tokens[short, len(ids[3]) :].any()


def test_documents_packing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [prose(5), prose(90), prose(9)]
    path = write_lines(tmp_path / "d.jsonl", *({"text": text} for text in texts))
    corpus = load_corpus(path, DEMO, sequence_length=48, packing="documents")
    assert rows(corpus) == [[BOS, *encode(tokenizer, text)][:48] for text in texts]
    assert corpus.sample_names == tuple(f"d, document {number}, token 0" for number in (1, 2, 3))
    assert corpus.description["packing"] == "documents"


def test_begin_token_comes_from_the_config_when_the_tokenizer_names_none(tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    shutil.copy(DEMO / "tokenizer.json", directory)
    path = write_lines(tmp_path / "d.jsonl", {"text": "a few words"})

    def first() -> int:
        return int(load_corpus(path, directory).tokens[0, 0])

    assert first() != BOS
    (directory / "config.json").write_text('{"bos_token_id": 5, "text_config": {"bos_token_id": 7}}')
    assert first() == 7
    (directory / "config.json").write_text('{"bos_token_id": 5, "text_config": {"bos_token_id": null}}')
    assert first() == 5
    (directory / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|begin_of_text|>"}}')
    assert first() == BOS


def test_a_conversation_begins_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": " Hello "}]})
    corpus = load_corpus(path, DEMO)
    assert rows(corpus) == [encode(tokenizer, "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello<|eot|>")]
    assert rows(corpus)[0].count(BOS) == 1
    assert corpus.description["chat_format"] == "chat_template.jinja"


# ---------------------------------------------------------------------------------------------------------------- choice, order


def largest_remainders(seats: int, weights: dict[str, int]) -> dict[str, int]:
    """The textbook: whole quotas first, what is left by the size of the remainders."""
    total = sum(weights.values())
    given = {name: seats * weight // total for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: Fraction(seats * weights[name], total) % 1, reverse=True)
    for name in by_remainder[: seats - sum(given.values())]:
        given[name] += 1
    return given


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_apportion(windows: list[int], data: st.DataObject) -> None:
    limits = {f"kind{number}": count for number, count in enumerate(windows)}
    weights = {name: count * 100 for name, count in limits.items()}
    seats = data.draw(st.integers(1, sum(windows)))
    shares = apportion(seats, weights, limits)
    assert sum(shares.values()) == seats
    assert list(shares) == list(weights)
    assert all(0 <= shares[name] <= limits[name] for name in limits)
    assert min(shares.values()) >= 1 or seats < len(windows)
    textbook = largest_remainders(seats, weights)
    if min(textbook.values()) >= 1 and all(textbook[name] <= limits[name] for name in limits):
        assert shares == textbook


def test_apportion_with_fewer_seats_than_kinds() -> None:
    assert apportion(2, {"a": 5, "b": 9, "c": 7, "d": 7}, dict.fromkeys("abcd", 3)) == {"a": 0, "b": 1, "c": 1, "d": 0}


@given(st.integers(1, 400), st.data(), st.integers(-3, 1 << 70))
def test_spread(available: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, available))
    assert spread(count, available, phase(0, "x")) == [index * available // count for index in range(count)]
    offset = phase(seed, "x")
    indices = spread(count, available, offset)
    assert 0 <= offset < 1
    assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < available
    stretches = [index * count // available for index in indices]
    assert all(abs(stretch - number) <= 1 for number, stretch in enumerate(stretches))


def test_seed_and_order(tmp_path: Path) -> None:
    documents = [{"kind": kind, "text": prose(60, start)} for kind in "abcd" for start in range({"a": 40}.get(kind, 10))]
    path = write_lines(tmp_path / "d.jsonl", *documents)
    everything = load_corpus(path, DEMO, sequence_length=64)
    options: dict[str, Any] = {"sequence_length": 64, "samples": 21}
    zero, again, one = (load_corpus(path, DEMO, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(zero.tokens, again.tokens) and zero.digest == again.digest and zero.description == again.description
    assert zero.digest != one.digest
    assert {tuple(row) for row in rows(one)} <= {tuple(row) for row in rows(everything)}
    labels = [name.split(",")[0] for name in zero.sample_names]
    assert Counter(labels) == {"a": 12, "b": 3, "c": 3, "d": 3}
    assert set(labels[:7]) == set("abcd"), "a prefix is mixed"
    assert [zero.kinds[int(kind)] for kind in zero.token_kinds[:, 0]] == labels
    for kind in "abcd":
        own = [name for name in everything.sample_names if name.startswith(kind)]
        assert [own.index(name) for name in zero.sample_names if name.startswith(kind)] == spread(
            Counter(labels)[kind], len(own), Fraction(0)
        )
    assert load_corpus(path, DEMO, sequence_length=64, samples=10**6).digest == everything.digest


def test_description_is_the_same_everywhere(tmp_path: Path) -> None:
    documents = [{"text": prose(50)}, {"messages": [{"role": "user", "content": "hi"}]}]
    descriptions = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = write_lines(tmp_path / name / "corpus.jsonl", *documents)
        descriptions.append(load_corpus(path, DEMO, sequence_length=32, samples=999).description)
    assert descriptions[0] == descriptions[1] == json.loads(json.dumps(descriptions[0]))
    assert descriptions[0]["samples_asked"] == 999 > descriptions[0]["samples"]


def test_the_digest_tells_corpora_apart(tmp_path: Path) -> None:
    texts = {"a.txt": "one two three four five", "b.txt": "one two three four six"}
    digests = set()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        digests.add(load_corpus(tmp_path / name, DEMO).digest)
        digests.add(load_corpus(tmp_path / name, DEMO, sequence_length=3).digest)
    shutil.copy(tmp_path / "a.txt", tmp_path / "c.txt")
    digests.add(load_corpus(tmp_path / "c.txt", DEMO).digest)
    assert len(digests) == 5, "text, length and label count"


# ---------------------------------------------------------------------------------------------------------------- sources


def test_a_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("plain words")
    write_lines(tmp_path / "deep" / "a.jsonl", {"language": "fr", "text": "bonjour"})
    (tmp_path / "z.json").write_text('{"text": "more"}\n\n{"text": "lines"}')
    for ignored in ("README.md", "readme.txt", "LICENSE.txt", ".hidden.txt", "dataset_infos.json", "t.parquet"):
        (tmp_path / ignored).write_text("not this")
    corpus = load_corpus(tmp_path, DEMO)
    assert [item["name"] for item in corpus.description["files"]] == ["b.txt", "deep/a.jsonl", "z.json"]
    found = dict(zip((name.split(",")[0] for name in corpus.sample_names), rows(corpus), strict=True))
    assert found == {
        "b": encode(tokenizer, "plain words"),
        "a.fr": [BOS, *encode(tokenizer, "bonjour")],
        "z": [BOS, *encode(tokenizer, "more"), BOS, *encode(tokenizer, "lines")],
    }


def test_labels_of_json_lines(tmp_path: Path) -> None:
    lines = [
        {"text": "a"},
        {"text": "b", "language": "th"},
        {"text": "c", "kind": "k"},
        {"text": "d", "kind": "k", "language": "th"},
    ]
    assert load_corpus(write_lines(tmp_path / "f.jsonl", *lines), DEMO).kinds == ("f", "f.th", "k", "k.th")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the dataset owner/texts at main = 2222..., and no network."""
    commit = "2" * 40
    repository = tmp_path / "hub" / "datasets--owner--texts"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_dataset_on_the_hub(dataset: Path, tokenizer: Tokenizer) -> None:
    write_lines(dataset / "train.jsonl", {"text": "from the hub"})
    corpus = load_corpus("owner/texts", DEMO)
    assert rows(corpus) == [[BOS, *encode(tokenizer, "from the hub")]]
    assert (corpus.description["source"], corpus.description["commit"]) == ("owner/texts", "2" * 40)
    with pytest.raises(CorpusError, match="owner/texts at revision v2 is neither a local directory"):
        load_corpus("owner/texts", DEMO, revision="v2")


def test_what_is_asked_of_the_hub(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["a.jsonl", "data/b.txt", "data/c.json"]
    asked: dict[str, Any] = {}

    def snapshot(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(dataset)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    write_lines(dataset / "train.jsonl", {"text": "x"})
    load_corpus("owner/texts", DEMO, revision="v1")
    assert (asked["repository"], asked["repo_type"], asked["revision"]) == ("owner/texts", "dataset", "v1")
    others = ["data/train-00000-of-00001.parquet", "README.md", "x.arrow", "y.csv", "z.png"]
    kept = huggingface_hub.utils.filter_repo_objects([*files, *others], allow_patterns=asked["allow_patterns"])
    assert list(kept) == files


def test_a_dataset_of_parquet_files(dataset: Path) -> None:
    (dataset / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"the dataset owner/texts holds no \.jsonl.*Parquet.*export it as JSON lines.*to_json"):
        load_corpus("owner/texts", DEMO)


def test_a_hub_that_fails(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CorpusError, match=r"owner/texts cannot be downloaded.*No space left"):
        load_corpus("owner/texts", DEMO)


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 text: byte 5"),
        ("a.txt", b" \n ", r"corpus a\.txt is empty"),
        ("a.jsonl", b"\n\n", r"corpus a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl line 2 is damaged"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', r"line 1 is damaged: the key 'text' occurs twice"),
        ("a.jsonl", b'["x"]', r"line 1 is damaged: it holds \['x'\] instead of a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"kind": "x"}', r"line 3 holds no text.*`messages`"),
        ("a.jsonl", b'{"text": "  "}', "line 1 holds no text"),
        ("a.jsonl", b'{"text": 5}', "line 1 holds no text"),
        ("a.jsonl", b'{"messages": []}', "line 1 holds no text"),
        ("a.jsonl", b'{"text": "x", "messages": [{}]}', "has both `text` and `messages`"),
        ("a.jsonl", b'{"text": "x", "kind": 5}', "`kind` is 5"),
        ("a.jsonl", b'{"text": "x\\ud800"}', "line 1 holds half of a surrogate pair"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}, "hello"]}', "line 1, message 2 is 'hello'"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "message 1 has the content None"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1 has the content .*text only"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}', "message 1: the call .* lacks"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": "f"}]}', "`tool_calls` is 'f'"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}], "tools": "f"}', "`tools` is 'f'"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(tmp_path / name, DEMO)
    assert "Download it again" not in str(caught.value), "it is the user's own file"


def test_bad_sources_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    text = tmp_path / "a.txt"
    text.write_text("some words")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "missing.txt", {}, "there is no such file or directory"),
        ("data/missing.jsonl", {}, "there is no such file or directory"),
        (tmp_path / "empty", {}, r"holds no \.jsonl"),
        (text, {"held_out": True}, "only the bundled corpus has one"),
        (text, {"revision": "v1"}, "revision v1 means nothing"),
        (None, {"revision": "v1"}, "revision v1 means nothing for the bundled corpus"),
        (text, {"samples": 0}, "0 samples"),
        (text, {"sequence_length": 1}, "sequence length of 1"),
        (text, {"packing": "tight"}, "no packing 'tight'.*packed, documents"),
        (text, {"vocab_size": 100}, r"a\.txt gives the token \d+ .*vocabulary has 100 tokens"),
    ]
    (tmp_path / "empty").mkdir()
    for source, options, message in cases:
        with pytest.raises(CorpusError, match=message):
            load_corpus(source, DEMO, **options)
    assert load_corpus(text, DEMO, vocab_size=2048).description["tokens"] > 0


def test_bad_tokenizers(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words")
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    with pytest.raises(CorpusError, match=r"has no tokenizer\.json"):
        load_corpus(text, directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"tokenizer\.json is damaged"):
        load_corpus(text, directory)
    shutil.copy(DEMO / "tokenizer.json", directory)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(CorpusError, match=r"tokenizer_config\.json is damaged"):
        load_corpus(text, directory)


def test_settings_of_the_tokenizer_file_do_not_cut_or_pad(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cutting = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    cutting.enable_truncation(5)
    cutting.enable_padding(length=5)
    cutting.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("several words that are more than five tokens")
    assert rows(load_corpus(tmp_path / "a.txt", tmp_path))[0] == encode(tokenizer, (tmp_path / "a.txt").read_text())
