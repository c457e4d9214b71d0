"""Backend: one server behind the router, and the requests that are on their way to it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from quire.router.renamed_blocks import RenamedBlocks


class BackendGoneError(Exception):
    """The connection broke, or the server is taken for dead."""


class EngineAwayError(Exception):
    """The server is there, but its engine starts anew: the stream can go on elsewhere meanwhile."""


@dataclass(slots=True, eq=False)
class _Read:
    """Somebody waits for the server."""

    limit: asyncio.Timeout
    may_leave: Callable[[], bool]
    """Whether the request can go on elsewhere while the engine is away."""
    has_left: bool = False


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
    is_removed: bool = False
    """It is not on the list any more: it finishes what it has."""
    num_missed: int = 0
    """Probes in a row without an answer."""
    _reads: set[_Read] = field(default_factory=set)

    @property
    def is_quire(self) -> bool:
        return self.block_size > 0

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for an answer of it."""
        return bool(self._reads)

    async def open(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> httpx.Response:
        """Send a request and return the response once its headers are there; the caller closes it.

        Raises `httpx.ConnectError` and `httpx.ConnectTimeout` if nothing was sent, `BackendGoneError` if something was.
        """
        request = self.client.build_request(method, self.url + path, headers=headers, content=body)
        try:
            with self._reading() as read:
                async with read.limit:
                    return await self.client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except (httpx.TransportError, TimeoutError) as error:
            raise self._gone(error) from error

    async def parts(
        self, response: httpx.Response, may_leave: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `BackendGoneError` if it ends early, and `EngineAwayError` if the engine is away
        and `may_leave` says yes."""
        parts = response.aiter_raw()
        while True:
            with self._reading(may_leave) as read:
                try:
                    async with read.limit:
                        part = await anext(parts)
                except StopAsyncIteration:
                    return
                except (httpx.TransportError, TimeoutError) as error:
                    if read.has_left:
                        raise EngineAwayError(f"the engine of {self.url} starts anew") from error
                    raise self._gone(error) from error
            yield part

    def fail(self, reason: str) -> None:
        """Take the server for dead, and end all reads from it."""
        self.is_up, self.reason = False, reason
        for read in self._reads:
            _expire(read.limit)

    def leave(self) -> None:
        """The engine is away: end the reads of what can go on elsewhere."""
        for read in self._reads:
            if read.may_leave():
                read.has_left = True
                _expire(read.limit)

    @contextmanager
    def _reading(self, may_leave: Callable[[], bool] = lambda: False) -> Iterator[_Read]:
        read = _Read(asyncio.timeout(None), may_leave)
        self._reads.add(read)
        try:
            yield read
        finally:
            self._reads.discard(read)

    def _gone(self, error: Exception) -> BackendGoneError:
        return BackendGoneError(f"{self.url} broke the connection: {type(error).__name__} {error}")


def _expire(limit: asyncio.Timeout) -> None:
    if not limit.expired():  # its task may not have run since it was ended
        limit.reschedule(0)
