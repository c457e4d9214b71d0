"""Logs on standard error, as text or JSON lines: time, level, name, message, request id, fields.

Every message that is logged while a request is handled carries the request's id. With `access_log` each request has
one line of its own; prompts and answers are never logged.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.types import Scope

from quire.server.log_writer import LogWriter
from quire.server.replies import Usage
from quire.server.settings import ServerSettings

PROBES = frozenset({"/health", "/health/live", "/health/ready"})
"""Routes that supervisors ask every few seconds. They have no access line."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the present task handles."""

_access = logging.getLogger("quire.access")


def configure_logging(settings: ServerSettings) -> None:
    """Log warnings, access lines if asked for, and the server's progress to standard error."""
    handler = LogWriter(sys.stderr.fileno()) if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("quire.cli.serve").setLevel(logging.INFO)
    _access.setLevel(logging.INFO if settings.access_log else logging.WARNING)


def log_request(scope: Scope, status: int, seconds: float, usage: Usage | None) -> None:
    """Write the access line of one request; `usage` has its tokens, None if it generates nothing."""
    if scope["path"] in PROBES or not _access.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {"status": status, "ms": round(seconds * 1000, 1)}
    if usage is not None:
        fields["prompt_tokens"] = usage.prompt_tokens
        fields["cached_tokens"] = usage.prompt_tokens_details.cached_tokens
        fields["completion_tokens"] = usage.completion_tokens
    if scope.get("client"):
        fields["client"] = scope["client"][0]
    if key := getattr(scope.get("state", {}).get("client"), "name", ""):
        fields["key"] = key
    _access.info("%s %s", scope["method"], quote(scope["path"]), extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _iso_time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level, name and message, then fields as name=value. A traceback follows on further lines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        line = f"{_iso_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = dict(getattr(record, "fields", {}))
    if identity := request_id.get():
        fields["request_id"] = identity
    return fields


def _word(value: object) -> str:
    """`value` as one word: a client's text that could be read as further fields is quoted."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' ="') else json.dumps(text)


def _iso_time(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
