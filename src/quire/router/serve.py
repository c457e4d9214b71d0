"""serve: the router from its first look at the servers to the end of its last request."""

import asyncio
import socket
from collections.abc import Callable

from quire.errors import ConfigError
from quire.router.app import RouterApp
from quire.router.backends import Backends
from quire.router.backends_file import BackendsFile
from quire.router.event_feed import EventFeed
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES
from quire.server.listen import HttpServer
from quire.server.settings import ServerSettings, is_loopback
from quire.server.sockets import url_of


async def serve(settings: RouterSettings, listener: socket.socket, *, report: Callable[[str], None]) -> bool:
    """Serve until a signal. Returns whether all requests could finish. Raises `ConfigError` for servers that cannot be
    reached or do not fit together."""
    fleet = Fleet(
        POLICIES[settings.policy](), max_blocks=settings.max_blocks, max_requests=settings.max_backend_requests
    )
    backends = Backends(settings, fleet)
    listed = None if settings.backends_file is None else BackendsFile(settings.backends_file)
    if listed is not None:
        backends.keep(listed.read())
    app = RouterApp(settings, fleet, backends)
    feeds = [
        EventFeed(fleet, url, address, backends.by_url[url])
        for url, address in zip(settings.backends, settings.kv_events, strict=False)
        if address != "-"
    ]
    server = HttpServer(app, http_settings(settings))
    try:
        await backends.start()
        _check_public(settings, backends)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve(sockets=[listener]))
            following = () if listed is None else (listed.follow(backends, settings.health_interval),)
            prefilling = () if app.proxy.prefill is None else (app.proxy.prefill.watch(),)
            watched = (backends.watch(), *following, *prefilling, *(feed.run() for feed in feeds))
            watching = [tasks.create_task(work) for work in watched]
            await server.listening.wait()
            report(f"listening on {url_of(listener)}")
            report(f"ready: {len(fleet.replicas)} of {len(backends.by_url)} servers, policy {settings.policy}")
            try:
                await server.stop_asked.wait()
                return await _drain(app, server, settings.shutdown_timeout, report)
            finally:
                for task in watching:
                    task.cancel()
                server.should_exit = True
                server.stop()
    finally:
        await backends.client.aclose()
        if app.proxy.prefill is not None:
            await app.proxy.prefill.backends.client.aclose()


def http_settings(settings: RouterSettings) -> ServerSettings:
    """The settings of the HTTP server. Keys are the servers' matter."""
    return ServerSettings(
        host=settings.host, port=settings.port, max_body_size=settings.max_body_size, allow_unauthenticated=True
    )


def _check_public(settings: RouterSettings, backends: Backends) -> None:
    if backends.is_open and not (settings.allow_unauthenticated or is_loopback(settings.host)):
        raise ConfigError(
            f"host is {settings.host}, which others can reach, and the servers ask for no API key; start them with "
            "--api-key, listen on 127.0.0.1, or accept it with --allow-unauthenticated"
        )


async def _drain(app: RouterApp, server: HttpServer, seconds: float, report: Callable[[str], None]) -> bool:
    """Take no new connections, and wait for the running requests."""
    report(f"stopping: running requests have {seconds:g} seconds (a second signal stops at once)")
    server.stop_asked.clear()
    app.is_draining = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while app.num_running and loop.time() < deadline and not server.stop_asked.is_set():
        await asyncio.sleep(0.05)
    if app.num_running:
        server.force_exit = True
        return False
    return True
