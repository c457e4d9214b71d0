"""Bodies: scalars as pydantic's lax mode reads them, and unknown fields."""

import logging
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from quire.server.anthropic.protocol import MessagesRequest
from quire.server.decoding import decode_json, nearest_field, unknown_fields
from quire.server.embeddings import EmbeddingsRequest
from quire.server.errors import Refusal
from quire.server.field_warnings import MAX_LOGGED, FieldWarnings
from quire.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from quire.server.responses.protocol import ResponsesRequest
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


class Oracle(BaseModel):
    """Fields of a completion as a server with pydantic declares them."""

    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool | None = None
    user: str | None = None
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None


SCALARS = ["5", '"5"', "5.0", '"5.0"', "5.5", '" 5 "', "true", "false", '"yes"', '"on"', '"f"', '"0"', "1", "0", "1.0"]
SCALARS += ["2", '"true"', '"x"', '""', "null", "[]", "{}", '"0.5"', "-1", "1e2", "[5]", '["5"]', '{"a": "5"}']


@pytest.mark.parametrize("field", Oracle.model_fields)
def test_scalars_are_read_as_by_pydantic(field: str) -> None:
    for text in SCALARS:
        body = f'{{"prompt": "x", "{field}": {text}}}'
        try:
            expected: Any = getattr(Oracle.model_validate_json(body), field)
        except ValidationError:
            expected = Refusal
        try:
            found: Any = getattr(decode_json(body.encode(), CompletionRequest), field)
        except Refusal:
            found = Refusal
        assert (found, type(found)) == (expected, type(expected)), (field, text)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", '"\\ud800"', '"\\udc00x"', "01", "'x'", "[" * 100_000 + "]" * 100_000]
)
def test_what_is_no_json_is_refused(value: str) -> None:
    for field in ("prompt", "temperature", "unknown"):
        with pytest.raises(Refusal):
            decode_json(f'{{"prompt": "x", "{field}": {value}}}'.encode(), CompletionRequest)


def test_pydantic_takes_words_for_numbers_that_are_none(server: RunningServer) -> None:
    assert TypeAdapter(float).validate_python("nan") != 0
    for value in ("nan", "inf", "-Infinity"):
        response, reply = server.send("POST", "/v1/completions", {"prompt": "x", "temperature": value})
        assert response.status == 400
        assert reply["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": "5"},
        {"max_tokens": 5.0, "temperature": "0.5"},
        {"logprobs": 1},
        {"logprobs": "true", "top_logprobs": "2"},
        {"stop": ""},
        {"stop": None},
        {"stream": "no"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}, {"role": "user", "content": "y"}]},
    ],
)
def test_lenient_chats(server: RunningServer, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "x"}]
    response, reply = server.send("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 3, **fields})
    assert response.status == 200, reply


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"max_token": 3}, ["max_token"]),
        ({"max_token": None}, []),
        ({"stream_options": {"include_use": True}}, ["stream_options.include_use"]),
        ({"response_format": {"type": "text", "json": {"a": {"b": 1}}}}, ["response_format.json"]),
        ({"guided_json": {"type": "object"}}, []),
        ({"structured_outputs": None, "store": True, "metadata": {"a": "b"}}, []),
        ({f"field{i}": 1 for i in range(50)}, [f"field{i}" for i in range(8)]),
        ({"x" * 500: 1}, ["x" * 64]),
    ],
)
def test_unknown_fields(fields: dict[str, Any], found: list[str]) -> None:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], **fields})
    decode_json(body, ChatCompletionRequest)
    assert unknown_fields(body, ChatCompletionRequest) == found


def test_unknown_fields_are_named_once_in_the_log_and_always_in_a_header(
    server: RunningServer, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "quire.server"):
        for _ in range(3):
            response, _ = server.send("POST", "/v1/completions", {"prompt": "x", "max_token": 3, "é\n": 1})
            assert response.status == 200
            assert response.headers["x-quire-warning"] == (
                "unknown field 'max_token' is ignored, the nearest known is max_tokens; "
                "unknown field '\\xe9\\n' is ignored"
            )
    assert len(caplog.records) == 2
    response, _ = server.send("POST", "/v1/completions", {"prompt": "x"})
    assert response.headers["x-quire-warning"] is None


def test_the_log_of_unknown_fields_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    warnings = FieldWarnings()
    with caplog.at_level(logging.WARNING, "quire.server"):
        for number in range(MAX_LOGGED + 10):
            warnings.log("/v1/completions", FieldWarnings.describe(CompletionRequest, [f"name{number}"]))
    assert len(caplog.records) == MAX_LOGGED


def test_nearest_fields() -> None:
    for wrong, right in (
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("maxTokens", "max_tokens"),
        ("zzz", None),
        ("n_predict", "max_tokens"),
        ("repeat_penalty", "repetition_penalty"),
        ("grammar", "structured_outputs"),
        ("response_format.jsonschema", "response_format.json_schema"),
        ("stream_options.include_use", "stream_options.include_usage"),
        ("stream_options.zzz", None),
        ("no.such.path", None),
        ("a[0].b", None),
    ):
        assert nearest_field(wrong, CompletionRequest) == right
    assert nearest_field("enable_thinking", ChatCompletionRequest) == "chat_template_kwargs"
    assert nearest_field("max_tokens", ResponsesRequest) == "max_output_tokens"
    assert nearest_field("stop", MessagesRequest) == "stop_sequences"


@pytest.mark.parametrize(
    ("body", "kind", "name", "said"),
    [
        ("{}", ChatCompletionRequest, "messages", "messages is missing"),
        ('{"messages": [{}]}', ChatCompletionRequest, "messages[0].role", "messages[0].role is missing"),
        ('{"truncation": "x"}', ResponsesRequest, "truncation", "Invalid enum value 'x'; there is auto, disabled"),
        ('{"input": "x", "encoding_format": "x"}', EmbeddingsRequest, "encoding_format", "; there is base64, float"),
        ('{"tokens": [5, true]}', DetokenizeRequest, "tokens[1]", "tokens[1]: Expected `int`, got `bool`"),
        ('{"input": [[false]]}', EmbeddingsRequest, "input[0][0]", "got `bool`"),
    ],
)
def test_refusals_name_the_field_and_what_it_takes(body: str, kind: type, name: str, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        decode_json(body.encode(), kind)
    assert caught.value.param == name
    assert said in caught.value.message


@pytest.mark.parametrize(("given", "meant"), [("true", 1), ("false", None), ("0", 0), ("3", 3), ("null", None)])
def test_logprobs_of_completions_may_be_those_of_chats(given: str, meant: int | None) -> None:
    request = decode_json(f'{{"prompt": "x", "logprobs": {given}}}'.encode(), CompletionRequest)
    assert request.logprobs is meant if meant is None else (request.logprobs, type(request.logprobs)) == (meant, int)
