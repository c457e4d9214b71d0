"""The engine in its own process: `python -m quire.engine.engine_process SOCKET RECORD`, started by `EngineChild`.

It communicates over one inherited end of a socketpair. While there is work it reads messages between steps. Without
work it blocks until a message comes, so an idle engine uses no CPU. It exits when the other end closes, at the latest
`ORPHAN_SECONDS` later. A `StepRecord`, which outlives it, says what it is doing.
"""

import gc
import math
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from quire.engine.core import EngineCore
from quire.engine.device import bind_to_node, take_cards
from quire.engine.group_signals import leave_to_parent
from quire.engine.messages import (
    Abort,
    Add,
    DescribeMemory,
    Failed,
    FrameBuffer,
    FromEngine,
    Load,
    MemoryDescribed,
    MemoryReported,
    Outputs,
    PhaseDone,
    PoolChanged,
    PrefixAccepted,
    Prepare,
    Ready,
    Refused,
    RegisterPrefix,
    ReportMemory,
    ResetPrefixCache,
    Stop,
    ToEngine,
    WatchPool,
    decode_to_engine,
    encode,
)
from quire.engine.model_task import read_model
from quire.engine.pool_watch import PoolWatch
from quire.engine.preloader import preload, without_garbage_collection
from quire.engine.step_record import StepRecord
from quire.errors import QuireError, RequestError
from quire.outputs import StepDeltas
from quire.parallel.follower import exit_with

ORPHAN_SECONDS = 10.0
"""Time for a step or a load, and for saving blocks, after the other end has closed."""
_CHUNK_BYTES = 1 << 20
_IDLE_STEP_SECONDS = 0.01
"""Pause between steps that only save blocks to disk."""


MakeCore = Callable[[Load, "Connection"], EngineCore]


class Connection:
    """Blocking frames over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = FrameBuffer()
        self._poll = select.poll()  # select() takes no descriptor above 1,023, and a server may have many
        self._poll.register(sock, select.POLLIN)

    def receive(self, *, wait: float | None) -> list[ToEngine]:
        """Messages that have arrived. Waits up to `wait` seconds for the first one, for ever if None.

        Raises `EOFError` if the other end has closed.
        """
        messages: list[ToEngine] = []
        milliseconds = None if wait is None else math.ceil(1e3 * wait)
        while self._poll.poll(0 if messages else milliseconds):
            data = self._socket.recv(_CHUNK_BYTES)
            if not data:
                raise EOFError
            messages += [decode_to_engine(body) for body in self._buffer.feed(data)]
        return messages

    def send(self, message: FromEngine) -> None:
        self._socket.sendall(encode(message))


def main(fd: int, record_fd: int, make_core: MakeCore, prepare: Callable[[], None]) -> None:
    """Be an engine process for as long as the other end of the socket lives. `prepare` is the work of a spare."""
    leave_to_parent()
    sock = socket.socket(fileno=fd)
    exit_with(sock, grace=ORPHAN_SECONDS)
    connection, record = Connection(sock), StepRecord(record_fd)
    try:
        first, *messages = connection.receive(wait=None)
        if isinstance(first, Prepare):
            prepare()
            record.begin()
            record.end(num_messages=1)
            first, *messages = messages or connection.receive(wait=None)
        assert isinstance(first, Load), "the first message to an engine is Load"
        try:
            core = make_core(first, connection)
            serve(core, connection, record, messages)
        except QuireError as error:
            connection.send(Failed(type(error).__name__, str(error)))
            sys.exit(1)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The API process has ended. Exit without running the destructors of a large pool.
        os._exit(0)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def import_engine() -> None:
    """Import torch, which takes a second, and all that an engine needs."""
    with without_garbage_collection():
        import quire.engine.build  # noqa: F401  # for its imports


def load_core(load: Load, connection: Connection) -> EngineCore:
    """Load the model, and report each phase."""
    folder = Path(load.folder)
    take_cards(load.index, load.config.num_ranks)
    model_config = read_model(load.config, folder)
    preloader = preload(load.config, model_config, load.plan, folder)
    started = perf_counter()
    import_engine()
    bind_to_node(0, load.config.num_ranks)
    from quire.engine.build import build_core

    connection.send(PhaseDone("import torch", perf_counter() - started))
    return build_core(
        load.config,
        model_config,
        load.plan,
        folder,
        lambda name, seconds: connection.send(PhaseDone(name, seconds)),
        preloader=preloader,
        warm_grammars=True,
        on_rank_death=_end_with_rank,
    )


def _end_with_rank(death: str) -> None:
    """Without a rank nothing can be computed: end at once, also inside a step or without work, and be replaced."""
    print(f"the engine process ends: {death}", file=sys.stderr, flush=True)
    os._exit(1)


def serve(core: EngineCore, connection: Connection, record: StepRecord, messages: list[ToEngine]) -> None:
    """Step for as long as the connection lives. `messages` came with `Load`."""
    core.record_steps(record)
    record.begin()
    record.end(num_messages=1)
    gc.freeze()  # the objects of the model stay; scanning them would delay a step
    connection.send(Ready())
    try:
        while True:
            for message in messages:
                if isinstance(message, Add):
                    record.compute((message.request.request_id,))
                _handle(core, message, connection)
            record.begin()
            _step(core, connection, had_messages=bool(messages))
            record.end(num_messages=len(messages))
            messages = connection.receive(wait=_wait_seconds(core))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        core.close()
        raise


def _wait_seconds(core: EngineCore) -> float | None:
    """How long to wait for a message before the next step; None: for ever."""
    if core.has_work:
        return 0
    if core.has_idle_work:
        return _IDLE_STEP_SECONDS
    return None if core.watch is None else core.watch.seconds_to_look


def _handle(core: EngineCore, message: ToEngine, connection: Connection) -> None:
    match message:
        case Add(request):
            try:
                core.add(request)
            except RequestError as error:
                connection.send(_refusal(request.request_id, error))
        case Abort(request_ids):
            for request_id in request_ids:
                core.abort(request_id)
        case Stop(samples):
            for request_id, index in samples:
                core.stop(request_id, index)
        case ResetPrefixCache():
            core.reset_prefix_cache()
        case RegisterPrefix(prefix_id, token_ids, salts):
            try:
                core.register_prefix(prefix_id, token_ids, salts)
            except RequestError as error:
                connection.send(_refusal(prefix_id, error))
            else:
                connection.send(PrefixAccepted(prefix_id))
        case ReportMemory():
            connection.send(MemoryReported(core.memory_report()))
        case WatchPool(on):
            core.watch_pool(on=on)
        case DescribeMemory(int(block)):
            connection.send(MemoryDescribed(block=core.detail_block(block)))
        case DescribeMemory(_, request_id):
            connection.send(MemoryDescribed(request=core.detail_request(request_id)))
        case Load() | Prepare():
            raise ValueError("an engine loads once")


def _step(core: EngineCore, connection: Connection, *, had_messages: bool) -> None:
    """Step if there is something to do, and send the outcome."""
    was_saving = core.has_idle_work
    worked = core.has_work or was_saving
    deltas = core.step() if worked else StepDeltas()
    for request_id, error in core.take_refused():
        connection.send(_refusal(request_id, error))
    # Stats are sent without deltas too: blocks become free after aborts, and saved to disk without requests.
    if deltas or had_messages or (was_saving and not core.has_idle_work):
        connection.send(Outputs(deltas, core.stats()))
    if core.watch is not None:
        _look(core.watch, connection, is_new=had_messages or worked)


def _look(watch: PoolWatch, connection: Connection, *, is_new: bool) -> None:
    """Send what changed in the pool, if it is time. `is_new`: something may have changed since the last call."""
    if is_new:
        watch.note_work()
    change = watch.look()
    if change is not None:
        connection.send(PoolChanged(change))


def _refusal(request_id: str, error: RequestError) -> Refused:
    return Refused(request_id, error.message, error.param, error.code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), load_core, import_engine)
