"""PoolViews: everybody who looks at the KV pool of an `AsyncLLM`. The engine records while there is a viewer."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from prometheus_client import Histogram

from quire.engine.fast_histogram import FastHistogram
from quire.engine.messages import ToEngine, WatchPool
from quire.engine.metrics import Metrics
from quire.errors import RequestError
from quire.outputs import EngineStats
from quire.pool_view import PoolChange, PoolFrame

MAX_VIEWERS = 32
"""Viewers at once; further ones are refused."""


class Source(Protocol):
    """What frames say besides the pool."""

    @property
    def state(self) -> str: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def metrics(self) -> Metrics: ...


class TooManyViewersError(RequestError):
    """`MAX_VIEWERS` look at the pool already."""

    status = 429


class PoolViews:
    """The viewers and the mirror they read. It must be used on one event loop."""

    def __init__(self, send: Callable[[ToEngine], None], source: Source) -> None:
        """`send` reaches the engine process; `source` is read when a frame is made."""
        self._send = send
        self.source = source
        self._viewers: set[PoolViewer] = set()
        self._mirror: Any = None
        """A `PoolMirror` while there are viewers."""

    def __len__(self) -> int:
        return len(self._viewers)

    def latencies(self) -> dict[str, tuple[float, int]]:
        """Sums of seconds and their counts, as `PoolFrame.latencies`."""
        return {name: _total(histogram) for name, histogram in self.source.metrics.latencies.items()}

    def open(self, tenant: str | None = None) -> "PoolViewer":
        """A new viewer, to be closed. With `tenant` it sees that tenant's requests only.

        Raises `TooManyViewersError`.
        """
        from quire.engine.pool_mirror import MirrorReader, PoolMirror  # imports numpy, which no other request needs

        if len(self._viewers) >= MAX_VIEWERS:
            raise TooManyViewersError(
                f"{MAX_VIEWERS} viewers look at the KV pool already, which is the limit; close one and try again",
                code="too_many_viewers",
            )
        if self._mirror is None:
            self._mirror = PoolMirror()
            self._send(WatchPool(on=True))
        viewer = PoolViewer(self, MirrorReader(self._mirror, tenant), sees_all=tenant is None)
        self._viewers.add(viewer)
        return viewer

    def close(self, viewer: "PoolViewer") -> None:
        """End a viewer. After the last one the engine records nothing. Safe to repeat."""
        self._viewers.discard(viewer)
        if not self._viewers and self._mirror is not None:
            self._mirror = None
            self._send(WatchPool(on=False))

    # -- called by the owner of the engine ----------------------------------------------------------------------------

    def apply(self, change: PoolChange) -> None:
        """The engine sent a change. One that was on the way when the last viewer left is dropped."""
        if self._mirror is not None and (change.shape is not None or self._mirror.shape is not None):
            self._mirror.apply(change)
            self.wake()

    def clear(self) -> None:
        """The engine died."""
        if self._mirror is not None:
            self._mirror.clear()
        self.wake()

    def resume(self) -> None:
        """A new engine takes messages."""
        if self._mirror is not None:
            self._send(WatchPool(on=True))

    def wake(self) -> None:
        """The state of the engine or the pool has changed."""
        for viewer in self._viewers:
            viewer.changed.set()


class PoolViewer:
    """One viewer: `next` waits for news."""

    def __init__(self, views: PoolViews, reader: Any, *, sees_all: bool) -> None:
        self._views = views
        self._reader = reader
        self._sees_all = sees_all
        self._state = ""
        self.changed = asyncio.Event()
        self.changed.set()

    async def next(self) -> PoolFrame:
        """What the viewer lacks, as soon as it lacks something."""
        while not (self._reader.is_behind or self._state != self._views.source.state):
            self.changed.clear()
            await self.changed.wait()
        self._state = self._views.source.state
        frame = PoolFrame(self._state)
        if self._sees_all:
            frame.stats, frame.latencies = self._views.source.stats, self._views.latencies()
        self._reader.catch_up(frame)
        return frame

    def close(self) -> None:
        """Look no more. Safe to repeat."""
        self._views.close(self)


def _total(histogram: Histogram | FastHistogram) -> tuple[float, int]:
    """The sum of a histogram's observations, and their number."""
    (family,) = histogram.collect()
    values = {sample.name.removeprefix(family.name): sample.value for sample in family.samples}
    return values["_sum"], int(values["_count"])
