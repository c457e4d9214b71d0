"""The routes /v1/files and /v1/batches."""

import asyncio
import secrets
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import BinaryIO

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from quire.server.batches.expiry import FIELD, PARTS, read_expires_after
from quire.server.batches.objects import Batch, BatchList, CreateBatch, DeletedFile, FileList, FileObject
from quire.server.batches.service import BatchService
from quire.server.batches.store import STORE
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal
from quire.server.limits import ClientGoneError
from quire.server.query import read_ascending, read_whole_number
from quire.server.store_faults import store_faults

Handler = Callable[[BatchService, RequestContext], Awaitable[None]]

_MAX_NAME_CHARS = 255
_SEND_BYTES = 2**18


def endpoints(service: BatchService | None) -> tuple[Endpoint, ...]:
    """The routes for `service`. Without one they exist, and say how the server must be started."""

    def bound(handle: Handler) -> Callable[[RequestContext], Awaitable[None]]:
        @wraps(handle)
        async def run(context: RequestContext) -> None:
            if service is None:
                message = "files and batches need a folder: start the server with --batch-dir DIR"
                raise Refusal(404, message, code="no_batches")
            await handle(service, context)

        return run

    rows: tuple[tuple[str, str, Handler, str, type | None, type | None], ...] = (
        ("POST", "/v1/files", upload_file, "Upload the input of a batch (multipart)", None, FileObject),
        ("GET", "/v1/files", list_files, "The files that were uploaded or written", None, FileList),
        ("GET", "/v1/files/{file_id}", get_file, "One of them", None, FileObject),
        ("GET", "/v1/files/{file_id}/content", get_content, "Its content", None, None),
        ("DELETE", "/v1/files/{file_id}", delete_file, "Delete a file", None, DeletedFile),
        ("POST", "/v1/batches", create_batch, "Answer the requests of a file in the background", CreateBatch, Batch),
        ("GET", "/v1/batches", list_batches, "The batches", None, BatchList),
        ("GET", "/v1/batches/{batch_id}", get_batch, "One of them", None, Batch),
        ("POST", "/v1/batches/{batch_id}/cancel", cancel_batch, "Cancel a batch", None, Batch),
    )
    return tuple(
        Endpoint(method, path, bound(handle), summary, body=body, reply=reply)
        for method, path, handle, summary, body, reply in rows
    )


# -- files ------------------------------------------------------------------------------------------------------------


async def upload_file(service: BatchService, context: RequestContext) -> None:
    name = f"file-{secrets.token_hex(16)}"
    most = min(context.settings.max_file_size, await service.room())
    target = service.path_of(f"{name}.partial")
    with store_faults(STORE):  # a form of some size is spooled to the disk
        form = await _read_form(context, most)
    try:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise Refusal(400, "the form has no file in the field 'file'", code="missing_file", param="file")
        unknown = sorted({*form} - {"file", "purpose", FIELD, *PARTS})
        context.warn(*(f"unknown field {name[:64]!a} is ignored" for name in unknown[:8]))
        if purpose != "batch":
            raise Refusal(400, f"purpose is {purpose!r}; 'batch' is supported", code="invalid_purpose", param="purpose")
        after, created_at = read_expires_after(form), service.clock()
        size = await service.on_disk(_copy, upload.file, target)
        file = FileObject(
            id=name,
            bytes=size,
            created_at=created_at,
            expires_at=created_at + after.seconds if after else None,
            filename=(upload.filename or "input.jsonl")[:_MAX_NAME_CHARS],
            purpose=purpose,
        )
        await service.add_file(file, context.client, target)
    finally:
        with suppress(OSError):
            target.unlink(missing_ok=True)
        await form.close()
    await context.reply(file)


async def list_files(service: BatchService, context: RequestContext) -> None:
    query = context.query
    ascending = read_ascending(query)
    limit = read_whole_number(query, "limit", 10_000, low=1, high=10_000)
    files = await service.files(
        context.client, purpose=query.get("purpose"), after=query.get("after"), limit=limit, ascending=ascending
    )
    await context.reply(files)


async def get_file(service: BatchService, context: RequestContext) -> None:
    await context.reply(await service.file(context.path_params["file_id"], context.client))


async def get_content(service: BatchService, context: RequestContext) -> None:
    file = await service.file(context.path_params["file_id"], context.client)
    headers = [(b"content-type", b"application/jsonl"), (b"content-length", str(file.bytes).encode())]
    with await service.on_disk(service.path_of(file.id).open, "rb") as content:
        part = await service.on_disk(content.read, _SEND_BYTES)  # a fault of the first read has a status of its own
        await context.send({"type": "http.response.start", "status": 200, "headers": headers})
        while part:
            try:
                async with asyncio.timeout(context.settings.stall_timeout or None):
                    await context.send({"type": "http.response.body", "body": part, "more_body": True})
            except TimeoutError:
                raise ClientGoneError from None
            part = await service.on_disk(content.read, _SEND_BYTES)
        await context.send({"type": "http.response.body", "body": b""})


async def delete_file(service: BatchService, context: RequestContext) -> None:
    file_id = context.path_params["file_id"]
    await service.delete_file(file_id, context.client)
    await context.reply(DeletedFile(id=file_id))


# -- batches ----------------------------------------------------------------------------------------------------------


async def create_batch(service: BatchService, context: RequestContext) -> None:
    await context.reply(await service.create(await context.read(CreateBatch), context.client))


async def list_batches(service: BatchService, context: RequestContext) -> None:
    query = context.query
    limit = read_whole_number(query, "limit", 20, low=1, high=100)
    await context.reply(await service.batches(context.client, after=query.get("after"), limit=limit))


async def get_batch(service: BatchService, context: RequestContext) -> None:
    await context.reply(await service.batch(context.path_params["batch_id"], context.client))


async def cancel_batch(service: BatchService, context: RequestContext) -> None:
    await context.reply(await service.cancel(context.path_params["batch_id"], context.client))


# -- reading requests -------------------------------------------------------------------------------------------------


async def _read_form(context: RequestContext, most: int) -> FormData:
    """The multipart body. Raises `Refusal` for a body that is none, or whose file has more than `most` bytes."""
    size = 0

    async def receive() -> Message:
        nonlocal size
        try:
            async with asyncio.timeout(context.settings.stall_timeout or None):
                message = await context.receive()
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        size += len(message.get("body", b""))
        if size > most + context.settings.max_header_size:
            raise Refusal(
                413,
                f"the file has more than {most} bytes, which are free (--max-file-size, --batch-dir-size)",
                code="file_too_large",
                param="file",
            )
        return message

    kind = dict(context.scope["headers"]).get(b"content-type", b"")
    if not kind.startswith(b"multipart/form-data"):
        raise Refusal(415, "send the file as multipart/form-data", code="unsupported_media_type")
    try:
        return await Request(context.scope, receive).form(max_files=1, max_fields=8, max_part_size=1024)
    except (HTTPException, MultiPartException, KeyError) as error:
        reason = getattr(error, "detail", None) or getattr(error, "message", None) or "it has no boundary"
        raise Refusal(400, f"the form cannot be read: {reason}", code="invalid_form") from None


def _copy(source: BinaryIO, target: Path) -> int:
    with target.open("wb") as out:
        shutil.copyfileobj(source, out, 2**20)
        return out.tell()
