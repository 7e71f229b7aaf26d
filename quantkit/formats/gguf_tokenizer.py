"""The tokenizer as keys of a GGUF file, so that llama.cpp cuts text into the same tokens.

Llama 4 has a byte-level BPE: the vocabulary and the merges are copied from ``tokenizer.json`` as they are.  How text is cut into
words before that cannot be copied: llama.cpp knows a list of rules by name.  Llama 4's is ``llama4``, and a tokenizer that cuts a
set of awkward lines in another way is refused, since its tokens would silently be others.  llama.cpp's rule differs from the
model's in one point: it cuts words at combining marks (its issue 27783), which changes some tokens of Hindi or Thai text.  Rules
that treat marks rightly have names that older versions of llama.cpp do not load.

Two special tokens are given that the converter leaves out: ``<|eot|>`` ends a turn, and ``<|eom|>`` a message that calls a tool.
Without them llama.cpp does not stop at ``<|eom|>``, and at ``<|eot|>`` only in models that have it as their end of sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any

from gguf.constants import Keys, TokenType

from quantkit import chat
from quantkit.config import Llama4Config
from quantkit.errors import CheckpointError, CorpusError
from quantkit.formats.gguf_general import count, flag, integers, text, texts
from quantkit.gguf_header import MetadataEntry
from quantkit.strict_json import brief, parse_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
MODEL = "gpt2"  # llama.cpp's name for every byte-level BPE
RULES = "llama4"
EOS_LIST = "tokenizer.ggml.eos_token_ids"  # read by versions of Ollama before 0.30 only
END_OF_TURN, END_OF_MESSAGE, END_OF_TEXT, BEGIN_OF_TEXT = "<|eot|>", "<|eom|>", "<|end_of_text|>", "<|begin_of_text|>"

# Lines, and the words that Llama 4 cuts them into: case, contractions, marks, digits by three, punctuation with line ends, spaces.
_WORDS = (
    ("Hello", " World", " camel", "Case", " HTTPServer's", " X"),
    ("It's", " we'LL", " I'd", "x"),
    ("123", "456", "7", ".", "5", "%", " ", "\uff11\uff12\uff13"),
    ("if", "(a", "!=", "b", "){\n", "\treturn", ";/\n", "}\n\n"),
    (" ", " naïve", " e\u0301te\u0301", "  ", " Ελλάδα", " สวัสดี", "  \n", "  "),
    ("你好", "\uff0c世界", "!!!\r\n\r\n", "_foo", "_bar", " //", " ok", "…\n", " \n", " x"),
)
_ID_KEYS = {"bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID, "unk": Keys.Tokenizer.UNK_ID, "pad": Keys.Tokenizer.PAD_ID}


@dataclass(frozen=True)
class _Vocabulary:
    """tokens, types: by id.  added: id of every token that stands apart from the merges, by its text."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    added: Mapping[str, int]


def tokenizer_metadata(directory: Path, config: Llama4Config) -> list[MetadataEntry]:
    """The ``tokenizer.*`` keys for the checkpoint in ``directory``, in the converter's order.

    Raises CheckpointError when ``tokenizer.json`` is missing or damaged, is no byte-level BPE with Llama 4's rules, or does not fit
    the vocabulary of the config.
    """
    path = directory / TOKENIZER_FILE
    content = _required_object(path)
    model = _byte_level_model(content, path)
    tokenizer = _opened(path)
    _check_rules(tokenizer, path)
    vocabulary = _vocabulary(content, model, config.vocab_size, path)
    _check_ids(tokenizer, vocabulary, path)
    try:
        settings = chat.tokenizer_settings(directory)
        templates = chat.named_templates(directory, settings)
    except CorpusError as error:
        raise CheckpointError(str(error)) from error
    identifiers = _special_ids(directory, settings, vocabulary, config.vocab_size)
    entries = [
        text(Keys.Tokenizer.MODEL, MODEL),
        text(Keys.Tokenizer.PRE, RULES),
        texts(Keys.Tokenizer.LIST, vocabulary.tokens),
        integers(Keys.Tokenizer.TOKEN_TYPE, vocabulary.types),
        texts(Keys.Tokenizer.MERGES, _merges(model, path)),
        *(count(_ID_KEYS[name], identifiers[name]) for name in _ID_KEYS if name in identifiers),
    ]
    for key, token in ((Keys.Tokenizer.EOT_ID, END_OF_TURN), (Keys.Tokenizer.EOM_ID, END_OF_MESSAGE)):
        if token in vocabulary.added:
            entries.append(count(key, vocabulary.added[token]))
    first, last = _template_ends(content)
    by_id = vocabulary.tokens
    entries.append(flag(Keys.Tokenizer.ADD_BOS, first == by_id[identifiers["bos"]]))
    if last is not None and last == by_id[identifiers["eos"]]:
        entries.append(flag(Keys.Tokenizer.ADD_EOS, True))
    entries.append(integers(EOS_LIST, _ends(directory, vocabulary, identifiers["eos"], config.vocab_size)))
    return entries + _template_entries({} if templates is None else templates[1])


# --------------------------------------------------------------------------------------------------------- tokenizer.json


def _required_object(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; a GGUF file holds the tokenizer. Download it, or copy it from the model this one was made from."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def _optional_object(path: Path) -> dict[str, Any]:
    return _required_object(path) if path.exists() else {}


def _steps(section: Any, key: str) -> list[Mapping[str, Any]]:
    """A step of the tokenizer, or the steps of a sequence of them."""
    if not isinstance(section, Mapping):
        return []
    inner = section.get(key) if section.get("type") == "Sequence" else [section]
    return [step for step in inner if isinstance(step, Mapping)] if isinstance(inner, list) else []


def _byte_level_model(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The section with vocabulary and merges, after checking that llama.cpp computes what the file describes."""
    model = content.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise CheckpointError(f"{path}: the model is {brief(kind)}; Llama 4 has a byte-level BPE. Use the model's own tokenizer.")
    odd = [
        key
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout", "unk_token")
        if model.get(key)
    ]
    before = [step.get("type") for step in _steps(content.get("pre_tokenizer"), "pretokenizers")]
    after = [step.get("type") for step in _steps(content.get("decoder"), "decoders")]
    changing = [step.get("type") for step in _steps(content.get("normalizer"), "normalizers")]
    if odd or changing or "ByteLevel" not in before or "ByteLevel" not in after:
        found = f"settings {brief(odd)}, normalizer {brief(changing)}, pre_tokenizer {brief(before)}, decoder {brief(after)}"
        raise CheckpointError(
            f"{path}: not a plain byte-level BPE as Llama 4 has ({found}); llama.cpp would cut text differently. "
            "Use the model's own tokenizer."
        )
    return model


def _opened(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} is damaged: {str(error)[:300]}. Download it again.") from error


def _check_rules(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that cuts text into other words than Llama 4's."""
    for words in _WORDS:
        line = "".join(words)
        found = tuple(line[start:stop] for _, (start, stop) in tokenizer.pre_tokenizer.pre_tokenize_str(line))
        if found != words:
            raise CheckpointError(
                f"{path}: cuts {line!r} into {brief(found)}, Llama 4's rules into {brief(words)}; llama.cpp knows only these, so "
                "its tokens would be others. Use the model's own tokenizer."
            )


def _check_ids(tokenizer: Tokenizer, vocabulary: _Vocabulary, path: Path) -> None:
    """Refuse gaps between the ids of added tokens: the library numbers them anew, and nobody knows which ids are meant."""
    for token, number in vocabulary.added.items():
        if (found := tokenizer.token_to_id(token)) != number:
            raise CheckpointError(
                f"{path}: says that the token {brief(token)} has the id {number}, but the tokenizers library gives it {found}. "
                "Number the added tokens without gaps, after the vocabulary."
            )


def _vocabulary(content: Mapping[str, Any], model: Mapping[str, Any], size: int, path: Path) -> _Vocabulary:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}. Use the tokenizer that belongs to this model.")

    plain, added = model.get("vocab"), content.get("added_tokens", [])
    if not isinstance(plain, Mapping) or not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        raise fault("has no vocabulary, or no list of added tokens")
    by_id: dict[int, str] = {}
    numbers: dict[str, int] = {}
    types: dict[int, int] = {}
    special = {token.get("content"): token for token in added}
    pairs = [(token, number) for token, number in plain.items() if token not in special]
    pairs += [(token.get("content"), token.get("id")) for token in added]
    for token, number in pairs:
        if type(number) is not int or not isinstance(token, str) or not token or number < 0:
            raise fault(f"the token {brief(token)} has the id {brief(number)}")
        if number >= size:
            raise fault(f"the token {brief(token)} has the id {number}, but vocab_size in config.json is {size}")
        if number in by_id:
            raise fault(f"the tokens {brief(by_id[number])} and {brief(token)} have the same id {number}")
        if (other := numbers.get(token, plain.get(token, number))) != number:
            raise fault(f"the token {brief(token)} has two ids, {brief(other)} and {number}")
        by_id[number], numbers[token] = token, number
        types[number] = _token_type(special.get(token))
    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in range(size))
    for number, token in enumerate(tokens):
        if numbers.get(token, number) != number:
            raise fault(f"the token {brief(token)} is also the name that GGUF files give to the unused id {number}")
    apart = {token: number for token, number in numbers.items() if token in special}
    return _Vocabulary(tokens, tuple(types.get(number, TokenType.UNUSED.value) for number in range(size)), apart)


def _token_type(added: Mapping[str, Any] | None) -> int:
    """Control tokens are read from prompts only where special tokens are asked for, user-defined ones everywhere."""
    if added is None:
        return TokenType.NORMAL.value
    token = added["content"]
    looks_special = any(
        token.startswith(begin) and token.endswith(end) for begin, end in (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    )
    if added.get("special") or looks_special or token in ("<pad>", "<mask>"):
        return TokenType.CONTROL.value
    return TokenType.USER_DEFINED.value


def _merges(model: Mapping[str, Any], path: Path) -> list[str]:
    """The merges as ``left right``, by rank, from either spelling of them."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(f"{path}: has no merges, which a byte-level BPE needs. Download it again.")
    found = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise CheckpointError(f"{path}: holds the merge {brief(merge)}; expected two tokens. Download it again.")
        found.append(" ".join(part.replace(" ", "\u0120") for part in pair))  # in this alphabet the space is written so
    return found


# ---------------------------------------------------------------------------------------------------------- special tokens


def _special_ids(directory: Path, settings: Mapping[str, Any], vocabulary: _Vocabulary, size: int) -> dict[str, int]:
    """Ids of the named special tokens: from the tokenizer's settings, else from the config, else by Llama 4's own names."""
    named = chat.special_tokens(settings)
    config = _optional_object(directory / "config.json")
    inner = config.get("text_config")
    sections = (config, inner if isinstance(inner, Mapping) else {})
    found: dict[str, int] = {}
    for name in _ID_KEYS:
        numbers = [section.get(f"{name}_token_id") for section in sections]
        number = next((number for number in numbers if type(number) is int and 0 <= number < size), None)
        token = named.get(f"{name}_token", "")
        if token in vocabulary.added:
            found[name] = vocabulary.added[token]
        elif number is not None:
            found[name] = number
    for name, token in (("bos", BEGIN_OF_TEXT), ("eos", END_OF_TURN), ("eos", END_OF_TEXT)):
        if name not in found and token in vocabulary.added:
            found[name] = vocabulary.added[token]
    for name in ("bos", "eos"):
        if name not in found:  # llama.cpp would silently take id 11
            raise CheckpointError(
                f"{directory}: neither tokenizer_config.json nor config.json names a token for {name} that tokenizer.json has. "
                f"Add {name}_token to tokenizer_config.json."
            )
    return found


def _ends(directory: Path, vocabulary: _Vocabulary, end: int, size: int) -> list[int]:
    """Every id that ends generation: the end of sequence, those of the configs, and Llama 4's own."""
    config, inner = _optional_object(directory / "config.json"), None
    inner = config.get("text_config")
    found: list[Any] = [end]
    for section in (_optional_object(directory / "generation_config.json"), config, inner):
        listed = section.get("eos_token_id") if isinstance(section, Mapping) else None
        found += listed if isinstance(listed, list) else [listed]
    found += [vocabulary.added[token] for token in (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN) if token in vocabulary.added]
    return list(dict.fromkeys(number for number in found if type(number) is int and 0 <= number < size))


def _template_ends(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the tokenizer puts before and after a text."""
    for step in _steps(content.get("post_processor"), "processors"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and len(single) > 1:
            return _special_name(single[0]), _special_name(single[-1])
    return None, None


def _special_name(piece: Any) -> str | None:
    inner = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
    name = inner.get("id") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _template_entries(templates: Mapping[str, str]) -> list[MetadataEntry]:
    """The chat template, and others beside it by their names."""
    entries = []
    names: list[str] = []
    for use, template in templates.items():
        name = "".join(letter if letter in ascii_letters + digits else "_" for letter in use)
        if template and name and name != "default" and name not in names:
            names.append(name)
            entries.append(text(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template))
    if names:
        entries.append(texts(Keys.Tokenizer.CHAT_TEMPLATES, names))
    if templates.get("default"):
        entries.append(text(Keys.Tokenizer.CHAT_TEMPLATE, templates["default"]))
    return entries
