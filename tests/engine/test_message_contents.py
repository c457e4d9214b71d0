"""Contents of messages in the form a template takes, against transformers' apply_chat_template."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quire.config import EngineConfig
from quire.engine.chat_template import ChatTemplate
from quire.engine.checkpoint import read_default_params
from quire.errors import CheckpointError, RequestError
from tests.checkpoints import write_tokenizer

DATA = Path(__file__).parents[1] / "data" / "chat_templates"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


TEMPLATES = {
    "text": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}",
    "added": "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}{% endfor %}",
    "either": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}<t>{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "parts": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p['text'] }};{% endfor %}{% endfor %}",
    "macro": "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}|{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}",
    "user parts": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}/{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "strict": "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text only') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}",
}
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": parts("A", "B")},
    {"role": "assistant", "content": "C"},
    {"role": "user", "content": parts("D")},
]


def joined(messages: list[dict[str, Any]], roles: set[str]) -> list[dict[str, Any]]:
    """The parts of messages of `roles` as one text."""
    return [
        {**m, "content": "\n".join(part["text"] for part in m["content"])}
        if m["role"] in roles and isinstance(m["content"], list)
        else m
        for m in messages
    ]


def transformers_text(folder: Path, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return text


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate({"default": template}, {}).render(messages, add_generation_prompt=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_passed_to_templates_that_know_them(name: str, tmp_path: Path) -> None:
    """As transformers does; other templates get one text, with which transformers agrees again."""
    knows = {"either": set(), "parts": set(), "macro": set(), "user parts": set()}
    messages = CHAT if name in knows else joined(CHAT, {"user"})
    if name == "parts":  # which cannot show a text; vLLM also wraps texts for it
        messages = [{**m, "content": parts(m["content"])} if isinstance(m["content"], str) else m for m in messages]
    assert render(TEMPLATES[name], CHAT) == transformers_text(tmp_path, TEMPLATES[name], messages)


def test_a_list_is_continued_as_a_text_is() -> None:
    for name in ("either", "text"):
        found = render(TEMPLATES[name], [{"role": "user", "content": parts("A", "B")}], continue_final_message=True)
        assert found.endswith("B")


CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING: dict[str, str] = {
    "plain": "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}"
    "{% endfor %}",
    "truth": "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}!{% endfor %}",
    "is none": "{% for m in messages %}{% if m.content is none %}-{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "is not none": "{% for m in messages %}{% if m.content is not none %}<{{ m.content }}>{% endif %}.{% endfor %}",
    "trim": "{% for m in messages %}{{ m.content | trim }};{% endfor %}",
    "concatenation": "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}",
    "tilde": "{% for m in messages %}{{ 'a' ~ m.content }}{% endfor %}",
}
FAILS_WITHOUT = {"concatenation"}
"""Templates that fail in transformers, and get an empty text here."""


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("absent", [False, True])
def test_no_content_beside_tool_calls(name: str, absent: bool, tmp_path: Path) -> None:
    answer: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL], "content": None}
    question = {"role": "user", "content": "say None"}
    given = {key: value for key, value in answer.items() if key != "content"} if absent else answer
    known = {**answer, "content": "" if name in FAILS_WITHOUT else None}
    assert render(CALLING[name], [question, given]) == transformers_text(tmp_path, CALLING[name], [question, known])


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_name(field: str, read: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m." + read + " }}/{{ m.name is defined }}{% endfor %}"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", field: "why", "name": None}]
    assert render(template, chat) == transformers_text(tmp_path, template, chat)


@pytest.mark.parametrize("file", sorted(DATA.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_agree_on_texts_in_parts(file: Path, tmp_path: Path) -> None:
    special = "{% set bos_token = '<s>' %}{% set eos_token = '</s>' %}"
    template = special + file.read_text(encoding="utf-8")
    chat = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    in_parts = [{**message, "content": parts(message["content"])} for message in chat]
    assert render(template, in_parts) == render(template, chat) == transformers_text(tmp_path, template, chat)


SYNTAX: dict[str, str] = {
    "call": "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}x{{ messages[0].content }}{% endcall %}",
    "call with arguments": "{% macro m(n) %}{% for i in range(n) %}{{ caller(i) }}{% endfor %}{% endmacro %}"
    "{% call(i) m(3) %}{{ i }},{% endcall %}",
    "call of an expression": "{% macro m(a, b='q') %}{{ a ~ b ~ caller() }}{% endmacro %}"
    "{% call m('p', b='r' + 's') %}t{% endcall %}",
    "nested calls": "{% macro m() %}({{ caller() }}){% endmacro %}"
    "{% call m() %}{% call m() %}i{% endcall %}{% endcall %}",
    "filter block": "{% filter upper %}abc{{ messages[0].role }}{% endfilter %}",
    "set block": "{% set x %}a{{ messages[0].content }}b{% endset %}{{ x | trim }}",
    "filtered set block": "{% set x | upper %}a{{ messages[0].content }}{% endset %}{{ x }}",
    "documents": "{% if documents is none %}none{% elif documents is defined %}{{ documents | length }}{% endif %}",
    "tools": "{{ tools is none }}{{ add_generation_prompt }}",
    "recursive loop": "{% for x in [1, [2, 3]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "with": "{% with a = 1, b = 'c' ~ 'd' %}{{ a }}{{ b }}{% endwith %}",
    "conditional": "{{ 'a' if documents else 'b' }}{{ messages | map(attribute='role') | join(',') }}",
}


@pytest.mark.parametrize("name", SYNTAX)
def test_the_whole_of_jinja_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert render(SYNTAX[name], chat) == transformers_text(tmp_path, SYNTAX[name], chat)


def test_calls_count_against_the_budget() -> None:
    template = "{% macro m() %}{% for i in range(2000) %}{{ caller() }}{% endfor %}{% endmacro %}"
    template += "{% call m() %}{% call m() %}" + "x" * 100 + "{% endcall %}{% endcall %}"
    with pytest.raises(RequestError, match=r"grew beyond|turned more than"):
        render(template, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": None}, r"messages\[0\] has no content"),
        ({"role": "user"}, r"messages\[0\] has no content"),
        ({"role": "user", "content": 5}, r"messages\[0\].content is a int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "only text parts are supported"),
        ({"role": "user", "content": [{"type": "text"}]}, "without a text"),
        ({"role": "user", "content": ["a"]}, "a part without a type"),
        ("hello", r"messages\[0\] is no object with a role"),
    ],
)
def test_contents_that_are_none(message: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        render(TEMPLATES["text"], [message])


class TestStart:
    def test_a_broken_template_is_told(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{% if %}")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja, line 1"):
            ChatTemplate.from_folder(tmp_path)
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
            ChatTemplate.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"temperature": "hot"}, "temperature is 'hot'"),
            ({"top_p": 3}, "top_p is 3"),
            ({"max_new_tokens": -1}, "max_tokens is -1"),
            ({"top_k": [1]}, "top_k is"),
            ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ],
    )
    def test_invalid_sampling_defaults_are_told(self, values: dict[str, Any], said: str, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {said}.*generation_config=none"):
            read_default_params(EngineConfig(), tmp_path)
        assert read_default_params(EngineConfig(generation_config="none"), tmp_path) == {}
