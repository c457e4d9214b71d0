"""Job: one batch on its way from its input file to its output files."""

import asyncio
import itertools
import logging
import sqlite3
from asyncio import Lock, Semaphore, Task, TaskGroup
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from quire.server.auth import Client
from quire.server.batches.line_requests import LineRequests
from quire.server.batches.lines import check_lines, parse_line, read_lines
from quire.server.batches.objects import Batch, BatchErrors, FileObject, InputLine, LineError, OutputLine
from quire.server.batches.store import Answered, BatchStore

logger = logging.getLogger("quire.server")

_CHUNK = 64
"""Lines that are read from the file at once."""
_UNANSWERED = {
    "expired": LineError("batch_expired", "the batch's completion window ended before this request was answered"),
    "cancelled": LineError("batch_cancelled", "the batch was cancelled before this request was answered"),
}


class Job:
    """Owns its batch: nothing else changes it."""

    def __init__(
        self,
        batch: Batch,
        client: Client,
        store: BatchStore,
        stored: Callable[..., Awaitable[Any]],
        requests: LineRequests,
        slots: Semaphore,
        now: Callable[[], float],
    ) -> None:
        """`stored` calls the store in its thread; `slots` are shared by all jobs."""
        self.batch = batch
        self.client = client
        self._store = store
        self._stored = stored
        self._requests = requests
        self._slots = slots
        self._now = now
        self._unsaved: list[Answered] = []
        self._saving = Lock()
        self._answering: Task[None] | None = None

    async def run(self) -> None:
        """Carry the batch from its present state to its end."""
        try:
            if self.batch.status == "validating":
                await self._validate()
            if self.batch.status == "in_progress":
                await self._answer()
            if self.batch.status in ("in_progress", "finalizing", "cancelling"):
                await self._finish()
        except Exception:
            logger.exception("batch %s stopped; it goes on after a restart of the server", self.batch.id)

    async def cancel(self) -> bool:
        """Begin to cancel. Returns False if it is too late."""
        if self.batch.status not in ("validating", "in_progress"):
            return self.batch.status == "cancelling"
        self.batch.status, self.batch.cancelling_at = "cancelling", self._time()
        await self._stored(self._store.save, self.batch)
        if self._answering is not None:
            self._answering.cancel()
        return True

    # -- the states ---------------------------------------------------------------------------------------------------

    async def _validate(self) -> None:
        batch = self.batch
        path = self._store.path_of(batch.input_file_id)
        count, errors = await asyncio.to_thread(check_lines, path, batch.endpoint)
        if batch.status != "validating":
            return  # cancelled meanwhile
        batch.request_counts.total = count
        if errors:
            batch.status, batch.failed_at, batch.errors = "failed", self._time(), BatchErrors(errors)
            await self._stored(self._store.end, batch)
        else:
            batch.status, batch.in_progress_at = "in_progress", self._time()
            await self._stored(self._store.save, batch)

    async def _answer(self) -> None:
        """Answer lines until all are answered, the batch is cancelled, or its time is over."""
        answered = await self._stored(self._store.answered_lines, self.batch.id)
        self._count(len(answered), sum(answered.values()), afresh=True)
        self._answering = asyncio.create_task(self._answer_lines(frozenset(answered)))
        try:
            done, _ = await asyncio.wait((self._answering,), timeout=max(0.0, self.batch.expires_at - self._now()))
        finally:
            self._answering.cancel()
            await asyncio.wait((self._answering,))
        if done and not self._answering.cancelled():
            self._answering.result()
            self.batch.status, self.batch.finalizing_at = "finalizing", self._time()
            await self._stored(self._store.save, self.batch)

    async def _answer_lines(self, answered: frozenset[int]) -> None:
        lines = read_lines(self._store.path_of(self.batch.input_file_id))
        async with TaskGroup() as group:
            while chunk := await asyncio.to_thread(_take, lines):
                for number, line in chunk:
                    if number not in answered:
                        await self._slots.acquire()
                        task = group.create_task(self._answer_line(number, parse_line(line)))
                        task.add_done_callback(lambda _: self._slots.release())

    async def _answer_line(self, number: int, line: InputLine) -> None:
        response = await self._requests.answer(line, self.client)
        output = OutputLine(id=response.request_id, custom_id=line.custom_id, response=response, error=None)
        await self._keep(Answered(number, response.status_code == 200, msgspec.json.encode(output)))

    async def _keep(self, answer: Answered) -> None:
        """Save an answer, together with those that come while another is being saved."""
        self._unsaved.append(answer)
        wait = 1.0
        async with self._saving:
            while self._unsaved:
                answers, self._unsaved = self._unsaved, []
                try:
                    await self._stored(self._store.add_answers, self.batch, answers)
                except sqlite3.Error as error:
                    # A full disk, most likely. Nothing is lost: the answers wait here, and no further line is sent.
                    logger.warning("batch %s cannot save answers (%s); trying again", self.batch.id, error)
                    self._unsaved = answers + self._unsaved
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, 60.0)
                else:
                    self._count(len(answers), sum(one.succeeded for one in answers))

    async def _finish(self) -> None:
        """Write the output files and end the batch."""
        batch = self.batch
        if batch.status != "finalizing":
            reason = "cancelled" if batch.status == "cancelling" else "expired"
            await self._stored(self._answer_rest, _UNANSWERED[reason])
        answered = await self._stored(self._store.answered_lines, batch.id)
        self._count(len(answered), sum(answered.values()), afresh=True)
        batch.output_file_id = await self._stored(self._write_file, "output", True)
        batch.error_file_id = await self._stored(self._write_file, "errors", False)
        match batch.status:
            case "finalizing":
                batch.status, batch.completed_at = "completed", self._time()
            case "cancelling":
                batch.status, batch.cancelled_at = "cancelled", self._time()
            case _:
                batch.status, batch.expired_at = "expired", self._time()
        await self._stored(self._store.end, batch)

    # -- in the store's thread ----------------------------------------------------------------------------------------

    def _answer_rest(self, error: LineError) -> None:
        """Give every line without an answer `error`."""
        answered = self._store.answered_lines(self.batch.id)
        lines = read_lines(self._store.path_of(self.batch.input_file_id))
        rest = [
            Answered(number, False, msgspec.json.encode(self._unanswered(number, line, error)))
            for number, line in lines
            if number not in answered
        ]
        self._store.add_answers(self.batch, rest)

    def _unanswered(self, number: int, line: bytes, error: LineError) -> OutputLine:
        try:
            custom_id = parse_line(line).custom_id
        except (msgspec.MsgspecError, UnicodeDecodeError):
            custom_id = ""  # cancelled before the file was checked
        return OutputLine(id=f"{self.batch.id}-{number}", custom_id=custom_id, response=None, error=error)

    def _write_file(self, kind: str, succeeded: bool) -> str | None:
        """The id of the output file with the answers that succeeded, or failed; None if there are none."""
        file_id = f"file-{self.batch.id.removeprefix('batch_')}-{kind}"
        partial = self._store.write_answers(self.batch.id, file_id, succeeded=succeeded)
        if partial is None:
            return None
        file = FileObject(
            id=file_id,
            bytes=partial.stat().st_size,
            created_at=self._time(),
            filename=f"{self.batch.id}_{kind}.jsonl",
            purpose="batch_output",
        )
        self._store.add_file(file, self.client.account, partial)
        return file_id

    def _count(self, num_answers: int, num_succeeded: int, *, afresh: bool = False) -> None:
        """Add answers to the counts of the batch, or set them."""
        counts = self.batch.request_counts
        if afresh:
            counts.completed = counts.failed = 0
        counts.completed += num_succeeded
        counts.failed += num_answers - num_succeeded

    def _time(self) -> int:
        return int(self._now())


def _take(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return list(itertools.islice(lines, _CHUNK))
