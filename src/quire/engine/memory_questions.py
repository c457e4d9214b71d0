"""MemoryQuestions: memory reports that were asked of the engine process and have not come."""

import asyncio
from collections import deque

from quire.errors import EngineUnavailableError
from quire.outputs import MemoryReport


class MemoryQuestions:
    """Answers come in the order of the questions."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[MemoryReport]] = deque()

    def ask(self) -> asyncio.Future[MemoryReport]:
        """The answer to a question that is sent now."""
        answer: asyncio.Future[MemoryReport] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        return answer

    def answer(self, report: MemoryReport) -> None:
        """Answer the oldest question."""
        waiting = self._waiting.popleft()
        if not waiting.done():
            waiting.set_result(report)

    def fail(self) -> None:
        """The engine process has ended: no answer will come."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(EngineUnavailableError("the engine ended before it could answer"))
        self._waiting.clear()
