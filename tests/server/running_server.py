"""A server on a real socket, in a thread with its own event loop."""

import asyncio
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from openai import OpenAI

from quire.server.backend import Engine
from quire.server.listen import serve
from quire.server.settings import ServerSettings
from quire.server.sockets import bind


@dataclass
class RunningServer:
    """Use as a context manager; leaving it stops the server."""

    engine: Engine
    settings: ServerSettings = field(default_factory=lambda: ServerSettings(port=0))
    wait: bool = True
    """Wait until the engine is ready."""
    start_seconds: float = 10
    reports: list[str] = field(default_factory=list)

    def __enter__(self) -> "RunningServer":
        self.listener = bind(self.settings)
        self.port: int = self.listener.getsockname()[1]
        self._events = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._events.wait(self.start_seconds), self.reports
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        async def until_cancelled() -> None:
            self._task = asyncio.ensure_future(serve(self.engine, self.settings, self.listener, report=self._report))
            with suppress(asyncio.CancelledError):
                await self._task

        self._loop.run_until_complete(until_cancelled())
        self._loop.close()

    def _report(self, line: str) -> None:
        self.reports.append(line)
        if line.startswith("ready" if self.wait else "listening"):
            self._events.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[HTTPResponse, Any]:
        """Send a request that the openai client would not send. Returns (response, its JSON or text)."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, body, {**given, **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response, json.loads(content) if is_json else content.decode()

    def raw(self, data: bytes, *, read: bool = True) -> bytes:
        """Send raw bytes. Returns everything the server sends until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            received = b""
            while read and (part := connection.recv(65536)):
                received += part
            return received
