"""Loading, draining and signals in a real process with a scripted engine."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import httpx
import pytest

from quire.errors import ConfigError, EngineUnavailableError
from quire.server.listen import notify
from quire.server.settings import ServerSettings
from quire.server.sockets import bind
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ScriptedEngine

PROCESS = """
import asyncio, sys
from tests.server.scripted_engine import ScriptedEngine
from quire.server.listen import serve
from quire.server.sockets import bind
from quire.server.settings import ServerSettings
settings = ServerSettings(port=0, shutdown_timeout={shutdown_timeout})
engine = ScriptedEngine(delay=0.02, endless=True, max_model_len=2**20)
finished = asyncio.run(serve(engine, settings, bind(settings), report=lambda line: print(line, flush=True)))
sys.exit(0 if finished else 1)
"""


@contextmanager
def process(shutdown_timeout: float, **variables: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    command = [sys.executable, "-c", PROCESS.format(shutdown_timeout=shutdown_timeout)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
    ) as running:
        assert running.stdout is not None
        port = int(running.stdout.readline().rpartition(":")[2])
        assert running.stdout.readline().startswith("ready")
        try:
            yield running, port
        finally:
            running.kill()


@contextmanager
def stream(port: int, max_tokens: int) -> Iterator[HTTPResponse]:
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens, "stream": True})
    with closing(HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        with connection.getresponse() as answer:
            assert answer.read(6) == b"data: "
            yield answer


def status_of(port: int, path: str) -> int:
    body = '{"prompt": "x"}' if path != "/health" else None
    with closing(HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST" if body else "GET", path, body, {"content-type": "application/json"})
        with connection.getresponse() as answer:
            return answer.status


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_lets_running_requests_finish(first: signal.Signals) -> None:
    """So does a terminal that closes: it sends SIGHUP more than once, as some supervisors do behind SIGTERM."""
    with process(shutdown_timeout=20) as (running, port), stream(port, max_tokens=60) as answer:
        running.send_signal(first)
        time.sleep(0.2)
        running.send_signal(signal.SIGHUP)
        assert status_of(port, "/health") == 503
        assert status_of(port, "/v1/completions") == 503
        rest = answer.read()
        assert rest.count(b"data: ") == 60
        assert b'"finish_reason":"length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert running.wait(10) == 0


def test_an_unfinished_stream_gets_an_error_event() -> None:
    with process(shutdown_timeout=0.3) as (running, port), stream(port, max_tokens=100_000) as answer:
        running.send_signal(signal.SIGTERM)
        *_, error, done = answer.read().strip().split(b"\n\n")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
        assert done == b"data: [DONE]"
        assert running.wait(10) == 0


def test_a_second_signal_stops_at_once() -> None:
    with process(shutdown_timeout=100) as (running, port), stream(port, max_tokens=100_000):
        running.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(5) == 1


def test_health_and_refusals_while_loading() -> None:
    with RunningServer(ScriptedEngine(load_seconds=100), wait=False) as server:
        response, reply = server.send("GET", "/health")
        assert (response.status, reply) == (503, {"status": "loading"})
        response, reply = server.send("POST", "/v1/completions", {"prompt": "x"})
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
        assert reply["error"]["type"] == "service_unavailable_error"
        assert server.send("GET", "/v1/models")[0].status in (200, 503)


def test_a_used_port_is_one_line() -> None:
    with RunningServer(ScriptedEngine()) as server, pytest.raises(ConfigError) as refused:
        bind(ServerSettings(port=server.port))
    assert str(refused.value) == (
        f"cannot listen on 127.0.0.1:{server.port}: address already in use; stop what uses it, or choose another "
        "--port (0: a free one)"
    )


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(ConfigError, match="not an address"):
        bind(ServerSettings(host="999.1.1.1", api_key=("k",)))


def test_health_says_why_there_is_no_engine() -> None:
    engine = ScriptedEngine()
    with RunningServer(engine) as server:
        for path in ("/health", "/health/ready"):
            response, reply = server.send("GET", path)
            assert (response.status, reply) == (200, {"status": "ready"})
        engine.stalls = True
        response, reply = server.send("GET", "/health/ready")
        assert (response.status, reply) == (503, {"status": "stalled"})
        engine.state = "down"
        engine.outage = EngineUnavailableError("the engine died 3 times. It starts again in 7 s", retry_after=7)
        response, reply = server.send("GET", "/health/ready")
        assert (response.status, reply) == (503, {"status": "down", "cause": str(engine.outage)})
        response, reply = server.send("POST", "/v1/completions", {"prompt": "x"})
        assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert reply["error"]["message"] == str(engine.outage)
        response, reply = server.send("GET", "/health/live")
        assert (response.status, reply) == (200, {"status": "live"})


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_hears_that_the_server_is_ready_and_that_it_stops(is_abstract: bool, tmp_path: Path) -> None:
    path = f"@quire-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path.replace("@", "\0", 1) if is_abstract else path)
        systemd.settimeout(10)
        with process(shutdown_timeout=5, NOTIFY_SOCKET=path) as (running, _):
            assert systemd.recv(100) == b"READY=1"
            running.send_signal(signal.SIGTERM)
            assert systemd.recv(100) == b"STOPPING=1"
            assert running.wait(10) == 0


def test_no_systemd_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with RunningServer(ScriptedEngine(), ServerSettings(uds=str(path), host="0.0.0.0")) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert any(line == f"listening on unix:{path}" for line in server.reports)
        with pytest.raises(ConfigError, match="address already in use; choose another --uds"):
            bind(ServerSettings(uds=str(path)))
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3
    assert not path.exists()


@pytest.mark.parametrize("name", ["missing/quire.sock", "x" * 200])
def test_a_path_that_cannot_hold_a_socket_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on .*; choose another --uds"):
        bind(ServerSettings(uds=str(tmp_path / name)))


def test_a_socket_of_a_later_server_is_left(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    with RunningServer(ScriptedEngine(), ServerSettings(uds=str(path))):
        path.unlink()
        other = bind(ServerSettings(uds=str(path)))
    with other:
        assert path.is_socket()


def test_one_of_two_servers_gets_the_socket_that_a_dead_one_left(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        with ThreadPoolExecutor(4) as threads:
            tries = [threads.submit(bind, ServerSettings(uds=str(path))) for _ in range(4)]
        listeners = [each.result() for each in tries if each.exception() is None]
        assert len(listeners) == 1
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        listeners[0].close()
        path.unlink()


def test_a_file_is_not_replaced_by_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("keep")
    with pytest.raises(ConfigError, match="address already in use"):
        bind(ServerSettings(uds=str(path)))
    assert path.read_text() == "keep"
    with pytest.raises(ConfigError, match="address already in use"):
        bind(ServerSettings(uds=str(tmp_path)))
    with pytest.raises(ConfigError, match="uds is empty; give the path of a socket"):
        ServerSettings(uds="")
