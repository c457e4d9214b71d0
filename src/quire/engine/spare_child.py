"""SpareChild: a process that has imported torch and waits, so that an engine that dies is replaced in half the time."""

import asyncio
import logging

from quire.engine.engine_child import EngineChild
from quire.engine.memory_sizes import available_memory
from quire.engine.messages import Prepare

logger = logging.getLogger(__name__)

DELAY_SECONDS = 5.0
"""Seconds between a ready engine and the start of a spare, whose import of torch takes a core for a second."""


MIN_AVAILABLE = 2 * 2**30
"""Free bytes from which a spare is kept without the option; a spare takes about a tenth of them."""


class SpareChild:
    """At most one process."""

    def __init__(self) -> None:
        self._child: EngineChild | None = None
        self._starting: asyncio.Task[None] | None = None

    def start_later(self) -> None:
        """Start a process in `DELAY_SECONDS`, unless there is one."""
        if self._child is None and self._starting is None:
            self._starting = asyncio.create_task(self._start())

    def take(self) -> EngineChild | None:
        """The process, if there is one; it may still be importing."""
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
        child, self._child = self._child, None
        if child is not None and child.exit_code is not None:
            child.release()
            return None
        return child

    async def end(self) -> None:
        """End the process, also one that is being started."""
        starting = self._starting
        child = self.take()
        if starting is not None:
            await asyncio.wait([starting])
        if child is not None:
            child.kill("it is not needed any more")
            await child.wait_dead()

    async def _start(self) -> None:
        await asyncio.sleep(DELAY_SECONDS)
        try:
            self._child = await EngineChild.spawn()
            self._child.send(Prepare())
        except OSError as error:
            logger.warning("no spare process can be started: %s", error)
        self._starting = None


def wants_spare(option: bool | None) -> bool:
    """Whether to keep a spare: as the option says, else if memory allows."""
    if option is not None:
        return option
    return available_memory() >= MIN_AVAILABLE
