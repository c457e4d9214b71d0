"""Door: while the queue is full, few requests are checked before they are refused, and the rest are refused unread."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from quire.server import door
from quire.server.door import Door
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
WAITING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": MESSAGES,
    "/v1/messages": {**MESSAGES, "model": "scripted"},
    "/v1/responses": {"input": "x"},
    "/api/chat": {**MESSAGES, "model": "scripted"},
    "/api/generate": {"prompt": "x", "model": "scripted"},
    "/infill": {"input_prefix": "x", "input_suffix": "y"},
}


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


def status(server: RunningServer, path: str, body: bytes) -> int:
    return server.send("POST", path, body)[0].status


def test_few_requests_are_checked_first(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can never be served is not asked to come again, as long as not many come."""
    monkeypatch.setattr(door, "CHECKS_PER_SECOND", 0.0)
    wrong = b'{"prompt":"x","max_tokens":-1}'
    server.engine.full = True  # type: ignore[attr-defined]
    statuses = [status(server, "/v1/completions", wrong) for _ in range(12)]
    assert statuses == [400] * 10 + [429] * 2
    server.engine.full = False  # type: ignore[attr-defined]
    assert status(server, "/v1/completions", wrong) == 400, "with room all are read"


@pytest.mark.parametrize("path", WAITING)
def test_every_route_that_waits_refuses_unread(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(door, "MAX_CHECKS", 0.0)
    server.engine.full = True  # type: ignore[attr-defined]
    body = json.dumps(WAITING[path]).encode()
    for sent in (body, body.replace(b'"x"', b"}{")):
        response, _ = server.send("POST", path, sent)
        assert response.status == 429
        assert response.headers["retry-after"] == "7"


def test_other_routes_are_served_while_the_queue_is_full(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_CHECKS", 0.0)
    server.engine.full = True  # type: ignore[attr-defined]
    assert status(server, "/tokenize", b'{"prompt":"x"}') == 200
    assert status(server, "/v1/embeddings", b'{"input":"x"}') != 429


def test_the_checks_come_back_with_time() -> None:
    now = 0.0
    one, full = Door(lambda: now), ScriptedEngine(full=True)

    def passes() -> bool:
        try:
            one.check(full, None)
        except Exception:
            return False
        return True

    assert sum(passes() for _ in range(99)) == door.MAX_CHECKS
    now = 0.5
    assert sum(passes() for _ in range(99)) == door.CHECKS_PER_SECOND / 2
    now = 1e6
    assert sum(passes() for _ in range(99)) == door.MAX_CHECKS
