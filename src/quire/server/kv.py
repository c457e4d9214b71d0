"""/kv: what the KV pool holds, in all and per request, for whoever runs the server."""

import asyncio

from quire.errors import EngineUnavailableError
from quire.outputs import MemoryReport
from quire.server.exchange import Endpoint, Exchange

_ANSWER_SECONDS = 10.0


async def get_kv(exchange: Exchange) -> None:
    """The report as JSON; it is made between two steps of the engine."""
    exchange.check_ready()
    try:
        report = await asyncio.wait_for(exchange.engine.memory_report(), _ANSWER_SECONDS)
    except TimeoutError:
        raise EngineUnavailableError(f"the engine did not answer within {_ANSWER_SECONDS:.0f} s") from None
    await exchange.reply(report)


ENDPOINTS = (Endpoint("GET", "/kv", get_kv, "What the KV pool holds, in all and per request", reply=MemoryReport),)
