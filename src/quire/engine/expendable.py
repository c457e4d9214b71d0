"""Expendable: a child process that can be killed, for work that may never end or may take all memory.

It answers one question at a time over one end of a socketpair. A question is blamed only on evidence: its process
raised an exception or was ended for the CPU time that it used, or used time and did not answer, or two processes in a
row broke on it.
A process that was killed or stopped from outside, or answers what cannot be read, is replaced, and the question is
asked again.
"""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from quire.engine.messages import FrameBuffer, Question, encode
from quire.engine.process_activity import activity, is_stopped
from quire.errors import EngineUnavailableError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

START_SECONDS = 120.0
"""Longest wait for the first answer of a process, which imports libraries before it, on a busy machine."""
LOOK_SECONDS = 0.5
"""Time between two looks whether a process that owes an answer was stopped."""
_WORKED_SECONDS = 0.5
"""CPU time by which a question is to blame for an answer that is late."""
_ENDED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)


class CostlyQuestionError(EngineUnavailableError):
    """A question that its process did not survive, or did not answer in time."""


class _ProcessFault(Exception):
    """The process failed; `by_question`: the question is to blame; `from_outside`: it certainly is not."""

    def __init__(self, what: str, *, by_question: bool = False, from_outside: bool = False) -> None:
        super().__init__(what)
        self.by_question = by_question
        self.from_outside = from_outside


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
        self._num_kills = 0

    @property
    def pid(self) -> int | None:
        """Process id, None while no process was started."""
        return None if self._process is None else self._process.pid

    def ask(self, question: Question) -> Answer:
        """The answer to a question. Raises `CostlyQuestionError` if the question is to blame that there is none, and
        `EngineUnavailableError` if `kill` was called or the system cannot start a process."""
        num_kills, num_faults = self._num_kills, 0
        while True:
            try:
                self._start()
                return self._ask(question, self._seconds)
            except _ProcessFault as fault:
                num_faults += 1
                words = f"the process that {self._purpose} {fault}"
                if self._num_kills != num_kills or (num_faults == 2 and fault.from_outside):
                    raise EngineUnavailableError(words) from fault
                if num_faults == 2 or fault.by_question:
                    raise CostlyQuestionError(words) from fault
                logger.warning("%s; the question is asked again", words)

    def start(self) -> Answer | None:
        """Start the process, unless it runs; returns its answer to the first question. Raises
        `EngineUnavailableError` if it does not start."""
        try:
            return self._start()
        except _ProcessFault as fault:
            raise EngineUnavailableError(f"the process that {self._purpose} {fault}") from fault

    def _start(self) -> Answer | None:
        if self._process is not None and self._process.poll() is None:
            if not is_stopped(self._process.pid):
                return None
            logger.warning("the process that %s was stopped from outside; it is replaced", self._purpose)
        self.close()
        try:
            self._spawn()
        except OSError as error:
            self.close()
            words = f"the system cannot start the process that {self._purpose}: {error.strerror or error}"
            raise EngineUnavailableError(words) from error
        try:
            return self._ask(self._first, max(self._seconds, START_SECONDS))
        except _ProcessFault as fault:
            what = f"{fault} before its first answer"
            if isinstance(fault.__cause__, TimeoutError):  # the machine is busy: no question is to blame
                raise EngineUnavailableError(f"the process that {self._purpose} {what}") from fault
            raise _ProcessFault(what, by_question=fault.by_question, from_outside=fault.from_outside) from fault

    def _spawn(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._frames = FrameBuffer()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def kill(self) -> None:
        """End the process; a pending question raises `EngineUnavailableError`."""
        self._num_kills += 1
        self._end()

    def _end(self) -> None:
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """End the process. A later question starts a new one."""
        self._end()
        if self._process is not None:
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def _ask(self, question: Question, seconds: float) -> Answer:
        assert self._process is not None
        before = activity(self._process.pid)
        try:
            return self._exchange(question, seconds)
        except TimeoutError as error:
            after = activity(self._process.pid)
            worked = before is None or after is None or after.work - before.work >= _WORKED_SECONDS
            raise self._fault(
                f"did not answer in {seconds:g} s", by_question=worked, from_outside=not worked
            ) from error
        except OSError as error:
            code = self._exit_code()
            raised = code is not None and code > 0  # an exception, such as one for want of memory
            raise self._fault(
                "has ended",
                by_question=raised or code == -signal.SIGXCPU,
                from_outside=code in _ENDED_FROM_OUTSIDE,
            ) from error
        except _ProcessFault:
            raise
        except (msgspec.MsgspecError, ValueError) as error:
            raise self._fault("answered what cannot be read") from error
        except BaseException:
            # The answer to an interrupted question would be read as the answer to the next one: end the process.
            self.close()
            raise

    def _exit_code(self) -> int | None:
        """The exit code of a process whose connection has ended; None if it lives on all the same."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=1.0)
        return None

    def _fault(self, what: str, *, by_question: bool = False, from_outside: bool = False) -> _ProcessFault:
        self.close()
        return _ProcessFault(what, by_question=by_question, from_outside=from_outside)

    def _exchange(self, question: Question, seconds: float) -> Answer:
        """Send a question and read its answer. Raises `TimeoutError`, another `OSError` if the connection ended."""
        assert self._socket is not None
        assert self._process is not None
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(encode(question))
        while True:
            self._socket.settimeout(max(1e-3, min(LOOK_SECONDS, deadline - time.monotonic())))
            try:
                data = self._socket.recv(1 << 20)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise
                if is_stopped(self._process.pid):
                    raise self._fault("was stopped from outside", from_outside=True) from None
                continue
            if not data:
                raise ConnectionResetError
            for body in self._frames.feed(data):
                return self._decode(body)
