"""The small HTTP client against a real server: streams, errors, and faulty servers."""

import asyncio
import socket
import threading
from typing import Any

import pytest

from quire.cli.http_client import HttpError, Target
from quire.server.settings import ServerSettings
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine


def events(url: str, api_key: str | None = None, **body: Any) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event async for event in Target(url, api_key).events({"prompt": "x", "stream": True, **body})]

    return asyncio.run(collect())


def test_streams() -> None:
    with RunningServer(ScriptedEngine()) as server:
        found = events(f"{server.url}/v1/completions", max_tokens=100)
        assert "".join(event["choices"][0]["text"] for event in found) == ANSWER


def test_keys_and_refusals() -> None:
    with RunningServer(ScriptedEngine(), ServerSettings(port=0, api_key=("k",))) as server:
        with pytest.raises(HttpError, match="answers 401: a valid API key is needed"):
            events(f"{server.url}/v1/completions")
        assert events(f"{server.url}/v1/completions", "k")
        with pytest.raises(HttpError, match="answers 404: the model 'm'"):
            events(f"{server.url}/v1/completions", "k", model="m")


def test_an_error_within_the_stream() -> None:
    with (
        RunningServer(ScriptedEngine(fail_at=2)) as server,
        pytest.raises(HttpError, match="the logits were not finite"),
    ):
        events(f"{server.url}/v1/completions")


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(HttpError, match="is the server running"):
            events(f"http://127.0.0.1:{unused.getsockname()[1]}/v1/completions")


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 70}.com"])
def test_a_name_that_no_host_has(host: str) -> None:
    with pytest.raises(HttpError, match="is the server running"):
        events(f"http://{host}/v1/completions")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"a": 1}\n\ndata: [DONE]\n\n', [{"a": 1}]),
        (
            b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ndata: {\r\n8\r\n"a": 1}\n\r\n0\r\n\r\n',
            [{"a": 1}],
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\ndata", "closed the connection"),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 4\r\n\r\noops", "answers 502: oops"),
        (b"", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer as such a server does: it sends b'SSH-2.0-OpenSSH"),
        (b"\x15\x03\x01\x00\x02", "which is not HTTP; check the address"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {oops\n\n", "does not answer as such a server does: Expecting property name"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [1]\n\n", r"an event is \[1\]"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "invalid literal"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "invalid literal"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "no such model"}\n\n', "no such model"),
    ],
)
def test_other_servers(answer: bytes, outcome: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        if isinstance(outcome, str):
            with pytest.raises(HttpError, match=outcome):
                events(url)
        else:
            assert events(url) == outcome
        thread.join()
