"""Requests found by trying every field of each endpoint with values it may be given: what is answered, what is said."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_published_requests import CHAT, DEFAULTS, MESSAGES, OLLAMA, RESPONSES, USER, items

COMPLETIONS, GENERATE, EMBEDDINGS = "/v1/completions", "/api/generate", "/v1/embeddings"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CUSTOM = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}
BATCH = {"input_file_id": "f", "endpoint": CHAT, "completion_window": "24h"}
FIELDS: dict[str, dict[str, Any]] = {**DEFAULTS, "/v1/batches": BATCH, "/tokenize": {}, "/v1/score": {}}

ANSWERED: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [{"role": "developer", "content": "x"}, USER]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [USER, {"role": "assistant", "content": None, "audio": {"id": "a"}}, USER]},
        {"modalities": ["text"], "prediction": {"type": "content", "content": "x"}, "service_tier": "flex"},
        {"reasoning_effort": "none", "verbosity": "low", "store": True, "metadata": {"a": "b"}},
        {"seed": 2**63, "n": 3, "stream": True},
        {"stream": "yes", "parallel_tool_calls": False, "cache_salt": "", "documents": [{"text": 5}]},
        {"max_tokens": 6, "max_completion_tokens": 5, "stop": ["a"] * 5, "vllm_xargs": {"a": 1}},
    ],
    COMPLETIONS: [
        {"prompt": [[1], [2]]},
        {"logprobs": True, "best_of": 3},
        {"n": 2, "temperature": 0, "length_penalty": 1.0, "suffix": ""},
        {"use_beam_search": True, "n": 2, "max_tokens": 3},
        {"truncate_prompt_tokens": -1, "add_special_tokens": False, "skip_special_tokens": False},
    ],
    RESPONSES: [
        items({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]}),
        {"background": True, "stream": True},
        {"include": ["reasoning.encrypted_content"], "max_tool_calls": 0, "truncation": "auto"},
        {"reasoning": {"effort": "high", "summary": "auto"}, "text": {"verbosity": "low"}, "top_logprobs": 3},
        {"tools": [{"type": "function", "name": "f"}], "stream_options": {"include_obfuscation": True}},
    ],
    MESSAGES: [
        {"max_tokens": "5", "messages": [USER, USER]},
        {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}, "context_management": {"edits": []}},
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "none"}},
    ],
    OLLAMA: [
        {"messages": None},
        {"messages": [{"role": "tool", "content": "x", "tool_name": "f"}]},
        {"format": "", "think": "high", "keep_alive": "1h30m", "tools": []},
        {"options": {"stop": "x", "num_predict": -2, "num_ctx": 10**9, "mirostat": 1}, "keep_alive": "-1"},
        {"model": "alias:latest", "logprobs": True, "top_logprobs": 3, "truncate": False, "shift": False},
    ],
    GENERATE: [
        {"prompt": None},
        {"raw": True, "images": [], "keep_alive": 0.5, "format": {"type": "integer"}},
    ],
    EMBEDDINGS: [{"input": [[1], [2]]}, {"encoding_format": "base64", "truncate_prompt_tokens": 1, "normalize": False}],
}
REFUSED: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {"messages": []}, "messages: Expected `array` of length >= 1", "messages"),
    (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [CUSTOM]}]}, "tool_calls[0].function", "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio'", "messages"),
    (CHAT, {"audio": {"voice": "alloy"}}, "audio is not available", "audio"),
    (CHAT, {"functions": [{"name": "f"}]}, "send tools", "functions"),
    (CHAT, {"tools": [TOOL, TOOL]}, "'f' twice", "tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "any"}, "none, auto, required", "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "there are no tools", "tool_choice"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "exclude", "continue_final_message"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias of token 1 is 101.0", "logit_bias"),
    (CHAT, {"max_tokens": 5, "min_tokens": 10}, "more than max_tokens 5", "min_tokens"),
    (COMPLETIONS, {"prompt": ["a", [1]]}, "prompt mixes", "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt is an empty list", "prompt"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, "less than n 2", "best_of"),
    (COMPLETIONS, {"stream": True, "best_of": 3}, "cannot be streamed", "best_of"),
    (COMPLETIONS, {"prompt_embeds": "x"}, "prompt_embeds is not available", "prompt_embeds"),
    (RESPONSES, {"input": ["x"]}, "input[0]: Expected `object`", "input[0]"),
    (RESPONSES, items({"type": "custom_tool_call", "call_id": "c"}), "'custom_tool_call'", "input"),
    (RESPONSES, {"previous_response_id": "resp_x"}, "not kept here", "previous_response_id"),
    (RESPONSES, {"background": True, "store": False}, "background needs store", "background"),
    (RESPONSES, {"tool_choice": {"type": "function", "name": "g"}}, "tool_choice names a tool and", "tool_choice"),
    (RESPONSES, {"prompt": {"id": "pmpt_1"}}, "prompt is not available", "prompt"),
    (MESSAGES, {"max_tokens": None}, "max_tokens: Expected `int`", None),
    (MESSAGES, {"tool_choice": "auto"}, "tool_choice: Expected `object", None),
    (MESSAGES, {"mcp_servers": [{"type": "url"}]}, "mcp_servers is not available", None),
    (MESSAGES, {"thinking": {"type": "x"}}, "enabled, adaptive, disabled", None),
    (OLLAMA, {"format": "xml"}, "format is 'xml'", None),
    (OLLAMA, {"keep_alive": "soon"}, "keep_alive is 'soon'; it is seconds as a number, or a duration such as 5m", None),
    (OLLAMA, {"options": {"temperature": "x"}}, "options.temperature", None),
    (GENERATE, {"context": [1]}, "context is not available", None),
    (EMBEDDINGS, {"input": ["a", 5]}, "input mixes", "input"),
    (EMBEDDINGS, {"input": ["x"] * 2049}, "at most 2048", "input"),
    (EMBEDDINGS, {"dimensions": 0}, "dimensions is 0", "dimensions"),
    ("/v1/batches", {}, "there is no file 'f'", "input_file_id"),
    ("/v1/batches", {"completion_window": 24}, "completion_window: Expected `str`", "completion_window"),
    ("/v1/batches", {"output_expires_after": {}}, "anchor is missing", "output_expires_after.anchor"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, "either prompt or messages", "prompt"),
    ("/v1/score", {"data_1": "a"}, "none of data_2", "data_2"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("batches")
    settings = ServerSettings(port=0, tool_call_parser="hermes", reasoning_parser="qwen3", batch_dir=str(folder))
    with RunningServer(ScriptedEngine(), settings) as running:
        yield running


@pytest.mark.parametrize("path", ANSWERED)
def test_is_answered(server: RunningServer, path: str) -> None:
    for fields in ANSWERED[path]:
        response, reply = server.send("POST", path, {**FIELDS[path], **fields})
        assert response.status == 200, (fields, reply)
        assert response.headers["x-quire-warning"] is None, fields


@pytest.mark.parametrize(("path", "fields", "reason", "param"), REFUSED)
def test_is_refused_by_name(
    server: RunningServer, path: str, fields: dict[str, Any], reason: str, param: str | None
) -> None:
    response, reply = server.send("POST", path, {**FIELDS[path], **fields})
    assert response.status in (400, 404), reply
    error = reply["error"]
    message = error if isinstance(error, str) else error["message"]
    assert reason in message, message
    assert param is None or error["param"] == param, json.dumps(error)


def test_what_is_ignored_is_named(server: RunningServer) -> None:
    for path, fields, name in (
        (RESPONSES, {"include": ["nope", "nope"]}, "include holds 'nope', which is ignored"),
        (CHAT, {"web_search_options": {}}, "unknown field 'web_search_options' is ignored"),
        (OLLAMA, {"options": {"nope": 1}}, "unknown field 'options.nope' is ignored"),
    ):
        response, reply = server.send("POST", path, {**FIELDS[path], **fields})
        assert response.status == 200, reply
        assert response.headers["x-quire-warning"] == name
