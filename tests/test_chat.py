"""Chat rendering against transformers' apply_chat_template, and against strings written out."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as transformers_chat
from transformers import PreTrainedTokenizerFast

from quantkit.chat import DATE_STRING, FIXED_DATE, LLAMA4_TOKENS, load_chat_format, special_tokens
from quantkit.corpus import load_corpus
from quantkit.documents import read_documents
from quantkit.errors import CorpusError

DEMO = Path(__file__).resolve().parent.parent / "demo" / "tiny-scout"

# In the style of the one that Llama 4 releases carry, with what templates use beside it: loop controls, namespace, generation.
LLAMA4_STYLE = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set seen = namespace(users=0) %}
{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|header_start|>system<|header_end|>\\n\\n" }}
    {%- if tools is not none %}
        {{- "Environment: ipython\\n" }}
    {%- endif %}
    {{- "Today is " + date_string + " (" + strftime_now("%Y") + ")\\n" + system_message + "<|eot|>" }}
{%- endif %}
{%- if tools is not none %}
    {%- if messages | length == 0 %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|header_start|>user<|header_end|>\\n\\n' -}}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' }}
    {% for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {% endfor %}
    {{- first_user_message + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {%- set seen.users = seen.users + 1 %}
        {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
        {%- if message['content'] is string %}
            {% generation %}{{- message['content'] }}{% endgeneration %}
        {%- else %}
            {%- for content in message['content'] %}
                {{- content['text'] | trim }}
            {%- endfor %}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- elif 'tool_calls' in message and message.tool_calls | length > 0 %}
        {{- '<|header_start|>assistant<|header_end|>\\n\\n<|python_start|>' + message['content'] + '<|python_end|>' }}
        {%- for tool_call in message.tool_calls %}
            {{- '{"name": "' + tool_call.function.name + '", "parameters": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- "}" }}
        {%- endfor %}
        {{- "<|eot|>" }}
    {%- else %}
        {{- "<|header_start|>ipython<|header_end|>\\n\\n" + message.content | tojson + "<|eom|>" }}
    {%- endif %}
{%- endfor %}
{{- "[" ~ seen.users ~ (pad_token | default("")) ~ "]" }}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {"größe": {"type": "number"}}}},
    }
]
PLAIN: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief & <kind>. "},
    {"role": "user", "content": "क्या हाल है?\n"},
    {"role": "assistant", "content": "  ठीक है। "},
]
CALLING: list[dict[str, Any]] = [
    *PLAIN[:2],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"größe": 2.5, "html": "<b>&'"}}}],
    },
    {"role": "tool", "content": '{"found": ["straße", null]}'},
    {"role": "assistant", "content": "Done."},
]


def settings_of_demo() -> dict[str, Any]:
    return dict(json.loads((DEMO / "tokenizer_config.json").read_text()))


def tokenizer_files(directory: Path, template: Any = None, file: str = "chat_template.jinja") -> Path:
    """A directory with the demo model's tokenizer settings and another template."""
    directory.mkdir(exist_ok=True)
    settings = settings_of_demo()
    if file == "tokenizer_config.json":
        settings["chat_template"] = template
    elif file == "chat_template.json":
        (directory / file).write_text(json.dumps({"chat_template": template}))
    elif template is not None:
        (directory / file).write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def render(directory: Path, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    return load_chat_format(directory, lambda _: True).render(messages, tools)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The demo model's tokenizer in transformers, on the fixed date."""

    class Fixed(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return FIXED_DATE

    monkeypatch.setattr(transformers_chat, "datetime", Fixed)
    tokens = {name: value for name, value in settings_of_demo().items() if name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"), **tokens)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_a_llama4_template_renders_as_transformers_does(
    file: str, with_tools: bool, tmp_path: Path, oracle: PreTrainedTokenizerFast
) -> None:
    directory = tokenizer_files(tmp_path / "t", LLAMA4_STYLE, file)
    conversations = [CALLING] if with_tools else [PLAIN, PLAIN[1:], [*PLAIN, {"role": "skip", "content": "x"}]]
    tools = TOOLS if with_tools else None
    for messages in conversations:
        expected = oracle.apply_chat_template(
            messages, tools=tools, chat_template=LLAMA4_STYLE, tokenize=False, date_string=DATE_STRING
        )
        rendered = render(directory, messages, tools)
        assert rendered == expected
        assert rendered.startswith("<|begin_of_text|>")
    assert load_chat_format(directory, lambda _: False).name == file


@pytest.mark.parametrize("style", ["bundled model", "Llama 4"])
def test_the_bundled_conversations_render_as_transformers_does(style: str, tmp_path: Path, oracle: PreTrainedTokenizerFast) -> None:
    directory = DEMO if style == "bundled model" else tokenizer_files(tmp_path / "t", LLAMA4_STYLE)
    chat = load_chat_format(directory, lambda _: True)
    template = (directory / "chat_template.jinja").read_text()
    parts = [read_documents(None, held_out=held_out).documents for held_out in (False, True)]
    conversations = [document for documents in parts for document in documents if document.messages]
    assert any(document.tools for document in conversations)
    for document in conversations:
        messages, tools = list(document.messages), list(document.tools) or None
        expected = oracle.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, date_string=DATE_STRING
        )
        assert chat.render(messages, tools) == expected


def test_the_date_never_changes(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ date_string }}"
    assert render(tokenizer_files(tmp_path / "t", template), PLAIN) == f"{DATE_STRING} {DATE_STRING}"
    assert FIXED_DATE.strftime("%d %b %Y") == DATE_STRING


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    directory = tokenizer_files(tmp_path / "t", named, "tokenizer_config.json")
    assert render(directory, PLAIN) == "plain"
    assert render(directory, PLAIN, TOOLS) == "tools"


def test_special_tokens() -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None, "add_bos_token": True, "other": "x"}
    assert special_tokens(settings) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_without_a_template(tmp_path: Path) -> None:
    directory = tokenizer_files(tmp_path / "t")
    known = load_chat_format(directory, lambda token: token in LLAMA4_TOKENS)
    assert known.name == "Llama 4 headers"
    assert known.render(PLAIN[1:], None) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nक्या हाल है?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nठीक है।<|eot|>"
    )
    called = known.render(CALLING, TOOLS)
    assert '{"name": "find", "arguments": {"größe": 2.5, "html": "<b>&\'"}}<|eot|>' in called
    assert "<|header_start|>ipython<|header_end|>\n\n" + CALLING[3]["content"] in called
    assert json.dumps(TOOLS[0], ensure_ascii=False) in called
    unknown = load_chat_format(directory, lambda token: token != "<|eot|>")
    assert unknown.name == "paragraphs"
    assert unknown.render(PLAIN[1:], None) == "user: क्या हाल है?\n\nassistant: ठीक है।\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert unknown.render(parts, None) == "user: one\ntwo\n"


def test_arguments_as_text_become_an_object(tmp_path: Path) -> None:
    """As the OpenAI interface writes them; a template's tojson would quote the text a second time."""
    call = {"type": "function", "function": {"name": "find", "arguments": '{"n": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    [document] = read_documents(path).documents
    assert document.messages[1]["tool_calls"][0]["function"]["arguments"] == {"n": 1}
    assert document.messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", r"chat_template\.jinja is no valid template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"c\.jsonl line 1: .*cannot render this conversation: .*roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", "cannot render this conversation: TypeError"),
        ("{{ nothing.member }}", "cannot render this conversation: UndefinedError"),
        ("{{ messages.append(1) }}", "cannot render this conversation: SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render this conversation: SecurityError"),
        ("{{ range(10**9) | list }}", "cannot render this conversation: OverflowError"),
    ],
)
def test_templates_that_fail(template: str, message: str, tmp_path: Path) -> None:
    directory = tokenizer_files(tmp_path / "t", template)
    (directory / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": PLAIN}))
    with pytest.raises(CorpusError, match=message):
        load_corpus(path, directory)


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
def test_a_template_that_is_none(file: str, tmp_path: Path) -> None:
    directory = tokenizer_files(tmp_path / "t", [{"name": "other", "template": "x"}], file)
    with pytest.raises(CorpusError, match=f"{file} holds a chat_template that is none"):
        load_chat_format(directory, lambda _: True)
    (tmp_path / "t" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match="not UTF-8 text at byte 0"):
        load_chat_format(directory, lambda _: True)
