"""RouterDeployment: `quire router` as the ingress of a Serve application."""

import asyncio

from starlette.types import Receive, Scope, Send

from quire.cluster.options import ClusterOptions
from quire.router.app import RouterApp
from quire.router.backends import Backends
from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES

GONE_SECONDS = 5.0
"""A replica that has not announced itself for so long, and does not answer, is forgotten."""


class Ingress:
    """The ASGI application that Serve calls. One process holds one router, which `RouterDeployment` makes."""

    def __init__(self) -> None:
        self.app: RouterApp | None = None

    def __reduce__(self) -> str:
        """Serve sends it to the router's process: there it is that process's `INGRESS`, and no copy of this one."""
        return "INGRESS"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        assert self.app is not None, "Serve makes the deployment before it sends requests"
        await self.app(scope, receive, send)


async def _live(receive: Receive, send: Send) -> None:
    """Answer Serve, which asks whether the application has started and ended: the deployment does both."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


INGRESS = Ingress()


class RouterDeployment:
    """The router's application, and the addresses that replicas tell."""

    async def __init__(self, options: ClusterOptions, replicas: object) -> None:  # type: ignore[misc]  # awaited
        """`replicas` is the handle of the other deployment, which makes it part of the application."""
        settings = options.router_settings()
        fleet = Fleet(
            POLICIES[settings.policy](), max_blocks=settings.max_blocks, max_requests=settings.max_backend_requests
        )
        self._backends = Backends(settings, fleet)
        self._backends.by_url.clear()
        self._announced: dict[str, float] = {}
        INGRESS.app = RouterApp(settings, fleet, self._backends)
        self._watching = asyncio.create_task(self._watch(settings.health_interval))

    async def announce(self, url: str) -> None:
        """A replica is at `url`."""
        self._announced[url] = asyncio.get_running_loop().time()
        self._backends.add(url)

    async def _watch(self, seconds: float) -> None:
        """Look at all replicas for ever, and forget the ones that are gone."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._backends.watch())
            while True:
                await asyncio.sleep(seconds)
                for url, seen in list(self._announced.items()):
                    if loop.time() - seen > GONE_SECONDS and not self._backends.by_url[url].is_up:
                        del self._announced[url]
                        self._backends.drop(url)
