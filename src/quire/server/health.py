"""/health and /version: whether the server takes requests, and what it is."""

from quire import __version__
from quire.server.exchange import Endpoint, Exchange
from quire.server.responses import Health, Version


async def get_health(exchange: Exchange) -> None:
    """200 where a request would be taken; 503 with the state while loading, draining, restarting or dead."""
    state = exchange.engine.state
    await exchange.reply(Health(status=state), status=200 if state == "ready" else 503)


async def get_version(exchange: Exchange) -> None:
    await exchange.reply(Version(version=__version__))


ENDPOINTS = (
    Endpoint("GET", "/health", get_health, "Whether the server takes requests", reply=Health, public=True),
    Endpoint("GET", "/version", get_version, "The server's version", reply=Version),
)
