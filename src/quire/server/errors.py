"""Errors of the HTTP layer, and OpenAI's error body, in which every error reaches the client."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException

from quire.errors import (
    CLIENT_FAULTS,
    NO_TOKEN_LEFT,
    DeadlineError,
    EngineUnavailableError,
    QueueFullError,
    RequestError,
)

logger = logging.getLogger("quire.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(msgspec.Struct):
    """Content of an error body. Clients branch on `code` and show `message`."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    """Body of every response that is not a success."""

    error: ErrorDetail


class Refusal(RequestError):
    """A request refused for its key, path, method, size or body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.headers = headers


class SampleFailedError(RequestError):
    """A sample that failed while it was decoded: by a fault of the engine (500), or because the client's parameters
    left it no token (400)."""

    def __init__(self, message: str) -> None:
        by_client = message.startswith(CLIENT_FAULTS)
        named = re.match(rf"{NO_TOKEN_LEFT}: (\w+) (?:and|forbid)", message)
        code = "contradictory_parameters" if by_client else "sample_failed"
        super().__init__(message, code=code, param=named and named[1])
        self.status = 400 if by_client else 500


@contextmanager
def naming(sent_names: Mapping[str, str]) -> Iterator[None]:
    """Let a `RequestError` raised inside name fields as the client sent them: `sent_names` maps our names to those."""
    try:
        yield
    except RequestError as error:
        for name, sent in sent_names.items():
            # Where a name is a common word, only the first word of a message is surely the field.
            place = r"(?<![\w-])" if "." in name else r"(?<![\w.-])" if "_" in name else "^"
            error.message = re.sub(rf"{place}{re.escape(name)}(?![\w-])", sent, error.message)
            error.param = sent if error.param == name else error.param
        error.args = (error.message,)
        raise


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """How an endpoint writes errors."""

    schema: type
    """Type of the body."""
    body: Callable[[RequestError, str], object]
    """From the error and the request's id to the body of the reply."""
    statuses: Mapping[int, int] = field(default_factory=dict)
    """Other statuses than those of `RequestError`."""

    def status(self, error: RequestError) -> int:
        return self.statuses.get(error.status, error.status)


def as_request_error(error: Exception) -> RequestError:
    """The error to show to the client. An unexpected error is logged, and shown without its details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return _from_starlette(error)
    logger.error("a request failed unexpectedly", exc_info=error)
    return Refusal(500, "internal error; the server's log has the details", code="internal_error")


def error_body(error: RequestError) -> ErrorBody:
    """`error` as OpenAI's error body."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return ErrorBody(ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code))


OPENAI_ERRORS = ErrorForm(ErrorBody, lambda error, _: error_body(error))


def error_headers(error: RequestError) -> tuple[tuple[bytes, bytes], ...]:
    """Response headers for `error`, such as Retry-After."""
    if isinstance(error, QueueFullError | EngineUnavailableError):
        return ((b"retry-after", str(error.retry_after).encode()),)
    if isinstance(error, DeadlineError):
        return ((b"x-should-retry", b"false"),)  # OpenAI's clients try again after a 408 without it
    return error.headers if isinstance(error, Refusal) else ()


def _from_starlette(error: HTTPException) -> Refusal:
    headers = tuple((k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items())
    return Refusal(error.status_code, error.detail, code="http_error", headers=headers)
