"""Server-sent events, and detection of clients that leave or stop reading.

The status is sent together with the first event. An error before it is answered with its own status; a later error is
an event of the stream. Every write is awaited: while a client reads slowly, the engine's stream is not read and its
outputs are merged.
"""

import asyncio
from asyncio import AbstractEventLoop, Task, TimerHandle
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Send

from quire.errors import RequestError
from quire.server.errors import as_request_error
from quire.server.limits import ClientGoneError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
DIRECT = "quire.direct"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
PING_SECONDS = 15.0
"""Silence after which a stream that has pings sends one. Proxies close connections that are silent for a minute."""
_HEADERS = [
    (b"cache-control", b"no-cache"),
    # Without it nginx holds events back.
    (b"x-accel-buffering", b"no"),
]


class DirectWriter(Protocol):
    """Writes to the connection of a stream past ASGI, without a switch of tasks: the extension `DIRECT` of a scope."""

    def ready(self) -> bool:
        """Whether the stream has begun and not ended, and the connection has room."""
        ...

    def write(self, data: bytes) -> None:
        """Write a part of the body; only while `ready`."""
        ...

    @property
    def num_writes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How a stream is written, besides its events."""

    failure: Callable[[RequestError], bytes]
    """The event for an error after the first event."""
    done: bytes = DONE
    """Ends the stream."""
    ping: bytes = b""
    """An event that says nothing, sent after some silence; empty: none."""
    content_type: bytes = EVENT_STREAM
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Further headers of the response."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. Cancel it and raise `ClientGoneError` as soon as the client leaves."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_client_leaves(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancelled(task)
        await _cancelled(watch)


async def send_events(
    send: Send,
    events: AsyncGenerator[bytes, None],
    stall_timeout: float,
    form: StreamForm,
    direct: DirectWriter | None = None,
) -> None:
    """Send `events` (encoded, one or more per item) as `form` says. An error before the first event is raised. What
    `direct` writes meanwhile breaks the silence, too."""
    async with aclosing(events), _StallWatch(stall_timeout, direct) as watch:
        first = await anext(events, b"")
        headers = [(b"content-type", form.content_type), *_HEADERS, *form.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pings = asyncio.create_task(watch.keep_alive(send, form.ping)) if form.ping else None
        try:
            await watch.write(send, first)
            async for event in events:
                await watch.write(send, event)
        except ClientGoneError:
            raise
        except Exception as error:
            await watch.write(send, form.failure(as_request_error(error)))
        finally:
            if pings is not None:
                await _cancelled(pings)
        await watch.write(send, form.done)
        await send({"type": "http.response.body", "body": b""})


class _StallWatch:
    """Cancels the current task when one write takes longer than `timeout` seconds (0: never).

    One timer serves the whole stream: a timeout around every write would cost as much as the write.
    """

    def __init__(self, timeout: float, direct: DirectWriter | None) -> None:
        self._timeout = timeout
        self._direct = direct
        self._writing_since: float | None = None
        self._wrote_at = 0.0
        self._stalled = False
        self._timer: TimerHandle | None = None

    async def write(self, send: Send, data: bytes) -> None:
        self._writing_since = self._loop.time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._writing_since = None
        self._wrote_at = self._loop.time()

    async def keep_alive(self, send: Send, ping: bytes) -> None:
        """Write `ping` whenever nothing was written for `PING_SECONDS`."""
        while True:
            silent, num_writes = self._loop.time() - self._wrote_at, self._num_direct_writes
            await asyncio.sleep(PING_SECONDS - silent if silent < PING_SECONDS else PING_SECONDS)
            if self._num_direct_writes > num_writes:
                self._wrote_at = self._loop.time()  # at some time since; a ping may come late
            if self._writing_since is None and self._loop.time() - self._wrote_at >= PING_SECONDS:
                await self.write(send, ping)

    @property
    def _num_direct_writes(self) -> int:
        return 0 if self._direct is None else self._direct.num_writes

    async def __aenter__(self) -> "_StallWatch":
        self._loop: AbstractEventLoop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if self._timeout:
            self._look_again_in(self._timeout)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._stalled and kind is asyncio.CancelledError:
            raise ClientGoneError

    def _look(self) -> None:
        waited = 0.0 if self._writing_since is None else self._loop.time() - self._writing_since
        if waited < self._timeout:
            self._look_again_in(self._timeout - waited)
        elif self._task is not None:
            self._stalled = True
            self._task.cancel()

    def _look_again_in(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: Task[Any]) -> None:
    """Cancel `task` if it runs, wait until it ends, and ignore its outcome."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
