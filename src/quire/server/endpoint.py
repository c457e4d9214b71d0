"""Endpoint: a row of the table of routes. RequestContext: one HTTP request and the ways to answer it."""

import gc
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from quire.engine.tokenizer import Tokenizer
from quire.errors import EngineUnavailableError, RequestError
from quire.server.auth import Client
from quire.server.backend import Engine
from quire.server.errors import Refusal
from quire.server.limits import check_shape, read_body
from quire.server.settings import ServerSettings
from quire.server.streaming import DONE, send_events, while_connected

T = TypeVar("T")

_TIMEOUT_HEADER = b"x-request-timeout"
_UNAVAILABLE = {
    "loading": "the model is still loading; /health turns 200 when it is ready",
    "draining": "the server is shutting down and takes no new requests",
    "restarting": "the engine is being restarted",
    "dead": "the server is shutting down",
}


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One HTTP request: its parts, the checks on it, and the ways to answer it."""

    engine: Engine
    settings: ServerSettings
    scope: Scope
    receive: Receive
    send: Send
    client: Client

    async def read(self, body_type: type[T]) -> T:
        """The JSON body as `body_type`. Raises `Refusal`, naming the field, if the body does not fit it."""
        body = await read_body(self.scope, self.receive, self.settings)
        check_shape(body)
        gc.disable()  # it would scan every object for each few hundred that are made
        try:
            return decode_json(body, body_type)
        finally:
            gc.enable()

    async def reply(self, body: object, *, status: int = 200) -> None:
        """Answer with JSON."""
        await self.reply_bytes(msgspec.json.encode(body), b"application/json", status=status)

    async def reply_bytes(
        self,
        body: bytes,
        content_type: bytes,
        *,
        status: int = 200,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """Answer with the bytes of `body`."""
        length = (b"content-length", str(len(body)).encode())
        start = [(b"content-type", content_type), length, *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": start})
        await self.send({"type": "http.response.body", "body": body})

    async def reply_when_done(self, work: Coroutine[Any, Any, object]) -> None:
        """Answer with the JSON of the value that `work` returns. `work` is cancelled if the client leaves."""
        await self.reply(await while_connected(self.receive, work))

    async def stream(
        self, events: AsyncGenerator[bytes, None], *, failure: Callable[[RequestError], bytes], done: bytes = DONE
    ) -> None:
        """Answer with server-sent events. `events` is closed if the client leaves or stops reading.

        `failure` makes the event for an error after the first event; `done` ends the stream.
        """
        timeout = self.settings.stall_timeout
        await while_connected(self.receive, send_events(self.send, events, timeout, failure=failure, done=done))

    def timeout(self) -> float | None:
        """Seconds that the request may take: the header x-request-timeout, at most --request-timeout; None: no limit.

        Raises `Refusal` for a header that is no positive number.
        """
        limit = self.settings.request_timeout or None
        given = dict(self.scope["headers"]).get(_TIMEOUT_HEADER)
        if given is None:
            return limit
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0.0 < seconds < inf:
            raise Refusal(
                400,
                f"the header x-request-timeout is {given[:40].decode('latin-1')!r}; give seconds above 0, such as 30",
                code="invalid_value",
                param="x-request-timeout",
            )
        return seconds if limit is None else min(limit, seconds)

    def check_ready(self) -> None:
        """Raise `EngineUnavailableError` unless the engine is ready, or restarting: requests wait for a restart."""
        state = self.engine.state
        if self.engine.outage is not None:
            raise self.engine.outage
        if state not in ("ready", "restarting"):
            raise EngineUnavailableError(_UNAVAILABLE.get(state, f"the engine is {state}"))

    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer. Raises `EngineUnavailableError` before it is loaded."""
        if self.engine.tokenizer is not None:
            return self.engine.tokenizer
        if self.engine.state == "loading":
            raise EngineUnavailableError(_UNAVAILABLE["loading"])
        raise Refusal(400, "the model has no tokenizer.json, without which there is no text", code="no_tokenizer")

    def check_model(self, name: str | None) -> str:
        """The model name to put in the reply. Raises `Refusal` (404) for a model that is not served."""
        names = self.engine.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise Refusal(
                404,
                f"the model {name[:200]!r} is not served here; there is {', '.join(names)}",
                code="model_not_found",
                param="model",
            )
        return name


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route: method, path, handler, and the types of its body and reply for the OpenAPI file."""

    method: str
    path: str
    handle: Callable[[RequestContext], Awaitable[None]]
    summary: str
    body: type | None = None
    reply: type | None = None
    streams: bool = False
    public: bool = False
    """Needs no API key."""


def decode_json(body: bytes, body_type: type[T]) -> T:
    """`body` as `body_type`. Raises `Refusal` (400) that names the field at fault."""
    try:
        return _decoder(body_type).decode(body)  # type: ignore[no-any-return,arg-type]  # lru_cache loses the type
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise Refusal(
            400,
            f"{place.strip('.`') or 'the body'}: {reason}",
            code="invalid_type",
            param=place.strip(".`") or None,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


@lru_cache
def _decoder(body_type: type) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type)
