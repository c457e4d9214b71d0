"""SpareChild: a process that has imported torch and waits, so that an engine that dies is replaced in half the time."""

import asyncio
import logging

from quire.engine.engine_child import Death, EngineChild
from quire.engine.memory_sizes import available_memory
from quire.engine.messages import Prepare
from quire.engine.process_activity import describe_exit

logger = logging.getLogger(__name__)

DELAY_SECONDS = 5.0
"""Seconds between a ready engine and the start of a spare, whose import of torch takes a core for a second."""
MAX_DELAY = 60.0
MIN_AVAILABLE = 2 * 2**30
"""Free bytes from which a spare is kept without the option; a spare takes about a tenth of them."""


class SpareChild:
    """At most one process. One that dies is replaced, later and later."""

    def __init__(self) -> None:
        self._child: EngineChild | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._dying: set[asyncio.Task[Death]] = set()

    def start_later(self) -> None:
        """Start a process in `DELAY_SECONDS`, unless there is one."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    def take(self) -> EngineChild | None:
        """The process, if there is one that runs; it may still be importing."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        child, self._child = self._child, None
        if child is not None and child.exit_code is not None:
            child.release()
            return None
        if child is not None and child.is_stopped:
            logger.warning("the spare process was stopped from outside and is not used")
            self._end(child)
            return None
        return child

    async def end(self) -> None:
        """End the process, also one that is being started."""
        keeping = self._keeping
        child = self.take()
        if child is not None:
            self._end(child)
        ending = [*self._dying, *([] if keeping is None else [keeping])]
        if ending:
            await asyncio.wait(ending)

    def _end(self, child: EngineChild) -> None:
        child.kill("it is not needed any more")
        task = asyncio.create_task(child.wait_dead())
        self._dying.add(task)
        task.add_done_callback(self._dying.discard)

    async def _keep(self) -> None:
        delay = DELAY_SECONDS
        while True:
            await asyncio.sleep(delay)
            delay = min(MAX_DELAY, 2 * max(delay, 1.0))
            try:
                child = self._child = await EngineChild.spawn()
            except (OSError, RuntimeError) as error:  # no descriptor, no process, no thread
                logger.warning("no spare process can be started: %s", error)
                continue
            child.send(Prepare())
            code = await child.wait_exit()
            self._child = None
            child.release()
            logger.warning("the spare process died: %s", describe_exit(code, out_of_memory=False))


def wants_spare(option: bool | None) -> bool:
    """Whether to keep a spare: as the option says, else if memory allows."""
    if option is not None:
        return option
    return available_memory() >= MIN_AVAILABLE
