"""Encoder: text and chats as the token ids that a model is asked with, by the tokenizer files of its checkpoint.

Special tokens written in a text count as such, since chat templates write them.  The begin token comes first, once, where the
tokenizer or the config names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from quantkit.chat import ChatFormat, Message, load_chat_format
from quantkit.corpus import begin_token, load_tokenizer
from quantkit.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """What may follow, and after what; token ids.  Neither is empty."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoder:
    """directory: of the tokenizer files.  begin: id of the begin token.  digest: of tokenizer.json."""

    directory: Path
    tokenizer: Tokenizer
    begin: int | None
    digest: str

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read ``tokenizer.json`` and what stands beside it.  Raises CorpusError."""
        path = Path(directory)
        tokenizer, digest = load_tokenizer(path)
        return cls(path, tokenizer, begin_token(path, tokenizer), digest)

    @cached_property
    def chat(self) -> ChatFormat:
        """The checkpoint's chat format."""
        return load_chat_format(self.directory, lambda token: self.tokenizer.token_to_id(token) is not None)

    def question(self, messages: Sequence[Message]) -> str:
        """A chat as text that ends where the assistant begins to answer.  Raises CorpusError."""
        return self.chat.render(list(messages), None, answer=True)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text to continue, the begin token first."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if self.begin is None or ids[:1] == (self.begin,) else (self.begin, *ids)

    def continuation(self, context: str, text: str) -> Continuation:
        """``text`` behind ``context``, as lm-evaluation-harness splits them: what the ids of both together have more than those of
        the context; white space that ends the context belongs to the continuation, since tokens begin with spaces.

        Raises CorpusError when that leaves nothing to score, or no context, which the model needs for its first prediction.
        """
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        before = self.encode(stripped)
        more = self.encode(stripped + text)[len(before) :]
        if not before or not more:
            what = "continuation" if before else "context"
            raise CorpusError(f"The {what} of {(stripped[-40:], text[:40])!r} has no token of its own, so nothing can be scored.")
        return Continuation(before, more)
