"""SmolLM2-135M-Instruct from its package on PyPI, a GGUF file in Q4_1: `make test-real`, which needs a network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.engine.checkpoint import find_model
from tests.real.real_models import SMOLLM2

pytestmark = pytest.mark.skipif("QUIRE_TEST_REAL" not in os.environ, reason="make test-real downloads real models")

ARTICLE = (
    "The lighthouse of Alexandria was built on the island of Pharos. It was one of the tallest buildings of the "
    "ancient world. Earthquakes damaged it three times, and its last stones were used for a citadel in 1480."
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model() -> Iterator[LLM]:
    with LLM(SMOLLM2, max_model_len=1024) as llm:
        yield llm


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """A client of `quire serve`."""
    command = [sys.executable, "-m", "quire", "serve", SMOLLM2, "--port", "0", "--max-model-len", "2048"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines: list[str] = []
            while not lines or " ready: " not in lines[-1]:
                lines.append(server.stderr.readline())
                assert lines[-1], "".join(lines)
            port = next(int(line.rpartition(":")[2]) for line in lines if " listening on http://127.0.0.1:" in line)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        finally:
            server.kill()


def test_the_package_holds_one_file() -> None:
    path = find_model(SMOLLM2)
    assert isinstance(path, Path)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_it_answers_a_chat(model: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = model.chat(question, SamplingParams(temperature=0.0, max_tokens=24))
    assert answer.outputs[0].text.strip() == "The capital of France is Paris."
    assert answer.outputs[0].finish_reason == "stop"


def test_it_fills_a_schema(model: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
    }
    params = SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=StructuredOutputsParams(json=schema))
    (answer,) = model.chat([{"role": "user", "content": "Describe Paris as JSON."}], params)
    found = json.loads(answer.outputs[0].text)
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)


def test_forced_tool_calls_follow_their_schema(client: openai.OpenAI) -> None:
    """The template of the model has no tools, so they come as text and the call by a grammar."""
    name = client.models.list().data[0].id
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
            tools=[WEATHER],  # type: ignore[list-item]  # a plain dictionary
            tool_choice=choice,  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=200,
        )
        assert reply.choices[0].finish_reason in ("tool_calls", "stop"), reply
        call = (reply.choices[0].message.tool_calls or [])[0]
        assert call.type == "function"
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert sorted(arguments) == ["city", "unit"]
        assert arguments["unit"] in ("celsius", "fahrenheit")
        assert isinstance(arguments["city"], str)


def test_a_chat_without_a_call_streams_as_it_answers(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    question = {"model": name, "messages": [{"role": "user", "content": "Name a color."}], "temperature": 0.0}
    whole = client.chat.completions.create(**question, max_tokens=24)
    parts = client.chat.completions.create(**question, max_tokens=24, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert text


def test_speculation_on_real_text_keeps_the_tokens() -> None:
    """A model that quotes its prompt: drafts are taken, and the bits are those without them."""
    chats = [
        [{"role": "user", "content": f"Repeat this text word for word:\n\n{ARTICLE}"}],
        [{"role": "user", "content": f"{ARTICLE}\n\nList three facts of this text."}],
    ]
    params = SamplingParams(temperature=0.0, max_tokens=80)
    found = {}
    for way, options in (("plain", {}), ("drafts", {"speculative_config": {"method": "ngram"}})):
        with LLM(SMOLLM2, max_model_len=1024, max_num_seqs=4, deterministic=True, **options) as llm:
            found[way] = llm.chat(chats, params, use_tqdm=False)
    for plain, drafted in zip(found["plain"], found["drafts"], strict=True):
        assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids
    metrics = [output.metrics for output in found["drafts"]]
    assert sum(each.num_accepted_tokens for each in metrics if each is not None) > 20
