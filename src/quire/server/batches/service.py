"""BatchService: answers the lines of all batches in the background.

Every line goes to the endpoint it names, as the request of a client with the lowest priority. Batches share the lines
that may be in the engine at once. After a restart each batch goes on with its first line that has no answer.
"""

import asyncio
import secrets
import time
from asyncio import Semaphore, Task
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET

from quire.errors import EngineUnavailableError
from quire.server.auth import Client
from quire.server.backend import Engine
from quire.server.batches.expiry import Sweeper
from quire.server.batches.job import Job
from quire.server.batches.line_requests import LineRequests
from quire.server.batches.objects import Batch, BatchList, CreateBatch, FileList, FileObject, RequestCounts
from quire.server.batches.store import BatchStore
from quire.server.batches.windows import parse_window
from quire.server.endpoint import Endpoint
from quire.server.errors import Refusal
from quire.server.key_use import KeyRing
from quire.server.settings import ServerSettings
from quire.server.store_faults import RetryPause, StoreFailedError, store_faults

T = TypeVar("T")

MAX_UNENDED = 100
"""Most batches of one account that are not over."""


class BatchService:
    """Owns the store. `start` begins to answer; before it, batches are only accepted."""

    def __init__(
        self,
        store: BatchStore,
        engine: Engine,
        settings: ServerSettings,
        endpoints: Sequence[Endpoint],
        keys: KeyRing,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._requests = LineRequests(engine, settings, endpoints, keys)
        self._now = now
        self._slots = Semaphore(settings.batch_concurrency)
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, Task[None]] = {}
        self._sweeper = Sweeper(store, self._stored, self._files_in_use, now)
        self._sweeping: Task[None] | None = None
        self._started = self._stopped = self._closed = False
        # SQLite waits for the disk; one thread keeps the calls in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    async def start(self) -> None:
        """Go on with all batches that are not over, and delete files at their time. While the store fails, it tries
        again."""
        pause = RetryPause()
        while True:
            try:
                unended = await self._stored(self._store.unended)
            except StoreFailedError:
                await pause.wait()
            else:
                break
        self._started = True
        for batch, client in unended:
            self._run(batch, client)
        self._sweeping = asyncio.create_task(self._sweeper.run())

    async def stop(self) -> None:
        """Leave all batches where they are. Lines being answered are answered again after the next start."""
        if self._stopped:
            return
        self._started, self._stopped = False, True
        tasks = [*self._tasks.values(), *((self._sweeping,) if self._sweeping else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown(wait=False)

    # -- files --------------------------------------------------------------------------------------------------------

    def path_of(self, name: str) -> Path:
        """Where the content of a file lies, or of a partial one. Read and write it by `on_disk`."""
        return self._store.path_of(name)

    async def on_disk(self, call: Callable[..., T], *args: Any) -> T:
        """Call what reads or writes files, in a thread. Raises `StoreFailedError` for a fault of the disk."""
        with store_faults(self._store.name):
            return await asyncio.to_thread(call, *args)

    async def add_file(self, file: FileObject, client: Client, partial: Path) -> None:
        """Keep an uploaded file, whose content was written to `partial`."""
        await self._stored(self._store.add_file, file, client.account, partial)
        self._sweeper.wake()

    def clock(self) -> int:
        """Seconds since 1970."""
        return int(self._now())

    async def room(self) -> int:
        """Bytes that further uploads may take."""
        return max(0, self._settings.batch_dir_size - await self._stored(self._store.total_bytes))

    async def file(self, file_id: str, client: Client, *, named: str = "file_id") -> FileObject:
        """Raises `Refusal` (404) if the client has no such file, or its time is over; `named` is the client's
        field."""
        file = await self._stored(self._store.file, file_id, client.account)
        if file is None or (file.expires_at is not None and file.expires_at <= self._now()):
            raise Refusal(404, f"there is no file {file_id[:100]!r}", code="file_not_found", param=named)
        return file

    async def files(
        self, client: Client, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> FileList:
        def page() -> list[FileObject]:
            of, now = client.account, self._now()
            return self._store.files(of, now, purpose=purpose, after=after, limit=limit + 1, ascending=ascending)

        data, has_more = _cut(await self._stored(page), limit)
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, first_id=first, last_id=last, has_more=has_more)

    async def delete_file(self, file_id: str, client: Client) -> None:
        """Raises `Refusal`: 404 if the client has no such file, 409 while a batch reads it."""
        await self.file(file_id, client)
        for job in self._jobs.values():
            if job.batch.input_file_id == file_id:
                raise Refusal(409, f"batch {job.batch.id} reads the file; cancel it first", code="file_in_use")
        await self._stored(self._store.delete_file, file_id, client.account)

    # -- batches ------------------------------------------------------------------------------------------------------

    async def create(self, request: CreateBatch, client: Client) -> Batch:
        """Accept a batch. Raises `Refusal` for a file, an endpoint or a window that cannot be."""
        seconds = parse_window(request.completion_window)
        if request.endpoint not in self._requests.urls:
            urls = ", ".join(self._requests.urls)
            raise Refusal(
                400,
                f"endpoint is {request.endpoint[:100]!r}; batches are answered by {urls}",
                code="invalid_endpoint",
                param="endpoint",
            )
        file = await self.file(request.input_file_id, client, named="input_file_id")
        if file.purpose != "batch":
            raise Refusal(
                400,
                f"the purpose of file {file.id} is {file.purpose!r}; upload the input with purpose 'batch'",
                code="invalid_purpose",
                param="input_file_id",
            )
        if sum(client.account == job.client.account for job in self._jobs.values()) >= MAX_UNENDED:
            raise Refusal(429, f"{MAX_UNENDED} batches are not over; wait or cancel one", code="too_many_batches")
        now = int(self._now())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            completion_window=request.completion_window,
            created_at=now,
            expires_at=now + seconds,
            request_counts=RequestCounts(),
            metadata=request.metadata,
            output_expires_after=request.output_expires_after or UNSET,
        )
        await self._stored(self._store.add_batch, batch, client)
        self._run(batch, client._replace(background=True))
        return batch

    async def batch(self, batch_id: str, client: Client) -> Batch:
        """Raises `Refusal` (404) if the client has no such batch."""
        batch = await self._stored(self._store.batch, batch_id, client.account)
        if batch is None:
            raise Refusal(404, f"there is no batch {batch_id[:100]!r}", code="batch_not_found", param="batch_id")
        job = self._jobs.get(batch_id)
        return batch if job is None else job.batch

    async def batches(self, client: Client, *, after: str | None, limit: int) -> BatchList:
        stored = await self._stored(lambda: self._store.batches(client.account, after=after, limit=limit + 1))
        data, has_more = _cut([self._jobs[b.id].batch if b.id in self._jobs else b for b in stored], limit)
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, first_id=first, last_id=last, has_more=has_more)

    async def cancel(self, batch_id: str, client: Client) -> Batch:
        """Begin to cancel a batch. Raises `Refusal`: 404 if there is none, 409 if it is over."""
        batch = await self.batch(batch_id, client)
        job = self._jobs.get(batch_id)
        if job is None or not await job.cancel():
            raise Refusal(409, f"the batch is {batch.status} and cannot be cancelled", code="batch_over")
        return job.batch

    async def wait(self, batch_id: str) -> None:
        """Wait until a batch is over."""
        if task := self._tasks.get(batch_id):
            await asyncio.wait((task,))

    # -- below --------------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, client: Client) -> None:
        job = Job(batch, client, self._store, self._stored, self._requests, self._slots, self._now)
        self._jobs[batch.id] = job
        if self._started:
            self._tasks[batch.id] = asyncio.create_task(job.run())
            self._tasks[batch.id].add_done_callback(lambda _: self._forget(batch.id))

    def _forget(self, batch_id: str) -> None:
        del self._jobs[batch_id], self._tasks[batch_id]
        self._sweeper.wake()  # it has read its input, and written files

    def _files_in_use(self) -> list[str]:
        return [job.batch.input_file_id for job in self._jobs.values()]

    async def _stored(self, call: Callable[..., T], *args: Any) -> T:
        """Call the store in its thread. Raises `StoreFailedError` for a fault, and `EngineUnavailableError` after the
        end of the service."""
        if self._closed:
            raise EngineUnavailableError("the server is shutting down")
        with store_faults(self._store.name):
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


def _cut(items: list[T], limit: int) -> tuple[list[T], bool]:
    """The first `limit` items, and whether there are more."""
    return items[:limit], len(items) > limit
