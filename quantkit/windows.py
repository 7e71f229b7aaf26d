"""Windows of text to measure on: token ids, which positions count, and of what kind and language each window is.

Two conventions, since a perplexity means something only beside others of its kind:

* ``full``: the text is packed as for calibration (see :mod:`quantkit.corpus`), and every position but the first of a window is
  predicted.
* ``llama.cpp``: what its program ``llama-perplexity`` does.  A text loses one line end at its end and is tokenized in one piece,
  special tokens written in it being plain text; the tokenizer's begin token goes in front, where the tokenizer puts one there.
  The tokens are cut into windows, and what does not fill a window is left out.  The first token of every window is replaced by the
  begin token.  Only what the second half predicts counts: position n/2 predicts the one after it, and so on.

``llama-perplexity`` knows one text.  Here each kind (a text file is one kind) is a text of its own, its documents joined by empty
lines; a kind that does not fill a window is left out, and the description says so.

Where no text fills a window, ``full`` takes shorter ones, and the description says that, too.

A kind such as ``prose.de`` names a language behind its last dot, natural or of programs; a kind without a dot has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from quantkit.chat import load_chat_format
from quantkit.corpus import apportion, begin_token, document_text, load_corpus, load_tokenizer, phase, spread
from quantkit.documents import Document, read_documents
from quantkit.errors import CorpusError
from quantkit.layer_pass import Samples
from quantkit.strict_json import brief

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Convention = Literal["full", "llama.cpp"]


@dataclass(frozen=True)
class Windows:
    """Text to measure on.

    tokens: int64 ``[windows, length]``, 0 behind the end of a window.  lengths: of the windows.  first: the first position whose
    prediction counts; the last one but one of a window is the last.  kinds: of each window, such as ``prose.de``.  names: where
    each window begins, for error messages.  description: JSON-able record of what this is; the same on every machine.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    first: int
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    description: dict[str, Any]

    @property
    def digest(self) -> str:
        """xxh3-128 of tokens, lengths, kinds and of the positions that count."""
        return str(self.description["digest"])

    @property
    def languages(self) -> tuple[str, ...]:
        """The language of each window, empty where its kind names none."""
        return tuple(kind.rpartition(".")[2] if "." in kind else "" for kind in self.kinds)

    @property
    def positions(self) -> tuple[int, ...]:
        """How many predictions of each window count."""
        return tuple(max(0, length - 1 - self.first) for length in self.lengths)

    def samples(self, part: slice) -> Samples:
        """How the windows of ``part`` lie in an array of hidden states, as rows of their own."""
        lengths = self.lengths[part]
        return Samples.of(torch.tensor(lengths), self.tokens.shape[1])

    def predictions(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the windows of ``part``: rows that predict, int64 ``[count]``, and the token that is right for each."""
        tokens = self.tokens[part]
        places = torch.arange(tokens.shape[1])
        counted = (places >= self.first) & (places < torch.tensor(self.lengths[part])[:, None] - 1)
        rows = counted.reshape(-1).nonzero()[:, 0]
        return rows, tokens.reshape(-1)[rows + 1]


def load_windows(
    text: str | Path | None,
    tokenizer_directory: str | Path,
    *,
    window: int = 512,
    windows: int | None = None,
    convention: Convention = "full",
    seed: int = 0,
    revision: str | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """Read text and cut it into windows of ``window`` tokens.  Raises CorpusError.

    text: None for the held-out part of the bundled corpus, a text or JSONL file, a directory of them, or a dataset repository id
    (then at ``revision``).  windows: how many, spread evenly over the text from a place that ``seed`` says; None for all.
    """
    if convention not in get_args(Convention):
        raise CorpusError(f"There is no convention {brief(convention)}. Choose one of: {', '.join(get_args(Convention))}.")
    if windows is not None and windows < 1:
        raise CorpusError(f"{windows} windows were asked for. Ask for 1 or more, or leave the number out to take all.")
    if window < 3:
        raise CorpusError(f"Windows of {window} tokens hold no context. Ask for 3 or more; 512 is usual.")
    if convention == "full":
        corpus = load_corpus(
            text,
            tokenizer_directory,
            samples=windows,
            sequence_length=window,
            seed=seed,
            held_out=text is None,
            revision=revision,
            vocab_size=vocab_size,
        )
        kinds = tuple(corpus.kinds[number] for number in corpus.token_kinds[:, 0].tolist())
        lengths = tuple(corpus.lengths.tolist())
        tokens = corpus.tokens[:, : max(lengths)].to(torch.int64).contiguous()  # a text may be shorter than what was asked
        shorter = {"window_reduced_to": max(lengths)} if max(lengths) < window else {}
        return _described(Windows(tokens, lengths, 0, kinds, corpus.sample_names, {**corpus.description, **shorter}), convention)
    return _second_halves(text, Path(tokenizer_directory), window, windows, seed, revision, vocab_size)


def _second_halves(
    text: str | Path | None,
    directory: Path,
    window: int,
    windows: int | None,
    seed: int,
    revision: str | None,
    vocab_size: int | None,
) -> Windows:
    read = read_documents(text, held_out=text is None, revision=revision)
    tokenizer, tokenizer_digest = load_tokenizer(directory)
    begin = _put_in_front(tokenizer, directory)
    available: dict[str, NDArray[np.int64]] = {}  # [windows of the kind, window]
    short = {}
    for kind, whole in sorted(_joined(read.documents, tokenizer, directory).items()):
        ids = _encode(tokenizer, whole, begin, kind, vocab_size)
        count = len(ids) // window
        if not count:
            short[kind] = len(ids)
            continue
        available[kind] = ids[: count * window].reshape(count, window)
        if begin is not None:
            available[kind][:, 0] = begin
    if not available:
        longest = max(short.values())
        raise CorpusError(f"No text fills a window of {window} tokens: the longest has {longest}. Give more text, or ask for less.")
    counts = {kind: len(cut) for kind, cut in available.items()}
    asked = sum(counts.values()) if windows is None else min(windows, sum(counts.values()))
    shares = apportion(asked, counts, counts)
    chosen = [(kind, row) for kind in available for row in spread(shares[kind], counts[kind], phase(seed, kind))]
    tokens = torch.from_numpy(np.stack([available[kind][row] for kind, row in chosen]))
    record = {
        **read.origin,
        "sequence_length": window,
        "seed": seed,
        "samples_asked": windows,
        "samples_available": sum(counts.values()),
        "samples": asked,
        "tokens": int(tokens.numel()),
        "tokenizer_digest": tokenizer_digest,
        "begin_token": begin,
        "left_out": short,
    }
    kinds = tuple(kind for kind, _ in chosen)
    names = tuple(f"{kind}, token {row * window}" for kind, row in chosen)
    return _described(Windows(tokens, (window,) * asked, window // 2, kinds, names, record), "llama.cpp")


def _joined(documents: tuple[Document, ...], tokenizer: Tokenizer, directory: Path) -> dict[str, str]:
    """By kind, its one text."""
    chat = None
    if any(document.messages for document in documents):
        chat = load_chat_format(directory, lambda token: tokenizer.token_to_id(token) is not None)
    parts: dict[str, list[str]] = {}
    for document in documents:
        parts.setdefault(document.kind, []).append(document_text(document, chat))
    return {kind: "\n\n".join(texts).removesuffix("\n") for kind, texts in parts.items()}


def _put_in_front(tokenizer: Tokenizer, directory: Path) -> int | None:
    """The begin token, if the tokenizer puts it before a text."""
    begin = begin_token(directory, tokenizer)
    return begin if begin is not None and tokenizer.encode("").ids[:1] == [begin] else None


def _encode(tokenizer: Tokenizer, text: str, begin: int | None, kind: str, vocab_size: int | None) -> NDArray[np.int64]:
    tokenizer.encode_special_tokens = True  # which is: as plain text
    ids = np.array(([] if begin is None else [begin]) + tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    if vocab_size is not None and (outside := int(ids.max(initial=0))) >= vocab_size:
        raise CorpusError(
            f"{kind} gives the token {outside} ({brief(tokenizer.id_to_token(outside))}), but the config's vocabulary has "
            f"{vocab_size} tokens. The tokenizer belongs to another model: use the one of this checkpoint."
        )
    return ids


def _described(cut: Windows, convention: Convention) -> Windows:
    """With the convention and a digest in the description."""
    if not sum(cut.positions):
        raise CorpusError("The text has no two tokens that follow each other in a window, so nothing is predicted. Give more text.")
    digest = xxhash.xxh3_128()
    for array in (cut.tokens.numpy(), np.array(cut.lengths)):
        digest.update(f"{array.shape}".encode())
        digest.update(array.astype("<i8").tobytes())
    digest.update("\n".join((convention, str(cut.first), *cut.kinds)).encode())
    return replace(cut, description={**cut.description, "convention": convention, "digest": digest.hexdigest()})
