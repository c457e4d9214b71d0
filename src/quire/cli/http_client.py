"""A small asynchronous HTTP client for `chat`, `bench`, `ps` and `top`: JSON and server-sent events.

It opens one connection per request, so that a benchmark measures requests and not a connection pool. It needs only the
standard library.
"""

import asyncio
import json
import os
import socket
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigError, QuireError

_LINE_LIMIT = 2**24
"""Maximum bytes of one event. The log-probabilities of a long prompt are one event."""


class HttpError(QuireError):
    """No answer, or an answer with an error status."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, such as http://127.0.0.1:8000/v1/completions, and the API key if the server needs one."""

    url: str
    api_key: str | None = None

    async def check(self) -> None:
        """Raise `HttpError` if nothing listens at the address."""
        _, writer = await self._connect()
        writer.close()

    async def get(self) -> bytes:
        """The body of the answer to GET. Raises `HttpError`."""
        async with self._ask(None) as lines:
            return b"\n".join([line async for line in lines])

    async def events(self, body: dict[str, Any] | None) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer, up to [DONE]; without a body of a GET.

        Raises `HttpError`, also for an error event.
        """
        async with self._ask(body) as lines:
            async for line in lines:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if not isinstance(event, dict):
                    raise ValueError(f"an event is {data[:100].decode(errors='replace')}")
                if error := event.get("error"):
                    raise HttpError(str(error.get("message", error) if isinstance(error, dict) else error))
                yield event

    @asynccontextmanager
    async def _ask(self, body: dict[str, Any] | None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of the answer. Raises `HttpError` unless the status is 200."""
        parts = urlsplit(self.url)
        reader, writer = await self._connect()
        try:
            await self._send(writer, parts.hostname or "", parts.path, body)
            status, headers = await _read_head(reader)
            lines = _chunked(reader) if headers.get("transfer-encoding", "") == "chunked" else _plain(reader, headers)
            if status != 200:
                text = b"".join([line async for line in lines]).decode(errors="replace")
                raise HttpError(f"{self.url} answers {status}: {_message(text)}")
            yield lines
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise HttpError(f"{self.url} closed the connection") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise HttpError(f"{self.url} does not answer as such a server does: {error}; check the address") from error
        finally:
            writer.close()

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        try:
            return await asyncio.open_connection(
                parts.hostname, port, ssl=ssl.create_default_context() if secure else None, limit=_LINE_LIMIT
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
            raise HttpError(f"no answer from {self.url}: {_reason(error)}; is the server running?") from error

    async def _send(self, writer: StreamWriter, host: str, path: str, body: dict[str, Any] | None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"host: {host}", "connection: close"]
        if body is not None:
            head += ["content-type: application/json", f"content-length: {len(data)}"]
        if self.api_key:
            head.append(f"authorization: Bearer {self.api_key}")
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()


async def _read_head(reader: StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer. Raises `ValueError` for what is not HTTP."""
    first = await reader.readline()
    if not first:
        raise asyncio.IncompleteReadError(first, None)
    version, _, rest = first.decode("latin-1").partition(" ")
    if not (version.startswith("HTTP/") and rest[:3].isdecimal()):
        raise ValueError(f"it sends {first[:40]!r}, which is not HTTP")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(rest[:3]), headers


async def _plain(reader: StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    async for line in reader:
        yield line


async def _chunked(reader: StreamReader) -> AsyncIterator[bytes]:
    """The lines of a chunked body. A line may span chunks."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        data = await reader.readexactly(size + 2)
        *lines, rest = (rest + data[:-2]).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def server_target(url: str, path: str, api_key: str | None) -> Target:
    """A path of the server at `url`, which may end in /v1 as clients write it. Raises `ConfigError`."""
    check_url(url)
    return Target(url.rstrip("/").removesuffix("/v1") + path, api_key)


def check_url(url: str) -> None:
    """Raise `ConfigError` for what is no address of a server."""
    try:
        parts = urlsplit(url)
        port = parts.port
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    except ValueError:  # brackets that do not match, or a port that is no number up to 65535
        sound = False
    if not sound or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise ConfigError(f"url is {url!r}; give one such as http://127.0.0.1:8000")


def _reason(error: OSError | UnicodeError) -> str:
    """The system's words. asyncio puts the address in their place, and names several by all their errors."""
    if isinstance(error, UnicodeError):
        return str(error)
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
