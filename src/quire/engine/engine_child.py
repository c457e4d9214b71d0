"""EngineChild: one engine process as its parent sees it: start it, send to it, read from it, end it.

The child inherits one end of a socketpair and the memory of a `StepRecord`, and nothing else.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from quire.engine.messages import FrameBuffer, FromEngine, ToEngine, decode_from_engine, encode
from quire.engine.process_activity import Activity, activity, describe_exit, is_stopped, num_oom_kills
from quire.engine.step_record import StepRecord

PROGRAM = "quire.engine.engine_process"
"""The module that a process runs."""
EXIT_SECONDS = 10.0
"""Time for a process to exit by itself after its connection was closed."""


@dataclass(frozen=True, slots=True)
class Death:
    """How an engine process ended."""

    cause: str
    """The reason, safe to show to a client: without paths and addresses."""
    while_loading: bool
    in_step: frozenset[str] | None
    """Requests that were in the step that died; None for all that the process held."""


class EngineChild:
    """One process, from `spawn` to `end`. It must be used on the event loop that started it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        record: StepRecord,
    ) -> None:
        self.record = record
        self._process = process
        self._reader = reader
        self._writer = writer
        self._num_oom_kills = num_oom_kills()
        self._num_sent = 0
        self._killed_for = ""
        self.num_received = 0
        """Messages that the process has sent."""
        self.is_ready = False
        """Set by the owner: whether the process can compute."""

    @classmethod
    async def spawn(cls) -> "EngineChild":
        """Start a process. Raises `OSError`, or `RuntimeError` for want of a thread, if the system cannot."""
        record = StepRecord()
        try:
            mine, theirs = socket.socketpair()
        except BaseException:
            record.close()
            raise
        process: asyncio.subprocess.Process | None = None
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    PROGRAM,
                    str(theirs.fileno()),
                    str(record.fd),
                    pass_fds=[theirs.fileno(), record.fd],
                    stdin=asyncio.subprocess.DEVNULL,
                )
            reader, writer = await asyncio.open_connection(sock=mine)
        except BaseException:
            mine.close()
            record.close()
            if process is not None:  # the caller was cancelled while the connection was opened
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            raise
        return cls(process, reader, writer, record)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, None while it runs."""
        return self._process.returncode

    @property
    def is_idle(self) -> bool:
        """Whether the process has carried out every message and is in no step."""
        return self._num_sent == self.record.num_handled and not self.record.in_step

    @property
    def is_stopped(self) -> bool:
        """Whether a signal from outside has stopped the process."""
        return is_stopped(self.pid)

    def activity(self) -> Activity | None:
        """As `process_activity.activity`."""
        return activity(self.pid)

    def send(self, message: ToEngine) -> None:
        """Send a message; dropped if the connection has ended."""
        if not self._writer.is_closing():
            self._num_sent += 1
            self._writer.write(encode(message))

    async def messages(self) -> AsyncIterator[FromEngine]:
        """What the process sends, until its connection ends."""
        frames = FrameBuffer()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 20):
                for body in frames.feed(data):
                    self.num_received += 1
                    yield decode_from_engine(body)

    def kill(self, cause: str) -> None:
        """End the process now, also if it is stopped."""
        self._killed_for = cause
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait_exit(self) -> int:
        """Wait for the end of the process; returns its exit code."""
        return await self._process.wait()

    async def wait_dead(self) -> Death:
        """Wait for the end of a process whose connection has ended."""
        self._writer.close()
        try:
            code = await asyncio.wait_for(self._process.wait(), timeout=EXIT_SECONDS)
        except TimeoutError:
            self.kill("it closed its connection and did not end")
            code = await self._process.wait()
        cause = self._killed_for or describe_exit(code, out_of_memory=num_oom_kills() > self._num_oom_kills)
        death = Death(cause, not self.is_ready, self.record.suspects())
        self.record.close()
        return death

    def release(self) -> None:
        """Release the socket and handles of a process that has ended."""
        self._writer.close()
        self.record.close()

    async def end(self) -> None:
        """Close the connection. The process exits after the step that it is in, and is killed if it does not."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), timeout=EXIT_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self.record.close()
