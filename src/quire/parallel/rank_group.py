"""RankGroup: the other ranks of a model as rank 0 sees them, and RankedExecutor, which runs every step on all of them.

Rank 0 is the engine process. The others are its children, each with one end of a socketpair: they get their orders as
frames and exit when it closes. The tensors of a step travel between ranks by `quire.layers.ranks`, not here. A rank
that dies ends the group: no step can be computed without it, so the engine process ends too and is replaced as always.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from quire import errors
from quire.errors import DeviceMemoryError, QuireError
from quire.parallel.frames import receive_frame, send_frame
from quire.parallel.rank_plan import encode_plan
from quire.step import StepPlan, StepResult

EXIT_SECONDS = 10.0
"""Time for a rank to exit by itself after its socket was closed."""


class RankDeadError(RuntimeError):
    """A rank of the model has died, so no step can be computed any more."""


class RankReport(msgspec.Struct):
    """What a rank says when it has loaded its part, or cannot."""

    error: str = ""
    """Name of the error's class; empty: it is ready to meet the others."""
    message: str = ""


class Pending(Protocol):
    @property
    def ready(self) -> bool: ...
    def result(self) -> StepResult: ...


class Runner(Protocol):
    """What rank 0 runs itself; see `quire.engine.executor.Executor`."""

    def launch(self, plan: StepPlan) -> Pending: ...
    def prepare(self, *, idle: bool) -> None: ...
    @property
    def has_idle_work(self) -> bool: ...
    def close(self) -> None: ...


class RankGroup:
    """The processes of the ranks from 1 on."""

    def __init__(
        self,
        program: str,
        size: int,
        orders: Callable[[int, Path], bytes],
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        """Start `size` - 1 processes of the module `program`. `orders` makes the first frame of a rank, given the file
        at which ranks meet. `on_death` is called, in a thread, with the reason when one dies."""
        self._folder = Path(tempfile.mkdtemp(prefix="quire-ranks-"))
        self.meeting_file = self._folder / "meeting"
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._on_death = on_death
        self._death = ""
        try:
            for rank in range(1, size):
                self._spawn(program, orders(rank, self.meeting_file))
        except BaseException:
            self.close()
            raise
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _spawn(self, program: str, first: bytes) -> None:
        mine, theirs = socket.socketpair()
        self._sockets.append(mine)
        with theirs:
            command = [sys.executable, "-m", program, str(theirs.fileno())]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL))
        send_frame(mine, first)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._closing or self._death:
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._death = f"rank {rank} of {len(self._processes) + 1} died ({cause})"
        if self._on_death is not None:
            self._on_death(self._death)

    def cause_of_death(self) -> str:
        """Why the group is dead; empty while it lives."""
        return self._death

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks from 1 on."""
        return [process.pid for process in self._processes]

    def wait_loaded(self) -> None:
        """Wait until all ranks have loaded their parts. Raises the error of one that cannot."""
        for sock in self._sockets:
            frame = receive_frame(sock)
            if frame is None:
                raise RankDeadError(self._death or "a rank died while loading")
            report = msgspec.msgpack.decode(frame, type=RankReport)
            if report.error:
                raise getattr(errors, report.error, QuireError)(report.message)

    def executor(self, runner: Runner) -> "RankedExecutor":
        """What runs each plan on `runner`, as rank 0, and on all other ranks."""
        return RankedExecutor(runner, self)

    def send(self, body: bytes) -> None:
        """Send a frame to all ranks. Raises `RankDeadError`."""
        try:
            for sock in self._sockets:
                send_frame(sock, body)
        except OSError as error:
            raise RankDeadError(self._death or f"a rank has died: {error}") from error

    def close(self) -> None:
        """End the processes. Safe to repeat."""
        self._closing = True
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class RankedExecutor:
    """Runs each plan here, as rank 0, and on all other ranks. Only this rank samples."""

    def __init__(self, runner: Runner, group: RankGroup) -> None:
        self._runner = runner
        self._group = group

    def launch(self, plan: StepPlan) -> Pending:
        """Begin a step on all ranks. Raises `RankDeadError` if one has died."""
        if cause := self._group.cause_of_death():
            raise RankDeadError(cause)
        self._group.send(encode_plan(plan))
        try:
            return self._runner.launch(plan)
        except DeviceMemoryError as error:
            # The others wait inside the step for this rank, so it cannot be taken back.
            raise RankDeadError(f"rank 0 cannot go on: {error}") from error
        except RuntimeError as error:
            if (cause := self._group.cause_of_death()) or "peer" in str(error).lower():
                raise RankDeadError(cause or f"a rank has died: {error}") from error
            raise

    def prepare(self, *, idle: bool) -> None:
        self._runner.prepare(idle=idle)

    @property
    def has_idle_work(self) -> bool:
        return self._runner.has_idle_work

    def close(self) -> None:
        """End the other ranks and release what this one has."""
        self._group.close()
        self._runner.close()
