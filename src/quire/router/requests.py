"""RoutedRequest: a client's request as the router passes it on."""

import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.types import Receive, Scope

from quire.router.marked_stream import MarkedStream
from quire.server.app import ENDPOINTS
from quire.server.errors import Refusal
from quire.server.handover import PREFILLED_HEADER, PROMPT_HEADER, STREAM_HEADER, Handover, encode_progress
from quire.server.limits import ClientGoneError

Headers = list[tuple[bytes, bytes]]

COMPUTING = frozenset(each.path for each in ENDPOINTS if each.method == "POST" and "{" not in each.path)
"""Paths whose requests only compute: sending one twice changes nothing."""
GENERATING = frozenset(each.path for each in ENDPOINTS if each.method == "POST" and each.streams)
"""Paths whose answers are generated, whole or as a stream."""
_STREAMS_BY_DEFAULT = ("/api/",)
_OWN = (STREAM_HEADER, PROMPT_HEADER, PREFILLED_HEADER)
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_NOT_PASSED_ON = HOP_BY_HOP | {b"host", b"content-length", b"accept-encoding", b"expect", *_OWN}


@dataclass(slots=True)
class RoutedRequest:
    """One request, and what the client has got of its answer."""

    method: str
    target: str
    """Path and query."""
    path: str
    headers: Headers
    body: bytes
    fields: Mapping[str, Any]
    """The JSON body; empty for any other."""
    stream_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    answer: MarkedStream = field(default_factory=MarkedStream)
    num_deaths: int = 0
    """Servers that died while they computed it."""
    content: bytes = b""
    """A digest of what is computed, by which a deadly request is known again: the server's, or else the body's."""
    prefilled: bool = False
    """Another server has computed its prompt."""
    version: str = ""
    """Version of the server that began the stream."""

    @property
    def only_computes(self) -> bool:
        """Sending it twice changes nothing."""
        return self.method == "GET" or (self.method == "POST" and self.path in COMPUTING)

    @property
    def streams(self) -> bool:
        """The client wants the answer as it comes."""
        if self.method != "POST" or self.path not in GENERATING:
            return False
        given = self.fields.get("stream")
        return self.path.startswith(_STREAMS_BY_DEFAULT) if given is None else bool(given)

    def digest(self) -> bytes:
        """A digest of target and body."""
        return hashlib.blake2b(self.target.encode() + b"\0" + self.body, digest_size=16).digest()

    def to_send(self, *, handover: bool) -> tuple[Headers, bytes]:
        """Headers and body for a server; with `handover` also the progress, for one that goes on where another died."""
        headers = [*self.headers, (PREFILLED_HEADER, b"1")] if self.prefilled else self.headers
        if not handover:
            return headers, self.body
        progress = encode_progress(self.answer.progress) if self.answer.progress else b""
        header = Handover(self.stream_id, self.created, len(progress)).header()
        return [*headers, (STREAM_HEADER, header)], progress + self.body


async def read_request(scope: Scope, receive: Receive, max_body_size: int) -> RoutedRequest:
    """The whole request. Raises `Refusal` (413) for a body over the limit."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > max_body_size:
            raise Refusal(
                413,
                f"the body is larger than the router's limit of {max_body_size} bytes (--max-body-size)",
                code="body_too_large",
            )
    body = b"".join(parts)
    query = scope["query_string"].decode("latin-1")
    path = scope["path"]
    target = (scope.get("raw_path") or quote(path).encode()).decode("latin-1") + (f"?{query}" if query else "")
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON]
    headers.append((b"accept-encoding", b"identity"))
    return RoutedRequest(scope["method"], target, path, headers, body, _fields(body))


def _fields(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, or {}: the server says what is wrong with it."""
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}
