"""MemoryQuestions: questions about the pool that the engine process answers between two steps, in their order."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from quire.engine.messages import DescribeMemory, MemoryDescribed, MemoryReported, ReportMemory, ToEngine
from quire.errors import EngineUnavailableError
from quire.outputs import MemoryReport
from quire.pool_view import BlockDetail, RequestDetail

_Answer = TypeVar("_Answer", MemoryReported, MemoryDescribed)


class MemoryQuestions:
    """Sends questions and hands the answers to those who asked."""

    def __init__(self, send: Callable[[ToEngine], None], state: Callable[[], str]) -> None:
        self._send = send
        self._state = state
        self._reports: deque[asyncio.Future[MemoryReported]] = deque()
        self._details: deque[asyncio.Future[MemoryDescribed]] = deque()

    async def report(self) -> MemoryReport:
        """Contents of the KV pool. Raises `EngineUnavailableError` if there is no engine to ask."""
        return (await self._ask(ReportMemory(), self._reports)).report

    async def block(self, block: int) -> BlockDetail | None:
        """As `EngineCore.detail_block`. Raises `EngineUnavailableError` if there is no engine to ask."""
        return (await self._ask(DescribeMemory(block=block), self._details)).block

    async def request(self, request_id: str) -> RequestDetail | None:
        """As `EngineCore.detail_request`. Raises `EngineUnavailableError` if there is no engine to ask."""
        return (await self._ask(DescribeMemory(request_id=request_id), self._details)).request

    async def _ask(self, question: ToEngine, waiters: "deque[asyncio.Future[_Answer]]") -> _Answer:
        if self._state() not in ("ready", "draining"):
            raise EngineUnavailableError(f"the engine is {self._state()}")
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        waiters.append(answer)
        self._send(question)
        return await answer

    def answer(self, message: MemoryReported | MemoryDescribed) -> None:
        """The engine answered the oldest question of this kind."""
        if isinstance(message, MemoryReported):
            _settle(self._reports.popleft(), message)
        else:
            _settle(self._details.popleft(), message)

    def fail(self) -> None:
        """The engine ended; nobody will answer."""
        _fail(self._reports)
        _fail(self._details)


def _settle(waiter: "asyncio.Future[_Answer]", message: _Answer) -> None:
    if not waiter.done():
        waiter.set_result(message)


def _fail(waiters: "deque[asyncio.Future[_Answer]]") -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(EngineUnavailableError("the engine ended before it could answer"))
    waiters.clear()
