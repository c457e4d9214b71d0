"""Backends: all servers behind the router, and the looks at them."""

import asyncio
import logging
import ssl
from collections.abc import Collection, Sequence

import httpx

from quire.errors import ConfigError
from quire.router.backend import Backend
from quire.router.probe import Answer, NoAnswerError, health_status, introduce, key_header, probe
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
MISSED_PROBES = 3
"""Probes without an answer after which a server is taken for dead, and its streams move."""
_IDLE_SECONDS = 2.0
"""Time that an unused connection is kept. Servers close theirs after 5 s, and a request must not meet a closed one."""
_ENGINE_AWAY = ("restarting", "down", "stalled")
"""What /health of a Quire server says while its engine computes nothing, but will again."""


class Backends:
    """Looks at every server, and keeps in `fleet` the ones that take requests."""

    def __init__(self, settings: RouterSettings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self.client = httpx.AsyncClient(
            limits=limits, timeout=timeout, trust_env=False, follow_redirects=False, verify=_trust(settings)
        )
        self.by_url = {url: Backend(url, self.client) for url in settings.backends}
        self.changed = asyncio.Event()
        """Set when a server has come up."""
        self.is_open = True
        """The servers answer without an API key."""

    async def start(self) -> None:
        """Look at all servers for the first time. Raises `ConfigError` if none answers, or if they do not fit together.

        A server that does not answer now may come later.
        """
        known: list[Backend] = []
        for _ in range(MISSED_PROBES):  # on a busy machine all answers may be late
            if not known:
                await asyncio.gather(*(self.look(backend) for backend in list(self.by_url.values())))
                known = [backend for backend in self.by_url.values() if backend.models]
        if not known:
            reasons = "; ".join(f"{backend.url}: {backend.reason}" for backend in self.by_url.values())
            raise ConfigError(f"no backend answers ({reasons}); start the servers first, or correct --backends")
        for backend in known:
            if problem := self._mismatch(backend, known):
                raise ConfigError(problem)

    def add(self, url: str) -> None:
        """A server that may be new. It takes requests when it has been looked at."""
        self.by_url.setdefault(url, Backend(url, self.client)).is_removed = False

    def keep(self, urls: Collection[str]) -> None:
        """These are the servers from now on. Others get no new requests, and finish the ones they have."""
        for url in urls:
            self.add(url)
        for url, backend in self.by_url.items():
            if url not in urls and not backend.is_removed:
                backend.is_removed = True
                self._leave(backend, "it is not on the list any more")

    def drop(self, url: str) -> None:
        """A server that will not come back."""
        backend = self.by_url.pop(url, None)
        if backend is not None:
            self._set_down(backend, "it has been removed")

    async def watch(self) -> None:
        """Look at all servers for ever. One that answers late does not delay the looks at the others."""
        async with asyncio.TaskGroup() as looks:
            running: dict[str, asyncio.Task[None]] = {}
            while True:
                await asyncio.sleep(self._settings.health_interval)
                for url, backend in list(self.by_url.items()):
                    if url not in running or running[url].done():
                        running[url] = looks.create_task(self.look(backend))
                for url in running.keys() - self.by_url.keys():
                    running.pop(url)

    async def look(self, backend: Backend) -> None:
        """Find out whether a server takes requests, and what it is if that is not known yet. Never raises."""
        try:
            if not backend.models:
                await self._identify(backend)
            path, answer = await self._health(backend)
        except NoAnswerError as error:
            backend.num_missed += 1
            if error.was_refused or backend.num_missed >= MISSED_PROBES:
                self._set_down(backend, str(error))
            elif not backend.is_up:
                backend.reason = str(error)
        except ConfigError as error:
            self._set_down(backend, str(error))
        else:
            if backend.models:  # else a request has met a dead server meanwhile
                self._heed(backend, path, answer)
        if backend.is_removed and not backend.is_busy:
            self.by_url.pop(backend.url, None)

    def _heed(self, backend: Backend, path: str, answer: Answer) -> None:
        """Do what a server's health asks for."""
        backend.num_missed = 0
        status = health_status(answer)
        if backend.is_removed:
            self._leave(backend, "it is not on the list any more")
        elif answer.status != 200:
            # It answers, so its streams go on; it only gets no new ones.
            self._leave(backend, f"its {path} says {answer.status}{f' ({status})' if status else ''}")
        elif problem := self._mismatch(backend, self._up_besides(backend)):
            self._leave(backend, problem)
        elif not backend.is_up:
            self._join(backend)
        if answer.status != 200 and status in _ENGINE_AWAY and self._has_equal(backend):
            backend.leave()

    async def _health(self, backend: Backend) -> tuple[str, Answer]:
        """(Path, answer) that say whether a server takes requests. Not every engine has /health."""
        path = "/health/ready" if backend.is_quire else "/health"
        answer = await probe(self.client, backend.url + path)
        if answer.status in (404, 405) and not backend.is_quire:
            path = "/v1/models"
            answer = await probe(self.client, backend.url + path, headers=key_header(self._settings.backend_api_key))
        return path, answer

    def _up_besides(self, backend: Backend) -> list[Backend]:
        """The other servers that take requests: what comes later must fit them."""
        return [other for other in self.by_url.values() if other.is_up and other is not backend]

    def _join(self, backend: Backend) -> None:
        if self.by_url.get(backend.url) is backend:  # not dropped meanwhile
            backend.is_up, backend.reason = True, ""
            self._fleet.join(backend.url)
            self.changed.set()
            logger.warning("%s takes requests", backend.url)

    def _has_equal(self, backend: Backend) -> bool:
        """Whether another server of the same version takes requests, which goes on with the same tokens."""
        return any(self.by_url[url].version == backend.version for url in self._fleet.replicas)

    def lose(self, backend: Backend, reason: str) -> None:
        """A request met a dead server."""
        self._set_down(backend, reason)

    async def _identify(self, backend: Backend) -> None:
        """Find a server's models and whether it is Quire. Raises `ConfigError` with the reason if it does not say, and
        `NoAnswerError`."""
        key = self._settings.backend_api_key
        known = await introduce(self.client, backend.url, key)
        if known is None:
            self.is_open = False
            raise ConfigError("it wants an API key for /v1/models; give one with --backend-api-key")
        self.is_open = self.is_open and not key
        backend.models, backend.block_size, backend.version = known.models, known.block_size, known.version

    def _mismatch(self, backend: Backend, others: Sequence[Backend]) -> str:
        """Why a server cannot stand beside `others`; "" if it can."""
        first = next((other for other in others if other.models), backend)
        if backend.models[0] != first.models[0]:
            return (
                f"{backend.url} serves {backend.models[0]}, but {first.url} serves {first.models[0]}; one router "
                "serves one model: start a router for each, or give the servers one name with --served-model-name"
            )
        first = next((other for other in others if other.is_quire), backend)
        if backend.is_quire and backend.block_size != first.block_size:
            return (
                f"{backend.url} has blocks of {backend.block_size} tokens, but {first.url} of {first.block_size}, so "
                "their block hashes differ; start all with the same --block-size"
            )
        return ""

    def _set_down(self, backend: Backend, reason: str) -> None:
        self._leave(backend, reason)
        backend.models = ()  # what comes back at this address may be something else
        backend.fail(reason)

    def _leave(self, backend: Backend, reason: str) -> None:
        if backend.is_up:
            logger.warning("%s takes no requests: %s", backend.url, reason)
            self._fleet.leave(backend.url)
        backend.is_up, backend.reason = False, reason


def _trust(settings: RouterSettings) -> ssl.SSLContext | bool:
    """What decides whether a server's certificate is right. Raises `ConfigError` for a file that holds none."""
    if settings.backend_ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=settings.backend_ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"backend_ca_file is {settings.backend_ca_file}, which cannot be read as certificates: {error}; give a "
            "file in PEM format"
        ) from None
