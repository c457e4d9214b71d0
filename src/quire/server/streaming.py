"""Server-sent events, and detection of clients that leave or stop reading.

The status is sent together with the first event. An error before it is answered with its own status; a later error is
an event of the stream. Every write is awaited: while a client reads slowly, the engine's stream is not read and its
outputs are merged.
"""

import asyncio
from asyncio import AbstractEventLoop, Task, TimerHandle
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive, Send

from quire.errors import RequestError
from quire.server.errors import as_request_error
from quire.server.limits import ClientGoneError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Without it nginx holds events back.
    (b"x-accel-buffering", b"no"),
]


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
    *,
    failure: Callable[[RequestError], bytes],
    done: bytes = DONE,
) -> None:
    """Send `events` (encoded, one or more per item), then `done`. An error before the first event is raised."""
    async with aclosing(events), _StallWatch(stall_timeout) as watch:
        first = await anext(events, b"")
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await watch.write(send, first)
            async for event in events:
                await watch.write(send, event)
        except ClientGoneError:
            raise
        except Exception as error:
            await watch.write(send, failure(as_request_error(error)))
        await watch.write(send, done)
        await send({"type": "http.response.body", "body": b""})


class _StallWatch:
    """Cancels the current task when one write takes longer than `timeout` seconds (0: never).

    One timer serves the whole stream: a timeout around every write would cost as much as the write.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._writing_since: float | None = None
        self._stalled = False
        self._timer: TimerHandle | None = None

    async def write(self, send: Send, data: bytes) -> None:
        self._writing_since = self._loop.time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._writing_since = None

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
