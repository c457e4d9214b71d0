"""Faults of the stores of files, batches and responses, as clients see them: 503, the cause, and what to do.

Every access to a store passes `store_faults`. A full disk may have room again: the server lives on, and clients may
send their requests again.
"""

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from quire.server.errors import Refusal

logger = logging.getLogger("quire.server")

RETRY_SECONDS = 10
"""What clients are asked to wait (`Retry-After`)."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0

_FULL = "the disk is full; delete files, or free space on the disk of the server"
_LOCKED = "another process uses the database; end it"
_READ_ONLY = "it cannot be written; let the user of the server write there"
_DAMAGED = "it is damaged; restore it from a copy, or start the server with a new one"
_MISSING = "a file or folder of it is missing; restore it and start the server again"
_FAILED = "the disk failed; the log of the server has the cause"

_BY_ERRNO = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
    errno.ENOENT: _MISSING,
    errno.ENOTDIR: _MISSING,
    errno.ESTALE: _MISSING,
}
_BY_SQLITE_CODE = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_READONLY_DBMOVED: _MISSING,
    sqlite3.SQLITE_CANTOPEN: _MISSING,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}


class StoreFailedError(Refusal):
    """A store could not be read or written (503)."""

    def __init__(self, store: str, cause: Exception) -> None:
        """`store` is the option that names the store, such as --batch-dir."""
        self.cause = f"the store of {store} failed: {_explain(cause)}"
        super().__init__(
            503,
            f"{self.cause}; send the request again later",
            code="store_failed",
            headers=((b"retry-after", str(RETRY_SECONDS).encode()),),
        )


@contextmanager
def store_faults(store: str) -> Iterator[None]:
    """Raise `StoreFailedError` for an error of the disk, the database or a damaged row inside. The log gets the cause,
    which may name paths."""
    try:
        yield
    except (sqlite3.Error, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        logger.warning("the store of %s failed: %s", store, error)
        raise StoreFailedError(store, error) from error


class RetryPause:
    """Pauses between attempts, in seconds: 1, 2, 4 … 60."""

    def __init__(self) -> None:
        self._seconds = _FIRST_PAUSE
        self._ended = asyncio.Event()

    async def wait(self) -> None:
        """Pause, or return at once after `end`."""
        seconds, self._seconds = self._seconds, min(2 * self._seconds, _LONGEST_PAUSE)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        self._ended.clear()

    def end(self) -> None:
        """End the present pause, or the next one."""
        self._ended.set()

    def reset(self) -> None:
        """Begin with short pauses again."""
        self._seconds = _FIRST_PAUSE


def _explain(cause: Exception) -> str:
    match cause:
        case sqlite3.Error():
            code = getattr(cause, "sqlite_errorcode", 0)  # absent where Python itself raises
            return _BY_SQLITE_CODE.get(code) or _BY_SQLITE_CODE.get(code & 0xFF, _FAILED)
        case OSError(errno=number) if number is not None:
            return _BY_ERRNO.get(number, _FAILED)
        case msgspec.MsgspecError() | UnicodeDecodeError():
            return _DAMAGED
    return _FAILED
