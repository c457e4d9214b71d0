"""Bytes around a request: trailers, chunk extensions, upgrades, pipelined requests and garbage."""

import json
import socket
import time

import pytest

from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine

BODY = b'{"prompt": "x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost:\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost:\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(BODY), BODY)
ENDLESS = {
    "trailers": CHUNKED + b"0\r\n" + b"x-filler: x\r\n" * 200_000,
    "one trailer": CHUNKED + b"0\r\nx-filler: " + b"x" * 2_000_000,
    "a chunk extension": HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 2_000_000,
    "trailers of a route without a body": b"GET /health HTTP/1.1\r\nhost:\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    + b"x-filler: x\r\n" * 200_000,
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nhost:\r\ncontent-length: 9000000\r\n\r\n" + b"x" * 9_000_000,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_connection_that_sends_without_end_is_closed(server: RunningServer, name: str) -> None:
    closed = False
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        try:
            connection.sendall(ENDLESS[name])
            while connection.recv(65536):
                pass
            closed = True
        except ConnectionError:
            closed = True
    assert closed
    assert server.send("GET", "/health")[0].status == 200


def test_a_small_trailer_and_small_chunks_are_read(server: RunningServer) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY * 1 + b" " * 20_000)
    for rest in (
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nx-checksum: 5\r\n\r\n" % (len(BODY), BODY),
        b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
    ):
        answer = server.raw(HEAD + b"connection: close\r\n" + rest)
        assert answer.startswith(b"HTTP/1.1 200")
        assert ANSWER.encode() in answer


@pytest.mark.parametrize("split", [0, 40, 150, 215])
@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_an_upgrade_that_is_not_supported_keeps_its_body(server: RunningServer, upgrade: bytes, split: int) -> None:
    request = HEAD + (
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQ\r\n"
        b"content-length: %d\r\n\r\n%b" % (upgrade, len(BODY), BODY)
    )
    last = b"GET /version HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request[:split])
        time.sleep(0.02)
        connection.sendall(request[split:] + last)
        received = b""
        while part := connection.recv(65536):
            received += part
    first, second = received.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    assert json.loads(first.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == ANSWER
    assert second.startswith(b"200")
    assert b'"version"' in second


def test_garbage_behind_a_stream_is_not_answered_into_it() -> None:
    body = b'{"prompt": "x", "stream": true, "max_tokens": 20}'
    with (
        RunningServer(ScriptedEngine(delay=0.01)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        received = connection.recv(10)
        connection.sendall(b"\x00garbage\r\n\r\n" * 10)
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1") == 1
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_body_that_trickles_is_refused() -> None:
    """Every byte comes in time, the whole does not."""
    with (
        RunningServer(ScriptedEngine(), ServerSettings(port=0, stall_timeout=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        connection.sendall(HEAD + b"connection: close\r\ncontent-length: 5000\r\n\r\n")
        begin = time.monotonic()
        connection.setblocking(False)
        received = b""
        while not received and time.monotonic() < begin + 20:
            connection.send(b"x")
            time.sleep(0.05)
            try:
                received = connection.recv(65536)
            except BlockingIOError:
                continue
        assert received.startswith(b"HTTP/1.1 408")


def test_connect_is_answered_and_ends(server: RunningServer) -> None:
    assert (
        server.raw(b"CONNECT /v1/completions HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\nGET").count(b"HTTP/1.1") == 1
    )
