"""/, /health and /version: whether the server is there and takes requests, and its version."""

from quire import __version__
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.replies import Health, Version


async def get_health(context: RequestContext) -> None:
    """200 if a request would be accepted; 503 with the state while loading, draining, restarting or dead."""
    state = context.engine.state
    await context.reply(Health(status=state), status=200 if state == "ready" else 503)


async def get_version(context: RequestContext) -> None:
    await context.reply(Version(version=__version__))


async def get_root(context: RequestContext) -> None:
    """A line of text: Ollama's command line asks for / before anything else."""
    await context.reply_bytes(b"Quire is running\n", b"text/plain; charset=utf-8")


ENDPOINTS = (
    Endpoint("GET", "/", get_root, "Whether the server is there", public=True),
    Endpoint("GET", "/health", get_health, "Whether the server takes requests", reply=Health, public=True),
    Endpoint("GET", "/version", get_version, "The server's version", reply=Version),
)
