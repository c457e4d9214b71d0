"""A server that answers as a script says, over a real socket, and can die in the middle of an answer."""

import asyncio
import json
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.request import SampleProgress
from quire.server.handover import Handover, decode_progress, mark
from tests.server.scripted_engine import CompletionOutput

Script = Callable[["Asked"], AsyncIterator[bytes]]
"""Yields the parts of a body; raises `Died` to break the connection."""


class Died(Exception):
    """The connection ends here."""


@dataclass
class Asked:
    """A request as the server got it."""

    path: str
    headers: dict[str, str]
    body: Any
    progress: dict[int, SampleProgress]


def event(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


def marked(text: str, *token_ids: int, choice: int = 0) -> bytes:
    return event(text) + mark([(choice, CompletionOutput(choice, text, list(token_ids)))])


@dataclass
class FakeServer:
    """Quire, if it has a block size; else another server."""

    script: Script | None = None
    block_size: int = 16
    model: str = "fake"
    version: str = ""
    ready: int = 200
    status: str = "ready"
    """What /health/ready says in words."""
    raw: dict[str, bytes] = field(default_factory=dict)
    """Path → bytes that are written as they are, and then the connection closes."""
    drips: bool = False
    """Every answer comes as one byte after the other, and has no end."""
    refusal: tuple[int, bytes] | None = None
    """Status and body of every answer that computes."""
    key: str = ""
    hangs: bool = False
    """It takes requests and answers none."""
    tls: ssl.SSLContext | None = None
    prefix: str = ""
    """What stands before every path."""
    asked: list[Asked] = field(default_factory=list)
    num_prefilled: int = 0
    """Prompts that it computed for other servers."""
    url: str = ""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeServer"]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        scheme = "http" if self.tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}{self.prefix}"
        try:
            yield self
        finally:
            self.die()

    def die(self) -> None:
        """Stop listening, and break every connection."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) != b"":
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(method, path, headers, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError, Died):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if self.hangs:
            await asyncio.sleep(60)
        path = path.removeprefix(self.prefix)
        if self.drips:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        if path in self.raw:
            writer.write(self.raw[path])
            await writer.drain()
            raise Died
        if self.key and path.startswith("/v1/") and headers.get("authorization") != f"Bearer {self.key}":
            await self._whole(writer, 401, b'{"error": {"message": "no key"}}')
        elif path == "/v1/models":
            await self._whole(writer, 200, json.dumps({"data": [{"id": self.model}]}).encode())
        elif path.startswith("/health"):
            await self._whole(writer, self.ready, json.dumps({"status": self.status}).encode())
        elif path == "/tokenize":  # a token for each byte, as in the events of the tests
            given = json.loads(body)
            text = given.get("prompt") or "".join(each["content"] for each in given["messages"])
            await self._whole(writer, 200, json.dumps({"tokens": list(text.encode())}).encode())
        elif headers.get("x-quire-prompt") == "compute" and self.refusal is not None:
            await self._whole(writer, *self.refusal)
        elif "x-quire-prompt" in headers and self.block_size:
            if headers["x-quire-prompt"] == "compute":
                self.num_prefilled += 1
            prompt = json.loads(body)["prompt"]
            blocks = {"model": self.model, "block_size": self.block_size, "num_tokens": 40, "hashes": "AAAAAAAAAAE="}
            blocks |= {"version": self.version, "content": b64encode(str(prompt).encode()).decode()}
            await self._whole(writer, 200, json.dumps(blocks).encode())
        elif "x-quire-prompt" in headers or self.script is None:
            await self._whole(writer, 200, b'{"text": "whole"}')
        else:
            await self._compute(path, headers, body, writer)

    async def _compute(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        progress: dict[int, SampleProgress] = {}
        given = headers.get("x-quire-stream")
        if given is not None:
            handover = Handover.from_header(given.encode())
            progress = decode_progress(body[: handover.num_bytes]) if handover.num_bytes else {}
            body = body[handover.num_bytes :]
        asked = Asked(path, headers, json.loads(body) if body[:1] == b"{" else body, progress)
        self.asked.append(asked)
        if self.refusal is not None:
            await self._whole(writer, *self.refusal)
            return
        assert self.script is not None
        marks = b"x-quire-stream: marked\r\n" if given is not None else b""
        kind = b"text/event-stream" if asked.body.get("stream") else b"application/json"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%btransfer-encoding: chunked\r\n\r\n" % (kind, marks))
        async for part in self.script(asked):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    @staticmethod
    async def _whole(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )
        await writer.drain()
