"""A rank without a model: it behaves as its first frame says, and answers each plan by appending it to a file."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from quire.errors import CheckpointError
from quire.parallel.follower import exit_with, follow, report
from quire.parallel.frames import receive_frame
from quire.step import StepPlan, StepResult


class Recorder:
    def __init__(self, path: Path, dies_at: int) -> None:
        self.path = path
        self.dies_at = dies_at
        self.num_plans = 0

    def execute(self, plan: StepPlan) -> StepResult:
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(plan) + b"\n")
        self.num_plans += 1
        if self.num_plans == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return StepResult()


if __name__ == "__main__":
    sock = socket.socket(fileno=int(sys.argv[1]))
    orders = msgspec.json.decode(receive_frame(sock) or b"{}")
    exit_with(sock)
    if orders.get("fails"):
        report(sock, CheckpointError("tensor x is missing"))
        sys.exit(1)
    if orders.get("exits"):
        sys.exit(3)
    report(sock)
    Path(orders["path"]).touch()
    if orders.get("hangs"):
        time.sleep(60)
    follow(sock, Recorder(Path(orders["path"]), orders.get("dies_at", 0)))
