"""Endpoint: a row of the table of routes. RequestContext: one HTTP request and the ways to answer it."""

import asyncio
import gc
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from quire.engine.model_task import check_task
from quire.engine.tokenizer import Tokenizer
from quire.errors import EngineUnavailableError, RequestError
from quire.request import Task
from quire.server.auth import Client
from quire.server.backend import Engine
from quire.server.decoding import decode_json, unknown_fields
from quire.server.errors import OPENAI_ERRORS, ErrorForm, Refusal
from quire.server.handover import (
    COMPUTE,
    PREFILLED_HEADER,
    PROMPT_HEADER,
    STREAM_HEADER,
    Handover,
    decode_progress,
)
from quire.server.key_use import KeyUse
from quire.server.limits import check_shape, read_body
from quire.server.services import Services
from quire.server.settings import ServerSettings
from quire.server.streaming import DIRECT, DirectWriter, StreamForm, send_events, while_connected

T = TypeVar("T")

_MAX_NAMES = 20
"""Names of models that a refusal lists."""
_MAX_WARNING = 400
"""Characters of one warning."""
_LARGE_BODY = 2**16
"""Bytes that may take milliseconds to read."""
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
    services: Services
    queues: bool = False
    """The request will wait in the engine's queue."""

    def for_vectors(self) -> "RequestContext":
        """The same request with the engine that makes vectors, which may be another than the one that generates."""
        return replace(self, engine=self.engine.vectors)

    def check_generates(self) -> None:
        """As `check_ready`; raises `RequestError` if the engine's model makes vectors instead of text."""
        self.check_ready()
        check_task(self.engine.model_config, Task.SAMPLE)

    async def read(self, body_type: type[T]) -> T:
        """The JSON body as `body_type`. Raises `Refusal`, naming the field, if the body does not fit it.

        Fields that the type does not have are ignored; a header of the response names them.
        """
        body = await read_body(self.scope, self.receive, self.settings)
        if self.queues and (self.computes_prompt or not self.asks_for_prompt):
            self.services.door.check(self.engine, self.client.account or None)
        given = dict(self.scope["headers"]).get(STREAM_HEADER)
        if given is not None:
            handover = Handover.from_header(given)
            progress = decode_progress(body[: handover.num_bytes]) if handover.num_bytes else {}
            self.scope["state"]["handover"] = replace(handover, progress=progress)
            body = body[handover.num_bytes :]
        decoded: T = await _in_turns(body, lambda: check_shape(body), lambda: decode_json(body, body_type))
        names: list[str] = await _in_turns(body, lambda: unknown_fields(body, body_type))
        if names:
            self.warn(*self.services.warnings.describe(body_type, names))
        return decoded

    @property
    def handover(self) -> Handover | None:
        """What the router says about the answer; None for a request that comes from a client."""
        handover: Handover | None = self.scope["state"].get("handover")
        return handover

    @property
    def asks_for_prompt(self) -> bool:
        """The router wants to know the prompt's blocks, not the answer."""
        return PROMPT_HEADER in dict(self.scope["headers"])

    @property
    def computes_prompt(self) -> bool:
        """The router wants the prompt computed, and another server to answer."""
        return dict(self.scope["headers"]).get(PROMPT_HEADER) == COMPUTE

    @property
    def is_prefilled(self) -> bool:
        """Another server has computed the prompt for this one."""
        return PREFILLED_HEADER in dict(self.scope["headers"])

    def answer_id(self, prefix: str) -> str:
        """The id of the answer, which begins with `prefix`."""
        return prefix + (self.handover.stream_id if self.handover else uuid.uuid4().hex)

    def created(self) -> int:
        """Unix time at which the answer began."""
        return self.handover.created if self.handover else int(time.time())

    def warn(self, *texts: str) -> None:
        """Say in a header of the response, and once in the log, what of the request has no effect. `texts` may hold
        words of the client: a line feed in one would begin another header."""
        lines = ["".join(char if char.isprintable() else "?" for char in text[:_MAX_WARNING]) for text in texts]
        self.scope["state"].setdefault("warnings", []).extend(lines)
        self.services.warnings.log(self.scope["path"], lines)

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

    async def stream(self, events: AsyncGenerator[bytes, None], form: StreamForm) -> None:
        """Answer with events, as `form` says. `events` is closed if the client leaves or stops reading."""
        timeout = self.settings.stall_timeout
        await while_connected(self.receive, send_events(self.send, events, timeout, form, self.direct))

    @property
    def direct(self) -> DirectWriter | None:
        """A way past ASGI for events; None where something else serves the application than this package."""
        writer: DirectWriter | None = self.scope.get("extensions", {}).get(DIRECT)
        return writer

    @property
    def path_params(self) -> Mapping[str, str]:
        """The parts of the path that the route names."""
        params: Mapping[str, str] = self.scope["path_params"]
        return params

    @property
    def query(self) -> Mapping[str, str]:
        """The parameters behind the path's question mark."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1")))

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

    @property
    def key_use(self) -> KeyUse:
        """What the client's API key allows, and what it has in use."""
        return self.services.keys.use_of(self.client.account)

    @property
    def model_names(self) -> list[str]:
        """The names of models that the client's key may use."""
        allowed = self.key_use.key.models
        names = [*self.engine.model_names, *self.engine.adapters.names]
        return names if allowed is None else [name for name in names if name in allowed]

    def check_ready(self) -> None:
        """Raise `EngineUnavailableError` unless the engine is ready, or restarting: requests wait for a restart."""
        state = self.engine.state
        if self.engine.outage is not None:
            raise self.engine.outage
        if state not in ("ready", "restarting"):
            raise EngineUnavailableError(_UNAVAILABLE.get(state, f"the engine is {state}"))

    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer. Raises `EngineUnavailableError` before it is loaded, and `Refusal` if there is
        none."""
        tokenizer = self.tokenizer_if_any()
        if tokenizer is None:
            raise Refusal(
                400,
                "the model has no tokenizer, without which there is no text: /v1/completions takes token ids as "
                "prompt, and returns them with return_token_ids",
                code="no_tokenizer",
            )
        return tokenizer

    def tokenizer_if_any(self) -> Tokenizer | None:
        """The engine's tokenizer; None for a model without one. Raises `EngineUnavailableError` before it is loaded."""
        if self.engine.tokenizer is None and self.engine.state == "loading":
            raise EngineUnavailableError(_UNAVAILABLE["loading"])
        return self.engine.tokenizer

    def check_model(self, name: str | None) -> str:
        """The model name to put in the reply. Raises `Refusal` (404) for a model that is not served to the client's
        key."""
        names = self.model_names
        if name is not None and name in self.engine.other_names:
            raise RequestError(
                f"the model {name!r} does not serve this endpoint: one of both models here generates text, the other "
                f"makes vectors; use {', '.join(names)}",
                param="model",
                code="wrong_task",
            )
        if name is None:
            name = names[0] if names else self.engine.model_names[0]
        if name not in names:
            shown = ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" * (len(names) > _MAX_NAMES))
            raise Refusal(
                404,
                f"the model {name[:200]!r} is not served here; there is {shown}",
                code="model_not_found",
                param="model",
            )
        self.scope["state"]["adapter"] = "" if name in self.engine.model_names else name
        return name

    @property
    def adapter_name(self) -> str:
        """The adapter that `check_model` let through; empty: the model alone."""
        name: str = self.scope["state"].get("adapter", "")
        return name


async def _in_turns(body: bytes, *works: Callable[[], Any]) -> Any:
    """The result of the last work on `body`. Each reads all of it: other requests run in between if it is large."""
    result = None
    for work in works:
        if len(body) > _LARGE_BODY:
            await asyncio.sleep(0)
        gc.disable()  # it would scan every object for each few hundred that are made
        try:
            result = work()
        finally:
            gc.enable()
    return result


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
    stream_type: str = "text/event-stream"
    public: bool = False
    """Needs no API key."""
    queues: bool = False
    """Its requests wait in the engine's queue."""
    errors: ErrorForm = OPENAI_ERRORS
