"""Bodies that are valid JSON of wrong shapes and depths: every endpoint answers with a success or a refusal."""

import json
from collections.abc import Iterator

import pytest

from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

USER = '[{"role": "user", "content": "x"}]'
CALL = '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": %s}]}]'
VALID = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": "2"},
    "/v1/chat/completions/render": {"messages": USER},
    "/tokenize": {"messages": USER},
    "/v1/responses": {"input": '"x"', "max_output_tokens": "2"},
    "/v1/messages": {"messages": USER, "max_tokens": "2"},
    "/v1/messages/count_tokens": {"messages": USER},
    "/api/chat": {"messages": USER, "model": '"alias"', "stream": "false"},
    "/v1/embeddings": {"input": '"x"'},
    "/api/embed": {"input": '"x"', "model": '"alias"'},
}
FIELDS = [
    "messages",
    "input",
    "tools",
    "tool_choice",
    "documents",
    "system",
    "text",
    "reasoning",
    "thinking",
    "include",
]
FIELDS += ["metadata", "output_config", "options", "format", "response_format", "chat_template_kwargs", "stop"]
LISTED = """
5 "x" [] {} [5] [{}] [{"type":5}] [{"type":null}] [{"type":"text"}] [{"type":"text","text":5}] {"format":5}
[{"type":"function_call","call_id":1}] [{"type":"reasoning","content":5}] [{"type":["x"]}] {"type":["x"]}
{"name":{}} [{"type":"reasoning","summary":[{"type":"summary_text"}]}] [{"role":5}] [{"role":["x"],"content":5}]
{"function":5} [{"role":"user","content":[{"type":["x"]}]}] [{"role":"user","content":[5]}]
[{"role":"user","content":null}] [{"role":"assistant","tool_calls":[5]}] [{"role":"assistant","tool_calls":[{}]}]
{"user_id":5} {"type":"function"} [{"role":"assistant","tool_calls":[{"function":5}]}]
[{"role":"assistant","tool_calls":[{"function":{"name":5}}]}]
[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":5}}]}] [{"role":"tool","content":"x"}]
[{"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":5}]}] [{"function":{"name":"f"}}]
[{"role":"user","content":[{"type":"tool_use","id":"1","name":"f","input":5}]}] [{"role":"assistant"}]
"""
SHAPES = LISTED.split()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


def send(server: RunningServer, path: str, fields: dict[str, str]) -> None:
    body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
    response, reply = server.send("POST", path, body.encode())
    assert response.status in (200, 400, 404), (path, body[:200], reply)


@pytest.mark.parametrize("path", VALID)
def test_wrong_shapes(server: RunningServer, path: str) -> None:
    for field in FIELDS:
        main = field in ("tools", "messages", "input", "tool_choice")
        if main or path in ("/v1/responses", "/v1/messages"):
            for shape in SHAPES if main else SHAPES[:12:2]:
                send(server, path, {**VALID[path], field: shape})


@pytest.mark.parametrize("depth", [100, 950, 1100, 100_000])
def test_depths(server: RunningServer, depth: int) -> None:
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        schema = f'{{"type": "object", "x": {deep}}}'
        tool = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
        for path, fields in (
            ("/v1/chat/completions", {"tools": tool}),
            ("/v1/chat/completions", {"messages": CALL % f'{{"name": "f", "arguments": {json.dumps(deep)}}}'}),
            ("/v1/chat/completions", {"messages": CALL % f'{{"name": "f", "arguments": {{"x": {deep}}}}}'}),
            ("/v1/chat/completions", {"chat_template_kwargs": f'{{"x": {deep}}}'}),
            ("/v1/chat/completions", {"guided_json": schema}),
            ("/v1/chat/completions", {"unknown": deep}),
            ("/v1/responses", {"input": f'[{{"role": "user", "content": "x", "y": {deep}}}]'}),
            ("/v1/messages", {"tools": f'[{{"name": "f", "input_schema": {schema}}}]'}),
            ("/v1/messages", {"messages": f'[{{"role": "user", "content": [{deep}]}}]'}),
            ("/api/chat", {"format": schema}),
        ):
            send(server, path, {**VALID[path], **fields})
