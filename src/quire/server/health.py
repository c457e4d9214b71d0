"""/health, /health/live, /health/ready and /version: whether the server is there and takes requests."""

from msgspec import UNSET

from quire import __version__
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.replies import Health, Version


async def get_health(context: RequestContext) -> None:
    """200 if a request would be computed: the engine is ready, and if it has work, it advances. Else 503."""
    state, advances = context.engine.state, context.engine.advances
    outage = context.engine.outage
    shown = "stalled" if state == "ready" and not advances else state
    await context.reply(
        Health(status=shown, cause=UNSET if outage is None else str(outage)), status=200 if advances else 503
    )


async def get_live(context: RequestContext) -> None:
    """200 as long as this process answers; a supervisor that restarts it for anything else would lose requests."""
    await context.reply(Health(status="live"))


async def get_version(context: RequestContext) -> None:
    await context.reply(Version(version=__version__))


ENDPOINTS = (
    Endpoint("GET", "/health", get_health, "Whether the server takes requests", reply=Health, public=True),
    Endpoint("GET", "/health/ready", get_health, "Whether the server takes requests", reply=Health, public=True),
    Endpoint("GET", "/health/live", get_live, "Whether the server answers", reply=Health, public=True),
    Endpoint("GET", "/version", get_version, "The server's version", reply=Version),
)
