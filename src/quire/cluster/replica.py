"""ReplicaDeployment: one Quire server in an actor of Ray Serve. It listens on its own port and tells the router."""

import asyncio
import contextlib
import logging
from typing import Any

from ray import serve, util

from quire.cluster.options import ClusterOptions
from quire.cluster.scaling import KV_SHARE, QUEUE_SECONDS
from quire.config import EngineConfig
from quire.engine.async_engine import AsyncLLM
from quire.server.app import build_app
from quire.server.key_use import KeyRing, check_keys
from quire.server.listen import HttpServer
from quire.server.settings import ServerSettings
from quire.server.sockets import bind, url_of

logger = logging.getLogger("ray.serve")

ROUTER = "Router"
REPLICA = "Replica"
ANNOUNCE_SECONDS = 1.0


class ReplicaDeployment:
    """Ray starts, watches, scales and replaces it. Serve's destructor drains it."""

    async def __init__(self, options: ClusterOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        self._settings = _settings(options)
        config = EngineConfig.from_options(options.engine)
        config.make_folders()
        self._engine = AsyncLLM(config, logger.info)
        check_keys(self._settings, self._engine)
        listener = bind(self._settings)
        self.url = url_of(listener)
        server_app = build_app(self._engine, self._settings, KeyRing(self._settings))
        self._server = HttpServer(server_app, self._settings)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        await self._engine.start()
        await self._engine.wait_ready()
        self._announcing = asyncio.create_task(self._announce())

    async def check_health(self) -> None:
        """Ray replaces the replica if this raises. An engine that restarts its process heals itself."""
        if self._serving.done() or self._engine.state == "dead":
            raise RuntimeError(f"the engine of {self.url} is {self._engine.state}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The engine's own numbers, for the autoscaling policy."""
        stats = self._engine.stats
        kv_share = stats.predicted_kv_cache_usage
        return {
            QUEUE_SECONDS: stats.predicted_queue_seconds or 0.0,
            KV_SHARE: stats.kv_cache_usage if kv_share is None else kv_share,
        }

    async def address(self) -> str:
        return self.url

    async def _announce(self) -> None:
        """Tell the router the address for ever: a router that starts again knows nobody."""
        router = serve.get_deployment_handle(ROUTER, serve.get_replica_context().app_name)
        while True:
            with contextlib.suppress(Exception):  # the router is not there yet, or not any more
                await router.announce.remote(self.url)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def __del__(self) -> None:
        """Drain: the router sees 503 at /health/ready and sends nothing more; what cannot finish moves on."""
        self._announcing.cancel()
        await self._engine.shutdown(self._settings.shutdown_timeout)
        self._server.should_exit = True
        self._server.stop()
        await self._serving


def _settings(options: ClusterOptions) -> ServerSettings:
    """A free port of this machine's address. Without API keys only this machine can reach it."""
    given: dict[str, Any] = {**options.server, "port": 0}
    settings = ServerSettings(**given)
    if settings.keys or settings.allow_unauthenticated:
        given["host"] = util.get_node_ip_address()
    return ServerSettings(**given)
