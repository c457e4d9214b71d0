"""/kv: contents of the KV pool, in total and per request, for operators. A key that is no admin's sees its requests."""

import asyncio

from msgspec import Struct

from quire.errors import EngineUnavailableError
from quire.outputs import MemoryReport, RequestMemory
from quire.server.endpoint import Endpoint, RequestContext

_ANSWER_SECONDS = 10.0


class OwnMemory(Struct):
    """The part of the memory report that concerns one API key."""

    requests: list[RequestMemory]


async def get_kv(context: RequestContext) -> None:
    """The memory report as JSON. The engine makes it between two steps."""
    context.check_ready()
    try:
        report = await asyncio.wait_for(context.engine.memory_report(), _ANSWER_SECONDS)
    except TimeoutError:
        raise EngineUnavailableError(f"the engine did not answer within {_ANSWER_SECONDS:.0f} s") from None
    if context.key_use.sees_all:
        await context.reply(report)
    else:
        own = [request for request in report.requests if request.tenant == context.client.account]
        await context.reply(OwnMemory(own))


ENDPOINTS = (
    Endpoint(
        "GET",
        "/kv",
        get_kv,
        "Contents of the KV pool, in total and per request; without an admin's key only the key's own `requests`",
        reply=MemoryReport,
    ),
)
