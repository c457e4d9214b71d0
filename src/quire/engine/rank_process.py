"""A rank other than 0 of a model: `python -m quire.engine.rank_process SOCKET`, started by `RankGroup`.

It loads its part of the weights, meets the other ranks, and runs each plan that rank 0 sends. It never samples.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import msgspec

from quire.engine.device import bind_to_node
from quire.engine.group_signals import leave_to_parent
from quire.engine.messages import RankLoad
from quire.engine.model_task import read_model
from quire.engine.preloader import without_garbage_collection
from quire.errors import QuireError
from quire.parallel.follower import exit_with, follow, report
from quire.parallel.frames import receive_frame


def main(fd: int) -> None:
    """Be a rank for as long as the other end of the socket lives."""
    leave_to_parent()
    sock = socket.socket(fileno=fd)
    first = receive_frame(sock)
    if first is None:
        return
    exit_with(sock)
    load = msgspec.msgpack.decode(first, type=RankLoad)
    bind_to_node(load.rank, load.config.num_ranks)
    with without_garbage_collection():
        from quire.engine.build_rank import build_follower
    try:
        model_config = read_model(load.config, Path(load.folder))
        runner, connect = build_follower(load.config, model_config, load.plan, Path(load.folder), load.rank)
    except QuireError as error:
        report(sock, error)
        sys.exit(1)
    report(sock)
    connect(Path(load.meeting_file))
    follow(sock, runner)
    os._exit(0)  # without the destructors of a large pool


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        os._exit(1)
