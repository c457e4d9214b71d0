"""Whether a grammar can be compiled, known before its request is queued and within a second.

`GrammarChecker` asks a child process, in which neither a client's grammar nor a fault of the compiler can hold up
anybody (see `grammar_process`). The engine compiles what passes once more, for itself. `GrammarDoor` is the same for a
server: its event loop never waits.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quire.config import EngineConfig
from quire.engine.checkpoint import tokenizer_folder
from quire.engine.messages import CheckGrammar, FrameBuffer, GrammarChecked, LoadVocabulary, decode_from_checker, encode
from quire.errors import EngineUnavailableError, QueueFullError, RequestError
from quire.model_config import ModelConfig
from quire.structured_outputs import StructuredOutputsParams

ANSWER_SECONDS = 30.0
"""The child process answers in less than a second once it has read the vocabulary; this is for one that never will."""
MAX_WAITING = 64
"""Grammars that wait to be checked; beyond it the answer is 429."""
MAX_KNOWN = 256
"""Grammars that passed lately and are not checked again."""


class GrammarChecker:
    """Owns the child process, one question at a time. `known` and `kill` may be called from another thread."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`folder` holds the tokenizer.json of the model."""
        self._load = LoadVocabulary(str(folder), vocab_size, eos_token_ids)
        self._known: OrderedDict[StructuredOutputsParams, int] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._frames = FrameBuffer()

    @classmethod
    def for_model(cls, config: EngineConfig, model: ModelConfig, folder: Path) -> "GrammarChecker":
        """For the tokens of the model in `folder`."""
        folder = tokenizer_folder(config, folder)
        return cls(folder, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)

    def known(self, form: StructuredOutputsParams) -> int | None:
        """What `check` returned of a form that passed lately."""
        return self._known.get(form)

    def check(self, form: StructuredOutputsParams) -> int:
        """The bytes that `form` takes once it is compiled. Raises `RequestError` if it cannot be."""
        num_bytes = self._known.pop(form, None)
        if num_bytes is None:
            self.start()
            answer = self._ask(CheckGrammar(form))
            if answer.error is not None:
                raise RequestError(answer.error, param=form.asked_as, code=answer.code)
            num_bytes = answer.num_bytes
        self._known[form] = num_bytes
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return num_bytes

    def start(self) -> None:
        """Start the process and have it read the vocabulary, unless it is there."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._socket, theirs = socket.socketpair()
        self._frames = FrameBuffer()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "quire.engine.grammar_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._ask(self._load)

    def kill(self) -> None:
        """End the process; who waits for its answer learns that there is none."""
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """End the process. A later `check` starts another one."""
        self.kill()
        if self._process is not None:
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def _ask(self, question: CheckGrammar | LoadVocabulary) -> GrammarChecked:
        """Raises `EngineUnavailableError` where the process ends, or goes on for ever, instead of answering."""
        assert self._socket is not None
        try:
            deadline = time.monotonic() + ANSWER_SECONDS
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.sendall(encode(question))
            while data := self._socket.recv(1 << 16):
                for body in self._frames.feed(data):
                    return decode_from_checker(body)
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            raise ConnectionResetError
        except BaseException as error:
            # Who leaves in the middle of an exchange leaves an answer behind, so the process goes with it.
            self.close()
            if isinstance(error, OSError):
                raise EngineUnavailableError("the process that checks grammars has ended") from error
            raise


class GrammarDoor:
    """A checker in a thread of its own, for which clients queue."""

    def __init__(self, checker: GrammarChecker) -> None:
        self._checker = checker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-grammar-door")
        self._num_waiting = 0

    def warm(self) -> None:
        """Begin to start the process, so that the first grammar does not wait for it."""
        self._thread.submit(self._checker.start)

    async def check(self, form: StructuredOutputsParams) -> int:
        """`GrammarChecker.check`. Raises `QueueFullError` where too many wait."""
        if (num_bytes := self._checker.known(form)) is not None:
            return num_bytes
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} grammars are waiting to be checked", retry_after=1)
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._checker.check, form))
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.kill()
        await asyncio.to_thread(self._thread.shutdown)
        self._checker.close()
