"""Ollama's API through the ollama client."""

import json
import math
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from quire.errors import EngineUnavailableError
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer

NUM_TOKENS = len(bundled_tokenizer().encode(ANSWER, add_special_tokens=False))
CALLING = '<think>Hm.</think>Let me look.<tool_call>{"name": "f", "arguments": {"a": [1, "e"]}}</tool_call>'
HELLO: Any = [{"role": "user", "content": "Who goes there?"}]


def look(a: list[str]) -> str:
    """Look around.

    Args:
        a: where
    """
    return "A ghost"


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[RunningServer]:
    settings = ServerSettings(port=0, tool_call_parser="hermes", reasoning_parser="qwen3")
    with RunningServer(engine, settings) as running:
        yield running


@pytest.fixture
def llama(server: RunningServer) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url, timeout=20) as client:
        yield client


def prompt_text(engine: ScriptedEngine) -> str:
    return bundled_tokenizer().decode(engine.calls[-1].prompt, skip_special_tokens=False)


def test_chat(llama: ollama.Client, engine: ScriptedEngine) -> None:
    reply = llama.chat("scripted:latest", HELLO)
    assert reply.message.role == "assistant"
    assert reply.message.content == ANSWER
    assert (reply.done, reply.done_reason, reply.model) == (True, "stop", "scripted:latest")
    assert (reply.eval_count, reply.prompt_eval_count) == (NUM_TOKENS, len(engine.calls[0].prompt))
    assert reply.total_duration is not None
    assert reply.prompt_eval_duration is not None
    assert reply.eval_duration is not None
    assert reply.total_duration == reply.prompt_eval_duration + reply.eval_duration
    assert reply.prompt_eval_duration > 0
    assert reply.eval_duration > 0
    lines = list(llama.chat("scripted", HELLO, stream=True))
    assert "".join(line.message.content or "" for line in lines) == ANSWER
    assert [line.done for line in lines] == [False] * NUM_TOKENS + [True]
    assert lines[-1].eval_count == NUM_TOKENS


def test_streams_are_the_default_and_json_by_line(server: RunningServer) -> None:
    response, text = server.send("POST", "/api/chat", {"model": "scripted", "messages": HELLO})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["message"] == {"role": "assistant", "content": "To"}
    assert lines[-1]["done_reason"] == "stop"


def test_options_reach_the_engine(llama: ollama.Client, engine: ScriptedEngine) -> None:
    options = {
        "num_predict": 5,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.5,
        "seed": 7,
        "stop": ["x"],
        "repeat_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "num_ctx": 4096,
        "num_gpu": 1,
    }
    reply = llama.chat("scripted", HELLO, options=options)
    assert reply.done_reason == "length"
    params = engine.calls[-1].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.5, 4, 0.5)
    assert (params.seed, params.stop, params.repetition_penalty) == (7, ("x",), 1.2)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, 0.2)
    llama.chat("scripted", HELLO, options={"num_predict": -1})
    assert engine.calls[-1].params.max_tokens is None
    llama.chat("scripted", HELLO, options={"num_predict": 10**6})
    assert engine.calls[-1].params.max_tokens == 256 - len(engine.calls[-1].prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_and_calls(llama: ollama.Client, engine: ScriptedEngine, stream: bool) -> None:
    engine.answer = CALLING
    asked: Any = {"model": "scripted", "messages": HELLO, "tools": [look], "think": True}
    messages = [line.message for line in llama.chat(**asked, stream=True)] if stream else [llama.chat(**asked).message]
    assert "".join(message.thinking or "" for message in messages) == "Hm."
    assert "".join(message.content or "" for message in messages) == "Let me look."
    (call,) = [call for message in messages for call in message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("f", {"a": [1, "e"]})
    assert '"look"' in prompt_text(engine)
    assert llama.chat(**{**asked, "think": False}).message.thinking is None


def test_history_with_calls(llama: ollama.Client, engine: ScriptedEngine) -> None:
    engine.max_model_len = 1024
    call: Any = {"function": {"name": "look", "arguments": {"a": "left"}}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "A ghost", "tool_name": "look"},
    ]
    llama.chat("scripted", messages, tools=[look])
    assert "left" in prompt_text(engine)
    assert "A ghost" in prompt_text(engine)


def test_format(llama: ollama.Client, engine: ScriptedEngine) -> None:
    llama.chat("scripted", HELLO, format="json")
    constraint = engine.calls[-1].params.structured_outputs
    assert constraint is not None
    assert constraint.json_object
    schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}}
    llama.generate("scripted", "x", format=schema)
    constraint = engine.calls[-1].params.structured_outputs
    assert constraint is not None
    assert '"properties"' in str(constraint.json)


def test_generate(llama: ollama.Client, engine: ScriptedEngine) -> None:
    reply = llama.generate("scripted", "Who goes there?", system="Be brief.")
    assert reply.response == ANSWER
    assert "<|system|>Be brief." in prompt_text(engine)
    assert "".join(line.response or "" for line in llama.generate("scripted", "x", stream=True)) == ANSWER
    llama.generate("scripted", "To be", raw=True)
    assert engine.calls[-1].prompt == bundled_tokenizer().encode("To be")
    assert engine.calls[-1].params.max_tokens == 256 - len(engine.calls[-1].prompt)


def test_logprobs(llama: ollama.Client) -> None:
    reply = llama.chat("scripted", HELLO, logprobs=True, top_logprobs=2, options={"num_predict": 3})
    assert reply.logprobs is not None
    assert [entry.logprob for entry in reply.logprobs] == [-3.0] * 3
    assert len(reply.logprobs[0].top_logprobs or ()) == 2


def test_loading(llama: ollama.Client, engine: ScriptedEngine) -> None:
    assert llama.generate("scripted").done_reason == "load"
    assert llama.chat("scripted", []).done_reason == "load"
    assert llama.generate("scripted", keep_alive=0).done_reason == "unload"
    assert engine.calls == []


def test_embed(llama: ollama.Client, server: RunningServer) -> None:
    reply = llama.embed("scripted", ["To be", "or not"])
    assert [math.hypot(*vector) for vector in reply.embeddings] == pytest.approx([1, 1])
    assert reply.prompt_eval_count == sum(len(bundled_tokenizer().encode(text)) for text in ("To be", "or not"))
    assert len(llama.embed("scripted", "x", dimensions=2).embeddings[0]) == 2
    assert math.hypot(*llama.embeddings("scripted", "x").embedding) == pytest.approx(1)


def test_models(llama: ollama.Client, server: RunningServer) -> None:
    entries = llama.list().models
    assert [entry.model for entry in entries] == ["scripted", "alias"]
    assert entries[0].details is not None
    assert entries[0].details.quantization_level in ("F32", "BF16", "F16")
    assert entries[0].size is not None
    assert entries[0].size > 10**5
    shown = llama.show("scripted")
    assert shown.capabilities == ["completion", "embedding", "tools", "thinking"]
    assert shown.modelinfo is not None
    architecture = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{architecture}.context_length"] == 256
    assert "bos_token" in (shown.template or "")
    assert [entry.model for entry in llama.ps().models] == ["scripted", "alias"]
    assert server.send("GET", "/api/version")[1]["version"].count(".") == 2


def test_errors_have_ollamas_form(server: RunningServer, llama: ollama.Client, engine: ScriptedEngine) -> None:
    with pytest.raises(ollama.ResponseError, match="there is scripted, alias") as missing:
        llama.chat("llama3", HELLO)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="when the server starts") as refused:
        llama.pull("llama3")
    assert refused.value.status_code == 400
    engine.raises, engine.raises_at = EngineUnavailableError("the engine is being restarted"), 3
    with pytest.raises(ollama.ResponseError, match="being restarted"):
        list(llama.chat("scripted", HELLO, stream=True))


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("chat", {"model": None}, "model"),
        ("chat", {"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, "reads text only"),
        ("chat", {"format": "xml"}, "format is 'xml'; it is \"json\""),
        ("chat", {"options": {"temperature": -1}}, "options.temperature is -1"),
        ("chat", {"options": {"stop": [""]}}, "options.stop holds"),
        ("chat", {"messages": [{"role": "user", "content": "word " * 999}]}, "maximum context length"),
        ("generate", {"template": "{{x}}"}, "template is not available"),
        ("generate", {"suffix": "end"}, "suffix needs a model that fills in the middle"),
        ("embed", {}, "input is missing"),
        ("show", {"model": None}, "model is missing"),
    ],
)
def test_refuses_by_name(server: RunningServer, path: str, fields: dict[str, Any], said: str) -> None:
    body = {"model": "scripted", "prompt": "x", **fields}
    if path == "chat":
        body = {"messages": HELLO, **body}
    response, reply = server.send("POST", f"/api/{path}", body)
    assert response.status == 400
    assert said in reply["error"]
