"""EngineClient: the engine process as seen from the process that answers clients. It starts, restarts and stops it.

The child inherits one end of a socketpair and nothing else. torch is not imported here, so this process answers while
weights load. A child that dies is replaced, up to `MAX_DEATHS` deaths within `DEATH_WINDOW`.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

from quire import errors
from quire.engine.messages import (
    Failed,
    FrameBuffer,
    FromEngine,
    Load,
    Ready,
    ToEngine,
    decode_from_engine,
    encode,
)
from quire.errors import EngineDeadError, QuireError

logger = logging.getLogger(__name__)

MAX_DEATHS = 5
"""After this many deaths within `DEATH_WINDOW` seconds the engine is not restarted."""
DEATH_WINDOW = 300.0
_EXIT_SECONDS = 10.0
"""Time for the child to exit by itself after its connection was closed."""


class EngineClient:
    """One engine process at a time. All methods run on the event loop that called `start`."""

    def __init__(
        self,
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[], None],
        on_spawn: Callable[[], None],
        on_failure: Callable[[QuireError], None],
    ) -> None:
        """`on_message` gets every message except `Ready` and `Failed`. `on_death`: the process died and another one
        will be started. `on_spawn`: a process was started and has its `Load` message; it takes messages.
        `on_failure`: there will be no engine, for this reason."""
        self.state = "loading"
        """loading, ready, draining, restarting, dead"""
        self._on_message = on_message
        self._on_death = on_death
        self._on_spawn = on_spawn
        self._on_failure = on_failure
        self._load: Load | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._failed = asyncio.Event()
        self._failure: QuireError | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    @property
    def pid(self) -> int:
        """Process id of the engine process."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the engine process, None while it runs."""
        assert self._process is not None, "start() comes first"
        return self._process.returncode

    async def start(self, load: Load) -> None:
        """Start the process. It goes on loading when this returns."""
        self._load = load
        await self._spawn()

    def send(self, message: ToEngine) -> None:
        """Send a message; dropped while there is no process, because `on_spawn` will send what the next one needs."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def wait_ready(self) -> None:
        """Return when the engine can compute. Raises the reason if it never will."""
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure

    async def wait_failed(self) -> QuireError:
        """Return the reason when there will be no engine any more."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def drain(self) -> None:
        """Mark the engine as shutting down: it is still restarted if it dies."""
        if self.state != "dead":
            self.state = "draining"

    async def shutdown(self) -> None:
        """End the process."""
        self.state = "dead"
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            # The child exits when its connection closes, after the step it is in.
            try:
                await asyncio.wait_for(self._process.wait(), timeout=_EXIT_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _spawn(self) -> None:
        mine, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "quire.engine.engine_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=mine)
        assert self._load is not None
        self.send(self._load)
        self._on_spawn()
        self._reader_task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Handle messages until the connection ends, then the death of the process."""
        buffer = FrameBuffer()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                for body in buffer.feed(data):
                    self._handle(decode_from_engine(body))
        if self.state != "dead":
            await self._handle_death()

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self.state = "ready" if self.state in ("loading", "restarting") else self.state
                self._ready.set()
            case Failed(kind, text):
                error_type = getattr(errors, kind, QuireError)
                self._fail(error_type(text))
            case _:
                self._on_message(message)

    async def _handle_death(self) -> None:
        """Start another process, or give up."""
        assert self._process is not None
        assert self._writer is not None
        self._writer.close()
        code = await self._process.wait()
        if self._failure is not None:
            return
        if self.state == "loading":
            self._fail(
                EngineDeadError(f"the engine process ended while loading (exit code {code}); its output says why")
            )
            return
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATH_WINDOW:
            self._fail(
                EngineDeadError(
                    f"the engine process died {MAX_DEATHS} times in {DEATH_WINDOW:.0f} s (exit code {code})"
                )
            )
            return
        logger.error("the engine process ended (exit code %s); starting another one", code)
        self.state = "restarting" if self.state == "ready" else self.state
        self._on_death()
        await self._spawn()

    def _fail(self, error: QuireError) -> None:
        self.state = "dead"
        self._failure = error
        self._ready.set()
        self._failed.set()
        self._on_failure(error)
