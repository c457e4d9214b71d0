"""BackgroundRuns: responses that are generated while no client waits. Clients may read their events, late too."""

import asyncio
from asyncio import Task
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from quire.errors import QueueFullError, RequestError

MAX_RUNS = 256
"""Most runs at a time."""
MAX_FINISHED = 64
"""Most finished runs whose events are still kept."""
MAX_EVENT_BYTES = 16 * 2**20
"""Most bytes of events kept per run."""


@dataclass(slots=True)
class Run:
    """One response in the background."""

    response_id: str
    account: str
    events: list[bytes] = field(default_factory=list)
    """The place of an event in the list is its sequence number."""
    num_bytes: int = 0
    finished: bool = False
    task: Task[None] | None = None
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, events: bytes) -> None:
        """Keep `events`, which are complete server-sent events."""
        self.num_bytes += len(events)
        if self.num_bytes <= MAX_EVENT_BYTES:
            self.events += [event + b"\n\n" for event in events.split(b"\n\n") if event]
        self.wake()

    def wake(self) -> None:
        """Wake the readers that wait for events."""
        self._grown.set()
        self._grown = asyncio.Event()

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """The events from number `start`, until the run has finished. Raises `RequestError` at the end of a run that
        had too many to keep."""
        while True:
            grown = self._grown
            if events := self.events[start:]:
                start += len(events)
                yield b"".join(events)
            elif self.finished:
                if self.num_bytes > MAX_EVENT_BYTES:
                    raise RequestError(
                        f"the response has more than {MAX_EVENT_BYTES} bytes of events, and the later ones are not "
                        "kept; retrieve it without stream",
                        param="stream",
                    )
                return
            else:
                await grown.wait()


@dataclass(slots=True)
class BackgroundRuns:
    """All runs of a server."""

    _runs: dict[str, Run] = field(default_factory=dict)

    def start(self, run: Run, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work`, which adds events to `run`. Raises `QueueFullError` if too many run."""
        if sum(not other.finished for other in self._runs.values()) >= MAX_RUNS:
            raise QueueFullError(
                f"{MAX_RUNS} responses run in the background, which is the limit; wait for one to end", retry_after=5
            )

        async def whole() -> None:
            try:
                await work()
            finally:
                run.finished = True
                run.wake()
                self._forget_oldest()

        self._runs[run.response_id] = run
        run.task = asyncio.create_task(whole())

    def find(self, account: str, response_id: str) -> Run | None:
        """The run of this response, while its events are kept."""
        run = self._runs.get(response_id)
        return run if run is not None and run.account == account else None

    async def cancel(self, run: Run) -> None:
        """End `run`; returns when it has ended."""
        if run.task is not None:
            run.task.cancel()
            await asyncio.wait((run.task,))

    def _forget_oldest(self) -> None:
        finished = [response_id for response_id, run in self._runs.items() if run.finished]
        for response_id in finished[: max(0, len(finished) - MAX_FINISHED)]:
            del self._runs[response_id]
