"""The engine in a process of its own: `python -m quire.engine.engine_process FD`, started by `AsyncLLM`.

It speaks over one inherited end of a socketpair. While there is work it looks for messages between steps; without any
it blocks in `recv`, so an idle engine uses no CPU. When the other end closes, whatever the reason, it exits.
"""

import gc
import os
import select
import signal
import socket
import sys
import traceback

from quire.engine.messages import (
    Abort,
    Add,
    Failed,
    FrameBuffer,
    FromEngine,
    Load,
    MemoryReported,
    Outputs,
    PhaseDone,
    Ready,
    Refused,
    RegisterPrefix,
    ReportMemory,
    ResetPrefixCache,
    Stop,
    ToEngine,
    decode_to_engine,
    encode,
)
from quire.engine.preloader import preload, without_garbage_collection
from quire.errors import QuireError, RequestError
from quire.model_config import ModelConfig
from quire.outputs import StepDeltas

_CHUNK_BYTES = 1 << 20
_IDLE_STEP_SECONDS = 0.01
"""Between steps that only save blocks to disk."""


class Connection:
    """Blocking frames over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = FrameBuffer()

    def receive(self, *, wait: float | None) -> list[ToEngine]:
        """Messages that have arrived; waits up to `wait` seconds for the first one, or for ever where that is None.

        Raises `EOFError` at the end.
        """
        messages: list[ToEngine] = []
        while select.select([self._socket], [], [], 0 if messages else wait)[0]:
            data = self._socket.recv(_CHUNK_BYTES)
            if not data:
                raise EOFError
            messages += [decode_to_engine(body) for body in self._buffer.feed(data)]
        return messages

    def send(self, message: FromEngine) -> None:
        self._socket.sendall(encode(message))


def main(fd: int) -> None:
    # The terminal's Ctrl-C reaches the whole process group; only the API process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=fd))
    try:
        load, *messages = connection.receive(wait=None)
        assert isinstance(load, Load), "the first message to an engine is Load"
        try:
            serve(connection, load, messages)
        except QuireError as error:
            connection.send(Failed(type(error).__name__, str(error)))
            sys.exit(1)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The API process has ended, and with it the reason to be here; a large pool's destructors are not worth a wait.
        os._exit(0)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def serve(connection: Connection, load: Load, messages: list[ToEngine]) -> None:
    """Load the model, then step for as long as the connection lives."""
    from pathlib import Path
    from time import perf_counter

    folder = Path(load.folder)
    model_config = ModelConfig.from_folder(folder)
    preloader = preload(load.config, model_config, load.plan, folder)
    started = perf_counter()
    with without_garbage_collection():
        from quire.engine.build import build_core  # imports torch: one second; the API process answers already
    connection.send(PhaseDone("import torch", perf_counter() - started))
    core = build_core(
        load.config,
        model_config,
        load.plan,
        folder,
        lambda name, seconds: connection.send(PhaseDone(name, seconds)),
        preloader=preloader,
        warm_grammars=True,
    )
    gc.freeze()  # what a model is made of stays; a collection that looked through it would hold up a step
    connection.send(Ready())
    try:
        while True:
            for message in messages:
                match message:
                    case Add(request):
                        try:
                            core.add(request)
                        except RequestError as error:
                            connection.send(Refused(request.request_id, error.message, error.param, error.code))
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
                            connection.send(Refused(prefix_id, error.message, error.param, error.code))
                    case ReportMemory():
                        connection.send(MemoryReported(core.memory_report()))
                    case Load():
                        raise ValueError("an engine loads once")
            was_saving = core.has_idle_work
            deltas = core.step() if core.has_work or was_saving else StepDeltas()
            for request_id, refusal in core.take_refused():
                connection.send(Refused(request_id, refusal.message, refusal.param, refusal.code))
            # Also sent without deltas: after aborts the free blocks must be seen, and what was saved without requests.
            if deltas or messages or (was_saving and not core.has_idle_work):
                connection.send(Outputs(deltas, core.stats()))
            if core.has_work:
                messages = connection.receive(wait=0)
            else:
                messages = connection.receive(wait=_IDLE_STEP_SECONDS if core.has_idle_work else None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        core.close()
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
