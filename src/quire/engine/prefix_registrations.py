"""PrefixRegistrations: the prefixes registered with an engine process, so that a new process gets them again.

The engine alone decides which prefixes fit (`quire.scheduler.registered_prefixes`); this file passes its answers on.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Sequence

from quire.engine.messages import RegisterPrefix, ToEngine
from quire.errors import QuarantinedError, QuireError

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Deaths of the engine in a row, all while it computed one prefix, after which that prefix is not sent again."""


class PrefixRegistrations:
    """Prefixes by id: those that the engine accepted, and those that wait for its answer."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        """`send` takes messages to the engine process."""
        self._send = send
        self._numbers = itertools.count()
        self._messages: dict[str, RegisterPrefix] = {}
        self._answers: dict[str, asyncio.Future[None]] = {}
        self._num_deaths: dict[str, int] = {}

    def __contains__(self, prefix_id: str) -> bool:
        return prefix_id in self._messages

    async def register(self, token_ids: list[int], salts: Sequence[str]) -> str:
        """Send a prefix to the engine and wait for its answer; returns the prefix id. Raises its refusal."""
        prefix_id = f"prefix-{next(self._numbers)}"
        message = self._messages[prefix_id] = RegisterPrefix(prefix_id, token_ids, tuple(salts))
        answer = self._answers[prefix_id] = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            await answer
        except QuireError:
            del self._messages[prefix_id]
            raise
        finally:
            del self._answers[prefix_id]
        return prefix_id

    def accept(self, prefix_id: str) -> None:
        """The engine will compute the prefix."""
        answer = self._answers.get(prefix_id)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def refuse(self, prefix_id: str, error: QuireError) -> None:
        """The engine cannot hold the prefix. A new engine process may refuse what the old one had accepted."""
        answer = self._answers.get(prefix_id)
        if answer is None:
            logger.error("the prefix %s is not kept: %s", prefix_id, error)
        elif not answer.done():
            answer.set_exception(error)

    def count_death(self, in_step: Collection[str] | None) -> None:
        """The engine died in a step with these prefixes and requests, or with any (None): drop a prefix that kills."""
        for prefix_id in tuple(self._messages):
            if in_step is None or prefix_id in in_step:
                self._num_deaths[prefix_id] = self._num_deaths.get(prefix_id, 0) + 1
            else:
                self._num_deaths.pop(prefix_id, None)
            if self._num_deaths.get(prefix_id, 0) >= MAX_DEATHS:
                error = QuarantinedError(f"the engine died {MAX_DEATHS} times in a row while it computed the prefix")
                self.refuse(prefix_id, error)
                if prefix_id not in self._answers:
                    del self._messages[prefix_id]

    def resend(self) -> None:
        """Register all prefixes with a new engine process."""
        for message in self._messages.values():
            self._send(message)

    def fail(self, error: QuireError) -> None:
        """There will be no engine: end the waits for an answer."""
        for prefix_id in self._answers:
            self.refuse(prefix_id, error)
