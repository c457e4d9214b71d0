"""Limits on sizes, formats and times of requests: each has its own status and is checked before any work."""

import gzip
import json
import socket
import time
import zlib
from typing import Any

import pytest

from quire.server.errors import Refusal
from quire.server.limits import check_shape
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

JSON = {"content-type": "application/json"}


def test_body_too_large(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, max_body_size=10_000)) as server:
        response, body = server.send("POST", "/v1/completions", {"prompt": "x" * 10_000})
        assert response.status == 413
        assert "10000 bytes (--max-body-size)" in body["error"]["message"]
        chunks = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        head = b"POST /v1/completions HTTP/1.1\r\nhost:\r\nconnection: close\r\ncontent-type: application/json\r\n"
        answer = server.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks * 3)
        assert answer.startswith(b"HTTP/1.1 413")
        declared = server.raw(head + b"content-length: 99999999999\r\n\r\n")
        assert declared.startswith(b"HTTP/1.1 413")
    assert engine.calls == []


def test_headers_too_large(server: RunningServer) -> None:
    assert server.send("GET", "/health", headers={"x-filler": "x" * 40_000})[0].status == 431
    endless = server.raw(b"GET /health HTTP/1.1\r\nhost:\r\nx-filler: " + b"x" * 200_000)
    assert endless.startswith(b"HTTP/1.1 431")
    assert server.send("GET", "/" + "x" * 40_000)[0].status == 431
    assert server.send("GET", "/health")[0].status == 200


def test_slow_headers_and_bodies(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, stall_timeout=0.2)) as server:
        assert server.raw(b"GET /health HTTP/1.1\r\nhost:") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nhost:\r\nconnection: close\r\ncontent-type: application/json\r\n"
        assert server.raw(head + b"content-length: 50\r\n\r\n{").startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("limit", "header"), [(0.0, "0.1"), (0.1, None), (0.1, "50"), (50, "0.1")])
def test_late_requests(limit: float, header: str | None) -> None:
    engine = ScriptedEngine(delay=0.01, endless=True)
    with RunningServer(engine, ServerSettings(port=0, request_timeout=limit)) as server:
        headers = {} if header is None else {"x-request-timeout": header}
        body = {"prompt": "x", "max_tokens": 200}
        response, reply = server.send("POST", "/v1/completions", body, headers)
        assert (response.status, reply["error"]["code"]) == (408, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"
        assert "within its 0.1 seconds" in reply["error"]["message"]
        _, text = server.send("POST", "/v1/completions", {**body, "stream": True}, headers)
        assert text.count("data: ") > 2
        assert '"code":"deadline_exceeded"' in text.split("\n\n")[-3]


@pytest.mark.parametrize("header", ["", "soon", "0", "-1", "nan", "inf", "1e999"])
def test_timeouts_that_are_no_time(server: RunningServer, header: str) -> None:
    response, reply = server.send("POST", "/v1/completions", {"prompt": "x"}, {"x-request-timeout": header})
    assert (response.status, reply["error"]["param"]) == (400, "x-request-timeout")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x",}', "byte 15"),
        (b'{"prompt": "x", "temperature": NaN}', "byte 31"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature: Number out of range"),
        (b'{"prompt": "x", "max_tokens": 1.5}', "max_tokens: Expected"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "x", "any": ' + b"[" * 40_000, "nested too deeply"),
        (b'{"messages": "x"}', "prompt is missing"),
        (b'{"prompt": "x", "priority": 99999999999}', "priority: Expected `int` <= 2147483647"),
        (b'{"prompt": "x", "cache_salt": "' + b"x" * 300 + b'"}', "cache_salt: Expected `str` of length <= 256"),
        (b"[]", "the body: Expected `object`"),
        (b'{"prompt": "x", "logit_bias": {"5": "x"}}', "logit_bias: Expected `float`"),
        (b'{"prompt": [1, [2, "x"]]}', "prompt[1][1]: Expected `int`"),
    ],
)
def test_malformed_bodies(server: RunningServer, body: bytes, said: str) -> None:
    response, reply = server.send("POST", "/v1/completions", body, JSON)
    assert response.status == 400
    assert said in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("text/plain;charset=UTF-8", 200),
        ("application/vnd.api+json", 200),
        ("", 200),
        ("application/x-www-form-urlencoded", 200),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_only_json_is_accepted(server: RunningServer, kind: str, status: int) -> None:
    response, reply = server.send("POST", "/v1/completions", b'{"prompt": "x"}', {"content-type": kind})
    assert response.status == status
    assert status == 200 or "application/json" in reply["error"]["message"]


def test_compressed_bodies(engine: ScriptedEngine) -> None:
    plain = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    with RunningServer(engine, ServerSettings(port=0, max_body_size=10_000)) as server:
        for body, encoding, status in (
            (gzip.compress(plain), "gzip", 200),
            (zlib.compress(plain), "deflate", 200),
            (plain, "identity", 200),
            (b"\xef\xbb\xbf" + plain, "identity", 200),
            (plain, "br", 415),
            (plain, "gzip", 400),
            (gzip.compress(plain)[:-4], "gzip", 400),
            (gzip.compress(b" " * 2_000_000), "gzip", 413),
        ):
            response, _ = server.send("POST", "/v1/completions", body, {**JSON, "content-encoding": encoding})
            assert response.status == status, encoding
    assert len(engine.calls) == 4


def test_routes_and_methods(server: RunningServer) -> None:
    response, reply = server.send("GET", "/v1/nothing")
    assert (response.status, reply["error"]["code"]) == (404, "route_not_found")
    for path, named in (
        ("/models", "use /v1/models; clients usually need a base URL that ends in /v1"),
        ("/chat/completions", "use /v1/chat/completions"),
        ("/v1/v1/chat/completions", "use /v1/chat/completions"),
        ("/openai/v1/completions", "use /v1/completions"),
        ("/V1/Completions", "use /v1/completions"),
        ("/v1", "is a base URL, not a route; routes are /v1/models"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/" + "x" * 5000, "/docs lists them"),
    ):
        response, reply = server.send("POST", path, {})
        assert response.status == 404
        assert named in reply["error"]["message"]
    response, reply = server.send("GET", "/v1/completions")
    assert (response.status, reply["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_prompt_characters(engine: ScriptedEngine) -> None:
    with RunningServer(engine, ServerSettings(port=0, max_prompt_chars=100)) as server:
        response, reply = server.send("POST", "/v1/completions", {"prompt": ["x" * 60, "y" * 60]})
        assert response.status == 400
        assert "120 characters" in reply["error"]["message"]


LONG_TEXTS = [
    "," * 300_000,
    "[" * 300_000,
    "a, " * 300_000,
    "\n" * 300_000,
    '"' * 300_000,
    '",[' * 300_000,
    "\\" * 200_000 + "," * 300_000,
]


@pytest.mark.parametrize("text", LONG_TEXTS, ids=range(len(LONG_TEXTS)))
@pytest.mark.parametrize("rest", [{}, {"suffix": "\\"}, {"user": '\\"'}])
def test_what_stands_inside_a_text_is_no_value(text: str, rest: dict[str, str]) -> None:
    check_shape(json.dumps({"prompt": [text, "x"], **rest}).encode())


@pytest.mark.parametrize("text", ["", "\\", '"', "\\\\", '\\"'])
@pytest.mark.parametrize(
    ("what", "values"), [("commas", [1] * 260_000), ("lists", [[1]] * 60_000), ("texts", ["\\"] * 40_000)]
)
def test_too_many_values_beside_a_text_are_refused(text: str, what: str, values: list[Any]) -> None:
    with pytest.raises(Refusal, match=rf"the body holds more than \d+,\d+ {what}, the most"):
        check_shape(json.dumps({"prompt": text, "x": values, "y": text}).encode())


def test_a_text_of_commas_that_fits_the_context_is_answered(engine: ScriptedEngine) -> None:
    engine.max_model_len = 400_000
    with RunningServer(engine) as server:
        assert server.send("POST", "/v1/completions", {"prompt": "," * 300_000, "max_tokens": 1})[0].status == 200


def test_many_prompts_are_refused_quickly(server: RunningServer) -> None:
    body = json.dumps({"prompt": ["x"] * 100_000}).encode()
    server.send("GET", "/health")
    started = time.perf_counter()
    assert server.send("POST", "/v1/completions", body)[0].status == 400
    assert time.perf_counter() - started < 1.0  # 20 ms alone on a machine


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    one = b"GET /version HTTP/1.1\r\nhost:\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n"
    answer = server.raw(one + last)
    assert answer.index(b'"version"') < answer.index(b'"status"')


def test_request_ids_are_echoed_or_made(server: RunningServer) -> None:
    assert server.send("GET", "/health", headers={"x-request-id": "mine"})[0].headers["x-request-id"] == "mine"
    made = [server.send("GET", "/nothing")[0].headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    assert server.send("GET", "/health", headers={"x-request-id": "x" * 500})[0].headers["x-request-id"] != "x" * 500


def test_garbage_on_the_socket(server: RunningServer) -> None:
    assert b"400" in server.raw(b"\x16\x03\x01 hello\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port)):
        pass
    assert server.send("GET", "/health")[0].status == 200


def test_settings_in_text() -> None:
    settings = ServerSettings(max_body_size="1MiB")  # type: ignore[arg-type]  # as from the command line
    assert settings.max_body_size == 2**20


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"stall_timeout": -1.0}, {"api_key": (" ",)}, {"max_samples": 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ServerSettings(**wrong)
