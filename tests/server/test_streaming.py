"""Clients that leave, clients that do not read, and errors within a stream."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable

import pytest

from quire.server.event_frame import EventFrame
from quire.server.settings import ServerSettings
from quire.server.streaming import while_connected
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connect(server: RunningServer, path: str, **body: object) -> socket.socket:
    data = json.dumps({"max_tokens": 10**6, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost:\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "stream": False}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/completions", {"prompt": ["x", "y", "z"], "stream": True, "n": 2}),
        ("/v1/completions", {"prompt": ["x", "y", "z"], "stream": False}),
    ],
)
@pytest.mark.parametrize("delay", [0.02, 100.0])
def test_a_client_that_leaves_stops_the_work(
    server: RunningServer, engine: ScriptedEngine, path: str, body: dict[str, object], delay: float
) -> None:
    """In the middle of a stream and before the first byte."""
    engine.endless, engine.delay, engine.max_model_len = True, delay, 2**21
    connection = connect(server, path, **body)
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1  # type: ignore[arg-type]  # of any
    until(lambda: engine.num_running == num_prompts)
    if delay < 1 and body["stream"]:
        assert connection.recv(10)
    connection.close()
    until(lambda: engine.num_running == 0, seconds=2)
    assert engine.num_closed_early == num_prompts


def test_many_clients_that_leave_at_random(server: RunningServer, engine: ScriptedEngine) -> None:
    engine.endless, engine.delay, engine.max_model_len = True, 0.001, 2**21
    for turn in range(50):
        connection = connect(server, "/v1/chat/completions", **CHAT, stream=turn % 2 == 0)
        time.sleep(turn % 7 / 1000)
        connection.close()
    until(lambda: len(engine.calls) > 0 and engine.num_running == 0)
    assert server.send("GET", "/health")[0].status == 200


def test_a_client_that_does_not_read_is_waited_for_and_then_dropped(engine: ScriptedEngine) -> None:
    engine.endless, engine.max_model_len = True, 2**21
    with RunningServer(engine, ServerSettings(port=0, stall_timeout=0.5)) as server:
        connection = connect(server, "/v1/chat/completions", **CHAT, stream=True)
        until(lambda: len(engine.calls) == 1 and engine.num_running == 0, seconds=10)
        num_tokens = engine.num_tokens
        assert engine.num_closed_early == 1
        assert num_tokens * 250 < 32 * 2**20, "no more is generated than the sockets hold"
        connection.close()
        with server.client() as client:  # other clients are served
            assert client.completions.create(model="scripted", prompt="x", max_tokens=3).choices[0].text


def test_an_error_before_the_first_event_has_its_own_status(server: RunningServer, engine: ScriptedEngine) -> None:
    engine.full = True
    response, reply = server.send("POST", "/v1/completions", {"prompt": ["x", "y"], "stream": True})
    assert response.status == 429
    assert reply["error"]["type"] == "rate_limit_error"


def test_an_error_within_a_stream_is_an_event(server: RunningServer, engine: ScriptedEngine) -> None:
    engine.raises, engine.raises_at = OSError("/secret"), 2
    response, text = server.send("POST", "/v1/completions", {"prompt": "x", "stream": True})
    assert response.status == 200
    *_, error, done = text.strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    assert "secret" not in text


def test_work_is_cancelled_with_its_request() -> None:
    async def scenario() -> None:
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                cancelled.set()

        async def receive() -> dict[str, str]:
            await asyncio.sleep(100)
            return {"type": "http.disconnect"}

        request = asyncio.create_task(while_connected(receive, work()))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert cancelled.is_set()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 2, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "x", "echo": True, "return_token_ids": True}),
        ("/v1/responses", {"input": "x", "store": False}),
        ("/v1/messages", {**CHAT, "max_tokens": 100}),
        ("/api/chat", CHAT),
    ],
)
def test_events_written_past_asgi_are_those_of_asgi(
    server: RunningServer, engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    """The same events in the same order, and the same tokens counted."""
    body = {"model": "scripted", **body, "stream": True}
    _, direct = server.send("POST", path, body)
    assert engine.num_tapped > 5
    engine.taps, engine.num_tapped = False, 0
    _, through_asgi = server.send("POST", path, body)
    assert engine.num_tapped == 0
    assert plain(direct) == plain(through_asgi)
    counted = re.search(r"quire:request_generation_tokens_sum\S* (\S+)", server.send("GET", "/metrics")[1])
    assert counted is not None
    assert float(counted[1]) == engine.num_tokens


def plain(text: str) -> str:
    """Without what differs from answer to answer: ids and times."""
    text = re.sub(
        r'"(id|item_id|created_at|total_duration|eval_duration|prompt_eval_duration)":("[^"]*"|\d+)', "", text
    )
    return re.sub(r'"(created|completed_at)":\d+|"previous_msg_id":"[^"]*"', "", text)


def test_an_error_while_events_are_written_past_asgi_ends_its_stream_alone(
    server: RunningServer, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: EventFrame, *values: str | int) -> bytes:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(EventFrame, "fill", fill)
        response, text = server.send("POST", "/v1/completions", {"prompt": "x", "stream": True})
    assert response.status == 200
    assert json.loads(text.strip().split("\n\n")[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert server.send("POST", "/v1/completions", {"prompt": "x", "stream": True})[1].endswith("data: [DONE]\n\n")
