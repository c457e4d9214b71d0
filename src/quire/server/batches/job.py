"""Job: one batch on its way from its input file to its output files."""

import asyncio
import itertools
import logging
from asyncio import Lock, Semaphore, Task, TaskGroup
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from quire.server.auth import Client
from quire.server.batches.line_requests import LineRequests
from quire.server.batches.lines import check_lines, parse_line, read_lines
from quire.server.batches.objects import ENDED, Batch, BatchErrors, FileObject, LineError, OutputLine
from quire.server.batches.store import Answered, BatchStore
from quire.server.store_faults import RetryPause, StoreFailedError, store_faults

logger = logging.getLogger("quire.server")

T = TypeVar("T")

_CHUNK = 64
"""Lines that are read from the file at once."""
_UNANSWERED = {
    "expired": LineError("batch_expired", "the batch's completion window ended before this request was answered"),
    "cancelled": LineError("batch_cancelled", "the batch was cancelled before this request was answered"),
}
_CHANGED = LineError("invalid_json_line", "the line was changed in the server's folder after the file was checked")
_LOST = LineError("input_file_missing", "the input file is missing in the server's folder; upload it again")


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
        self._pause = RetryPause()

    async def run(self) -> None:
        """Carry the batch from its present state to its end. After a fault, such as a full disk, it tries again."""
        while self.batch.status not in ENDED:
            try:
                await self._advance()
            except Exception as error:
                if _is_store_fault(error):  # it is in the log
                    logger.warning("batch %s waits for its store", self.batch.id)
                else:
                    logger.exception("batch %s met an unexpected error; it tries again", self.batch.id)
                await self._pause.wait()

    async def cancel(self) -> bool:
        """Begin to cancel. Returns False if it is too late. While the store fails, the batch stops all the same; a
        server that is killed before the store works again goes on with it."""
        if self.batch.status not in ("validating", "in_progress"):
            return self.batch.status == "cancelling"
        self.batch.status, self.batch.cancelling_at = "cancelling", self._time()
        if self._answering is not None:
            self._answering.cancel()
        self._pause.end()
        with suppress(StoreFailedError):  # `run` saves it later
            await self._stored(self._store.save, self.batch)
        return True

    # -- the states ---------------------------------------------------------------------------------------------------

    async def _advance(self) -> None:
        if self.batch.status == "validating":
            await self._validate()
        if self.batch.status == "in_progress":
            await self._answer()
        if self.batch.status in ("in_progress", "finalizing", "cancelling"):
            await self._finish()

    async def _validate(self) -> None:
        batch = self.batch
        count, errors = await self._on_disk(self._check_input)
        if batch.status != "validating":
            return  # cancelled meanwhile
        batch.request_counts.total = count
        if errors:
            await self._end(replace(batch, status="failed", failed_at=self._time(), errors=BatchErrors(errors)))
        else:
            batch.status, batch.in_progress_at = "in_progress", self._time()
            await self._stored(self._store.save, batch)

    async def _answer(self) -> None:
        """Answer lines until all are answered, the batch is cancelled, or its time is over."""
        await self._save_unsaved()
        answered = await self._stored(self._store.answered_lines, self.batch.id)
        if self.batch.status != "in_progress":
            return  # cancelled meanwhile
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
            while chunk := await self._on_disk(_take, lines):
                for number, line in chunk:
                    if number not in answered:
                        await self._slots.acquire()
                        task = group.create_task(self._answer_line(number, line))
                        task.add_done_callback(lambda _: self._slots.release())

    async def _answer_line(self, number: int, line: bytes) -> None:
        try:
            request = parse_line(line)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            await self._keep(Answered(number, False, self._unanswered(number, line, _CHANGED)))
            return
        response = await self._requests.answer(request, self.client)
        output = OutputLine(id=response.request_id, custom_id=request.custom_id, response=response, error=None)
        await self._keep(Answered(number, response.status_code == 200, msgspec.json.encode(output)))

    async def _keep(self, answer: Answered) -> None:
        """Save an answer, together with those that come while another is being saved. While the store fails, answers
        wait here, and no further line is sent."""
        self._unsaved.append(answer)
        async with self._saving:
            while self._unsaved:
                try:
                    await self._save_unsaved()
                except StoreFailedError:
                    logger.warning("batch %s cannot save answers; it tries again", self.batch.id)
                    await self._pause.wait()

    async def _save_unsaved(self) -> None:
        answers, self._unsaved = self._unsaved, []
        try:
            await self._stored(self._store.add_answers, self.batch, answers)
        except BaseException:
            self._unsaved = answers + self._unsaved  # saving a line twice keeps the first answer
            raise
        self._pause.reset()
        self._count(len(answers), sum(one.succeeded for one in answers))

    async def _finish(self) -> None:
        """Write the output files and end the batch."""
        batch = self.batch
        await self._save_unsaved()
        if batch.status != "finalizing":
            reason = "cancelled" if batch.status == "cancelling" else "expired"
            await self._stored(self._answer_rest, _UNANSWERED[reason])
        answered = await self._stored(self._store.answered_lines, batch.id)
        self._count(len(answered), sum(answered.values()), afresh=True)
        batch.output_file_id = await self._stored(self._write_file, "output", True)
        batch.error_file_id = await self._stored(self._write_file, "errors", False)
        match batch.status:
            case "finalizing":
                await self._end(replace(batch, status="completed", completed_at=self._time()))
            case "cancelling":
                await self._end(replace(batch, status="cancelled", cancelled_at=self._time()))
            case _:
                await self._end(replace(batch, status="expired", expired_at=self._time()))

    async def _end(self, ended: Batch) -> None:
        """Save the batch in its final state. It has that state when it is saved, and not before."""
        await self._stored(self._store.end, ended)
        self.batch = ended

    async def _on_disk(self, call: Callable[..., T], *args: Any) -> T:
        """Call what reads files, in a thread. Raises `StoreFailedError`."""
        with store_faults(self._store.name):
            return await asyncio.to_thread(call, *args)

    def _check_input(self) -> tuple[int, list[LineError]]:
        """The number of requests in the input, and its faults."""
        path = self._store.path_of(self.batch.input_file_id)
        return (0, [_LOST]) if _is_lost(path) else check_lines(path, self.batch.endpoint)

    # -- in the store's thread ----------------------------------------------------------------------------------------

    def _answer_rest(self, error: LineError) -> None:
        """Give every line without an answer `error`."""
        path = self._store.path_of(self.batch.input_file_id)
        if _is_lost(path):
            self.batch.errors = BatchErrors([_LOST])
            return
        answered = self._store.answered_lines(self.batch.id)
        rest = [
            Answered(number, False, self._unanswered(number, line, error))
            for number, line in read_lines(path)
            if number not in answered
        ]
        self._store.add_answers(self.batch, rest)

    def _unanswered(self, number: int, line: bytes, error: LineError) -> bytes:
        """The answer to a line that no endpoint answered."""
        try:
            custom_id = parse_line(line).custom_id
        except (msgspec.MsgspecError, UnicodeDecodeError):
            custom_id = ""  # cancelled before the file was checked
        output = OutputLine(id=f"{self.batch.id}-{number}", custom_id=custom_id, response=None, error=error)
        return msgspec.json.encode(output)

    def _write_file(self, kind: str, succeeded: bool) -> str | None:
        """The id of the output file with the answers that succeeded, or failed; None if there are none."""
        file_id = f"file-{self.batch.id.removeprefix('batch_')}-{kind}"
        partial = self._store.write_answers(self.batch.id, file_id, succeeded=succeeded)
        if partial is None:
            return None
        created_at, after = self._time(), self.batch.output_expires_after
        file = FileObject(
            id=file_id,
            bytes=partial.stat().st_size,
            created_at=created_at,
            expires_at=created_at + after.seconds if after else None,
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


def _is_lost(path: Path) -> bool:
    """Whether there is no such file. Raises `OSError` if that cannot be known."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    return False


def _is_store_fault(error: BaseException) -> bool:
    """Whether `error`, or each one in a group, is a fault of the store."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_store_fault, error.exceptions))
    return isinstance(error, StoreFailedError)
