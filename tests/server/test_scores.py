"""/score, /rerank, /classify and a second engine for vectors, with real small models."""

import base64
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from quire import LLM, AsyncLLM
from quire.config import EngineConfig
from quire.server.two_engines import TwoEngines
from tests.embedders import make_bert
from tests.server.running_server import RunningServer

QUERY, TEXTS = "what is paris", ["a cat sat", "paris is the capital of france", "the big red dog"]


@contextmanager
def serving(folder: Path, name: str) -> Iterator[RunningServer]:
    with RunningServer(engine_of(folder, name), start_seconds=120) as running:
        yield running


def engine_of(folder: Path, name: str) -> AsyncLLM:
    options = {"model": str(folder), "served_model_name": name, "threads": 1, "spare": False}
    return AsyncLLM(EngineConfig(**options), lambda _: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, LLM]]:
    folder = tmp_path_factory.mktemp("reranker")
    make_bert(folder, num_labels=1)
    with serving(folder, "reranker") as running:
        yield running, LLM(str(folder))


def test_rerank(reranker: tuple[RunningServer, LLM]) -> None:
    """Jina's and Cohere's forms give the scores of `LLM.rerank`."""
    server, llm = reranker
    expected = llm.rerank(QUERY, TEXTS)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
        body: dict[str, Any] = {"model": "reranker", "query": QUERY, "documents": documents}
        _, reply = server.send("POST", path, body)
        assert [result["index"] for result in reply["results"]] == [result.index for result in expected]
        scores = [result["relevance_score"] for result in reply["results"]]
        assert scores == pytest.approx([result.relevance_score for result in expected], abs=1e-5)
        assert ("document" in reply["results"][0]) is (path != "/v2/rerank")
        assert reply["usage"]["total_tokens"] == 31
        _, best = server.send("POST", path, {**body, "top_n": 1, "return_documents": True, "max_tokens_per_doc": 2})
        assert len(best["results"]) == 1
        assert best["results"][0]["document"] == {"text": TEXTS[best["results"][0]["index"]]}
        assert best["usage"]["total_tokens"] < 31


def test_score(reranker: tuple[RunningServer, LLM]) -> None:
    server, llm = reranker
    expected = [output.outputs.score for output in llm.score(QUERY, TEXTS)]
    for names in (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        for path in ("/score", "/v1/score"):
            _, reply = server.send("POST", path, {names[0]: QUERY, names[1]: TEXTS})
            assert [entry["score"] for entry in reply["data"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"query": QUERY, "documents": []}, "documents"),
        ("/rerank", {"query": QUERY, "documents": [1]}, "documents[0]"),
        ("/rerank", {"query": QUERY, "documents": ["x"] * 2049}, "documents"),
        ("/rerank", {"query": QUERY, "documents": ["dog " * 60]}, "documents"),
        ("/rerank", {"query": QUERY, "documents": ["x"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": QUERY, "documents": ["x"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ("/rerank", {"documents": ["x"]}, "query"),
        ("/score", {"text_1": "a"}, "data_2"),
        ("/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/score", {"text_1": "a", "data_1": "b", "text_2": "c"}, "data_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/classify", {"input": []}, "input"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model"),
    ],
)
def test_refuses_by_name(reranker: tuple[RunningServer, LLM], path: str, body: dict[str, Any], param: str) -> None:
    response, reply = reranker[0].send("POST", path, body)
    assert response.status == 400, reply
    assert reply["error"]["param"] == param, reply


def test_truncates_if_asked(reranker: tuple[RunningServer, LLM]) -> None:
    body = {"query": QUERY, "documents": ["dog " * 60], "truncate_prompt_tokens": -1}
    _, reply = reranker[0].send("POST", "/rerank", body)
    assert reply["usage"]["total_tokens"] == 40


def test_classify(reranker: tuple[RunningServer, LLM]) -> None:
    server, llm = reranker
    _, reply = server.send("POST", "/classify", {"input": TEXTS})
    found = [entry["probs"] for entry in reply["data"]]
    for probs, output in zip(found, llm.classify(TEXTS), strict=True):
        assert probs == pytest.approx(output.outputs.probs, abs=1e-5)
    assert reply["data"][0]["label"] == "class 0"


def test_two_models(tmp_path: Path) -> None:
    """Each endpoint finds its model, each refuses the other's, and both answer at once."""
    make_bert(tmp_path)
    chat = AsyncLLM(EngineConfig(threads=1, spare=False, max_num_seqs=8, kv_cache_memory=2**24), lambda _: None)
    two = TwoEngines(chat, engine_of(tmp_path, "embedder"))
    with RunningServer(two, start_seconds=180) as server, server.client() as client:
        assert [card.id for card in client.models.list()] == ["quire-bundled", "embedder"]
        stream = client.completions.create(model="quire-bundled", prompt="To be", max_tokens=60, stream=True)
        next(iter(stream))
        for name in ("embedder", "embedder"):
            found = client.embeddings.create(model=name, input=TEXTS)
            assert len(found.data[0].embedding) == 32
        assert sum(1 for _ in stream) > 1
        _, raw = server.send("POST", "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})
        assert raw["model"] == "embedder"
        numbers = struct.unpack("<32f", base64.b64decode(raw["data"][0]["embedding"]))
        assert numbers == pytest.approx(found.data[0].embedding, abs=1e-6)
        _, ollama = server.send("POST", "/api/embed", {"model": "embedder:latest", "input": TEXTS})
        assert ollama["embeddings"][0] == pytest.approx(found.data[0].embedding, abs=1e-6)
        _, shown = server.send("POST", "/api/show", {"model": "embedder"})
        assert shown["capabilities"] == ["embedding"]
        check_refusals(client)


def check_refusals(client: OpenAI) -> None:
    """A chat request for the embedder and the reverse."""
    for refused in (
        lambda: client.completions.create(model="embedder", prompt="a"),
        lambda: client.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "a"}]),
        lambda: client.embeddings.create(model="quire-bundled", input="a"),
    ):
        with pytest.raises(BadRequestError) as error:
            refused()
        assert error.value.code == "wrong_task"
