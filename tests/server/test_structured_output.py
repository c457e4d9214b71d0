"""Structured output through the real client: OpenAI's field, vLLM's fields, and grammars that are refused."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from tests.server.running_server import RunningServer

MODEL = "quire-bundled"
PROMPT = "First Citizen:\nBefore we proceed any further"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
SLOW = {"type": "integer", "multipleOf": 999983}
"""A grammar within every limit of the compiler that takes seconds to compile."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    config = EngineConfig(max_num_seqs=16, num_blocks=512, threads=1, disable_log_stats=True)
    with RunningServer(AsyncLLM(config), start_seconds=120) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def complete(client: OpenAI, **options: Any) -> list[str]:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "seed": 1, **options}
    choices = client.completions.create(**asked).choices
    assert {choice.finish_reason for choice in choices} == {"stop"}
    return [choice.text for choice in choices]


def check(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"colour", "size"}
    assert value["colour"] in ("red", "green")
    assert value["size"] in range(1, 100)


def test_a_json_object_may_come_with_its_schema(client: OpenAI) -> None:
    (text,) = complete(client, extra_body={"response_format": {"type": "json_object", "schema": SCHEMA}})
    check(text)


def test_response_format_of_a_chat_whole_and_streamed(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What thing?"}],
        "response_format": form,
        "temperature": 0,
    }
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text is not None
    check(text)
    chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "<" [a-z]{1,5} ">"'}, "<[a-z]{1,5}>"),
        ({"structured_outputs": {"json": {"enum": [7, 8]}}}, "[78]"),
        ({"guided_json": json.dumps({"type": "boolean"})}, "true|false"),
        ({"guided_json": {"enum": [["a", "b"]]}, "guided_whitespace_pattern": "_"}, '\\[_?"a"_?,_?"b"_?\\]'),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, r'\{"colour":"[a-z]+","size":\d+\}'),
        ({"response_format": {"type": "text"}, "guided_choice": ["a"]}, "a"),
    ],
)
def test_every_field_constrains_the_text(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    for text in complete(client, n=3, extra_body=fields):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_grammar": "start: missing"}, "unknown name"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "cannot be enforced"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://x"}}}},
            "not fetch",
        ),
        ({"guided_json": SLOW}, "takes more than"),
        ({"structured_outputs": {"json": SLOW}}, "takes more than"),
        ({"guided_json": {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)]}}, ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_grammar_is_a_400_within_a_second(
    client: OpenAI, fields: dict[str, Any], reason: str, stream: bool
) -> None:
    started = time.monotonic()
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=fields, stream=stream)
    assert time.monotonic() - started < 5, "the limit is a second; a busy machine may take longer to notice"
    (field,) = fields
    body: Any = refused.value.body
    assert body["message"].startswith(f"{field}: ")
    assert reason in body["message"]
    assert (body["type"], body["param"], body["code"]) == ("invalid_request_error", field, "invalid_grammar")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": []},
        {"guided_json": "{"},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 2**19}}}},
    ],
)
def test_an_invalid_constraint_is_refused_by_the_name_of_its_field(client: OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body=fields)
    body: Any = refused.value.body
    (field,) = fields
    assert body["param"] == field
    assert field in body["message"]


def test_eight_streams_continue_during_explosions(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    prompts = [PROMPT[:length] for length in range(8, 40, 4)]

    def stream(prompt: str) -> tuple[str, float]:
        text, longest, last = "", 0.0, time.monotonic()
        for chunk in client.completions.create(**asked, prompt=prompt, stream=True):
            text += chunk.choices[0].text
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return text, longest

    def explode(_: int) -> float:
        started = time.monotonic()
        with pytest.raises(BadRequestError, match="takes more than"):
            client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"guided_json": SLOW})
        return time.monotonic() - started

    alone = [stream(prompt)[0] for prompt in prompts]
    complete(client, extra_body={"guided_choice": ["a"]})  # the process that checks grammars runs
    with ThreadPoolExecutor(9) as pool:
        exploding = pool.submit(explode, 0)
        concurrent = list(pool.map(stream, prompts))
    assert [text for text, _ in concurrent] == alone
    assert max(gap for _, gap in concurrent) < 3
    assert exploding.result() < 5, "0.7 s, and what nine busy clients add"
