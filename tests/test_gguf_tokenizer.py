"""The tokenizer in a GGUF file: llama.cpp cuts text into the same tokens as the tokenizers library, and stops where it should.

llama.cpp's rule named ``llama4`` does not count combining marks as parts of words, unlike Llama 4's own (llama.cpp issue 27783).
So lines are compared twice: all of them under the one rule of llama.cpp that treats marks as Llama 4 does, which shows that tokens
and merges are right; and those without marks, and nearly all others, under ``llama4``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, SpecialVocab, TokenType
from tokenizers import Tokenizer

from quantkit.config import Llama4Config, parse_config
from quantkit.errors import CheckpointError
from quantkit.formats.gguf_metadata import text_metadata
from quantkit.formats.gguf_tokenizer import tokenizer_metadata
from quantkit.gguf_header import MetadataEntry, build_header
from tests.llama_cpp import Llama

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "tiny-scout"
HELD_OUT = ROOT / "calibration_data" / "held_out"
RULE_WITH_MARKS = "granite-embed-multi-97m"
AWKWARD = (
    "",
    " ",
    "  \n\n \t x",
    "a\r\nb\rc\n",
    "It's WE'LL they'Re I'd",
    "1234567890 12,345.678 \uff11\uff12",
    "camelCase HTTPServer XMLHttpRequest2",
    "if(a!=b){\n\treturn;\n}\n/// x /*",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ufeff\u00a0\u2003x",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0395\u03bb\u03bb\u03ac\u03b4\u03b1",
    "\x00\x01\x7f\u0080\uffff",
    "<|eot|",
    "|>" * 9,
)


def demo_config(**text: Any) -> Llama4Config:
    config = json.loads((DEMO / "config.json").read_text())
    return parse_config({**config, "text_config": {**config["text_config"], **text}})


def values(entries: list[MetadataEntry]) -> dict[str, Any]:
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key: entry.value for entry in entries}


def opened(path: Path, entries: list[MetadataEntry], config: Llama4Config) -> Llama:
    header, _, _ = build_header(text_metadata(config, model_name="x", file_type=0, tokenizer=entries), [])
    path.write_bytes(header)
    return Llama(path, vocab_only=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Llama, Llama]]:
    """The demo's tokenizer in llama.cpp: as written, and under the rule that knows marks."""
    entries = tokenizer_metadata(DEMO, demo_config())
    other = [dataclasses.replace(entry, value=RULE_WITH_MARKS) if entry.key == "tokenizer.ggml.pre" else entry for entry in entries]
    directory = tmp_path_factory.mktemp("vocabulary")
    pair = opened(directory / "a.gguf", entries, demo_config()), opened(directory / "b.gguf", other, demo_config())
    yield pair
    for model in pair:
        model.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def has_marks(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


def test_held_out_text_is_cut_alike(models: tuple[Llama, Llama], tokenizer: Tokenizer) -> None:
    written, with_marks = models
    texts = [
        text
        for path in sorted(HELD_OUT.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        for text in strings(json.loads(line))
    ]
    assert len(texts) > 500 and any(map(has_marks, texts))
    differing = 0
    for text in (*texts, *AWKWARD):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert with_marks.tokenize(text) == expected, ascii(text[:80])
        assert with_marks.detokenize(expected) == text or "\x00" in text
        if written.tokenize(text) != expected:
            assert has_marks(text), ascii(text[:80])
            differing += 1
    assert differing < len(texts) // 50


def test_the_demo_cuts_words_as_the_releases_do() -> None:
    [rule] = [step["pattern"]["Regex"] for step in tokenizer_file()["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
    # the digest of Llama 4's, as Ollama's issue 17698 gives it
    assert hashlib.sha256(rule.encode()).hexdigest() == "2d1b8dc11e89af71459b36004f698ab3693f59fd84f63e8ec2b49564ab857420"


def test_special_tokens(models: tuple[Llama, Llama], tokenizer: Tokenizer) -> None:
    model, _ = models
    text = "<|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n<|eom|>"
    assert model.tokenize(text, add_special=True) == tokenizer.encode(text).ids
    assert model.adds_bos() and tokenizer.encode("").ids == [tokenizer.token_to_id("<|begin_of_text|>")]
    plain = model.tokenize(text, parse_special=False)
    assert not set(plain) & {tokenizer.token_to_id(token) for token in ("<|eot|>", "<|eom|>", "<|header_start|>")}
    ends = {tokenizer.id_to_token(number) for number in range(model.vocabulary_size) if model.is_end_of_generation(number)}
    assert ends == {"<|eot|>", "<|eom|>", "<|end_of_text|>"}
    assert model.chat_template() == (DEMO / "chat_template.jinja").read_text(encoding="utf-8")


def test_keys(tokenizer: Tokenizer) -> None:
    entries = tokenizer_metadata(DEMO, demo_config())
    found, types = values(entries), {entry.key: (entry.type, entry.items) for entry in entries}
    theirs = SpecialVocab(DEMO, load_merges=True, n_vocab=2048)
    assert list(found["tokenizer.ggml.merges"]) == theirs.merges
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    assert {name: found[f"tokenizer.ggml.{long}_token_id"] for name, long in names.items()} == theirs.special_token_ids
    assert found["tokenizer.ggml.add_bos_token"] is theirs.add_special_token["bos"] is True
    assert found["tokenizer.chat_template"] == theirs.chat_template
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "llama4")
    assert found["tokenizer.ggml.tokens"][:2032] == tuple(tokenizer.id_to_token(number) for number in range(2032))
    assert set(found["tokenizer.ggml.token_type"][:2032]) == {TokenType.NORMAL.value}
    eot, eom = tokenizer.token_to_id("<|eot|>"), tokenizer.token_to_id("<|eom|>")
    assert (found["tokenizer.ggml.eot_token_id"], found["tokenizer.ggml.eom_token_id"]) == (eot, eom)
    assert found["tokenizer.ggml.eos_token_ids"] == (eot, tokenizer.token_to_id("<|end_of_text|>"), eom)
    assert types["tokenizer.ggml.token_type"] == (GGUFValueType.ARRAY, GGUFValueType.INT32)
    assert types["tokenizer.ggml.eot_token_id"] == (GGUFValueType.UINT32, None)


# ------------------------------------------------------------------------------------------------- made-up tokenizers


def tokenizer_file() -> dict[str, Any]:
    return json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def save(directory: Path, content: Any, **files: Any) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name, value in {"tokenizer_config": {}, "config": {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def added(number: int, content: str, special: bool = False) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def test_merges_in_the_older_spelling(tmp_path: Path) -> None:
    content = tokenizer_file()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    config = demo_config()
    assert (
        values(tokenizer_metadata(save(tmp_path, content), config))["tokenizer.ggml.merges"]
        == (values(tokenizer_metadata(DEMO, config))["tokenizer.ggml.merges"])
    )


def test_kinds_of_added_tokens_and_unused_ids(tmp_path: Path) -> None:
    content = tokenizer_file()
    content["added_tokens"] += [added(2048, "<|odd|>"), added(2049, "plain word"), added(2050, "<x>", special=True)]
    config = demo_config(vocab_size=2060)
    entries = tokenizer_metadata(save(tmp_path, content), config)
    found = values(entries)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 2060
    assert (tokens[2048], tokens[2049], tokens[2050]) == ("<|odd|>", "plain word", "<x>")
    control, own = TokenType.CONTROL.value, TokenType.USER_DEFINED.value
    assert types[2047:] == (control, control, own, control, *[TokenType.UNUSED.value] * 9)
    assert (tokens[2051], tokens[2059]) == ("[PAD2051]", "[PAD2059]")
    model = opened(tmp_path / "a.gguf", entries, config)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a plain word<|odd|>b<x>", "plain wordplain word", "[PAD2051]"):
        assert model.tokenize(text) == reference.encode(text, add_special_tokens=False).ids
    model.close()


def test_where_special_tokens_are_named(tmp_path: Path) -> None:
    content, config = tokenizer_file(), demo_config()
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}

    def found(**files: Any) -> tuple[Any, ...]:
        table = values(tokenizer_metadata(save(tmp_path, content, **files), config))
        return tuple(
            table.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id", "padding_token_id", "eos_token_ids")
        )

    end, turn, message, begin = (ids[f"<|{name}|>"] for name in ("end_of_text", "eot", "eom", "begin_of_text"))
    assert found() == (begin, turn, None, (turn, end, message))
    named = {"bos_token": "<|eom|>", "eos_token": {"content": "<|end_of_text|>"}, "pad_token": "nowhere"}
    assert found(tokenizer_config=named) == (message, end, None, (end, message, turn))
    listed = {"eos_token_id": [9, 8, 99999], "pad_token_id": 7, "text_config": {"bos_token_id": 5, "pad_token_id": 6}}
    assert found(config=listed) == (5, turn, 7, (turn, 9, 8, end, message))
    assert found(config={"eos_token_id": 4}, generation_config={"eos_token_id": [3]})[1:] == (4, None, (4, 3, end, message, turn))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] == begin]
    with pytest.raises(CheckpointError, match="names a token for eos"):
        found()


def test_whether_a_text_begins_with_a_token(tmp_path: Path) -> None:
    content, config = tokenizer_file(), demo_config()
    template = content["post_processor"]["processors"][1]
    begin = template["single"][0]
    key, end_key = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"

    def found() -> tuple[bool, Any]:
        table = values(tokenizer_metadata(save(tmp_path, content), config))
        return table[key], table.get(end_key)

    content["post_processor"] = template
    assert found() == (True, None)
    end = {"SpecialToken": {"id": "<|eot|>", "type_id": 0}}
    template["special_tokens"]["<|eot|>"] = {"id": "<|eot|>", "ids": [2037], "tokens": ["<|eot|>"]}
    template["single"] = [begin, template["single"][1], end]
    assert found() == (True, True)
    template["single"] = [template["single"][1]]
    assert found() == (False, None)
    content["post_processor"] = None
    assert found() == (False, None)


def test_chat_templates(tmp_path: Path) -> None:
    content, config = tokenizer_file(), demo_config()

    def found(**files: Any) -> dict[str, Any]:
        table = values(tokenizer_metadata(save(tmp_path, content, **files), config))
        return {key.removeprefix("tokenizer.chat_template"): value for key, value in table.items() if "chat_template" in key}

    assert found() == {}
    assert found(tokenizer_config={"chat_template": "one"}) == {"": "one"}
    several = [{"name": "default", "template": "one"}, {"name": "tool use", "template": "two"}]
    assert found(tokenizer_config={"chat_template": several}) == {"": "one", ".tool_use": "two", "s": ("tool_use",)}
    assert found(chat_template={"chat_template": "three"}) == {"": "three"}
    (tmp_path / "chat_template.jinja").write_text("four")
    assert found(tokenizer_config={"chat_template": "one"}) == {"": "four"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="jinja"):
        found()


def spoil(content: dict[str, Any], change: str) -> None:
    model = content["model"]
    first = next(iter(model["vocab"]))
    if change == "model":
        content["model"] = {"type": "WordPiece"}
    elif change == "no model":
        del content["model"]
    elif change == "normalizer":
        content["normalizer"] = {"type": "NFC"}
    elif change == "metaspace":
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    elif change == "byte fallback":
        model["byte_fallback"] = True
    elif change == "another rule":
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"
    elif change == "no rule":
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    elif change == "no merges":
        model["merges"] = []
    elif change == "strange merge":
        model["merges"][5] = ["a", "b", "c"]
    elif change == "unknown merge":
        model["merges"][5] = ["zqx", "zqx"]
    elif change == "same id":
        model["vocab"][first] = 17
    elif change == "negative id":
        model["vocab"][first] = -1
    elif change == "too many":
        content["added_tokens"].append(added(2048, "<|late|>"))
    elif change == "two ids":
        content["added_tokens"][-1]["content"] = first
    elif change == "gap":
        del content["added_tokens"][3]
    elif change == "name of an unused id":
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 2047]
        model["vocab"]["[PAD2047]"] = model["vocab"].pop(first)
        model["merges"] = [pair for pair in model["merges"] if first not in pair]
    else:
        raise AssertionError(change)


SPOILED = {
    "model": "WordPiece",
    "no model": "None",
    "normalizer": "normalizer",
    "metaspace": "Metaspace",
    "byte fallback": "byte_fallback",
    "another rule": "Llama 4's rules",
    "no rule": "Llama 4's rules",
    "no merges": "merges",
    "strange merge": "damaged|two tokens",
    "unknown merge": "damaged",
    "same id": "same id 17",
    "negative id": "damaged|-1",
    "too many": "vocab_size in config.json is 2048",
    "two ids": "two ids",
    "gap": "without gaps",
    "name of an unused id": "unused id 2047",
}


@pytest.mark.parametrize("change", list(SPOILED))
def test_tokenizers_that_cannot_be_written(tmp_path: Path, change: str) -> None:
    content = tokenizer_file()
    spoil(content, change)
    with pytest.raises(CheckpointError, match=SPOILED[change]) as raised:
        tokenizer_metadata(save(tmp_path, content), demo_config())
    assert str(tmp_path) in str(raised.value) and len(str(raised.value)) < 1500


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        tokenizer_metadata(tmp_path, demo_config())
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="damaged"):
        tokenizer_metadata(tmp_path, demo_config())
    save(tmp_path, tokenizer_file())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        tokenizer_metadata(tmp_path, demo_config())
