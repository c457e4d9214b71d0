"""No field of any endpoint keeps the event loop busy, whatever it holds. The fields are read from the endpoints."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from quire.server.app import ENDPOINTS
from quire.server.limits import MAX_LISTS, MAX_OBJECTS, MAX_STRINGS, MAX_VALUES
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_event_loop import LIMIT

MESSAGES = [{"role": "user", "content": "x"}]
FORMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/chat/completions/render": {"messages": MESSAGES},
    "/v1/responses": {"input": "x", "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1, "model": "scripted"},
    "/v1/messages/count_tokens": {"messages": MESSAGES, "model": "scripted"},
    "/api/chat": {"messages": MESSAGES, "model": "scripted"},
    "/api/generate": {"prompt": "x", "model": "scripted"},
    "/api/embed": {"input": "x", "model": "scripted"},
    "/api/embeddings": {"prompt": "x", "model": "scripted"},
    "/v1/embeddings": {"input": "x"},
    "/score": {"text_1": "x", "text_2": "y"},
    "/rerank": {"query": "x", "documents": ["y"]},
    "/classify": {"input": "x"},
    "/infill": {"input_prefix": "x", "input_suffix": "y"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
"""What must be in a body; endpoints that need nothing are not listed."""
CUT = ("/api/embed", "/api/embeddings", "/tokenize", "/infill")
KINDS: dict[str, tuple[Any, bytes]] = {
    "text": ("x", b'"' + b"ab " * 1_300_000 + b'"'),
    "texts": (["x"], json.dumps(["x"] * (MAX_STRINGS - 99)).encode()),
    "numbers": ([1], b"[" + b"1," * (MAX_VALUES - 99) + b"1]"),
    "lists": ([[1]], b"[" + b"[1]," * (MAX_LISTS - 99) + b"[1]]"),
    "objects": ([{}], b"[" + b"{}," * (MAX_OBJECTS - 99) + b"{}]"),
    "messages": ([{"role": "user", "content": "x"}], json.dumps(MESSAGES * (MAX_STRINGS // 4 - 99)).encode()),
    "object": ({"a": 1}, json.dumps({str(number): 1 for number in range(MAX_STRINGS - 99)}).encode()),
    "numbered": ({"1": 1.0}, json.dumps({str(number): 1 for number in range(MAX_STRINGS - 99)}).encode()),
}
"""Kind of value → a small one, and the largest within the limits."""


STATUSES = (200, 400, 403, 404, 501)


def cases() -> Iterator[tuple[str, str, bytes]]:
    """Path, name and body: each field of each type of body with the largest value of each kind that the field takes.

    A plain text is tried in the fields that matter: reading it costs the same in all others. Where a text is cut
    instead of refused, it would be tokenised as a whole, which takes a thread some seconds.
    """
    seen = set()
    for endpoint in ENDPOINTS:
        if endpoint.body is None or endpoint.body in seen:
            continue
        seen.add(endpoint.body)
        form = FORMS.get(endpoint.path, {})
        for field in msgspec.structs.fields(endpoint.body):
            for kind, (small, large) in KINDS.items():
                if kind == "text" and (field.encode_name not in form or endpoint.path in CUT):
                    continue
                if not takes(field.type, small):
                    continue
                rest = {name: value for name, value in form.items() if name != field.encode_name}
                body = json.dumps(rest).encode()[:-1] + (b"," if rest else b"")
                body += f'"{field.encode_name}":'.encode() + large + b"}"
                yield endpoint.path.replace("{response_id}", "x"), f"{field.encode_name}: {kind}", body


def takes(kind: Any, value: object) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


CASES = list(cases())


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(ScriptedEngine()) as running:
        yield running


@pytest.fixture
def longest(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The CPU time of every callback of the server's event loop."""
    seen = [0.0]
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        seen.append(time.thread_time() - begin)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return seen


def test_the_endpoints_with_large_fields_are_tried() -> None:
    paths = {path for path, _, _ in CASES}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/rerank"} <= paths
    assert len(CASES) > 200


@pytest.mark.parametrize("path", sorted({path for path, _, _ in CASES}))
def test_no_field_keeps_the_loop_busy(path: str, server: RunningServer, longest: list[float]) -> None:
    for _, name, body in (case for case in CASES if case[0] == path):
        for _ in range(3):  # a neighbour on the same core lengthens a callback now and then
            longest[:] = [0.0]
            response, reply = server.send("POST", path, body)
            assert response.status in STATUSES, (name, reply)
            if max(longest) < LIMIT:
                break
        else:
            raise AssertionError(f"{name}: a callback took {max(longest):.3f} s of CPU time")
