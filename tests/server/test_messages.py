"""Anthropic's /v1/messages and count_tokens through the anthropic client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, BadRequestError

from quire.errors import EngineUnavailableError
from quire.server import streaming
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer

NUM_TOKENS = len(bundled_tokenizer().encode(ANSWER, add_special_tokens=False))
CALLING = '<think>Hm.</think>Let me look.<tool_call>{"name": "f", "arguments": {"a": [1, "e"]}}</tool_call>'
TOOLS: Any = [{"name": "f", "description": "Look", "input_schema": {"type": "object", "properties": {"a": {}}}}]
HELLO: Any = [{"role": "user", "content": "Who goes there?"}]


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, tool_call_parser="hermes", reasoning_parser="qwen3")
    with RunningServer(engine, settings) as running:
        yield running


@pytest.fixture
def claude(server: RunningServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def prompt_text(engine: ScriptedEngine) -> str:
    return bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False)


def create(claude: Anthropic, **fields: Any) -> Any:
    return claude.messages.create(**{"model": "scripted", "max_tokens": 100, "messages": HELLO, **fields})


def test_answers(claude: Anthropic, engine: ScriptedEngine) -> None:
    message = create(
        claude, system="Be brief.", extra_body={"temperature": 0.5, "top_k": 3}, metadata={"user_id": "u" * 300}
    )
    assert [block.text for block in message.content] == [ANSWER]
    assert (message.type, message.role, message.model) == ("message", "assistant", "scripted")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == NUM_TOKENS
    assert message.usage.cache_read_input_tokens == 2
    assert message.usage.input_tokens + 2 == len(engine.calls[0].prompt)
    params = engine.calls[0].params
    assert (params.max_tokens, params.temperature, params.top_k) == (100, 0.5, 3)
    assert engine.calls[0].tenant == "u" * 256
    assert "<|system|>Be brief." in prompt_text(engine)


def test_system_blocks_and_what_changes_in_each_request(claude: Anthropic, engine: ScriptedEngine) -> None:
    system = ["x-anthropic-billing-header: cc_version=1; cch=abc;", "You are a ghost.", "Boo."]
    blocks = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in system]
    create(claude, system=blocks)
    assert "<|system|>You are a ghost.\nBoo." in prompt_text(engine)
    assert "billing" not in prompt_text(engine)


@pytest.mark.parametrize(
    ("fields", "answer", "reason", "sequence"),
    [
        ({}, ANSWER, "end_turn", None),
        ({"max_tokens": 3}, ANSWER, "max_tokens", None),
        ({"max_tokens": 100_000}, ANSWER * 20, "model_context_window_exceeded", None),
        ({"stop_sequences": ["question"]}, ANSWER, "stop_sequence", "question"),
        ({"tools": TOOLS}, CALLING, "tool_use", None),
    ],
)
def test_stop_reasons(
    claude: Anthropic, engine: ScriptedEngine, fields: Any, answer: str, reason: str, sequence: str | None
) -> None:
    engine.answer, engine.stops_at = answer, sequence
    whole = create(claude, **fields)
    assert (whole.stop_reason, whole.stop_sequence) == (reason, sequence)
    with claude.messages.stream(**{"model": "scripted", "max_tokens": 100, "messages": HELLO, **fields}) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == (reason, sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens == 2
    assert [block.model_dump() for block in final.content if block.type == "text"] == [
        block.model_dump() for block in whole.content if block.type == "text"
    ]


def test_thinking_text_and_a_call(claude: Anthropic, engine: ScriptedEngine) -> None:
    engine.answer = CALLING
    asked: Any = {"tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 50}}
    thinking, text, call = create(claude, **asked).content
    assert thinking.thinking == "Hm."
    assert text.text == "Let me look."
    assert (call.name, call.input) == ("f", {"a": [1, "e"]})
    events = list(create(claude, **asked, stream=True))
    names = [event.type for event in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    starts = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]
    given = "".join(
        e.delta.partial_json for e in events if getattr(e, "delta", None) and hasattr(e.delta, "partial_json")
    )
    assert json.loads(given) == {"a": [1, "e"]}


def test_a_conversation_with_results_of_tools(claude: Anthropic, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": "there"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "A ghost"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    create(claude, messages=messages, tools=TOOLS)
    text = prompt_text(engine)
    for part in ("Look\nthere", "I look.", '"a": 1', "A ghost", "And now?"):
        assert part in text
    assert text.index("A ghost") < text.index("And now?")


@pytest.mark.parametrize("kind", ["auto", "any", "none", "tool"])
def test_tool_choice(claude: Anthropic, engine: ScriptedEngine, kind: str) -> None:
    engine.answer = CALLING
    choice = {"type": kind, **({"name": "f"} if kind == "tool" else {}), "disable_parallel_tool_use": True}
    message = create(claude, tools=TOOLS, tool_choice=choice)
    constraint = engine.calls[-1].params.structured_outputs
    assert (constraint is not None) == (kind in ("any", "tool"))
    assert (message.stop_reason == "tool_use") == (kind != "none")


def test_count_tokens(claude: Anthropic, engine: ScriptedEngine) -> None:
    asked: Any = {"model": "scripted", "system": [{"type": "text", "text": "Be brief."}], "messages": HELLO}
    count = claude.messages.count_tokens(**asked).input_tokens
    claude.messages.create(**asked, max_tokens=1)
    assert count == len(engine.calls[-1].prompt)
    more = claude.messages.count_tokens(**asked, tools=TOOLS).input_tokens
    assert more > count
    long: Any = [{"role": "user", "content": "word " * 1000}]
    assert claude.messages.count_tokens(model="scripted", messages=long).input_tokens > engine.max_model_len


def test_errors_have_anthropics_form(server: RunningServer, claude: Anthropic, engine: ScriptedEngine) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(claude, model="claude")
    body: Any = missing.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"
    assert body["request_id"]
    with pytest.raises(BadRequestError, match="prompt is too long"):
        create(claude, messages=[{"role": "user", "content": "word " * 1000}])
    engine.full = True
    with pytest.raises(anthropic.RateLimitError):
        create(claude)
    engine.full, engine.raises = False, EngineUnavailableError("the engine is being restarted")
    with pytest.raises(anthropic.APIStatusError) as overloaded:
        create(claude)
    assert overloaded.value.status_code == 529
    response, reply = server.send("GET", "/v1/messages")
    assert (response.status, reply["type"]) == (405, "error")
    engine.raises_at = 3
    with pytest.raises(anthropic.APIStatusError, match="restarted"):
        list(create(claude, stream=True))


def test_keys(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, api_key=("secret",))) as server:
        for key, status in (("secret", 200), ("wrong", 401)):
            headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
            body = {"model": "scripted", "max_tokens": 2, "messages": HELLO}
            response, reply = server.send("POST", "/v1/messages?beta=true", body, headers)
            assert response.status == status
        assert reply["error"]["type"] == "authentication_error"


def test_pings_fill_silence(server: RunningServer, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.05)
    engine.answer, engine.delay = "one two", 0.3
    body = {"model": "scripted", "max_tokens": 3, "messages": HELLO, "stream": True}
    _, text = server.send("POST", "/v1/messages", body)
    events = [event.split("\n")[0] for event in text.split("\n\n")]
    assert events[:2] == ["event: message_start", "event: ping"]
    assert events.count("event: ping") > 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "source is neither"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"name": "x", "type": "bash_20250124"}]}, "tools[0] is of type 'bash_20250124'"),
        ({"tools": TOOLS, "tool_choice": {"type": "maybe"}}, "tool_choice.type is 'maybe'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"thinking": {"type": "loud"}}, "thinking.type is 'loud'"),
        ({"stop_sequences": ["x"] * 100}, "stop_sequences holds 100"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not available"),
        ({"temperature": 5e9}, "temperature"),
    ],
)
def test_refuses_by_name(server: RunningServer, engine: ScriptedEngine, fields: dict[str, Any], said: str) -> None:
    for stream in (False, True):
        body = {"model": "scripted", "max_tokens": 5, "messages": HELLO, "stream": stream, **fields}
        response, reply = server.send("POST", "/v1/messages", body)
        assert response.status == 400
        assert reply["error"]["type"] == "invalid_request_error"
        assert said in reply["error"]["message"]
    assert engine.calls == []


def test_tools_that_run_elsewhere_are_left_out_with_a_warning(server: RunningServer) -> None:
    body = {"max_tokens": 3, "messages": HELLO, "tool_choice": {"type": "auto"}}
    body["tools"] = [{"type": "web_search_20250305", "name": "web_search"}]
    response, _ = server.send("POST", "/v1/messages", body)
    assert response.status == 200
    assert "web_search_20250305 run on Anthropic" in response.headers["x-quire-warning"]
