"""MemoryReturn: hands free memory back to the system after a peak, which malloc would keep for the next one."""

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

from quire.engine import malloc_arena

LOOK_SECONDS = 5.0
"""Time from the end of a request until memory is looked at. An idle server does not look."""
GROWTH = 1.25
SLACK_BYTES = 16 * 2**20
"""Memory may grow by `GROWTH` and by so much before it is handed back."""


def resident_bytes() -> int:
    """Bytes of this process in memory; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class MemoryReturn:
    """Owned by the application; used on its event loop."""

    def __init__(
        self, resident: Callable[[], int] = resident_bytes, release: Callable[[], None] = malloc_arena.release
    ) -> None:
        self._resident = resident
        self._release = release
        self._idle = 0
        """Bytes in memory before the first request."""
        self._timer: asyncio.TimerHandle | None = None

    def request_began(self) -> None:
        """Note what the process takes before its first request."""
        self._idle = self._idle or self._resident()

    def request_ended(self) -> None:
        """Look at the memory in `LOOK_SECONDS`, unless that is planned."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._resident() > GROWTH * self._idle + SLACK_BYTES:
            gc.collect()  # what errors hold in cycles; the engine's own objects are frozen
            # In a thread, and without the interpreter's lock: the kernel takes milliseconds for many pages.
            asyncio.get_running_loop().run_in_executor(None, self._release)
