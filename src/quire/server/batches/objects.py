"""OpenAI's objects for files and batches, and one line of an input and of an output file."""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]

ENDED: frozenset[Status] = frozenset(("failed", "completed", "expired", "cancelled"))
"""Final states of a batch."""


class ExpiresAfter(Struct, kw_only=True):
    """When a file is deleted: so many seconds after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2592000)]


class FileObject(Struct, kw_only=True):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Struct, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Struct, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class RequestCounts(Struct):
    """Lines of a batch. `completed` are those answered with status 200."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class LineError(Struct):
    """A fault of one line of an input file, or of the file."""

    code: str
    message: str
    line: int | None = None
    """Counted from 1."""
    param: str | None = None


class BatchErrors(Struct):
    """Why a batch failed before its first line was answered."""

    data: list[LineError]
    object: Literal["list"] = "list"


class CreateBatch(Struct, kw_only=True):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class Batch(Struct, kw_only=True):
    """A batch. Times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: Mapping[str, str] | None = None
    output_expires_after: ExpiresAfter | UnsetType = UNSET
    """For the files with the answers."""


class BatchList(Struct, kw_only=True):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputLine(Struct, kw_only=True):
    """One request of an input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: Raw


class LineResponse(Struct, kw_only=True):
    """What the endpoint answered."""

    status_code: int
    request_id: str
    body: Raw


class OutputLine(Struct, kw_only=True):
    """One line of an output or an error file."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | UnsetType | None = UNSET
