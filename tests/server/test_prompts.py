"""Prompts from chat requests: histories with tools against transformers, and templates that know no tools."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.engine.chat_template import ChatTemplate
from quire.server.prompts import render
from quire.server.protocol import ChatCompletionRequest
from tests.server.scripted_engine import LocalTemplate

DATA = Path(__file__).parents[1] / "data" / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"é": {}}}}}
]
ARGUMENTS = {"city": 'Saint-"Denis" é', "days": [1, 2.5, None], "deep": {"a": True}}


def call(index: int, arguments: Any) -> dict[str, Any]:
    return {"id": f"call_{index}", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def history(arguments: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call(1, arguments), call(2, arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": '{"t": 20}'},
        {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
        {"role": "assistant", "content": "Twenty, or rain.", "reasoning_content": "Two answers."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call(3, arguments)]},
        {"role": "tool", "tool_call_id": "call_3", "content": ""},
    ]


TEMPLATES = {
    "qwen2.5": (DATA / "qwen2.5_tools.jinja").read_text(encoding="utf-8"),
    "tags": """{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{% for c in m.tool_calls %}
<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}
<parameter={{ k }}>{{ v if v is string else v | tojson }}</parameter>{% endfor %}{% endfor %}
{% else %}{{ m.content }}{% endif %}{% endfor %}{{ tools | tojson(indent=2) }}""",
    "reasoning": """{% for m in messages %}{% if m.reasoning_content is defined %}
<think>{{ m.reasoning_content }}</think>{%- endif %}{{ m.content or '' }}{{ m.tool_call_id or '' }}{{ m.name or '' }}
{{ m.tool_calls | length }}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ tools | length }}""",
    "documents": """{% for d in documents %}{{ loop.index }}: {{ d.title }} {{ d.text }}
{% endfor %}{{ messages[-1].role }}{{ bos_token }}{{ custom.depth }}
{{ messages[2].tool_calls | length }}{{ tools[0].function.name }}""",
}
OPTIONS: dict[str, Any] = {
    "documents": [{"title": "One", "text": "é"}, {"title": "Two", "text": "b"}],
    "custom": {"depth": 3},
    "enable_thinking": False,
}


def rendered(source: str, **body: Any) -> str:
    request = msgspec.convert(body, ChatCompletionRequest)
    return asyncio.run(render(LocalTemplate(ChatTemplate({"default": source}, TOKENS)), request))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_history_with_tools_equals_transformers(name: str, as_text: bool) -> None:
    """Also where the arguments come as JSON in a string, as OpenAI's clients send them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[history(ARGUMENTS)],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **OPTIONS,
        **TOKENS,
    )
    text = rendered(
        TEMPLATES[name],
        messages=history(json.dumps(ARGUMENTS) if as_text else ARGUMENTS),
        tools=TOOLS,
        documents=OPTIONS["documents"],
        chat_template_kwargs={"custom": OPTIONS["custom"], "enable_thinking": False},
    )
    assert text == expected[0]


def test_a_template_that_shows_calls_and_no_tools_keeps_its_form_of_calls() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | length }}\n{% endfor %}"
    text = rendered(source, messages=history("{}")[1:4], tools=TOOLS)
    assert text.startswith("<system>You can call functions.")
    assert "JSON list" not in text
    assert "<assistant>2\n<tool>" in text


def test_empty_arguments_are_an_empty_object() -> None:
    source = "{{ tools }}{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call(1, "")]}]
    assert rendered(source, messages=messages) == "None{}"


def test_a_template_without_tools_gets_them_as_text() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    text = rendered(source, messages=history(json.dumps(ARGUMENTS)), tools=TOOLS)
    lines = text.splitlines()
    assert lines[0] == "<system>Be brief."
    assert json.loads(lines[3]) == TOOLS[0]["function"]
    calls = json.loads(next(line for line in lines if line.startswith("<assistant>[")).removeprefix("<assistant>"))
    assert calls == [{"name": "weather", "arguments": ARGUMENTS}] * 2
    assert '<user>Result of weather: {"t": 20}' in lines
    assert "<user>Result: rain" in lines
    assert rendered(source, messages=history("{}")[:2]) == "<system>Be brief.\n<user>Weather?\n"
    assert rendered(source, messages=history("{}")[1:2], tools=TOOLS, tool_choice="none") == "<user>Weather?\n"
