"""GrammarDoor: whether a grammar can be compiled, known before its request is queued and within a second.

The compiling happens in a child process that is killed when it takes too long, so neither a client's grammar nor a
fault of the compiler can hold up a stream. The engine compiles what passes once more, for itself.
"""

import asyncio
import contextlib
import socket
import sys
from collections import OrderedDict

from quire.engine.messages import CheckGrammar, FrameBuffer, GrammarChecked, LoadVocabulary, decode_from_checker, encode
from quire.errors import EngineUnavailableError, QueueFullError, RequestError
from quire.structured_outputs import StructuredOutputsParams

CHECK_SECONDS = 0.7
"""A grammar that takes longer to compile is refused."""
START_SECONDS = 30.0
MAX_WAITING = 64
"""Grammars that wait to be checked; beyond it the answer is 429."""
MAX_KNOWN = 256
"""Grammars that passed lately and are not checked again."""


class GrammarDoor:
    """Owns the child process, which is started when the first grammar comes."""

    def __init__(self, folder: str, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`folder` holds the tokenizer.json of the model."""
        self._load = LoadVocabulary(folder, vocab_size, eos_token_ids)
        self._known: OrderedDict[StructuredOutputsParams, None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames = FrameBuffer()

    async def check(self, form: StructuredOutputsParams) -> None:
        """Return if `form` compiles. Raises `RequestError` if not, and `QueueFullError` where too many wait."""
        if form in self._known:
            self._known.move_to_end(form)
            return
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} grammars are waiting to be checked", retry_after=1)
        self._num_waiting += 1
        try:
            async with self._turn:
                await self._check(form)
        finally:
            self._num_waiting -= 1
        self._known[form] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def close(self) -> None:
        """End the child process."""
        if self._writer is not None:
            self._writer.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _check(self, form: StructuredOutputsParams) -> None:
        if self._process is None:
            await self._start()
        # What leaves in the middle of an exchange leaves its answer behind, so the process goes with it.
        try:
            answer = await self._ask(CheckGrammar(form), CHECK_SECONDS)
        except TimeoutError:
            await self.close()
            raise RequestError(
                f"structured_outputs: the {form.kind} takes more than {CHECK_SECONDS} s to compile; make it simpler",
                param="structured_outputs",
                code="invalid_grammar",
            ) from None
        except ConnectionError:
            await self.close()
            raise RequestError(
                f"structured_outputs: the {form.kind} takes more than can be compiled; make it simpler",
                param="structured_outputs",
                code="invalid_grammar",
            ) from None
        except asyncio.CancelledError:
            await self.close()
            raise
        if answer.error is not None:
            raise RequestError(answer.error, param="structured_outputs", code=answer.code)

    async def _start(self) -> None:
        mine, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "quire.engine.grammar_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        self._frames = FrameBuffer()
        try:
            self._reader, self._writer = await asyncio.open_connection(sock=mine)
            await self._ask(self._load, START_SECONDS)
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError | ConnectionError):
                raise EngineUnavailableError("the process that checks grammars does not start") from error
            raise

    async def _ask(self, question: CheckGrammar | LoadVocabulary, seconds: float) -> GrammarChecked:
        """Raises `TimeoutError`, and `ConnectionError` where the process ends instead of answering."""
        assert self._reader is not None
        assert self._writer is not None
        async with asyncio.timeout(seconds):
            self._writer.write(encode(question))
            while True:
                data = await self._reader.read(1 << 16)
                if not data:
                    raise ConnectionResetError
                for body in self._frames.feed(data):
                    return decode_from_checker(body)
