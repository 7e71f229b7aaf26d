"""Documents to calibrate on, before they are tokens: read from the bundled corpus, a file, a directory or a dataset on the hub.

Two kinds of file: ``.jsonl`` (and ``.json`` with one object per line) holds a document per line, ``text`` or ``messages`` (and
``tools``), with the labels ``kind`` and ``language``; anything else is plain text, one document labelled with the file's stem.  In
a directory only ``.jsonl``, ``.json`` and ``.txt`` count.  Files are taken in the order of their names, so documents have an order.

The bundled corpus is package data (``quantkit_calibration_data``, the folder calibration_data/), in two parts that share nothing:
what quantization may look at, and what is held out to measure it by.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from quantkit.errors import CheckpointError, CorpusError
from quantkit.hub import download_dataset, is_repository_id
from quantkit.strict_json import brief, parse_object

BUNDLED = "bundled"
_PACKAGE = "quantkit_calibration_data"
_LINES = (".jsonl", ".json")
_READ = (*_LINES, ".txt")
# Found beside data, not data.
_NOT_DATA = (".*", "license*", "licence*", "readme*", "requirements*.txt", "dataset_infos.json", "dataset_dict.json")
_JSONL_HELP = "A line is one JSON object with `text` (a string) or `messages` (a list of objects with role and content)."


@dataclass(frozen=True)
class Document:
    """One document.  Either ``text`` or ``messages`` is filled.

    kind: its label, such as "prose.de".  where: file and line, for errors.  plain: from a plain text file, which gets no BOS token.
    """

    kind: str
    where: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Documents:
    """All documents of a source.  origin: JSON-able record of the source, the same on every machine."""

    origin: dict[str, Any]
    documents: tuple[Document, ...]


def read_documents(source: str | Path | None, *, held_out: bool = False, revision: str | None = None) -> Documents:
    """Every document of ``source``: None or "bundled", a file, a directory, or a dataset repository id.  Raises CorpusError."""
    path = Path(os.path.expanduser(source)) if source is not None else Path(BUNDLED)
    exists = source is not None and path.exists()
    if source is None or (str(source) == BUNDLED and not exists):
        _no_revision("the bundled corpus", revision)
        part = "held_out" if held_out else "calibration"
        return _collect({"source": BUNDLED, "part": part}, _bundled_files(part))
    if held_out:
        raise CorpusError(f"{source} has no held-out part: only the bundled corpus has one. Give the path of other text instead.")
    if exists:
        _no_revision(str(source), revision)
        files = _directory_files(path, str(source)) if path.is_dir() else [(path.name, _read_bytes(path))]
        return _collect({"source": path.resolve().name}, files)
    if isinstance(source, str) and is_repository_id(source) and not source.endswith(_READ):
        snapshot = download_dataset(source, revision)
        return _collect({"source": source, "commit": snapshot.name}, _directory_files(snapshot, f"the dataset {source}"))
    raise CorpusError(
        f"{source}: there is no such file or directory, and it is no repository id (owner/name) either. Give the path of a text or "
        "JSONL file or of a directory of them, a dataset on the hub, or leave it out for the bundled corpus."
    )


def _no_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise CorpusError(f"revision {revision} means nothing for {source}: only datasets on the hub have revisions. Leave it out.")


# ---------------------------------------------------------------------------------------------------------------- files


def _bundled_files(part: str) -> Iterator[tuple[str, bytes]]:
    try:
        folder = importlib.resources.files(_PACKAGE).joinpath(part)
    except ModuleNotFoundError as error:
        raise CorpusError(
            "The bundled corpus is not installed. Install quantkit again (`pip install .`), or give a corpus."
        ) from error
    if not folder.is_dir():
        raise CorpusError(f"The installed bundled corpus lacks its part {part}. Install quantkit again, or give a corpus.")
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name.endswith(_LINES):
            yield item.name, item.read_bytes()


def _directory_files(directory: Path, described: str) -> Iterator[tuple[str, bytes]]:
    try:
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
    except OSError as error:
        raise CorpusError(f"{directory} cannot be listed: {error.strerror or error}. Check its permissions.") from error
    paths = [path for path in paths if not any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _NOT_DATA)]
    chosen = [path for path in paths if path.suffix.lower() in _READ]
    if not chosen:
        raise CorpusError(
            f"{described} holds no .jsonl, .json or .txt file. Parquet, Arrow and CSV are not read: export it as JSON lines "
            '(with the datasets library: `load_dataset(...).to_json("corpus.jsonl")`) and give that file.'
        )
    for path in chosen:
        yield path.relative_to(directory).as_posix(), _read_bytes(path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}. Check that it is a file you may read.") from error


def _collect(origin: dict[str, Any], files: Iterable[tuple[str, bytes]]) -> Documents:
    documents: list[Document] = []
    record = []
    for name, data in files:
        record.append({"name": name, "bytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)})
        try:
            text = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{name} is not UTF-8 text: byte {error.start} cannot be decoded. Convert it to UTF-8.") from error
        if name.lower().endswith(_LINES):
            documents += _parse_lines(name, text)
        elif text.strip():
            documents.append(Document(Path(name).stem, name, text, plain=True))
    if not documents:
        raise CorpusError(f"The corpus {origin['source']} is empty: no document in {len(record)} files. Give a text that is not.")
    return Documents({**origin, "files": record}, tuple(documents))


# ---------------------------------------------------------------------------------------------------------------- lines


def _parse_lines(name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: other separators may stand inside a JSON string
        if line.strip():
            where = f"{name} line {number}"
            try:
                members = parse_object(line.encode("utf-8"), where)
            except CheckpointError as error:
                cause = str(error).removesuffix(" Download it again.")
                raise CorpusError(f"{cause} {_JSONL_HELP}") from error
            yield _parse_document(members, where, Path(name).stem)


def _parse_document(members: dict[str, Any], where: str, stem: str) -> Document:
    kind, language, text, messages, tools = (members.get(key) for key in ("kind", "language", "text", "messages", "tools"))
    for key, value in (("kind", kind), ("language", language)):
        if value is not None and not (isinstance(value, str) and value):
            raise CorpusError(f"{where}: `{key}` is {brief(value)}. Make it a short string, or leave it out.")
    label = kind or stem
    if language and not (kind is None and stem.endswith(f".{language}")):
        label = f"{label}.{language}"
    if isinstance(text, str) and text.strip() and messages is None:
        return Document(label, where, text)
    if isinstance(messages, list) and messages and text is None:
        if tools is not None and not isinstance(tools, list):
            raise CorpusError(f"{where}: `tools` is {brief(tools)}. Make it a list of function definitions, or leave it out.")
        parsed = tuple(_parse_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1))
        return Document(label, where, messages=parsed, tools=tuple(tools or ()))
    if text is not None and messages is not None:
        raise CorpusError(f"{where} has both `text` and `messages`. Keep one of them.")
    raise CorpusError(f"{where} holds no text. {_JSONL_HELP}")


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    """A message as templates expect it: content is never null, and the arguments of a call are an object, not its JSON text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise CorpusError(f"{where} is {brief(message)}. Make it an object with role and content.")
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        readable = all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
        )
    else:
        readable = isinstance(content, str)
    if not readable:
        raise CorpusError(f"{where} has the content {brief(content)}. Make it a string; calibration reads text only.")
    parsed = {**message, "content": content}
    parsed.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise CorpusError(f"{where}: `tool_calls` is {brief(calls)}. Make it a list of calls.")
        parsed["tool_calls"] = [_parse_call(call, where) for call in calls]
    return parsed


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CorpusError(f'{where}: the call {brief(call)} lacks {{"function": {{"name": ..., "arguments": ...}}}}.')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise CorpusError(f"{where}: the arguments {brief(arguments)} are no JSON. Write them as an object.") from error
    return {**call, "function": {**function, "arguments": arguments}}
