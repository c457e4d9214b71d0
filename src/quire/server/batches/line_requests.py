"""LineRequests: calls the endpoint that a line of a batch names, inside the process and without a socket."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import Message, Scope

from quire.errors import RequestError
from quire.server.auth import Client
from quire.server.backend import Engine
from quire.server.batches.objects import InputLine, LineResponse
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal, as_request_error, error_body, error_headers
from quire.server.key_use import KeyRing
from quire.server.media_fetch import MediaFetcher
from quire.server.responses.store import ResponseStore
from quire.server.services import Services
from quire.server.settings import ServerSettings

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Paths that lines may name, if the server has them."""

_BUSY = (429, 503)
"""Statuses after which a line waits and is sent again."""
_MAX_WAIT = 30.0
"""Seconds before a line is sent again, at most."""


class _Delivery(msgspec.Struct):
    stream: bool | None = None
    background: bool | None = None


class LineRequests:
    """Answers lines; it keeps nothing."""

    def __init__(self, engine: Engine, settings: ServerSettings, endpoints: Sequence[Endpoint], keys: KeyRing) -> None:
        self._engine = engine
        self._settings = settings
        # Answers of batches lie in files; the store of /v1/responses does not fill with them.
        self._services = Services(ResponseStore(None, settings.responses_store_size), keys, MediaFetcher.of(settings))
        self._endpoints = {e.path: e for e in endpoints if e.method == "POST" and e.path in URLS}

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._endpoints)

    async def answer(self, line: InputLine, client: Client) -> LineResponse:
        """What the endpoint answers. While the engine is full or restarts, the line waits."""
        request_id = f"batch_req_{secrets.token_hex(16)}"
        while True:
            status, body, wait = await self._send(line, client)
            if status not in _BUSY:
                return LineResponse(status_code=status, request_id=request_id, body=msgspec.Raw(body))
            await asyncio.sleep(min(wait, _MAX_WAIT))

    async def _send(self, line: InputLine, client: Client) -> tuple[int, bytes, float]:
        """Status and body, and the seconds to wait before the line may be sent again."""
        parts, status = list[bytes](), 0
        unread = [bytes(line.body)]

        async def receive() -> Message:
            if not unread:
                await asyncio.Event().wait()  # nobody hangs up
            return {"type": "http.request", "body": unread.pop()}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            parts.append(message.get("body", b""))

        try:
            _check_delivery(unread[0])
            scope = _scope(line.url, client)
            context = RequestContext(self._engine, self._settings, scope, receive, send, client, self._services)
            await self._endpoints[line.url].handle(context)
            return status, b"".join(parts), 0.0
        except Exception as error:
            shown = as_request_error(error)
            return shown.status, msgspec.json.encode(error_body(shown)), _seconds_to_wait(shown)


def _scope(url: str, client: Client) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "path_params": {},
        "state": {"client": client},
    }


def _check_delivery(body: bytes) -> None:
    """Refuse a line with `stream` or `background`: its answer would not be in the reply."""
    try:
        asked = msgspec.json.decode(body, type=_Delivery, strict=False)
    except msgspec.MsgspecError:
        return  # the endpoint says what is wrong
    for name in ("stream", "background"):
        if getattr(asked, name):
            raise Refusal(400, f"{name} is true; a batch gets whole answers", code="invalid_value", param=name)


def _seconds_to_wait(error: RequestError) -> float:
    headers: dict[bytes, Any] = dict(error_headers(error))
    return float(headers.get(b"retry-after", 1))
