"""/kv, /kv/stream, /kv/blocks and /kv/requests: contents of the KV pool, for operators and for the page at /.

A key that is no admin's sees its own requests. Only /kv/blocks and /kv/requests hold tokens of prompts. They answer the
holder of a key; a server without keys answers the machine that it runs on.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from quire.errors import EngineUnavailableError, RequestError
from quire.outputs import MemoryReport, RequestMemory
from quire.pool_view import BlockDetail, PoolFrame, RequestDetail
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal, error_body
from quire.server.settings import is_loopback
from quire.server.streaming import StreamForm

T = TypeVar("T")

_ANSWER_SECONDS = 10.0
FRAME_SECONDS = 0.2
"""Least time between two frames of one viewer."""
_FORWARDING = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


class OwnMemory(Struct):
    """The part of the memory report that concerns one API key."""

    requests: list[RequestMemory]


class ShownBlock(Struct):
    """A block's details and the text of its tokens."""

    block: BlockDetail
    texts: list[str]


class ShownRequest(Struct):
    """A request's details and the text of its tokens."""

    request: RequestDetail
    texts: list[str]


async def get_kv(context: RequestContext) -> None:
    """The memory report as JSON. The engine makes it between two steps."""
    context.check_ready()
    report = await _in_time(context.engine.memory_report())
    tenant = _tenant(context)
    if tenant is None:
        await context.reply(report)
    else:
        await context.reply(OwnMemory([request for request in report.requests if request.tenant == tenant]))


async def get_stream(context: RequestContext) -> None:
    """Changes of the pool as server-sent events (see `PoolFrame`), until the client leaves."""
    viewer = context.engine.views.open(_tenant(context))

    async def frames() -> AsyncGenerator[bytes, None]:
        while True:
            yield encode_frame(await viewer.next())
            await asyncio.sleep(FRAME_SECONDS)

    form = StreamForm(failure=_failure, done=b"", ping=b": nothing new\n\n")
    try:
        await context.stream(frames(), form)
    finally:
        viewer.close()


async def get_block(context: RequestContext) -> None:
    """One block: its holders, its tokens, whether the prefix cache can find it."""
    _check_reader(context)
    given = context.path_params["block"]
    detail = await _in_time(context.engine.questions.block(int(given))) if _is_index(given) else None
    tenant = _tenant(context)
    if detail is not None and tenant is not None:
        detail.holders = [holder for holder in detail.holders if holder.tenant == tenant]
        detail = detail if detail.holders else None
    if detail is None:
        raise Refusal(404, f"there is no block {given[:40]!r} of yours; GET /kv/stream lists blocks", code="not_found")
    await context.reply(ShownBlock(detail, _texts(context, detail.token_ids)))


async def get_request(context: RequestContext) -> None:
    """One unfinished request: its tokens, its block tables, the requests that share its blocks."""
    _check_reader(context)
    request_id = context.path_params["request_id"]
    detail = await _in_time(context.engine.questions.request(request_id))
    tenant = _tenant(context)
    if detail is None or tenant not in (None, detail.request.tenant):
        raise Refusal(
            404, f"no unfinished request of yours is called {request_id[:80]!r}; GET /kv lists them", code="not_found"
        )
    if tenant is not None:
        detail.shared_with = {}
    await context.reply(ShownRequest(detail, _texts(context, detail.token_ids)))


def encode_frame(frame: PoolFrame) -> bytes:
    """The frame as an event. Empty parts are left out."""
    shown = {name: value for name in PoolFrame.__slots__ if (value := getattr(frame, name))}
    return b"data: " + msgspec.json.encode(shown) + b"\n\n"


def _failure(error: RequestError) -> bytes:
    return b"event: error\ndata: " + msgspec.json.encode(error_body(error)) + b"\n\n"


async def _in_time(question: Coroutine[Any, Any, T]) -> T:
    try:
        return await asyncio.wait_for(question, _ANSWER_SECONDS)
    except TimeoutError:
        raise EngineUnavailableError(f"the engine did not answer within {_ANSWER_SECONDS:.0f} s") from None


def _tenant(context: RequestContext) -> str | None:
    """The only account whose requests the client may see; None if it may see all."""
    return None if context.key_use.sees_all else context.client.account


def _check_reader(context: RequestContext) -> None:
    """Raise `Refusal` (403) unless the client may read prompts: anybody's for an admin, its own with another key."""
    context.check_ready()
    if context.settings.keys:
        return
    headers: Mapping[bytes, bytes] = dict(context.scope["headers"])
    sender = context.scope.get("client")
    is_near = sender is None or is_loopback(sender[0])
    if is_near and is_loopback(context.settings.host) and not any(name in headers for name in _FORWARDING):
        return
    raise Refusal(
        403,
        "a server without API keys shows the tokens of prompts to its own machine only; set --api-key",
        code="key_needed",
    )


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _texts(context: RequestContext, token_ids: list[int]) -> list[str]:
    """The text of each token; empty for a model without a tokenizer."""
    tokenizer = context.tokenizer_if_any()
    if tokenizer is None:
        return []
    return ["" if token < 0 else tokenizer.id_to_text(token) for token in token_ids]


ENDPOINTS = (
    Endpoint(
        "GET",
        "/kv",
        get_kv,
        "Contents of the KV pool, in total and per request; without an admin's key only the key's own `requests`",
        reply=MemoryReport,
    ),
    Endpoint("GET", "/kv/stream", get_stream, "Changes of the KV pool as events", reply=PoolFrame, streams=True),
    Endpoint("GET", "/kv/blocks/{block}", get_block, "Holders and tokens of a block", reply=ShownBlock),
    Endpoint(
        "GET", "/kv/requests/{request_id}", get_request, "Tokens and block tables of a request", reply=ShownRequest
    ),
)
