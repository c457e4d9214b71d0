"""Requests as bytes, and the statuses of what comes back."""

import re
import socket

from tests.server.running_server import RunningServer

GOOD = b'{"prompt":"x"}'


def post(body: bytes = GOOD, *headers: bytes, path: bytes = b"/v1/completions", version: bytes = b"1.1") -> bytes:
    """A request with the right length, unless `headers` say how long it is."""
    given = b"".join(header + b"\r\n" for header in headers).lower()
    lines = [b"POST %b HTTP/%b" % (path, version), b"host: 127.0.0.1", b"connection: close", *headers]
    if b"content-type" not in given:
        lines.append(b"content-type: application/json")
    if b"content-length" not in given and b"transfer-encoding" not in given:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(target: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"%b %b %b" % (method, target, version), b"host: 127.0.0.1", b"connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return post(data, b"transfer-encoding: chunked")


def statuses(server: RunningServer, data: bytes) -> list[int]:
    """The statuses of the answers to raw bytes, without those that only say to go on (100)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        received = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:  # it was closed while bytes were on the way
            pass
    return [int(found) for found in re.findall(rb"HTTP/1\.1 ([2-9]\d\d)", received)]


def check(found: list[int]) -> None:
    assert all(200 <= status < 500 for status in found), found
