"""Backend: one server behind the router, its kind and its health. Backends: all of them, and the looks at them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import msgspec

from quire.errors import ConfigError
from quire.router.renamed_blocks import RenamedBlocks
from quire.router.settings import RouterSettings
from quire.routing.fleet import Fleet
from quire.server.handover import PROMPT_HEADER, PromptBlocks

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""Longest time that a server may take to say how it is."""
MISSED_PROBES = 3
"""Probes without an answer after which a server is taken for dead, and its streams move."""
_IDLE_SECONDS = 2.0
"""Time that an unused connection is kept. Servers close theirs after 5 s, and a request must not meet a closed one."""


class BackendGoneError(Exception):
    """The connection broke, or the server is taken for dead."""


class _ModelCard(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


@dataclass(slots=True, eq=False)
class Backend:
    """One server."""

    url: str
    client: httpx.AsyncClient
    models: tuple[str, ...] = ()
    block_size: int = 0
    """Tokens per block; 0 for a server that is not Quire."""
    blocks: RenamedBlocks | None = None
    """What KV events say of a server that is not Quire; None without events."""
    version: str = ""
    """Version of a Quire server; empty for one that does not say."""
    is_up: bool = False
    reason: str = "not looked at yet"
    """Why it takes no requests."""
    num_missed: int = 0
    """Probes in a row without an answer."""
    _reads: set[asyncio.Timeout] = field(default_factory=set)
    """Reads that wait for this server."""

    @property
    def is_quire(self) -> bool:
        return self.block_size > 0

    async def open(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> httpx.Response:
        """Send a request and return the response once its headers are there; the caller closes it.

        Raises `httpx.ConnectError` and `httpx.ConnectTimeout` if nothing was sent, `BackendGoneError` if something was.
        """
        request = self.client.build_request(method, self.url + path, headers=headers, content=body)
        try:
            with self._until_dead() as limit:
                async with limit:
                    return await self.client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except (httpx.TransportError, TimeoutError) as error:
            raise BackendGoneError(f"{self.url} broke the connection: {type(error).__name__} {error}") from error

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `BackendGoneError` if it ends early."""
        parts = response.aiter_raw()
        while True:
            try:
                with self._until_dead() as limit:
                    async with limit:
                        part = await anext(parts)
            except StopAsyncIteration:
                return
            except (httpx.TransportError, TimeoutError) as error:
                raise BackendGoneError(f"{self.url} broke the connection: {type(error).__name__} {error}") from error
            yield part

    def fail(self, reason: str) -> None:
        """Take the server for dead, and end all reads from it."""
        self.is_up, self.reason = False, reason
        for limit in self._reads:
            limit.reschedule(0)

    @contextmanager
    def _until_dead(self) -> Iterator[asyncio.Timeout]:
        limit = asyncio.timeout(None)
        self._reads.add(limit)
        try:
            yield limit
        finally:
            self._reads.discard(limit)


class Backends:
    """Looks at every server, and keeps in `fleet` the ones that take requests."""

    def __init__(self, settings: RouterSettings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS)
        timeout = httpx.Timeout(None, connect=PROBE_SECONDS)
        self.client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, follow_redirects=False)
        self.by_url = {url: Backend(url, self.client) for url in settings.backends}
        self.changed = asyncio.Event()
        """Set when a server has come up."""
        self.is_open = True
        """The servers answer without an API key."""

    async def start(self) -> None:
        """Look at all servers for the first time. Raises `ConfigError` if none answers, or if they do not fit together.

        A server that does not answer now may come later.
        """
        await asyncio.gather(*(self.look(backend) for backend in list(self.by_url.values())))
        known = [backend for backend in self.by_url.values() if backend.models]
        if not known:
            reasons = "; ".join(f"{backend.url}: {backend.reason}" for backend in self.by_url.values())
            raise ConfigError(f"no backend answers ({reasons}); start the servers first, or correct --backends")
        for backend in known:
            if problem := self._mismatch(backend):
                raise ConfigError(problem)

    def add(self, url: str) -> None:
        """A server that may be new. It takes requests when it has been looked at."""
        if url not in self.by_url:
            self.by_url[url] = Backend(url, self.client)

    def drop(self, url: str) -> None:
        """A server that will not come back."""
        backend = self.by_url.pop(url, None)
        if backend is not None:
            self._set_down(backend, "it has been removed")

    async def watch(self) -> None:
        """Look at all servers for ever."""
        while True:
            await asyncio.sleep(self._settings.health_interval)
            await asyncio.gather(*(self.look(backend) for backend in list(self.by_url.values())))

    async def look(self, backend: Backend) -> None:
        """Find out whether a server takes requests, and what it is if that is not known yet."""
        try:
            if not backend.models:
                await self._identify(backend)
            path = "/health/ready" if backend.is_quire else "/health"
            response = await self._probe(backend.url + path)
        except httpx.TransportError as error:
            backend.num_missed += 1
            refused = isinstance(error, httpx.ConnectError)
            if refused or backend.num_missed >= MISSED_PROBES:
                self._set_down(backend, f"it does not answer ({type(error).__name__})")
            return
        except ConfigError as error:
            self._set_down(backend, str(error))
            return
        backend.num_missed = 0
        if response.status_code != 200:
            # It answers, so its streams go on; it only gets no new ones.
            self._leave(backend, f"its {path} says {response.status_code}")
        elif problem := self._mismatch(backend):
            self._leave(backend, problem)
        elif not backend.is_up:
            backend.is_up, backend.reason = True, ""
            self._fleet.join(backend.url)
            self.changed.set()
            logger.warning("%s takes requests", backend.url)

    async def _probe(self, url: str) -> httpx.Response:
        """The answer at `url`. A kept connection may be closed by now: then a new one is tried."""
        try:
            return await self.client.get(url, timeout=PROBE_SECONDS)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            return await self.client.get(url, timeout=PROBE_SECONDS)

    def lose(self, backend: Backend, reason: str) -> None:
        """A request met a dead server."""
        self._set_down(backend, reason)

    async def _identify(self, backend: Backend) -> None:
        """Find a server's models and whether it is Quire. Raises `ConfigError` with the reason if it does not say."""
        key = self._settings.backend_api_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = await self.client.get(f"{backend.url}/v1/models", headers=headers, timeout=PROBE_SECONDS)
        if response.status_code == 401:
            self.is_open = False
            raise ConfigError("it wants an API key for /v1/models; give one with --backend-api-key")
        self.is_open = self.is_open and not key
        try:
            models = tuple(card.id for card in msgspec.json.decode(response.content, type=_ModelList).data)
        except msgspec.DecodeError:
            raise ConfigError(f"its /v1/models is no list of models (status {response.status_code})") from None
        if not models:
            raise ConfigError("its /v1/models lists no model")
        probe = {"model": models[0], "prompt": [1], "max_tokens": 1}
        asked = await self.client.post(
            f"{backend.url}/v1/completions",
            json=probe,
            headers={**headers, PROMPT_HEADER.decode(): "blocks"},
            timeout=PROBE_SECONDS,
        )
        try:
            blocks = msgspec.json.decode(asked.content, type=PromptBlocks)
            backend.block_size, backend.version = blocks.block_size, blocks.version
        except msgspec.DecodeError:
            backend.block_size, backend.version = 0, ""
            if asked.status_code == 503:
                raise ConfigError("it is still loading") from None
        backend.models = models

    def _mismatch(self, backend: Backend) -> str:
        """Why a server cannot stand beside the others; "" if it can."""
        first = next((other for other in self.by_url.values() if other.models), backend)
        if backend.models[0] != first.models[0]:
            return (
                f"{backend.url} serves {backend.models[0]}, but {first.url} serves {first.models[0]}; one router "
                "serves one model: start a router for each, or give the servers one name with --served-model-name"
            )
        sizes = {other.block_size: other for other in self.by_url.values() if other.is_quire}
        if backend.is_quire and backend.block_size != (size := next(iter(sizes))):
            return (
                f"{backend.url} has blocks of {backend.block_size} tokens, but {sizes[size].url} of {size}, so their "
                "block hashes differ; start all with the same --block-size"
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
