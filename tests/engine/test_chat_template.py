"""ChatTemplate against published renderings and transformers, and against templates that exceed every limit."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from quire.engine.chat_template import ChatTemplate
from quire.errors import CheckpointError, RequestError

DATA = Path(__file__).parents[1] / "data" / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.jinja"))}
VECTORS = [json.loads(line) for line in (DATA / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Good morning – ça va? 🙂"}
ASSISTANT = {"role": "assistant", "content": "  Very well, "}
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"


def template(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, TOKENS, **options)


def render(source: str, messages: Sequence[Mapping[str, Any]] = (USER,), **options: Any) -> str:
    return template(source).render(messages, **options)


@pytest.mark.parametrize("row", VECTORS, ids=[f"{row['template']}-{row['case']}" for row in VECTORS])
def test_renders_as_published(row: dict[str, Any]) -> None:
    tokens = {name: row[name] for name in ("bos_token", "eos_token") if row[name] is not None}
    chat = ChatTemplate({"default": TEMPLATES[row["template"]]}, tokens)
    options = {"tools": row["tools"], "add_generation_prompt": row["add_generation_prompt"]}
    if "error" in row:
        with pytest.raises(RequestError, match=row["error"]) as caught:
            chat.render(row["messages"], **options)
        assert caught.value.param == "messages"
    else:
        assert chat.render(row["messages"], **options) == row["rendered"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("continued", [False, True])
def test_equals_transformers(name: str, continued: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [USER, ASSISTANT] if continued else [USER, ASSISTANT, USER]
    expected, _ = render_jinja_template(
        conversations=[messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **TOKENS,
    )
    text = render(TEMPLATES[name], messages, add_generation_prompt=not continued, continue_final_message=continued)
    assert text == expected[0]


# --- messages -----------------------------------------------------------------------------------------------------


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "x"}, "no object with a role"),
        ({"role": "user"}, "no content"),
        ({"role": "user", "content": 7}, "content is a int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "type 'image_url'; only text"),
        ({"role": "user", "content": ["x"]}, "part without a type"),
    ],
)
def test_messages_that_are_none(message: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        render(CHATML, [message])
    with pytest.raises(RequestError, match="messages is empty"):
        render(CHATML, [])


def test_arguments_of_tool_calls_become_objects() -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    for sent, shown in (('{"b": "ü", "a": 1}', '{"b": "ü", "a": 1}'), ("no json", '"no json"')):
        call = {"type": "function", "function": {"name": "f", "arguments": sent}}
        assert render(source, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == shown


def test_messages_of_the_caller_stay_as_they_are() -> None:
    message = {"role": "assistant", "content": "so"}
    render(CHATML, [message], add_generation_prompt=False, continue_final_message=True)
    assert message == {"role": "assistant", "content": "so"}


def test_final_message_is_continued() -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [USER, {"role": "assistant", "content": "so be "}]
    assert render(CHATML, messages, **options).endswith("<|assistant|>so be ")
    assert render(CHATML.replace("content", "content | trim"), messages, **options).endswith("<|assistant|>so be")
    with pytest.raises(RequestError, match="exclude each other"):
        render(CHATML, messages, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(RequestError, match="cannot be continued"):
        render("nothing of it", messages, **options)


# --- what templates find --------------------------------------------------------------------------------------------


def test_environment() -> None:
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% generation %}{{ 1 + 1 }}{% endgeneration %}") == "2"
    assert render("{{ {'b': '<ü>', 'a': 1} | tojson }}") == '{"b": "<ü>", "a": 1}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert render("  {% if true %}\n  x\n  {% endif %}\n") == "  x\n"
    assert render("{{ bos_token }}{{ eos_token }}{{ pad_token }}") == "<s></s>"
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{% if tools is none %}none{% endif %}", tools=[]) == "none"
    chat = template("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(1616, 4, 23))
    assert chat.render([USER]) == "23 Apr 1616"


def test_loops_keep_what_jinja_offers_in_them() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
    assert render(source, [USER, ASSISTANT, USER]) == "1/2False 2/2True "
    assert render("{% for x in missing %}x{% else %}none{% endfor %}") == "none"
    assert render("{% macro m(x) %}[{% for c in x %}{{ c }},{% endfor %}]{% endmacro %}{{ m('ab') }}") == "[a,b,]"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('no such thing') }}", "refuses the messages: no such thing"),
        ("{{ messages[0].content.missing.deeper }}", "has no attribute 'missing'"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_errors_of_the_template_are_told(source: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        render(source)


DOUBLING = "{{% set ns = namespace(s='ab') %}}{{% for i in range(60) %}}{{% set ns.s = {} %}}{{% endfor %}}"
RUNAWAYS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    *map(
        DOUBLING.format,
        [
            "ns.s ~ ns.s",
            "ns.s + ns.s",
            "ns.s * 2",
            "[ns.s, ns.s] | join",
            "'%s%s' % (ns.s, ns.s)",
            "'%s%s' | format(ns.s, ns.s)",
            "'{}{}'.format(ns.s, ns.s)",
            "ns.s.replace('a', 'aa').replace('b', 'bb')",
        ],
    ),
    "{{ 'a' * 10 ** 12 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
]


@pytest.mark.parametrize("source", RUNAWAYS)
def test_templates_that_run_away_are_stopped(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(RequestError, match=r"grew beyond|turned more than|power|too big"):
        render(source)
    assert time.perf_counter() - started < 10


def test_length_is_limited_to_what_is_tokenised() -> None:
    chat = template("{{ messages[0].content }}", max_chars=10)
    assert chat.render([{"role": "user", "content": "0123456789"}]) == "0123456789"
    with pytest.raises(RequestError, match="beyond 10 characters"):
        chat.render([{"role": "user", "content": "0123456789x"}])


# --- folders ------------------------------------------------------------------------------------------------------


def write(folder: Path, **content: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENS, **content}))
    return folder


def test_template_in_the_tokenizer_config(tmp_path: Path) -> None:
    chat = ChatTemplate.from_folder(write(tmp_path, chat_template="{{ bos_token }}one"))
    assert chat.render([USER]) == "<s>one"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "file"


def test_named_templates(tmp_path: Path) -> None:
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    chat = ChatTemplate.from_folder(write(tmp_path, chat_template=entries))
    assert chat.render([USER]) == "plain"
    assert chat.render([USER], tools=[{"type": "function"}]) == "tools"


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    chat = ChatTemplate.from_folder(write(tmp_path))
    with pytest.raises(RequestError, match=r"no chat template. Use /v1/completions") as caught:
        chat.render([USER])
    assert caught.value.code == "no_chat_template"


def test_broken_templates_are_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("fine\n{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja, line 2"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for content in (7, ["x"], [{"name": "default"}]):
        with pytest.raises(CheckpointError, match="neither a text nor a list"):
            ChatTemplate.from_folder(write(tmp_path, chat_template=content))
