"""The calibration corpus as tokens: documents tokenized with the checkpoint's own tokenizer, packed, chosen, hashed.

The same source, tokenizer and numbers give the same tokens on every machine.  Documents of one kind (language or programming
language) are joined and cut into windows, so a sample has one kind; each kind gets its share of the samples by tokens, and the
windows of a kind are spread evenly over it.  Samples of all kinds take turns, so that any prefix of the corpus is a smaller mixed
corpus.  ``description`` and ``digest`` go into fingerprints and ledgers: what was calibrated on is never a guess.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from quantkit.chat import ChatFormat, load_chat_format, special_tokens, tokenizer_settings
from quantkit.documents import Document, read_documents
from quantkit.errors import CheckpointError, CorpusError
from quantkit.strict_json import brief, parse_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Packing = Literal["packed", "documents"]
_BATCH = 256  # documents tokenized at once: enough to keep all cores busy, few enough to hold
_GOLDEN = 2654435769  # 2**32 divided by the golden ratio: its multiples spread evenly over 2**32


@dataclass(frozen=True)
class Corpus:
    """Samples to calibrate on.  Behind the length of a sample, ``tokens`` and ``token_kinds`` are 0.

    tokens: int32 ``[samples, length]``.  lengths: int32 ``[samples]``.  kinds: labels such as "prose.de", "code.python".
    token_kinds: int16 ``[samples, length]``, index into kinds.  sample_names: where each sample begins, for error messages.
    description: JSON-able record of what this is; the same for the same corpus on every machine.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    kinds: tuple[str, ...]
    token_kinds: torch.Tensor
    sample_names: tuple[str, ...]
    description: dict[str, Any]

    @property
    def digest(self) -> str:
        """xxh3-128 of tokens, lengths, and kinds."""
        return str(self.description["digest"])


@dataclass(frozen=True)
class _Window:
    """A sample before it is chosen.  document and offset: where it begins, counted within its kind, from 1 and from 0."""

    tokens: NDArray[np.int32]  # [at most sequence_length]
    document: int
    offset: int


def load_corpus(
    source: str | Path | None,
    tokenizer_directory: str | Path,
    *,
    samples: int | None = None,
    sequence_length: int = 2048,
    seed: int = 0,
    packing: Packing = "packed",
    held_out: bool = False,
    revision: str | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Read, tokenize, pack and choose.  Raises CorpusError.

    source: None or "bundled", a text or JSONL file, a directory of them, or a dataset repository id (then at ``revision``).
    samples: how many at most, None for all; when there are fewer, all are taken and ``description`` says so.
    packing: "packed" fills windows of ``sequence_length`` tokens, "documents" makes each document one sample, cut at that length.
    held_out: the part of the bundled corpus that is kept for measuring.  vocab_size: of the config; token ids must lie below it.
    """
    if samples is not None and samples < 1:
        raise CorpusError(f"{samples} samples were asked for. Ask for 1 or more, or leave the number out to take all.")
    if sequence_length < 2:
        raise CorpusError(f"A sequence length of {sequence_length} holds no context. Ask for 2 or more; 2048 is usual.")
    if packing not in get_args(Packing):
        raise CorpusError(f"There is no packing {packing!r}. Choose one of: {', '.join(get_args(Packing))}.")
    directory = Path(tokenizer_directory)
    read = read_documents(source, held_out=held_out, revision=revision)
    tokenizer, tokenizer_digest = load_tokenizer(directory)
    chat = None
    if any(document.messages for document in read.documents):
        chat = load_chat_format(directory, lambda token: tokenizer.token_to_id(token) is not None)
    begin = begin_token(directory, tokenizer)
    by_kind = _tokenize(tokenizer, read.documents, chat, begin, vocab_size)
    cut = _packed_windows if packing == "packed" else _document_windows
    available = {kind: cut(documents, sequence_length) for kind, documents in by_kind.items()}
    totals = {kind: sum(len(window.tokens) for window in windows) for kind, windows in available.items()}
    count = sum(map(len, available.values()))
    asked = count if samples is None else min(samples, count)
    shares = apportion(asked, totals, {kind: len(windows) for kind, windows in available.items()})
    chosen = {
        kind: [available[kind][index] for index in spread(share, len(available[kind]), phase(seed, kind))]
        for kind, share in shares.items()
        if share
    }
    record = {
        **read.origin,
        "sequence_length": sequence_length,
        "seed": seed,
        "packing": packing,
        "samples_asked": samples,
        "samples_available": count,
        "chat_format": chat.name if chat else None,
        "tokenizer_digest": tokenizer_digest,
        "begin_token": begin,
    }
    return _assemble(chosen, record)


# ---------------------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(directory: Path) -> tuple[Tokenizer, str]:
    """The tokenizer and the digest of its file."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(
            f"{directory} has no tokenizer.json, so text cannot become tokens. Download it with the checkpoint, or convert the "
            "tokenizer with transformers (`AutoTokenizer.from_pretrained(...).save_pretrained(...)`)."
        ) from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CorpusError(
            f"{path} is damaged or newer than the tokenizers library: {error}. Download it again, or update."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, xxhash.xxh3_64_hexdigest(data)


def begin_token(directory: Path, tokenizer: Tokenizer) -> int | None:
    """The id of the token that begins a document: by the tokenizer's settings, else by the config; None when there is none."""
    named = special_tokens(tokenizer_settings(directory)).get("bos_token")
    if named is not None:
        identity: int | None = tokenizer.token_to_id(named)
        if identity is not None:
            return identity
    try:
        config = parse_object((directory / "config.json").read_bytes(), str(directory / "config.json"))
    except FileNotFoundError:
        return None  # a directory of tokenizer files alone
    except OSError as error:
        raise CorpusError(
            f"{directory / 'config.json'} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    except CheckpointError as error:
        raise CorpusError(str(error)) from error
    inner = config.get("text_config")
    for members in (inner if isinstance(inner, dict) else {}, config):
        value = members.get("bos_token_id")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _tokenize(
    tokenizer: Tokenizer, documents: Sequence[Document], chat: ChatFormat | None, begin: int | None, vocab_size: int | None
) -> dict[str, list[NDArray[np.int32]]]:
    """Token ids of every document, by kind; kinds sorted, documents in order."""
    by_kind: dict[str, list[NDArray[np.int32]]] = {kind: [] for kind in sorted({document.kind for document in documents})}
    for first in range(0, len(documents), _BATCH):
        batch = documents[first : first + _BATCH]
        encoded = tokenizer.encode_batch([document_text(document, chat) for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encoded, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            if begin is not None and not document.plain and not (ids.size and ids[0] == begin):
                ids = np.concatenate([[begin], ids])
            if not ids.size:
                raise CorpusError(f"{document.where} gives no tokens. Take it out, or check that the tokenizer fits the text.")
            if vocab_size is not None and (outside := int(ids.max())) >= vocab_size:
                raise CorpusError(
                    f"{document.where} gives the token {outside} ({brief(tokenizer.id_to_token(outside))}), but the config's "
                    f"vocabulary has {vocab_size} tokens. The tokenizer belongs to another model: use the one of this checkpoint."
                )
            by_kind[document.kind].append(ids.astype(np.int32))
    return by_kind


def document_text(document: Document, chat: ChatFormat | None) -> str:
    text = document.text
    if document.messages:
        assert chat is not None, "loaded when any document has messages"
        try:
            text = chat.render(list(document.messages), list(document.tools) or None)
        except CorpusError as error:
            raise CorpusError(f"{document.where}: {error}") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(f"{document.where} holds half of a surrogate pair, which is no text. Repair its \\u escapes.") from error
    return text


# ---------------------------------------------------------------------------------------------------------------- samples


def _packed_windows(documents: Sequence[NDArray[np.int32]], length: int) -> list[_Window]:
    """Full windows over the documents joined; one shorter window when they fill none."""
    joined = np.concatenate(documents)
    starts = np.cumsum([0, *map(len, documents)])  # [documents + 1]
    windows = []
    for position in range(0, max(len(joined) - length, 0) + 1, length):
        document = int(np.searchsorted(starts, position, side="right"))  # counted from 1
        windows.append(_Window(joined[position : position + length], document, position - int(starts[document - 1])))
    return windows


def _document_windows(documents: Sequence[NDArray[np.int32]], length: int) -> list[_Window]:
    return [_Window(document[:length], number, 0) for number, document in enumerate(documents, 1)]


def apportion(seats: int, weights: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, int]:
    """Divide ``seats`` by weight with the largest remainder method, at least one each while there are enough, within limits.

    With fewer seats than names, those of largest weight get one each.
    """
    total = sum(weights.values())
    if seats < len(weights):
        first = set(sorted(weights, key=lambda name: -weights[name])[:seats])  # stable: ties in order
        return {name: int(name in first) for name in weights}
    given = dict.fromkeys(weights, 1)
    for _ in range(seats - len(weights)):
        # Whoever is furthest below its exact share is next: from equal starts, exactly the largest remainder method.
        open_names = [name for name in weights if given[name] < limits[name]]
        best = max(open_names, key=lambda name: seats * weights[name] - given[name] * total)  # ties: the first
        given[best] += 1
    return given


def phase(seed: int, kind: str) -> Fraction:
    """Where in its stretch a chosen window lies, from 0 to below 1: drawn from seed and kind, 0 for seed 0."""
    if seed == 0:
        return Fraction(0)
    return Fraction(xxhash.xxh3_64_intdigest(f"{seed} {kind}".encode()) >> 32, 1 << 32)


def spread(count: int, available: int, offset: Fraction) -> list[int]:
    """``count`` of ``available`` indices, evenly spread: floor((i + offset) * available / count)."""
    return [math.floor((index + offset) * available / count) for index in range(count)]


def _assemble(chosen: Mapping[str, Sequence[_Window]], record: Mapping[str, Any]) -> Corpus:
    kinds = tuple(chosen)
    if len(kinds) > np.iinfo(np.int16).max:
        raise CorpusError(f"The corpus has {len(kinds)} kinds. Merge labels until there are at most {np.iinfo(np.int16).max}.")
    # Kinds take turns: sample i of n of a kind stands at (i + x) / n, where x spreads the kinds over each turn.
    order = sorted(
        (Fraction((index << 32) + number * _GOLDEN % (1 << 32), len(windows) << 32), number, index)
        for number, windows in enumerate(chosen.values())
        for index in range(len(windows))
    )
    samples = [(number, chosen[kinds[number]][index]) for _, number, index in order]
    lengths = np.array([len(window.tokens) for _, window in samples], dtype=np.int32)
    tokens = np.zeros((len(samples), int(lengths.max())), dtype=np.int32)
    token_kinds = np.zeros(tokens.shape, dtype=np.int16)
    per_kind: Counter[str] = Counter()
    for row, (number, window) in enumerate(samples):
        tokens[row, : len(window.tokens)] = window.tokens
        token_kinds[row, : len(window.tokens)] = number
        per_kind[kinds[number]] += len(window.tokens)
    digest = xxhash.xxh3_128()
    for array in (tokens, lengths, token_kinds):
        digest.update(f"{array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    digest.update("\n".join(kinds).encode())
    return Corpus(
        tokens=torch.from_numpy(tokens),
        lengths=torch.from_numpy(lengths),
        kinds=kinds,
        token_kinds=torch.from_numpy(token_kinds),
        sample_names=tuple(f"{kinds[number]}, document {window.document}, token {window.offset}" for number, window in samples),
        description={
            **record,
            "samples": len(samples),
            "tokens": int(lengths.sum()),
            "tokens_per_kind": {kind: per_kind[kind] for kind in kinds},
            "digest": digest.hexdigest(),
        },
    )
