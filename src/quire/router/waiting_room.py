"""WaitingRoom: requests for which no server is free. They wait in order; there is a limit, and beyond it a 429."""

import asyncio
from collections import deque
from collections.abc import Collection

from quire.errors import EngineUnavailableError, QueueFullError
from quire.router.backends import Backends
from quire.routing.fleet import Fleet
from quire.routing.policies import Prompt
from quire.routing.replica import Work

_PATIENT_TIMES = 4
"""So many times as long waits a stream that has begun: its client cannot ask again."""


class WaitingRoom:
    """Hands out places on servers. `leave` must follow every `enter` that returns."""

    def __init__(self, fleet: Fleet, backends: Backends, *, max_size: int, seconds: float) -> None:
        """`seconds`: how long a request waits for a server if none takes requests."""
        self._fleet = fleet
        self._backends = backends
        self._max_size = max_size
        self._seconds = seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def enter(self, prompt: Prompt, without: Collection[str] = (), *, patient: bool = False) -> Work:
        """A place on a server that is not in `without`, as soon as there is one; `patient` for a stream that has begun.

        Raises `QueueFullError` if too many wait, and `EngineUnavailableError` if no server comes up.
        """
        while True:
            if not self._waiting and (work := self._fleet.choose(prompt, without)) is not None:
                return work
            if not any(name not in without for name in self._fleet.replicas):
                await self._await_server(without, self._seconds * (_PATIENT_TIMES if patient else 1))
                continue
            if len(self._waiting) >= self._max_size:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting in the router, the limit is {self._max_size} "
                    "(--max-queue-size)",
                    retry_after=1,
                )
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
            if (work := self._fleet.choose(prompt, without)) is not None:
                return work

    def leave(self, work: Work) -> None:
        """Give a place back, to the first that waits."""
        self._fleet.end(work)
        self.wake()

    def wake(self) -> None:
        """Let the first that waits look again."""
        if self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
            else:
                self.wake()

    async def _await_server(self, without: Collection[str], seconds: float) -> None:
        self._backends.changed.clear()
        try:
            await asyncio.wait_for(self._backends.changed.wait(), seconds)
        except TimeoutError:
            if any(name not in without for name in self._fleet.replicas):
                return
            reasons = "; ".join(f"{each.url}: {each.reason or 'tried'}" for each in self._backends.by_url.values())
            raise EngineUnavailableError(f"no server takes requests now ({reasons})", retry_after=5) from None
