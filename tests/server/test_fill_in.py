"""Filling in the middle: `suffix` of completions, /infill, and `suffix` of Ollama's generate."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from openai import OpenAI

from quire.engine.tokenizer import Tokenizer
from quire.server.fill_in import FAMILIES, FillInMarks, find_marks
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, BUNDLED, ScriptedEngine, bundled_tokenizer


def tokenizer_with(*marks: str) -> Tokenizer:
    """The bundled tokenizer with further special tokens."""
    backend = tokenizers.Tokenizer.from_file(str(Path(BUNDLED) / "tokenizer.json"))
    backend.add_special_tokens(list(marks))
    return Tokenizer(backend, bundled_tokenizer().special_tokens)


class FillInEngine(ScriptedEngine):
    """A scripted engine whose tokenizer has the marks of one family."""

    async def start(self) -> None:
        self.tokenizer = tokenizer_with("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>")


@pytest.fixture
def engine() -> ScriptedEngine:
    return FillInEngine()


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def prompt_text(engine: ScriptedEngine) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(engine.calls[-1].prompt, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_families_are_found_by_their_tokens(family: FillInMarks) -> None:
    needed = [mark for mark in (family.prefix, family.suffix, family.middle) if mark]
    tokenizer = tokenizer_with(*needed)
    found = find_marks(tokenizer)
    assert found is not None
    assert tokenizer.added_tokens[found.prefix] == family.prefix
    assert found.suffix_first == family.suffix_first
    assert len(found.stop_token_ids) == len(needed)
    assert find_marks(tokenizer_with(*needed[:-1])) is None


def test_suffix_of_completions(client: OpenAI, engine: ScriptedEngine) -> None:
    reply = client.completions.create(model="scripted", prompt="def f(", suffix="return x", max_tokens=30)
    assert reply.choices[0].text == ANSWER
    assert prompt_text(engine) == "<|begin|><|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>"
    assert len(engine.calls[-1].params.stop_token_ids) == 4


def test_infill(server: RunningServer, engine: ScriptedEngine) -> None:
    body: dict[str, Any] = {"input_prefix": "a(", "prompt": "b", "input_suffix": ")", "n_predict": 4, "top_k": 3}
    body["input_extra"] = [{"filename": "x.py", "text": "import x"}]
    _, reply = server.send("POST", "/infill", body)
    assert reply["stop"]
    assert reply["stop_type"] == "limit"
    assert (reply["tokens_predicted"], reply["tokens_evaluated"]) == (4, len(engine.calls[0].prompt))
    assert prompt_text(engine) == "<|begin|>import x<|file_sep|><|fim_prefix|>a(b<|fim_suffix|>)<|fim_middle|>"
    assert engine.calls[0].params.top_k == 3
    _, text = server.send("POST", "/infill", {**body, "stream": True})
    events = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")]
    assert "".join(event["content"] for event in events) == reply["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    response, reply = server.send("POST", "/infill", {**body, "top_k": -9})
    assert (response.status, reply["error"]["param"]) == (400, "top_k")


def test_suffix_of_ollama(server: RunningServer, engine: ScriptedEngine) -> None:
    body = {"model": "scripted", "prompt": "a", "suffix": "b", "stream": False}
    assert server.send("POST", "/api/generate", body)[1]["response"] == ANSWER
    assert prompt_text(engine).endswith("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>")
    assert "insert" in server.send("POST", "/api/show", {"model": "scripted"})[1]["capabilities"]


def test_models_without_the_tokens_refuse() -> None:
    with RunningServer(ScriptedEngine()) as server:
        for path, body, param in (
            ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "input_suffix"),
        ):
            response, reply = server.send("POST", path, body)
            assert response.status == 400
            assert reply["error"]["param"] == param
            assert "no tokens for it" in reply["error"]["message"]
