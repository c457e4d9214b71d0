"""Checks whether a grammar can be compiled, before its request is queued and within a second.

`GrammarChecker` asks a child process, so that neither a client's grammar nor a fault of the compiler can delay other
requests (see `grammar_process`). The engine compiles an accepted grammar again for itself. `AsyncGrammarChecker` is the
same for a server, whose event loop must not block.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quire.config import EngineConfig
from quire.engine.checkpoint import tokenizer_folder
from quire.engine.expendable import CostlyQuestionError, Expendable
from quire.engine.messages import CheckGrammar, LoadVocabulary, decode_from_checker
from quire.errors import QueueFullError, RequestError
from quire.model_config import ModelConfig
from quire.structured_outputs import StructuredOutputsParams

ANSWER_SECONDS = 30.0
"""Longest wait for an answer. A working child process answers within a second once it has read the vocabulary."""
MAX_WAITING = 64
"""Most grammars that may wait to be checked; the next one is refused with 429."""
MAX_KNOWN = 256
"""Recently accepted grammars, which are not checked again."""


class GrammarChecker:
    """Owns the child process; asks one question at a time. `known` and `kill` may be called from another thread."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`folder` holds the tokenizer.json of the model."""
        self._known: OrderedDict[StructuredOutputsParams, int] = OrderedDict()
        self._process = Expendable(
            "quire.engine.grammar_process",
            "checks grammars",
            LoadVocabulary(str(folder), vocab_size, eos_token_ids),
            decode_from_checker,
            seconds=ANSWER_SECONDS,
        )

    @classmethod
    def for_model(cls, config: EngineConfig, model: ModelConfig, folder: Path) -> "GrammarChecker":
        """A checker for the tokens of the model in `folder`."""
        folder = tokenizer_folder(config, folder)
        return cls(folder, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)

    def known(self, spec: StructuredOutputsParams) -> int | None:
        """The result of `check` for a recently accepted spec, else None."""
        return self._known.get(spec)

    def check(self, spec: StructuredOutputsParams) -> int:
        """The size of the compiled grammar in bytes. Raises `RequestError` if it cannot be compiled."""
        num_bytes = self._known.pop(spec, None)
        if num_bytes is None:
            try:
                answer = self._process.ask(CheckGrammar(spec))
            except CostlyQuestionError as error:
                message = f"{spec.asked_as}: the {spec.kind} takes too much time or memory to check; make it simpler"
                raise RequestError(message, param=spec.asked_as, code="invalid_grammar") from error
            if answer.error is not None:
                raise RequestError(answer.error, param=spec.asked_as, code=answer.code)
            num_bytes = answer.num_bytes
        self._known[spec] = num_bytes
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return num_bytes

    def start(self) -> None:
        """Start the process and let it read the vocabulary, unless it runs already."""
        self._process.start()

    def kill(self) -> None:
        """End the process; a pending `check` raises `EngineUnavailableError`."""
        self._process.kill()

    def close(self) -> None:
        """End the process. A later `check` starts a new one."""
        self._process.close()


class AsyncGrammarChecker:
    """A `GrammarChecker` in its own thread; callers queue for it."""

    def __init__(self, checker: GrammarChecker) -> None:
        self._checker = checker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-grammar-checker")
        self._num_waiting = 0

    def warm(self) -> None:
        """Start the process in the background, so that the first grammar need not wait for it."""
        self._thread.submit(self._checker.start)

    async def check(self, spec: StructuredOutputsParams) -> int:
        """`GrammarChecker.check`. Raises `QueueFullError` if more than `MAX_WAITING` wait."""
        if (num_bytes := self._checker.known(spec)) is not None:
            return num_bytes
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} grammars are waiting to be checked", retry_after=1)
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._checker.check, spec))
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.kill()
        await asyncio.to_thread(self._thread.shutdown)
        self._checker.close()
