"""Namespaces of tools in /v1/responses, as Codex sends them."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine, bundled_tokenizer

CALLING = '<tool_call>{"name": "agents.wait", "arguments": {"id": 1}}</tool_call>'
FUNCTION = {"type": "function", "name": "wait", "parameters": {"type": "object", "properties": {"id": {}}}}
NAMESPACE: dict[str, Any] = {"type": "namespace", "name": "agents", "description": "Others", "tools": [FUNCTION]}


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    engine.answer = CALLING
    with RunningServer(engine, ServerSettings(port=0, tool_call_parser="hermes")) as running:
        yield running


def test_a_call_tells_name_and_namespace(server: RunningServer, engine: ScriptedEngine) -> None:
    client = server.client()
    asked: Any = {"model": "scripted", "input": "x", "tools": [NAMESPACE]}
    with client.responses.stream(**asked) as events:
        seen = list(events)
        (call,) = events.get_final_response().output
    assert (call.namespace, call.name, call.arguments) == ("agents", "wait", '{"id": 1}')
    (done,) = [event for event in seen if event.type == "response.function_call_arguments.done"]
    assert done.name == "wait"
    history = [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "late"}]
    client.responses.create(model="scripted", input=history, tools=[NAMESPACE])  # type: ignore[list-item]  # dicts
    prompt = bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False)
    assert prompt.count('"name": "agents.wait"') == 2


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ({**NAMESPACE, "tools": None}, r"tools\[0\] is a namespace; it needs a name and a list"),
        ({**NAMESPACE, "name": 5}, r"tools\[0\] is a namespace; it needs a name and a list"),
        ({**NAMESPACE, "tools": [{"type": "custom", "name": "x"}]}, r"tools\[0\].tools\[0\] is of type 'custom'"),
        ({"type": "custom", "name": "x"}, r"tools\[0\] is of type 'custom'; function and namespace are supported"),
    ],
)
def test_refusals_name_the_place(server: RunningServer, tool: Any, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        server.client().responses.create(model="scripted", input="x", tools=[tool])
