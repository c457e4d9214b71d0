"""LimitedProtocol: uvicorn's HTTP connection with a limit on every byte that a client can send.

uvicorn itself limits neither headers nor chunk extensions nor trailers, loses the body of a request that offers an
upgrade, and answers bytes that are no request into the response in progress.
"""

from asyncio import TimerHandle, Transport
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quire.errors import EngineUnavailableError, RequestError
from quire.server.descriptors import WANTED, max_connections
from quire.server.errors import error_body
from quire.server.limits import headers_too_large
from quire.server.settings import ServerSettings
from quire.server.streaming import DIRECT

_LINGER_SECONDS = 1.0
_MAX_LINGERING = 16
"""Refused connections that get an answer. Each holds a descriptor for `_LINGER_SECONDS`; others are only closed."""
_OVERHEAD_PER_BYTE = 8
"""Bytes of framing for each byte of a body: chunks of a single byte have five."""
_UPGRADE_HEADERS = (b"upgrade", b"connection", b"http2-settings")


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    settings = ServerSettings()
    max_connections = WANTED

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as in uvicorn's own class
        super().connection_made(transport)
        self._overhead = 0
        """Bytes of the present request that belong to no body."""
        self._body = 0
        self._header_timer: TimerHandle | None = None
        self._refused = False
        self._offers_upgrade = False
        self._await_headers()
        if len(self.connections) > self.max_connections:
            self._refuse_connection()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._overhead += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse_garbage()
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        self._check_limits()

    def _check_limits(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._overhead > self.settings.max_header_size + _OVERHEAD_PER_BYTE * self._body:
            self._refuse_headers() if self._header_timer is not None else self._give_up()
        elif self._body > self.settings.max_body_size and self.cycle.response_complete:
            self._give_up()  # the answer is sent, and nobody reads the rest

    def on_message_begin(self) -> None:
        self._await_headers()
        self._body = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._headers_done()
        self._offers_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._offers_upgrade:
            self._overhead = 0
            super().on_headers_complete()
            extensions: dict[str, Any] = {DIRECT: CycleWriter(self.cycle)}
            self.scope["extensions"] = extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._header_timer is not None:  # else it is a trailer, which nobody reads
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offers_upgrade:
            self._overhead = 0
            super().on_message_complete()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the request again as if it offered no upgrade. The parser has taken what follows its headers for
        another protocol; `rest` is what has arrived of that."""
        if not self._offers_upgrade:  # CONNECT is nothing else; its answer is on the way
            self._refused = True
            return
        self._offers_upgrade = False
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._overhead = 0
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _refuse_garbage(self) -> None:
        """Answer bytes that are no request; behind a response in progress, let it end and answer nothing."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.send_400_response("Invalid HTTP request received.")
            return
        self._refused = True
        cycle.keep_alive = False

    def _await_headers(self) -> None:
        if self._header_timer is None and self.settings.stall_timeout:
            self._header_timer = self.loop.call_later(self.settings.stall_timeout, self._give_up)

    def _headers_done(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse_connection(self) -> None:
        error = EngineUnavailableError(
            f"{len(self.connections) - 1} connections are open, as many as the server's limit of descriptors allows "
            "(ulimit -n); close some, or come again"
        )
        if len(self.connections) > self.max_connections + _MAX_LINGERING:
            self._refused = True
            self.transport.close()
            return
        self._refuse(b"503 Service Unavailable\r\nretry-after: 1", error)

    def _refuse_headers(self) -> None:
        self._refuse(b"431 Request Header Fields Too Large", headers_too_large(self.settings.max_header_size))

    def _refuse(self, status: bytes, error: RequestError) -> None:
        body = msgspec.json.encode(error_body(error))
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (status, len(body), body)
        )
        # Closing while the client still sends would reset the connection and lose the response. Drop what it sends.
        self._refused = True
        self.loop.call_later(_LINGER_SECONDS, self._give_up)


class CycleWriter:
    """The `DirectWriter` of one response."""

    __slots__ = ("_cycle", "_flow", "_write", "num_writes")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write
        self.num_writes = 0

    def ready(self) -> bool:
        cycle = self._cycle
        begun = cycle.chunked_encoding  # None before the headers are written
        return bool(begun) and not (self._flow.write_paused or cycle.disconnected or cycle.response_complete)

    def write(self, data: bytes) -> None:
        if not data:  # an empty chunk would end the body
            return
        self.num_writes += 1
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


def limited_protocol(settings: ServerSettings) -> type[Any]:
    """`LimitedProtocol` with the limits of `settings` and the process, as a class: uvicorn makes the instances."""
    limits = {"settings": settings, "max_connections": max_connections()}
    return type("LimitedProtocol", (LimitedProtocol,), limits)
