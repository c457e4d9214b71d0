"""The whole server: the bundled model, the engine in its child process, HTTP over a socket, the openai client."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from tests.server.running_server import RunningServer

CHAT: list[Any] = [{"role": "user", "content": "Speak, what trade art thou?"}]
PROMPT = "First Citizen:\nBefore we proceed any further, hear me speak."


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    config = EngineConfig(max_num_seqs=32, num_blocks=512, threads=1, disable_log_stats=True)
    with RunningServer(AsyncLLM(config), start_seconds=120) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def gauge(server: RunningServer, name: str) -> float:
    found = re.search(rf"^quire:{name}{{.*}} (\S+)$", server.send("GET", "/metrics")[1], re.MULTILINE)
    assert found is not None
    return float(found[1])


def greedy(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> str:
    asked = {"model": "quire-bundled", "prompt": prompt, "temperature": 0, "max_tokens": 24, **options}
    text: str = client.completions.create(**asked).choices[0].text
    return text


def test_chat_whole_and_streamed_agree(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "quire-bundled", "messages": CHAT, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_beam_search_whole_and_streamed_agree(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "quire-bundled", "prompt": PROMPT, "max_tokens": 12, "n": 2, "logprobs": 1}
    extra = {"use_beam_search": True, "beam_width": 4, "length_penalty": 0.5, "early_stopping": "never"}
    whole = client.completions.create(**asked, extra_body=extra)
    scores = [sum(c.logprobs.token_logprobs) / 12**0.5 for c in whole.choices if c.logprobs is not None]  # type: ignore[arg-type]
    assert len(scores) == 2
    assert scores[0] >= scores[1]
    texts = ["", ""]
    for chunk in client.completions.create(**asked, extra_body=extra, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert (
        greedy(client, max_tokens=12)
        == client.completions.create(model="quire-bundled", prompt=PROMPT, max_tokens=12, extra_body={"beam_width": 1})
        .choices[0]
        .text
    )


def test_kv_reports_the_pool(server: RunningServer, client: OpenAI) -> None:
    stream = client.completions.create(
        model="quire-bundled", prompt=PROMPT, max_tokens=400, n=2, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    report = server.send("GET", "/kv")[1]
    (request,) = report["requests"]
    assert request["running"]
    assert request["num_sequences"] == 2
    assert request["num_filled_slots"] <= request["num_allocated_slots"]
    assert 0.0 <= request["waste"] < 1.0
    assert report["stats"]["num_running"] == 1
    assert report["used_block_ages"]["max"] >= 0.0
    stream.close()


def test_concurrent_requests_equal_single_ones(client: OpenAI) -> None:
    prompts = [PROMPT[:length] for length in range(10, 58, 8)]
    alone = [greedy(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: greedy(client, prompt), prompts)) == alone
    together = client.completions.create(model="quire-bundled", prompt=prompts, temperature=0, max_tokens=24)
    assert [choice.text for choice in sorted(together.choices, key=lambda c: c.index)] == alone


def test_seeds_repeat_and_samples_differ(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "quire-bundled",
        "prompt": PROMPT,
        "n": 4,
        "max_tokens": 16,
        "temperature": 1.0,
    }
    first = [choice.text for choice in client.completions.create(**asked, seed=7).choices]
    assert [choice.text for choice in client.completions.create(**asked, seed=7).choices] == first
    assert len(set(first)) > 1


def test_stop_strings_end_the_text(client: OpenAI) -> None:
    text = greedy(client)
    stop = text[5:9]
    assert greedy(client, stop=stop) == text[: text.index(stop)]


def test_echo_scores_are_the_logprobs_of_generating(client: OpenAI) -> None:
    """The scores that an evaluation reads from echo equal the log-probabilities of generating the same tokens."""
    asked: dict[str, Any] = {"model": "quire-bundled", "temperature": 0}
    first = client.completions.create(
        **asked, prompt=PROMPT, max_tokens=8, logprobs=2, extra_body={"return_token_ids": True}
    )
    extra = first.choices[0].model_extra
    assert extra is not None
    assert first.choices[0].logprobs is not None
    prompt = extra["prompt_token_ids"] + extra["token_ids"]
    scored = client.completions.create(**asked, prompt=prompt, max_tokens=1, logprobs=1, echo=True).choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None
    found = scored.token_logprobs[len(extra["prompt_token_ids"]) : -1]
    assert found == pytest.approx(first.choices[0].logprobs.token_logprobs, abs=1e-3)


def test_echo_of_a_prompt_that_ends_within_a_character(server: RunningServer) -> None:
    """The whole text is what decoding all tokens gives, whole or streamed, and offsets point into it."""
    client = server.client()
    _, reply = server.send("POST", "/tokenize", {"prompt": "é😀"})
    for length in range(1, len(reply["tokens"]) + 1):
        asked: dict[str, Any] = {"prompt": reply["tokens"][:length], "temperature": 0, "max_tokens": 2, "echo": True}
        spelled = {"skip_special_tokens": False}
        wanted = {**asked, **spelled, "return_token_ids": True, "logprobs": 0}
        _, answer = server.send("POST", "/v1/completions", wanted)
        (choice,) = answer["choices"]
        _, decoded = server.send("POST", "/detokenize", {"tokens": asked["prompt"] + choice["token_ids"]})
        assert choice["text"] == decoded["prompt"]
        assert len(choice["logprobs"]["text_offset"]) == length + 2
        assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])
        assert choice["logprobs"]["text_offset"][-1] < len(choice["text"])
        chunks = client.completions.create(model="quire-bundled", stream=True, extra_body=spelled, **asked)
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice["text"]
        _, prompt = server.send("POST", "/v1/completions", {**asked, "max_tokens": 0})
        _, decoded = server.send("POST", "/detokenize", {"tokens": asked["prompt"]})
        assert prompt["choices"][0]["text"] == decoded["prompt"]


def test_a_client_that_leaves_frees_its_blocks(server: RunningServer) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost:\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert connection.recv(100)
        assert gauge(server, "num_requests_running") == 1
    deadline = time.monotonic() + 5
    while gauge(server, "num_used_kv_blocks") or gauge(server, "num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_refusals_of_the_engine_reach_the_client(client: OpenAI) -> None:
    for options, said in (
        ({"logprobs": 1000}, "max_logprobs"),
        ({"extra_body": {"allowed_token_ids": [10**6]}}, "vocabulary"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"prompt": [5] * 5000}, "5000 tokens"),
    ):
        with pytest.raises(BadRequestError, match=said):
            greedy(client, **options)
    with pytest.raises(BadRequestError, match="top_logprobs is 200") as refused:
        client.chat.completions.create(model="quire-bundled", messages=CHAT, logprobs=True, top_logprobs=200)
    assert refused.value.param == "top_logprobs"


def test_errors_that_the_engine_finds_name_the_field_that_the_client_sent(server: RunningServer) -> None:
    wrong: dict[str, Any] = {"type": "strin"}
    hello = [{"role": "user", "content": "Hi"}]
    named = {"type": "json_schema", "name": "a", "schema": wrong}
    for path, body, field in (
        ("/v1/responses", {"input": "Hi", "text": {"format": named}}, "text.format"),
        ("/v1/responses", {"input": "Hi", "top_logprobs": 99, "include": []}, "top_logprobs"),
        ("/api/chat", {"model": "quire-bundled", "messages": hello, "format": wrong}, "format"),
        (
            "/v1/messages",
            {"messages": hello, "max_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": wrong}}},
            "output_config.format",
        ),
    ):
        response, reply = server.send("POST", path, body)
        error = reply["error"] if path == "/api/chat" else reply["error"]["message"]
        assert (response.status, error.partition(":")[0].partition(" ")[0]) == (400, field)


def test_every_protocol_gives_the_same_answer(server: RunningServer, client: OpenAI) -> None:
    chat = client.chat.completions.create(model="quire-bundled", messages=CHAT, temperature=0, max_tokens=24)
    text = chat.choices[0].message.content
    assert text
    question = CHAT[0]["content"]
    response = client.responses.create(model="quire-bundled", input=question, temperature=0, max_output_tokens=24)
    assert response.output_text == text
    asked: dict[str, Any] = {"model": "quire-bundled", "messages": CHAT}
    _, message = server.send("POST", "/v1/messages", {**asked, "max_tokens": 24, "temperature": 0})
    assert message["content"] == [{"type": "text", "text": text}]
    options = {"temperature": 0, "num_predict": 24}
    _, lines = server.send("POST", "/api/chat", {**asked, "options": options})
    assert "".join(json.loads(line)["message"]["content"] for line in lines.splitlines()) == text


def test_embeddings_are_those_of_the_engine(client: OpenAI) -> None:
    alike, other = "Speak, what trade art thou?", "Sir, a carpenter."
    first, again, different = (
        item.embedding for item in client.embeddings.create(model="quire-bundled", input=[alike, alike, other]).data
    )
    assert first == pytest.approx(again, abs=1e-5)
    assert sum(a * b for a, b in zip(first, different, strict=True)) < 0.999


def test_contradictions_are_found_at_the_door_or_end_the_sample(client: OpenAI) -> None:
    for fields, said in (
        ({"allowed_token_ids": [45], "bad_words": ["I"]}, "bad_words"),
        ({"allowed_token_ids": [1], "min_tokens": 3}, "min_tokens"),
        ({"allowed_token_ids": [45], "structured_outputs": {"choice": ["hello"]}}, "structured_outputs"),
        ({"bad_words": ["hello"], "guided_choice": ["hello"], "n": 2}, "guided_choice and bad_words forbid all"),
        ({"allowed_token_ids": [45], "response_format": {"type": "json_object"}}, "response_format and allowed_token"),
    ):
        with pytest.raises(BadRequestError, match=said) as refused:
            greedy(client, max_tokens=5, extra_body=fields)
        assert refused.value.code == "contradictory_parameters"
        assert refused.value.param in fields
        assert "min_tokens" in fields or "min_tokens" not in refused.value.message
