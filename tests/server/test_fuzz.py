"""Any JSON body gets a success or a refusal with its reason, never a server error."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields

from quire.server.anthropic.protocol import MessagesRequest
from quire.server.embeddings import EmbeddingsRequest
from quire.server.infill import InfillRequest
from quire.server.ollama import protocol as ollama
from quire.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from quire.server.responses.protocol import ResponsesRequest
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

FORMS: dict[str, tuple[type[Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "x"}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
    "/v1/responses": (ResponsesRequest, {"input": "x"}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    "/v1/embeddings": (EmbeddingsRequest, {"input": "x"}),
    "/api/chat": (ollama.ChatRequest, {"messages": [{"role": "user", "content": "x"}], "model": "alias"}),
    "/api/generate": (ollama.GenerateRequest, {"prompt": "x", "model": "alias"}),
    "/api/embed": (ollama.EmbedRequest, {"input": "x", "model": "alias"}),
    "/infill": (InfillRequest, {"input_prefix": "x", "input_suffix": "y"}),
}
EDGES = st.sampled_from(
    [0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "x", "\x00", "é🎭", True, None]
)
VALUES = st.recursive(
    EDGES | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


@pytest.mark.parametrize("path", FORMS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_body_is_a_fault(fuzzed: RunningServer, path: str, data: st.DataObject) -> None:
    form, valid = FORMS[path]
    names = st.sampled_from([field.name for field in fields(form)])
    changes: dict[str, Any] = data.draw(st.dictionaries(names, VALUES, max_size=3))
    response, reply = fuzzed.send("POST", path, {**valid, **changes})
    assert response.status in (200, 400, 404), reply
    if response.status != 200:
        error = reply["error"]
        assert error if path.startswith("/api/") else error["message"]
        assert path.startswith("/api/") or error["type"] in ("invalid_request_error", "not_found_error")
