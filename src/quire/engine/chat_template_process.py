"""ChatTemplateProcess: a model's chat templates, compiled and rendered by expendable child processes."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quire.engine.chat_template import read_response_template, read_sources
from quire.engine.expendable import CostlyQuestionError, Expendable
from quire.engine.messages import LoadTemplate, Rendered, RenderMessages, decode_from_renderer
from quire.errors import EngineUnavailableError, QueueFullError, RequestError

logger = logging.getLogger(__name__)

NUM_PROCESSES = 2
"""While messages that are costly to render occupy one process, other requests use the second."""
MAX_WAITING = 1024
"""Most requests that may wait to be rendered; the next one is refused with 429."""
ANSWER_SECONDS = 30.0
"""Longest wait for a rendering, on a machine too busy to use up the CPU time that it may take."""


class ChatTemplateProcess:
    """The templates of one model folder. Each thread of `NUM_PROCESSES` owns a process, which starts when needed."""

    def __init__(self, folder: Path, report: Callable[[str], None] = logger.error) -> None:
        """`report` gets what is wrong with a template. Raises `CheckpointError` for a folder that cannot be read."""
        sources, _ = read_sources(folder)
        self.source = sources.get("tool_use") or sources.get("default") or ""
        """The text of the template, the one for tools if there are several."""
        self.response_template = read_response_template(folder)
        """How the tokenizer describes replies, as JSON; "" if it does not."""
        self._folder = folder
        self._report = report
        self._idle = [self._make() for _ in range(NUM_PROCESSES)]
        self._all = tuple(self._idle)
        self._threads = ThreadPoolExecutor(NUM_PROCESSES, thread_name_prefix="quire-chat-template")
        self._num_waiting = 0

    def warm(self) -> None:
        """Start a process in the background, so that the first chat need not wait for it."""
        self._threads.submit(self._start)

    async def render(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> str:
        """`ChatTemplate.render`. Raises `RequestError`, and `QueueFullError` if more than `MAX_WAITING` wait."""
        if self._num_waiting >= MAX_WAITING:
            raise QueueFullError(f"{MAX_WAITING} chats are waiting to be rendered", retry_after=1)
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._threads.submit(self._render, messages, options))
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        await asyncio.to_thread(self._threads.shutdown)
        for process in self._all:
            process.close()

    def _make(self) -> Expendable[Rendered]:
        first = LoadTemplate(str(self._folder))
        return Expendable(
            "quire.engine.template_process", "renders chats", first, decode_from_renderer, seconds=ANSWER_SECONDS
        )

    def _start(self) -> None:
        process = self._idle.pop()
        try:
            with contextlib.suppress(EngineUnavailableError):
                answer = process.start()
                if answer is not None and answer.error is not None:
                    self._report(f"no chat: {answer.error}")
        finally:
            self._idle.append(process)

    def _render(self, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> str:
        process = self._idle.pop()
        try:
            answer = process.ask(RenderMessages([dict(message) for message in messages], options))
        except CostlyQuestionError as error:
            raise RequestError(
                "the model's chat template takes too much time or memory for these messages; shorten them",
                param="messages",
                code="template_too_slow",
            ) from error
        finally:
            self._idle.append(process)
        if answer.error is not None:
            raise RequestError(answer.error, param=answer.param, code=answer.code)
        return answer.text
