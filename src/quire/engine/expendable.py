"""Expendable: a child process that can be killed, for work that may never end or may take all memory.

It answers one question at a time over one end of a socketpair. If it ends or takes too long, the question fails, and
the next one starts a new process.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from quire.engine.messages import FrameBuffer, Question, encode
from quire.errors import EngineUnavailableError

Answer = TypeVar("Answer")

START_SECONDS = 120.0
"""Longest wait for the first answer of a process, which imports libraries before it, on a busy machine."""


class Expendable(Generic[Answer]):
    """One process. `kill` may be called from another thread."""

    def __init__(
        self, module: str, purpose: str, first: Question, decode: Callable[[bytes], Answer], *, seconds: float
    ) -> None:
        """`module` runs as the process and answers `first` before any other question, then each within `seconds`;
        errors call it the process that `purpose`s."""
        self._module = module
        self._purpose = purpose
        self._first = first
        self._decode = decode
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._frames = FrameBuffer()

    @property
    def pid(self) -> int | None:
        """Process id, None while no process was started."""
        return None if self._process is None else self._process.pid

    def ask(self, question: Question) -> Answer:
        """The answer to a question. Raises `EngineUnavailableError` if the process ends or is late."""
        self.start()
        return self._ask(question, self._seconds)

    def start(self) -> Answer | None:
        """Start the process, unless it runs; returns its answer to the first question. Raises as `ask` does."""
        if self._process is not None and self._process.poll() is None:
            return None
        self.close()
        self._socket, theirs = socket.socketpair()
        self._frames = FrameBuffer()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        return self._ask(self._first, max(self._seconds, START_SECONDS))

    def kill(self) -> None:
        """End the process; a pending question raises `EngineUnavailableError`."""
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """End the process. A later question starts a new one."""
        self.kill()
        if self._process is not None:
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def _ask(self, question: Question, seconds: float) -> Answer:
        assert self._socket is not None
        try:
            deadline = time.monotonic() + seconds
            self._socket.settimeout(seconds)
            self._socket.sendall(encode(question))
            while data := self._socket.recv(1 << 20):
                for body in self._frames.feed(data):
                    return self._decode(body)
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            raise ConnectionResetError
        except BaseException as error:
            # The answer to an interrupted question would be read as the answer to the next one: end the process.
            self.close()
            if isinstance(error, OSError):
                raise EngineUnavailableError(f"the process that {self._purpose} has ended") from error
            raise
