"""Limits of API keys: at every endpoint that generates or embeds, named with their values, and given back."""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError, QueueFullError
from quire.outputs import RequestMemory
from quire.server.api_keys import ApiKey
from quire.server.errors import Refusal, error_headers
from quire.server.key_use import KeyUse, check_keys
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

CHAT = [{"role": "user", "content": "To be"}]
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "To be"}),
    ("/v1/completions", {"prompt": "To be", "stream": True}),
    ("/v1/chat/completions", {"messages": CHAT}),
    ("/v1/chat/completions", {"messages": CHAT, "stream": True}),
    ("/v1/responses", {"input": "To be"}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 5}),
    ("/api/chat", {"model": "scripted", "messages": CHAT}),
    ("/api/generate", {"model": "scripted", "prompt": "To be"}),
    ("/v1/embeddings", {"input": "To be"}),
    ("/api/embed", {"model": "scripted", "input": "To be"}),
    ("/api/embeddings", {"model": "scripted", "prompt": "To be"}),
]
"""Every endpoint that generates or embeds, but /infill, for which the bundled model has no marks."""


@contextmanager
def serving(folder: Path, engine: ScriptedEngine, limits: str = "", **options: Any) -> Iterator[RunningServer]:
    """A server with three keys: "one" with `limits`, "two" without, and "boss", an admin's."""
    file = folder / "keys.toml"
    texts = (f"[[keys]]\nname = '{name}'\nkey = '{name}'\n" for name in ("one", "two", "boss"))
    one, two, boss = texts
    file.write_text(f"{one}{limits}\n{two}{boss}admin = true\n")
    with RunningServer(engine, ServerSettings(port=0, api_keys=str(file), **options)) as server:
        yield server


def send(server: RunningServer, path: str, body: Any = None, *, key: str = "one") -> tuple[int, Any, Any]:
    """Status, body, and headers."""
    method = "GET" if body is None else "POST"
    response, answer = server.send(method, path, body, {"authorization": f"Bearer {key}"})
    return response.status, answer, response.headers


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrency_at_every_endpoint(tmp_path: Path) -> None:
    engine = ScriptedEngine(endless=True, delay=0.01, max_model_len=10**6)
    with serving(tmp_path, engine, "max_concurrency = 1") as server, server.client("one") as client:
        stream = client.completions.create(model="scripted", prompt="x", max_tokens=10**5, stream=True)
        next(iter(stream))
        for path, body in GENERATING:
            status, answer, headers = send(server, path, body)
            assert status == 429, (path, answer)
            assert "the API key 'one'" in str(answer), path
            assert "max_concurrency is 1" in str(answer), path
            assert int(headers["retry-after"]) >= 1, path
        assert len(engine.calls) == 1
        assert send(server, "/v1/completions", {"prompt": "x", "max_tokens": 1}, key="two")[0] == 200
        assert send(server, "/v1/models")[0] == 200
        stream.close()
        wait_until(lambda: engine.num_running == 0)
        assert send(server, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_tokens_per_minute_at_every_endpoint(tmp_path: Path, engine: ScriptedEngine) -> None:
    with serving(tmp_path, engine, "tokens_per_minute = 60") as server:
        assert send(server, "/v1/completions", {"prompt": [5] * 50})[0] == 200
        for path, body in GENERATING:
            status, answer, headers = send(server, path, body)
            assert (status, "tokens_per_minute is 60" in str(answer)) == (429, True), (path, answer)
            assert int(headers["retry-after"]) >= 1, path
        for path, body in (("/v1/completions", {"prompt": [5] * 61}), ("/v1/embeddings", {"input": [[5] * 31] * 2})):
            status, answer, _ = send(server, path, body)
            assert status == 400
            assert "tokens_per_minute is 60" in str(answer)
        assert send(server, "/v1/completions", {"prompt": [5] * 61}, key="two")[0] == 200


def test_a_share_of_the_queue(tmp_path: Path) -> None:
    engine = ScriptedEngine(delay=600.0, max_queue_size=8)
    with serving(tmp_path, engine, "queue_share = 0.25") as server:
        for path, body in (("/v1/completions", {"prompt": ["x"] * 3}), ("/v1/embeddings", {"input": ["x"] * 3})):
            status, answer, _ = send(server, path, body)
            assert (status, "queue_share is 2, 0.25 of 8" in str(answer)) == (400, True)
        two = json.dumps({"prompt": ["x"] * 2, "max_tokens": 2})
        head = f"POST /v1/completions HTTP/1.1\r\nhost:\r\nauthorization: Bearer one\r\ncontent-length: {len(two)}"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(f"{head}\r\n\r\n{two}".encode())
            wait_until(lambda: len(engine.calls) == 2)
            for path, body in GENERATING:
                status, answer, _ = send(server, path, body)
                assert (status, "2 of its prompts are waiting" in str(answer)) == (429, True), path
        wait_until(lambda: engine.num_running == 0)
        engine.delay = 0.0
        assert send(server, "/v1/completions", {"prompt": ["x"] * 2})[0] == 200


def test_the_priority_is_the_keys(tmp_path: Path, engine: ScriptedEngine) -> None:
    with serving(tmp_path, engine, "priority = 7") as server:
        for path, body in GENERATING:
            asks = path.startswith("/v1/") and path not in ("/v1/messages", "/v1/responses")
            _, _, headers = send(server, path, {**body, "priority": -5} if asks else body)
            assert engine.calls[-1].priority == 7, path
            assert not asks or "priority -5 has no effect" in headers["x-quire-warning"], path
        send(server, "/v1/completions", {"prompt": "x", "priority": -5}, key="two")
        assert engine.calls[-1].priority == 0


def test_models_that_a_key_may_not_use_are_unknown(tmp_path: Path, engine: ScriptedEngine) -> None:
    with serving(tmp_path, engine, "models = ['alias']") as server:
        assert [card["id"] for card in send(server, "/v1/models")[1]["data"]] == ["alias"]
        assert [entry["name"] for entry in send(server, "/api/tags")[1]["models"]] == ["alias"]
        assert len(send(server, "/v1/models", key="two")[1]["data"]) == 2
        for path, body in GENERATING:
            refused = send(server, path, {**body, "model": "scripted"})
            unknown = send(server, path, {**body, "model": "nothing0"})
            assert refused[0] == unknown[0] == 404, path
            assert "alias" in str(refused[1])
            assert str(refused[1]).replace("scripted", "nothing0")[:80] == str(unknown[1])[:80]
            assert send(server, path, {**body, "model": "alias"})[0] == 200, path
        assert send(server, "/v1/models/scripted")[0] == 404
        assert send(server, "/v1/completions", {"prompt": "x"})[1]["model"] == "alias"


def test_kv_and_metrics_show_a_key_only_its_own(tmp_path: Path, engine: ScriptedEngine) -> None:
    accounts = {name: ApiKey(digest=hashlib.sha256(name.encode()).digest()).account for name in ("one", "two")}
    engine.memory = [
        RequestMemory(f"r-{name}", True, 1, 9, 1, 9, 16, 0, 0, 0.5, 0, {}, None, account)
        for name, account in accounts.items()
    ]
    with serving(tmp_path, engine, "max_concurrency = 1\ntokens_per_minute = 9") as server:
        assert send(server, "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2})[0] == 200
        assert send(server, "/v1/completions", {"prompt": [5] * 9})[0] == 429
        for name, other in (("one", "two"), ("two", "one")):
            report, text = (send(server, path, key=name)[1] for path in ("/kv", "/metrics"))
            assert report.keys() == {"requests"}
            assert [request["request_id"] for request in report["requests"]] == [f"r-{name}"]
            assert f'quire:key_requests_running{{key="{name}"}} 0.0' in text
            assert f'"{other}"' not in text
            assert "num_requests" not in text
        counted = ["requests_total", "prompt_tokens_total", "generated_tokens_total"]
        text = send(server, "/metrics")[1]
        for name, value in zip(counted, (1, 3, 2), strict=True):
            assert f'quire:key_{name}{{key="one"}} {value}.0' in text
        assert 'quire:key_requests_refused_total{key="one",limit="tokens_per_minute"} 1.0' in text
        report, text = (send(server, path, key="boss")[1] for path in ("/kv", "/metrics"))
        assert [request["tenant"] for request in report["requests"]] == list(accounts.values())
        assert report["stats"]["num_blocks"] == 64
        assert "vllm:num_requests_running" in text
        assert all(f'quire:key_requests_total{{key="{name}"}}' in text for name in ("one", "two", "boss"))


def test_the_only_key_sees_everything(tmp_path: Path, engine: ScriptedEngine) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("[[keys]]\nname = 'one'\nkey = 'one'\n")
    for settings in (ServerSettings(port=0, api_keys=str(file)), ServerSettings(port=0, api_key=("one", "two"))):
        with RunningServer(engine, settings) as server:
            assert "stats" in send(server, "/kv")[1]
            assert "vllm:num_requests_running" in send(server, "/metrics")[1]


@pytest.mark.parametrize(
    ("limits", "engine", "shown"),
    [
        ("models = ['m']", ScriptedEngine(), "one: models holds 'm'; served: scripted, alias"),
        ("queue_share = 0.5", ScriptedEngine(max_queue_size=0), "one: queue_share is 0.5, but max_queue_size is 0"),
    ],
)
def test_limits_that_the_engine_cannot_keep(tmp_path: Path, limits: str, engine: ScriptedEngine, shown: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"[[keys]]\nname = 'one'\nkey = 'one'\n{limits}\n")
    with pytest.raises(ConfigError, match=shown):
        check_keys(ServerSettings(api_keys=str(file)), engine)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(use: KeyUse, num_prompts: int, num_tokens: int, max_queue_size: int = 100) -> tuple[int, int]:
    """Status and Retry-After of the refusal."""
    with pytest.raises(Refusal) as caught, use.admit(num_prompts, num_tokens, max_queue_size):
        pass
    return caught.value.status, int(dict(error_headers(caught.value)).get(b"retry-after", 0))


def test_tokens_return_with_time_and_answers_overdraw() -> None:
    clock = Clock()
    use = KeyUse(ApiKey("a", tokens_per_minute=60), clock=clock)
    with use.admit(1, 40, 0) as admission:
        admission.note_first()
        admission.note_tokens(50)
    assert refusal(use, 1, 0) == (429, 31)  # 30 overdrawn, and one is needed
    clock.now += 31
    with use.admit(1, 1, 0):
        assert refusal(use, 1, 60) == (429, 60)
    clock.now += 1000
    with use.admit(1, 60, 0):  # no more than a minute's tokens are saved up
        assert refusal(use, 1, 1) == (429, 1)
    assert refusal(use, 1, 61) == (400, 0)
    assert use.num_refused == {"tokens_per_minute": 4}


def test_a_request_that_the_engine_refuses_takes_no_tokens() -> None:
    use = KeyUse(ApiKey("a", tokens_per_minute=60), clock=Clock())
    for _ in range(5):
        with pytest.raises(QueueFullError), use.admit(1, 60, 0):
            raise QueueFullError("full", retry_after=1)
    with use.admit(1, 60, 0):
        pass
    assert refusal(use, 1, 60)[0] == 429


def test_only_prompts_that_wait_count_for_the_queue() -> None:
    use = KeyUse(ApiKey("a", queue_share=0.03), clock=Clock())
    with use.admit(2, 2, 100) as first:
        assert refusal(use, 2, 2)[0] == 429
        with use.admit(1, 1, 100):
            pass
        first.note_first()
        with use.admit(2, 2, 100):
            assert use.num_waiting == 3
    assert refusal(use, 4, 4) == (400, 0)
    assert (use.num_waiting, use.num_requests) == (0, 0)
    with use.admit(400, 400, 0):  # no limit of the queue, so no share
        pass
