"""/kv: contents of the KV pool, in total and per request, for operators."""

import asyncio

from quire.errors import EngineUnavailableError
from quire.outputs import MemoryReport
from quire.server.endpoint import Endpoint, RequestContext

_ANSWER_SECONDS = 10.0


async def get_kv(context: RequestContext) -> None:
    """The memory report as JSON. The engine makes it between two steps."""
    context.check_ready()
    try:
        report = await asyncio.wait_for(context.engine.memory_report(), _ANSWER_SECONDS)
    except TimeoutError:
        raise EngineUnavailableError(f"the engine did not answer within {_ANSWER_SECONDS:.0f} s") from None
    await context.reply(report)


ENDPOINTS = (Endpoint("GET", "/kv", get_kv, "Contents of the KV pool, in total and per request", reply=MemoryReport),)
