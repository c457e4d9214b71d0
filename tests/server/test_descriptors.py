"""Connections leave descriptors for the server itself, and a limit that may be raised is raised."""

import fcntl
import json
import resource
import socket
import time
from contextlib import ExitStack

import pytest

from quire.engine.engine_process import Connection
from quire.engine.messages import ReportMemory, encode
from quire.errors import ConfigError
from quire.server import connection as http_connection
from quire.server.descriptors import RESERVED, WANTED, max_connections, raise_limit
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine


class System:
    """A system with limits of its own."""

    def __init__(self, soft: int, hard: int, *, refuses: bool = False) -> None:
        self.limits, self.refuses = (soft, hard), refuses

    def getrlimit(self, kind: int) -> tuple[int, int]:
        return self.limits

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        if self.refuses:
            raise ValueError("not allowed to raise maximum limit")
        self.limits = limits


UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("system", "soft", "connections"),
    [
        (System(1024, 524_288), WANTED, WANTED - RESERVED),
        (System(1024, 4096), 4096, 4096 - RESERVED),
        (System(1024, UNLIMITED), WANTED, WANTED - RESERVED),
        (System(1024, 4096, refuses=True), 1024, 1024 - RESERVED),
        (System(1_000_000, 1_000_000), 1_000_000, 1_000_000 - RESERVED),
        (System(UNLIMITED, UNLIMITED), UNLIMITED, WANTED),
        (System(64, 64), 64, 32),
    ],
)
def test_the_limit_is_raised_and_a_part_of_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, system: System, soft: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    raise_limit()
    assert (system.limits[0], max_connections()) == (soft, connections)


@pytest.mark.parametrize("system", [System(63, 63), System(8, 63), System(1, 4096, refuses=True)])
def test_too_few_descriptors_are_one_line(monkeypatch: pytest.MonkeyPatch, system: System) -> None:
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    with pytest.raises(ConfigError, match=r"may open \d+ files \(ulimit -n\); a server needs 64 or more"):
        raise_limit()


def test_a_connection_too_many_is_answered_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "max_connections", lambda: 3)
    monkeypatch.setattr(http_connection, "_LINGER_SECONDS", 0.05)
    monkeypatch.setattr(http_connection, "_MAX_LINGERING", 2)
    with RunningServer(ScriptedEngine()) as server, ExitStack() as idle:
        held = [idle.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(3)]
        assert health(held[0]).startswith(b"HTTP/1.1 200"), "all three are there"
        head, _, body = server.raw(b"").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in head
        assert json.loads(body)["error"]["message"].startswith("3 connections are open, as many as the server's limit")
        crowd = [idle.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(20)]
        for each in crowd:
            each.settimeout(10)
            while each.recv(1000):
                pass  # all are closed
        assert health(held[0]).startswith(b"HTTP/1.1 200")
        held[1].close()
        deadline = time.monotonic() + 10
        while server.raw(b"GET /health HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n")[9:12] != b"200":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def health(connection: socket.socket) -> bytes:
    """The answer on a connection that stays open."""
    connection.sendall(b"GET /health HTTP/1.1\r\nhost:\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(1000)
    return answer


def test_an_engine_takes_any_descriptor() -> None:
    """A server with thousands of connections starts the next engine with a descriptor above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mine, theirs = socket.socketpair()
    with mine, theirs:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
            with socket.socket(fileno=fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 2000)) as high:
                assert high.fileno() >= 2000
                connection = Connection(high)
                assert connection.receive(wait=0) == []
                assert connection.receive(wait=0.0001) == []
                mine.sendall(encode(ReportMemory()))
                assert connection.receive(wait=None) == [ReportMemory()]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
