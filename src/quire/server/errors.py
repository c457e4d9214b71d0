"""Refusals of the HTTP layer, and the one form in which any error reaches a client: OpenAI's error body."""

import logging

import msgspec
from starlette.exceptions import HTTPException

from quire.errors import EngineDeadError, EngineUnavailableError, QueueFullError, RequestError

logger = logging.getLogger("quire.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(msgspec.Struct):
    """The inside of an error body; clients branch on `code` and show `message`."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    """What every response but a success holds."""

    error: ErrorDetail


class Refusal(RequestError):
    """A request that HTTP itself gives reason to refuse: its key, path, method, size or form."""

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
    """A sample ended by a fault of the engine, not of the client."""

    status = 500

    def __init__(self, message: str) -> None:
        super().__init__(message, code="sample_failed")


def as_request_error(error: Exception) -> RequestError:
    """The error to show for `error`. What was not raised on purpose is logged, and shown without its details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return _from_starlette(error)
    if isinstance(error, EngineDeadError):
        return Refusal(500, str(error), code="engine_dead")
    logger.error("a request failed unexpectedly", exc_info=error)
    return Refusal(500, "internal error; the server's log has the details", code="internal_error")


def error_body(error: RequestError) -> ErrorBody:
    """OpenAI's form of `error`."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return ErrorBody(ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code))


def error_headers(error: RequestError) -> tuple[tuple[bytes, bytes], ...]:
    """Headers that belong to `error`, such as Retry-After."""
    if isinstance(error, QueueFullError | EngineUnavailableError):
        return ((b"retry-after", str(error.retry_after).encode()),)
    return error.headers if isinstance(error, Refusal) else ()


def _from_starlette(error: HTTPException) -> Refusal:
    headers = tuple((k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items())
    if error.status_code == 404:
        return Refusal(404, "there is no such route; /docs lists them", code="route_not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return Refusal(405, f"this route takes {allowed}", code="method_not_allowed", headers=headers)
    return Refusal(error.status_code, error.detail, code="http_error", headers=headers)
