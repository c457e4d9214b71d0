"""Files that are deleted at a time their client chose: reading the field `expires_after`, and the Sweeper."""

import asyncio
from asyncio import Event
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from quire.server.batches.objects import ExpiresAfter
from quire.server.batches.store import BatchStore
from quire.server.errors import Refusal
from quire.server.store_faults import RetryPause, StoreFailedError

FIELD = "expires_after"
PARTS = (f"{FIELD}[anchor]", f"{FIELD}[seconds]")
"""How a form writes the members of the field."""
_LONGEST_WAIT = 3600.0


def read_expires_after(form: Mapping[str, Any]) -> ExpiresAfter | None:
    """The field of an upload: two fields of the form, or one with JSON. Raises `Refusal` (400) for other values."""
    try:
        if FIELD in form:
            return msgspec.json.decode(str(form[FIELD]), type=ExpiresAfter)
        given = {name[len(FIELD) + 1 : -1]: form[name] for name in PARTS if name in form}
        return msgspec.convert(given, ExpiresAfter, strict=False) if given else None
    except msgspec.MsgspecError as error:
        message = f"{FIELD} cannot be read: {error}; give anchor created_at, and seconds from 3600 to 2592000"
        raise Refusal(400, message, code="invalid_expires_after", param=FIELD) from None


class Sweeper:
    """Deletes files at their time. It sleeps until the next one."""

    def __init__(
        self,
        store: BatchStore,
        stored: Callable[..., Awaitable[Any]],
        in_use: Callable[[], Collection[str]],
        now: Callable[[], float],
    ) -> None:
        """`stored` calls the store in its thread; `in_use` are the files that batches still read."""
        self._store = store
        self._stored = stored
        self._in_use = in_use
        self._now = now
        self._changed = Event()

    def wake(self) -> None:
        """A file has come, or a batch has ended: look again."""
        self._changed.set()

    async def run(self) -> None:
        """Never returns. While the store fails, it tries again."""
        pause = RetryPause()
        while True:
            self._changed.clear()
            try:
                next_at = await self._stored(self._store.delete_expired, self._now(), frozenset(self._in_use()))
            except StoreFailedError:
                await pause.wait()
                continue
            pause.reset()
            seconds = _LONGEST_WAIT if next_at is None else min(_LONGEST_WAIT, next_at - self._now())
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, seconds)):
                    await self._changed.wait()
