"""The bundled corpus: its README is true, it is as broad as it says, nothing repeats, and the held-out part is other text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quantkit.corpus import load_corpus

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "calibration_data"
DEMO = ROOT / "demo" / "tiny-scout"
LANGUAGES = frozenset(["ar", "de", "en", "es", "fr", "hi", "id", "it", "pt", "th", "tl", "vi"])  # those that Llama 4 supports
PARTS = ("calibration", "held_out")
FILES = sorted(path for part in PARTS for path in (DATA / part).iterdir())
KINDS = {"code", "dialogue", "long", "mathematics", "prose", "structured", "tools"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def body(document: dict[str, Any]) -> str:
    """All that was written, without the JSON around it."""
    if "text" in document:
        return str(document["text"])
    return "\n\n".join(message["content"] for message in document["messages"])


def runs(text: str, length: int = 12) -> set[tuple[str, ...]]:
    """All runs of words; of scripts that write vowels as marks, runs of what stands between marks, which are shorter."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[first : first + length]) for first in range(len(words) - length + 1)}


def table(header: str) -> list[list[str]]:
    """The rows of the README's table whose first column has that header."""
    text = (DATA / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(header)} \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, header
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_readme_lists_every_file_as_it_is() -> None:
    listed = {row[0]: (number(row[1]), number(row[2]), row[3].strip("`")) for row in table("file")}
    found = {}
    for path in FILES:
        data = path.read_bytes()
        found[path.relative_to(DATA).as_posix()] = (len(documents(path)), len(data), hashlib.sha256(data).hexdigest())
    assert listed == found


def test_the_readme_sums_up_the_files() -> None:
    sizes: Counter[tuple[str, str]] = Counter()
    by_language: Counter[str] = Counter()
    for path in FILES:
        kind, language = path.stem.split(".")
        sizes[kind, path.parent.name] += path.stat().st_size
        if path.parent.name == "calibration" and kind != "code":
            by_language[language] += path.stat().st_size
    rows = {row[0]: (number(row[2]), number(row[3])) for row in table("kind")}
    assert rows == {kind: (sizes[kind, "calibration"], sizes[kind, "held_out"]) for kind, _ in sizes}
    text = (DATA / "README.md").read_text(encoding="utf-8")
    assert {found[1]: number(found[2]) for found in re.finditer(r"\((\w\w)\) ([\d,]+)", text)} == by_language
    for part in PARTS:
        paths = [path for path in FILES if path.parent.name == part]
        count, size = sum(len(documents(path)) for path in paths), sum(path.stat().st_size for path in paths)
        found = re.search(rf"`{part}/` is .*?(\d+) documents, ([\d,]+) bytes", text, re.DOTALL)
        assert found and (int(found[1]), number(found[2])) == (count, size)
    assert "CC0-1.0" in text


def test_breadth() -> None:
    sizes = {path.stem: path.stat().st_size for path in FILES if path.parent.name == "calibration"}
    assert {stem.split(".")[0] for stem in sizes} == KINDS
    natural = {stem: size for stem, size in sizes.items() if not stem.startswith("code.")}
    by_language: Counter[str] = Counter()
    for stem, size in natural.items():
        by_language[stem.split(".")[1]] += size
    assert set(by_language) == LANGUAGES
    assert sum(by_language.values()) >= 600_000
    assert min(by_language.values()) >= 20_000
    assert {f"prose.{language}" for language in LANGUAGES} <= set(sizes)
    assert sum(stem.startswith("code.") for stem in sizes) >= 8
    held_out = {tuple(path.stem.split(".")) for path in FILES if path.parent.name == "held_out"}
    assert held_out <= {tuple(stem.split(".")) for stem in sizes}
    assert {kind for kind, _ in held_out} == KINDS
    assert {language for _, language in held_out} >= LANGUAGES, "every language that is calibrated on can be measured"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_documents(path: Path) -> None:
    kind, language = path.stem.split(".")
    read = documents(path)
    assert read
    for document in read:
        assert (document["kind"], document["language"]) == (kind, language)
        assert set(document) - {"tools"} == {"kind", "language", "messages" if "messages" in document else "text"}
        text = body(document)
        assert text == text.strip("\n") and 200 <= len(text.encode()) <= 50_000
        assert not re.search("[\ufffd\ufeff\r\x00]|^(=====|@@@)", text, re.MULTILINE)
        for message in document.get("messages", ()):
            assert set(message) - {"tool_calls"} == {"role", "content"}
        if "messages" in document:
            check_conversation(document)
    assert kind != "tools" or all(document.get("tools") for document in read)


def check_conversation(document: dict[str, Any]) -> None:
    """Roles in a possible order; every call names a function that was offered, with arguments it has, and gets one answer."""
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in document.get("tools", ())}
    assert len(offered) == len(document.get("tools", ()))
    messages = document["messages"]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    assert spoken[0] == "user" and spoken[-1] == "assistant" and "system" not in spoken
    open_calls = 0
    for message in messages:
        assert (message["role"] == "tool") == (open_calls > 0), "answers follow calls"
        if message["role"] == "tool":
            open_calls -= 1
        calls = message.get("tool_calls", [])
        assert message["content"] or calls
        for call in calls:
            assert call["type"] == "function" and message["role"] == "assistant"
            parameters = offered[call["function"]["name"]]
            arguments = call["function"]["arguments"]
            assert set(parameters.get("required", ())) <= set(arguments) <= set(parameters.get("properties", {}))
        open_calls += len(calls)
    assert open_calls == 0


def test_nothing_repeats() -> None:
    """No run of twelve words stands in two documents, and no long paragraph twice in one."""
    owner: dict[tuple[str, ...], str] = {}
    for path in FILES:
        for position, document in enumerate(documents(path), 1):
            where = f"{path.parent.name}/{path.name}, document {position}"
            text = body(document)
            for run in runs(text):
                assert owner.setdefault(run, where) == where, f"{where} shares {' '.join(run)!r} with {owner[run]}"
            paragraphs = Counter(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if len(part) >= 60)
            assert max(paragraphs.values(), default=1) == 1, f"{where} repeats a paragraph"


def test_no_line_of_the_held_out_part_is_in_the_other() -> None:
    lines: dict[str, set[str]] = {part: set() for part in PARTS}
    for path in FILES:
        for document in documents(path):
            lines[path.parent.name] |= {
                line.strip() for line in re.split(r"\n|(?<=[.!?।؟。])\s+", body(document)) if len(line.strip()) >= 40
            }
    assert not lines["calibration"] & lines["held_out"]


def test_the_corpus_loads() -> None:
    corpora = {
        held_out: load_corpus(None, DEMO, sequence_length=512, vocab_size=2048, held_out=held_out) for held_out in (False, True)
    }
    for held_out, part in ((False, "calibration"), (True, "held_out")):
        stems = sorted(path.stem for path in (DATA / part).iterdir())
        assert list(corpora[held_out].kinds) == stems
        assert [item["name"] for item in corpora[held_out].description["files"]] == [f"{stem}.jsonl" for stem in stems]
        assert corpora[held_out].description["part"] == part
    assert corpora[False].digest != corpora[True].digest
    assert load_corpus("bundled", DEMO, sequence_length=512).digest == corpora[False].digest
    assert corpora[False].description["tokens"] > 300_000
