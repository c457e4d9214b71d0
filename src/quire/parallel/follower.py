"""The loop of a rank other than 0: report that the part is loaded, then run every plan that arrives."""

import os
import select
import socket
import threading
import time
from typing import Protocol

import msgspec

from quire.parallel.frames import receive_frame, send_frame
from quire.parallel.rank_group import RankReport
from quire.parallel.rank_plan import decode_plan
from quire.step import StepPlan, StepResult


class Computes(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


def exit_with(sock: socket.socket, *, grace: float = 0.0) -> None:
    """End this process `grace` seconds after the one at the other end, also in the middle of a step: a rank waits for
    the others there, and a step may never end."""

    def watch() -> None:
        poller = select.poll()
        poller.register(sock, select.POLLRDHUP)
        poller.poll()
        time.sleep(grace)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def report(sock: socket.socket, error: Exception | None = None) -> None:
    """Tell rank 0 that this rank is loaded, or why it cannot be."""
    said = RankReport() if error is None else RankReport(type(error).__name__, str(error))
    send_frame(sock, msgspec.msgpack.encode(said))


def follow(sock: socket.socket, runner: Computes) -> None:
    """Run plans until rank 0 closes the socket."""
    while (body := receive_frame(sock)) is not None:
        runner.execute(decode_plan(body))
