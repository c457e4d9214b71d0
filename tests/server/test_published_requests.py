"""Requests that the public references of OpenAI, Anthropic and Ollama show, and their near misses, by endpoint."""

from collections.abc import Iterator
from typing import Any

import pytest

from quire.engine.chat_template import ChatTemplate
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, LocalTemplate, ScriptedEngine, bundled_tokenizer

CHAT, RESPONSES, MESSAGES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"
USER = {"role": "user", "content": "Who?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]}
DEFAULTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    CHAT: {"messages": [USER]},
    RESPONSES: {"input": "x"},
    MESSAGES: {"messages": [USER], "max_tokens": 5},
    OLLAMA: {"messages": [USER], "model": "alias", "stream": False},
    "/api/generate": {"prompt": "x", "model": "alias", "stream": False},
    "/v1/embeddings": {"input": "x"},
}


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, tool_call_parser="hermes", reasoning_parser="qwen3")
    with RunningServer(engine, settings) as running:
        yield running


def send(server: RunningServer, path: str, fields: dict[str, Any]) -> tuple[int, str, str]:
    """The status, the error's message and the warning."""
    response, reply = server.send("POST", path, {**DEFAULTS[path], **fields})
    error = reply["error"] if response.status != 200 else ""
    return response.status, error["message"] if isinstance(error, dict) else error, response.headers["x-quire-warning"]


def said(*content: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": list(content)}, USER]}


def items(*given: Any) -> dict[str, Any]:
    return {"input": [USER, *given]}


def asked(block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


def result(block: Any) -> dict[str, Any]:
    content = [{"type": "tool_result", "tool_use_id": "t", "content": [block]}]
    return {"messages": [USER, USE, {"role": "user", "content": content}]}


TEXT = {"type": "text", "text": "Birnam"}
DOCUMENT = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Birnam"}]}}
FOUND = {"type": "search_result", "title": "Birnam", "source": "s", "content": [{"type": "text", "text": "wood"}]}
SEEN: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, said({"type": "refusal", "refusal": "Birnam"}), "Birnam"),
    (CHAT, said({"type": "output_text", "text": "Birnam", "annotations": []}), "Birnam"),
    (CHAT, said({"type": "thinking", "thinking": "no"}, TEXT), "Birnam"),
    (
        CHAT,
        said({"type": "thinking", "thinking": [{"type": "text", "text": "no"}]}, {"type": "text", "text": "a"}),
        "a",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Birnam"}]}]}, "Birnam"),
    (CHAT, {"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "Who?"),
    (RESPONSES, items({"type": "web_search_call", "id": "w", "status": "completed", "action": {}}), "Who?"),
    (RESPONSES, items({"type": "mcp_list_tools", "id": "m", "tools": [], "server_label": "s"}), "Who?"),
    (RESPONSES, items({"type": "code_interpreter_call", "id": "m", "code": "1", "outputs": []}), "Who?"),
    (MESSAGES, asked(DOCUMENT), "Birnam"),
    (MESSAGES, asked({**DOCUMENT, "source": {"type": "content", "content": "Birnam"}}), "Birnam"),
    (MESSAGES, asked(FOUND), "Birnam\ns\nwood"),
    (MESSAGES, result(FOUND), "Birnam\ns\nwood"),
    (MESSAGES, said({"type": "compaction", "content": "Birnam"}), "Birnam"),
    (MESSAGES, said({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}), "Who?"),
    (MESSAGES, said({"type": "web_search_tool_result", "tool_use_id": "s", "content": []}), "Who?"),
    (MESSAGES, said({"type": "mcp_tool_use", "id": "s", "name": "w", "server_name": "s", "input": {}}), "Who?"),
    (MESSAGES, {"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}, "Who?"),
    (OLLAMA, {"messages": [{"role": "system", "content": None}, USER]}, "Who?"),
    (OLLAMA, {"messages": [{"role": "system"}, USER]}, "Who?"),
]


@pytest.mark.parametrize(("path", "fields", "shown"), SEEN)
def test_is_answered(
    server: RunningServer, engine: ScriptedEngine, path: str, fields: dict[str, Any], shown: str
) -> None:
    status, error, _ = send(server, path, fields)
    assert status == 200, error
    prompt = bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False)
    assert shown in prompt
    assert ">no" not in prompt  # thoughts are no text


NAMES = ("self", "messages_", "loop", "range", "caller", "tojson", "quire_budget", "__class__", "", "a b", "é", "0")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [2, None, [1], {"a": {}}])
def test_a_variable_of_a_template_may_have_any_name(server: RunningServer, name: str, value: Any) -> None:
    assert send(server, CHAT, {"chat_template_kwargs": {name: value}})[0] == 200


def test_a_template_whose_functions_are_hidden_is_refused(server: RunningServer) -> None:
    status, error, _ = send(server, CHAT, {"chat_template_kwargs": {"bos_token": {"a": 1}, "namespace": 2}})
    assert status in (200, 400), error


TOOLS = [{"name": "f", "parameters": []}]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, said({"type": "refusal"}), "messages[1].content has a part of type 'refusal' without a refusal"),
    (CHAT, said({"type": "input_text", "text": None}), "part of type 'input_text' without a text"),
    (CHAT, said({"type": ["text"]}), "messages[1].content has a part of type ['text']"),
    (RESPONSES, items({"type": "function_call", "name": "f", "arguments": {}}), "call_id and arguments as text"),
    (RESPONSES, items({"type": "function_call_output", "output": "x"}), "function_call_output without call_id"),
    (RESPONSES, items({"content": "x"}), "input[1] is a message without role"),
    (RESPONSES, items({"role": "user", "content": [{"type": "input_text", "text": None}]}), "without a text"),
    (RESPONSES, items({"type": "local_shell_call", "id": "l"}), "supported are message"),
    (RESPONSES, items({"type": "item_reference", "id": "msg_1"}), "refers to the item 'msg_1'"),
    (RESPONSES, items({"id": "msg_" + "0" * 32}), "refers to the item"),
    (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "needs text.format.name and text.format.schema"),
    (RESPONSES, {"truncation": "maybe"}, "truncation: Invalid enum value 'maybe'; there is auto, disabled"),
    (RESPONSES, {"tools": [{"type": "function", **tool} for tool in TOOLS]}, "tools[0].parameters is []"),
    (MESSAGES, asked({"type": "text"}), "messages[0].content[0] is a block of type 'text' without text"),
    (MESSAGES, asked({"type": "tool_result"}), "'tool_result' without tool_use_id"),
    (MESSAGES, asked({"type": "tool_use", "id": "t", "name": "f"}), "and input as an object"),
    (MESSAGES, asked({"type": "document", "source": {"type": "url", "url": "x"}}), "document whose source is no text"),
    (MESSAGES, asked({"type": "container_upload", "file_id": "f"}), "'container_upload'; supported are text"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice.type is 'any' and there are no tools"),
    (MESSAGES, {"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.type is 'tool' and there are no tools"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema describes"),
    (MESSAGES, {"tools": [{"input_schema": {}}]}, "tools[0].name is ''"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1"),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format is of type 'json_schema'"),
    (MESSAGES, {"output_config": {"format": {"type": "xml"}}}, "output_config.format is of type 'xml'"),
]


@pytest.mark.parametrize(("path", "fields", "reason"), REFUSED)
def test_is_refused_in_words_of_the_request(
    server: RunningServer, path: str, fields: dict[str, Any], reason: str
) -> None:
    status, error, _ = send(server, path, fields)
    assert (status, reason in error) == (400, True), error


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/completions", "prompt"),
        (CHAT, "messages"),
        (RESPONSES, "input"),
        (MESSAGES, "messages"),
        ("/v1/messages/count_tokens", "messages"),
        (OLLAMA, "model"),
        ("/v1/embeddings", "input"),
        ("/v1/rerank", "query"),
        ("/detokenize", "tokens"),
    ],
)
def test_a_missing_field_is_named(server: RunningServer, path: str, name: str) -> None:
    response, reply = server.send("POST", path, {})
    error = reply["error"]
    message = error if isinstance(error, str) else error["message"]
    assert (response.status, message.split()[:2]) == (400, [name, "is"])
    assert path in (OLLAMA, MESSAGES, "/v1/messages/count_tokens") or error["param"] == name


def test_hosted_calls_are_named_in_a_warning(server: RunningServer) -> None:
    search = {"type": "web_search_call", "id": "w"}
    assert send(server, RESPONSES, items(search))[2] == "web_search_call run on OpenAI's servers; they are left out"
    use = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    assert "server_tool_use run on Anthropic's servers" in send(server, MESSAGES, said(use))[2]


@pytest.mark.parametrize(
    "kind", ["web_search_\r\nset-cookie: a=b", "web_search_\n", "web_search_é\x00", "web_search_" * 999]
)
def test_words_of_a_client_in_a_warning_begin_no_header(server: RunningServer, kind: str) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (MESSAGES, {"tools": [{"type": kind, "name": "w"}]}),
        (MESSAGES, said({"type": f"{kind}_tool_result", "tool_use_id": "s"})),
        (RESPONSES, {"tools": [{"type": kind}]}),
        (RESPONSES, items({"type": kind})),
    ]
    for path, fields in asked:
        response, reply = server.send("POST", path, {**DEFAULTS[path], **fields})
        assert response.status == 200, reply
        assert response.headers["set-cookie"] is None
        assert response.headers["x-quire-warning"].startswith("web_search_")
        assert len(response.headers["x-quire-warning"]) <= 400


def test_an_assistants_text_at_the_end_is_continued(server: RunningServer, engine: ScriptedEngine) -> None:
    for content in ("Birnam", [{"type": "text", "text": "Birnam"}]):
        assert send(server, MESSAGES, {"messages": [USER, {"role": "assistant", "content": content}]})[0] == 200
        assert bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False).endswith("Birnam")
    assert send(server, MESSAGES, {"messages": [USER, USE]})[0] == 200
    assert not bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False).endswith("f")


def test_a_template_that_cannot_continue_a_text_begins_a_turn() -> None:
    hides = ChatTemplate({"default": "{% for m in messages %}{{ m.content | length }}{% endfor %} ROMEO:"}, {})
    with RunningServer(ScriptedEngine(chat_template=LocalTemplate(hides))) as server:
        fields = {"messages": [USER, {"role": "assistant", "content": "Birnam"}]}
        assert send(server, MESSAGES, fields)[0] == 200
        assert server.send("POST", f"{MESSAGES}/count_tokens", fields)[0].status == 200


def test_items_of_a_response_may_be_referred_to(server: RunningServer, engine: ScriptedEngine) -> None:
    _, first = server.send("POST", RESPONSES, {"input": "Who?"})
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    for given in (reference, {"id": reference["id"]}, {**reference, "type": None}):
        response, second = server.send("POST", RESPONSES, items(given, USER))
        assert response.status == 200, second
        prompt = bundled_tokenizer().decode(engine.calls[-1].prompt)
        assert prompt.count(ANSWER) == 1
        assert prompt.count("Who?") == 2
    _, listed = server.send("GET", f"{RESPONSES}/{second['id']}/input_items?order=asc")
    assert [item["type"] for item in listed["data"]] == ["message"] * 3


def test_input_tokens_are_those_of_the_response(server: RunningServer) -> None:
    body = {"input": [USER], "instructions": "Be brief."}
    _, counted = server.send("POST", f"{RESPONSES}/input_tokens", body)
    _, response = server.send("POST", RESPONSES, body)
    assert counted == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/batches", "GET, HEAD, POST"),
        ("/v1/files/f", "DELETE, GET, HEAD"),
        ("/v1/responses/r", "DELETE, GET, HEAD"),
        (CHAT, "POST"),
        ("/health", "GET, HEAD"),
    ],
)
def test_all_methods_of_a_path_are_named(server: RunningServer, path: str, methods: str) -> None:
    for method in ("OPTIONS", "PATCH"):
        response, reply = server.send(method, path)
        assert (response.status, response.headers["allow"]) == (405, methods)
        assert methods in reply["error"]["message"]


@pytest.mark.parametrize("path", [*DEFAULTS])
def test_a_slash_at_the_end_changes_nothing(server: RunningServer, path: str) -> None:
    for slashes in ("/", "//"):
        response, reply = server.send("POST", f"{path}{slashes}?a=b", DEFAULTS[path])
        assert response.status == 200, reply
    assert server.send("GET", "/v1/models/")[1]["object"] == "list"


def test_commands_of_ollamas_documentation(server: RunningServer) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # curl -d
    for path, fields in DEFAULTS.items():
        response, reply = server.send("POST", path, {**fields, "stream": False}, form)
        assert response.status == 200, reply
    assert server.send("POST", "/api/generate", b"model=x&prompt=y", form)[0].status == 400
