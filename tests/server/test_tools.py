"""Tool calls and reasoning through the openai client: forced calls of the real engine, scripted replies of others."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from quire.engine.chat_template import ChatTemplate
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import LocalTemplate, ScriptedEngine, bundled_tokenizer

ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER: Any = {"type": "function", "function": {"name": "weather"}}
CALLS = (
    'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>{"name": "now"}</tool_call>'
)
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% for t in tools or [] %}{{ t | tojson }}"
    "{% endfor %}{% if tools %}<tool_call></tool_call>{% endif %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


@contextmanager
def scripted(
    answer: str, template: str = "{{ tools }}<tool_call>", **settings: Any
) -> Iterator[tuple[OpenAI, ScriptedEngine]]:
    engine = ScriptedEngine(
        answer=answer, chat_template=LocalTemplate(ChatTemplate({"default": template}, {})), max_model_len=2048
    )
    with RunningServer(engine, ServerSettings(port=0, **settings)) as server, server.client() as client:
        yield client, engine


@pytest.fixture(scope="module")
def forced() -> Iterator[OpenAI]:
    config = EngineConfig(max_num_seqs=4, num_blocks=512, threads=1, disable_log_stats=True)
    with RunningServer(AsyncLLM(config), start_seconds=120) as running, running.client() as client:
        yield client


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "scripted", "messages": ASK, "tools": TOOLS, **options})


def joined(stream: Any) -> tuple[str, str, list[dict[str, Any]], str | None]:
    """Text, reasoning, calls and finish reason of a stream, with the rules that clients rely on."""
    text, reasoning, calls, reason = "", "", list[dict[str, Any]](), None
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            text += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
            for call in delta.tool_calls or []:
                if call.id is not None:  # the first delta of a call, and no other, has id, type and name
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                else:
                    assert call.function.name is None
                    assert call.index == len(calls) - 1
                calls[-1]["arguments"] += call.function.arguments or ""
            reason = choice.finish_reason or reason
    return text, reasoning, calls, reason


def check_weather(arguments: str) -> None:
    value = json.loads(arguments)
    assert value.keys() == {"city", "unit"}
    assert len(value["city"]) <= 12
    assert value["unit"] in ("c", "f")


@pytest.mark.parametrize("choice", ["required", WEATHER])
def test_forced_calls(forced: OpenAI, choice: Any) -> None:
    asked = {
        "model": "quire-bundled",
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 3,
        "max_tokens": 200,
    }
    reply = ask(forced, **asked).choices[0]
    (call,) = reply.message.tool_calls
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None
    assert call.function.name in ("weather", "now")
    if call.function.name == "weather":
        check_weather(call.function.arguments)
    if choice is WEATHER:
        assert call.function.name == "weather"
    text, _, calls, reason = joined(ask(forced, **asked, stream=True))
    assert (text, reason) == ("", "tool_calls")
    assert [(entry["name"], entry["arguments"]) for entry in calls] == [(call.function.name, call.function.arguments)]


def test_several_samples_call_each_on_their_own(forced: OpenAI) -> None:
    reply = ask(forced, model="quire-bundled", tool_choice=WEATHER, n=3, temperature=1.0, max_tokens=200)
    for choice in reply.choices:
        check_weather(choice.message.tool_calls[0].function.arguments)


def test_parse_helpers(forced: OpenAI) -> None:
    class Weather(BaseModel):
        """The weather of a city."""

        city: Literal["Paris", "Rome"]
        days: int

    tools = [pydantic_function_tool(Weather)]
    reply = forced.chat.completions.parse(
        model="quire-bundled",
        messages=ASK,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_conversation_with_results(forced: OpenAI) -> None:
    """A template that knows no tools gets calls and results as text."""
    history = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    reply = ask(forced, model="quire-bundled", messages=history, max_tokens=5, tool_choice="auto")
    assert reply.choices[0].message.content


def test_calls_in_a_free_reply() -> None:
    with scripted(CALLS) as (client, engine):
        reply = ask(client).choices[0]
        assert reply.finish_reason == "tool_calls"
        assert reply.message.content == "Hm."
        found = [(call.function.name, call.function.arguments) for call in reply.message.tool_calls]
        assert found == [("weather", '{"city": "Paris"}'), ("now", "{}")]
        text, _, calls, reason = joined(ask(client, stream=True))
        assert (text, reason) == ("Hm.", "tool_calls")
        assert [(call["name"], call["arguments"]) for call in calls] == found
        assert len({call["id"] for call in calls}) == 2
        one = ask(client, parallel_tool_calls=False).choices[0].message.tool_calls
        assert [call.function.name for call in one] == ["weather"]
        assert engine.calls[0].params.structured_outputs is None
        assert not engine.calls[0].params.skip_special_tokens


def test_a_reply_that_was_cut_keeps_its_finish_reason() -> None:
    with scripted(CALLS) as (client, _):
        for max_tokens in range(5, 60, 9):
            assert ask(client, max_tokens=max_tokens).choices[0].finish_reason == "length"


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_no_parser_runs_where_there_are_no_tools(options: Any) -> None:
    with scripted(CALLS) as (client, engine):
        reply = ask(client, **options).choices[0]
        assert (reply.message.content, reply.message.tool_calls, reply.finish_reason) == (CALLS, None, "stop")
        assert bundled_tokenizer().decode(engine.calls[0].prompt) == "None<tool_call>"


def test_reasoning_and_its_budget() -> None:
    answer = "Paris?\n</think>\n\nYes, Paris."
    with scripted(answer, QWEN) as (client, _):
        reply = client.chat.completions.create(model="scripted", messages=ASK)
        message: Any = reply.choices[0].message
        assert (message.content, message.reasoning, message.reasoning_content) == ("Yes, Paris.", "Paris?", "Paris?")
        assert reply.usage is not None
        assert reply.usage.completion_tokens_details is not None
        assert 0 < (reply.usage.completion_tokens_details.reasoning_tokens or 0) < reply.usage.completion_tokens
        stream = client.chat.completions.create(model="scripted", messages=ASK, stream=True)
        assert joined(stream) == ("Yes, Paris.", "Paris?", [], "stop")
        hidden = client.chat.completions.create(model="scripted", messages=ASK, extra_body={"include_reasoning": False})
        assert hidden.choices[0].message.content == "Yes, Paris."
        assert not hasattr(hidden.choices[0].message, "reasoning")
        with pytest.raises(BadRequestError, match="thinking_token_budget needs"):  # </think> is no token here
            client.chat.completions.create(model="scripted", messages=ASK, extra_body={"thinking_token_budget": 8})


@pytest.mark.parametrize(
    "options", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}]
)
def test_thinking_that_is_turned_off(options: Any) -> None:
    with scripted("Yes.\n", QWEN) as (client, _):
        message: Any = (
            client.chat.completions.create(model="scripted", messages=ASK, extra_body=options).choices[0].message
        )
        assert message.content == "Yes.\n"
        assert not hasattr(message, "reasoning")


def test_options_name_the_formats() -> None:
    answer = "<think>x</think>[TOOL_CALLS]now[ARGS]{}"
    with scripted(answer, "{{ tools }}", tool_call_parser="mistral_v11", reasoning_parser="deepseek_r1") as (client, _):
        message: Any = ask(client).choices[0].message
        assert message.reasoning == "x"
        assert [call.function.name for call in message.tool_calls] == ["now"]
    with scripted(answer, "{{ tools }}<think>", reasoning_parser="none") as (client, _):
        assert ask(client).choices[0].message.content == answer


def test_strict_tools_and_a_format_of_the_text_become_a_grammar() -> None:
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    with scripted("{}") as (client, engine):
        for options in ({"tools": strict}, {"response_format": form}, {"tool_choice": "required"}):
            ask(client, **options)
        grammars = [call.params.structured_outputs for call in engine.calls]
        assert [bool(grammar and (grammar.grammar or grammar.around)) for grammar in grammars] == [True] * 3


def test_templates_get_tools_documents_and_variables() -> None:
    template = "{{ tools[0].function.name }}|{{ documents[0].text }}|{{ mood }}|{{ depth.level }}"
    with scripted("x", template) as (client, engine):
        body = {
            "documents": [{"title": "t", "text": "Act I"}],
            "chat_template_kwargs": {"mood": "sad", "depth": {"level": 2}},
        }
        ask(client, extra_body=body)
        assert bundled_tokenizer().decode(engine.calls[0].prompt) == "weather|Act I|sad|2"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "'f'.*weather, now"),
        ({"tools": [{"type": "custom"}]}, "tools", r"tools\[0\] is of type 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", r"tools\[0\].function.name is 'a b'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "twice"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools",
            "arguments are an object",
        ),
        ({"tools": [{"function": {"name": "f", "parameters": 3}}]}, "tools", "JSON schema"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(513)]}, "tools", "at most 512"),
        ({"thinking_token_budget": 3}, "thinking_token_budget", "needs a model"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "field of the request"),
        ({"tool_choice": "required", "beam_width": 2}, "beam_width", "beam search"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    with scripted("x") as (client, engine):
        body = {"tools": TOOLS, **fields}
        with pytest.raises(BadRequestError, match=message) as refused:
            client.chat.completions.create(model="scripted", messages=ASK, extra_body=body)
        assert refused.value.param == param
        assert not engine.calls


def test_a_schema_that_cannot_be_forced_is_a_400(forced: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {"required": ["a"]}}}}
    with pytest.raises(BadRequestError, match=r'tools: .*"not" cannot be enforced') as refused:
        ask(forced, model="quire-bundled", tools=[tool], tool_choice="required")
    assert refused.value.param == "tools"


def test_allowed_tools_limit_the_choice(forced: OpenAI) -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "now"}]},
    }
    reply = ask(forced, model="quire-bundled", tool_choice=choice, max_tokens=60, parallel_tool_calls=False)
    assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["now"]
