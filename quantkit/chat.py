"""Chat messages as the text a model was trained on: the checkpoint's own chat template, rendered as transformers would.

A template comes with the checkpoint, so from anywhere: it runs in jinja's immutable sandbox and sees plain JSON values only.  It
has what transformers offers to templates, with one difference: the date never changes, because calibration must give the same bytes
tomorrow.  A checkpoint without a template gets Llama 4's header format if its tokenizer has the tokens for it, else plain
paragraphs; ``ChatFormat.name`` says which.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import CheckpointError, CorpusError
from quantkit.strict_json import brief, parse_object

FIXED_DATE = dt.datetime(2024, 7, 26)  # the date that Llama's own template falls back on
DATE_STRING = "26 Jul 2024"
LLAMA4_TOKENS = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")

Message = dict[str, Any]


class Render(Protocol):
    """Messages and tools to text; with ``answer`` the text ends where the assistant begins to answer.  Raises CorpusError."""

    def __call__(self, messages: list[Message], tools: list[Any] | None, /, *, answer: bool = False) -> str: ...


@dataclass(frozen=True)
class ChatFormat:
    """How messages become text.  name: where that comes from, for the record."""

    name: str
    render: Render


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says, beneath it what ``special_tokens_map.json`` says; {} when there is neither."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= _optional_object(directory / name)
    return settings


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens (``bos_token``, ``eos_token``, ...) of tokenizer settings, as text."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def load_chat_format(directory: Path, has_token: Callable[[str], bool]) -> ChatFormat:
    """The chat format of the checkpoint whose tokenizer files lie in ``directory``.  Raises CorpusError."""
    settings = tokenizer_settings(directory)
    templates = named_templates(directory, settings)
    if templates is not None:
        name, by_use = templates
        render = _template_renderer(f"{directory / name}", by_use, special_tokens(settings))
        return ChatFormat(name, render)
    if all(has_token(token) for token in LLAMA4_TOKENS):
        return ChatFormat("Llama 4 headers", _llama4_headers)
    return ChatFormat("paragraphs", _paragraphs)


# ---------------------------------------------------------------------------------------------------------------- templates


def named_templates(directory: Path, settings: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """(name of the file, templates by use: "default" and perhaps "tool_use"), or None."""
    path = directory / "chat_template.jinja"
    try:
        return path.name, {"default": path.read_bytes().decode("utf-8")}
    except FileNotFoundError:
        pass  # older checkpoints keep it elsewhere
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is damaged: not UTF-8 text at byte {error.start}. Download it again.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    candidates = {
        "chat_template.json": _optional_object(directory / "chat_template.json").get("chat_template"),
        "tokenizer_config.json": settings.get("chat_template"),
    }
    for name, value in candidates.items():
        if isinstance(value, str):
            return name, {"default": value}
        if isinstance(value, list):  # several named ones
            by_use = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            named = {use: text for use, text in by_use.items() if isinstance(use, str) and isinstance(text, str)}
            if "default" in named:
                return name, named
        if value is not None:
            raise CorpusError(f"{directory / name} holds a chat_template that is none: {brief(value)}. Download it again.")
    return None


def _template_renderer(where: str, by_use: Mapping[str, str], tokens: Mapping[str, str]) -> Render:
    from jinja2 import TemplateError

    environment = _environment()
    try:
        compiled = {use: environment.from_string(text) for use, text in by_use.items()}
    except TemplateError as error:
        raise CorpusError(f"{where} is no valid template: {error}. Download it again, or calibrate on plain text.") from error

    def render(messages: list[Message], tools: list[Any] | None, *, answer: bool = False) -> str:
        template = compiled["tool_use"] if tools and "tool_use" in compiled else compiled["default"]
        values = {**tokens, "date_string": DATE_STRING, "documents": None}
        try:
            return str(template.render(messages=messages, tools=tools, add_generation_prompt=answer, **values))
        except Exception as error:  # a template is a program: whatever Python raises can come out of it
            raise CorpusError(
                f"{where} cannot render this conversation: {type(error).__name__}: {str(error)[:300]}. "
                "Change the conversation to what the template expects, or give it as text."
            ) from error

    return render


def _environment() -> Any:
    """What transformers compiles chat templates with, the date apart."""
    from jinja2 import TemplateError, nodes, parser
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant says, for training; here it stands for its content."""

        tags = {"generation"}  # noqa: RUF012  declared so by jinja

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment


# ---------------------------------------------------------------------------------------------------------------- without one


def _spoken(message: Message) -> str:
    """The content of a message, followed by its calls as JSON."""
    content = message.get("content", "")
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    parts += [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part.strip() for part in parts if part.strip())


def _with_tools(messages: list[Message], tools: list[Any] | None) -> list[Message]:
    if not tools:
        return messages
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return [{"role": "system", "content": f"You can call these functions:\n{listed}"}, *messages]


def _llama4_headers(messages: list[Message], tools: list[Any] | None, *, answer: bool = False) -> str:
    roles = {"tool": "ipython"}
    turns = (
        f"<|header_start|>{roles.get(message['role'], message['role'])}<|header_end|>\n\n{_spoken(message)}<|eot|>"
        for message in _with_tools(messages, tools)
    )
    return "<|begin_of_text|>" + "".join(turns) + ("<|header_start|>assistant<|header_end|>\n\n" if answer else "")


def _paragraphs(messages: list[Message], tools: list[Any] | None, *, answer: bool = False) -> str:
    paragraphs = [f"{message['role']}: {_spoken(message)}" for message in _with_tools(messages, tools)]
    return "\n\n".join([*paragraphs, "assistant:"] if answer else paragraphs) + ("" if answer else "\n")


def _optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    try:
        return parse_object(data, str(path))
    except CheckpointError as error:
        raise CorpusError(str(error)) from error
