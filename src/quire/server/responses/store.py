"""ResponseStore: responses that clients may retrieve and continue, in a bounded SQLite database.

Each row holds one response and the items of its own request; a conversation is the chain of `previous_response_id`.
An account sees its own responses only. The oldest are removed when there is no room for a new one.
"""

import asyncio
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from quire.errors import ConfigError, RequestError
from quire.server.responses.owners import Owners
from quire.server.responses.protocol import ResponseError, ResponseObject
from quire.server.store_faults import store_faults
from quire.server.transaction import make_private, transaction

logger = logging.getLogger("quire.server")

T = TypeVar("T")
Item = dict[str, Any]

_SHARED_CHARS = 24
"""Characters of a response's id that are also in the ids of its items."""
MAX_CHAIN = 1000
"""Most responses in one conversation."""
_TABLES = (
    """CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, account TEXT NOT NULL, created REAL NOT NULL, previous TEXT, status TEXT NOT NULL,
    body BLOB NOT NULL, items BLOB NOT NULL, size INTEGER NOT NULL, owner INTEGER)""",
    "CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created)",
    "CREATE TABLE IF NOT EXISTS kept (bytes INTEGER NOT NULL)",
)
"""`owner` is the server that makes a response. `kept` has one row, the sum of all sizes."""
RUNNING = ("queued", "in_progress")
_encode = msgspec.json.encode
_decode_response = msgspec.json.Decoder(ResponseObject).decode
_decode_items = msgspec.json.Decoder(list[dict[str, Any]]).decode


def item_id_of(response_id: str, prefix: str, index: int) -> str:
    """The id of a response's item number `index`. Another server that goes on with the response names it alike."""
    return f"{prefix}_{response_id.removeprefix('resp_')[:_SHARED_CHARS]}{index:08x}"


def response_id_of(item_id: str) -> str | None:
    """How the id of the response begins that made the item of this id; None for an id of another form."""
    _, _, shared = item_id.partition("_")
    return f"resp_{shared[:_SHARED_CHARS]}" if len(shared) == _SHARED_CHARS + 8 else None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response, and the items of the request that it answers."""

    response: ResponseObject
    items: list[Item]


class ResponseStore:
    """Keeps responses in the file `path`, or in memory if it is None, in `capacity` bytes of content at most. Several
    servers may share a file. Every method raises `StoreFailedError` if the file cannot be read or written."""

    def __init__(self, path: str | None, capacity: int) -> None:
        """Raises `ConfigError` for a file that is no database, or cannot be written."""
        self._capacity = capacity
        self._lock = threading.Lock()
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                make_private(Path(path))
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            weakref.finalize(self, self._database.close)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            with transaction(self._database):
                self._make_tables()
            self._owners = Owners(path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"responses_store {path}: {error}; give a file that can be written") from None

    def _make_tables(self) -> None:
        for statement in _TABLES:
            self._database.execute(statement)
        columns = [row[1] for row in self._database.execute("PRAGMA table_info(responses)")]
        if "owner" not in columns:  # a file of an older Quire
            self._database.execute("ALTER TABLE responses ADD COLUMN owner INTEGER")
        self._database.execute("DELETE FROM kept")
        self._database.execute("INSERT INTO kept SELECT coalesce(sum(size), 0) FROM responses")

    async def save(self, account: str, stored: StoredResponse) -> None:
        """Add `stored`, or replace the response of the same id."""
        await self._run(lambda: self._save(account, stored))

    async def load(self, account: str, response_id: str) -> StoredResponse | None:
        """The response of this id; None if `account` has none."""
        return await self._run(lambda: self._load(account, response_id))

    async def delete(self, account: str, response_id: str) -> bool:
        """Remove the response of this id. Returns whether `account` had one."""
        return await self._run(lambda: self._delete_one(account, response_id))

    async def find_items(self, account: str, item_ids: Sequence[str]) -> list[Item]:
        """The items of these ids in the output of the account's responses. Raises `RequestError` for an id that none
        has, and for items of more than `MAX_CHAIN` responses."""
        return await self._run(lambda: self._find_items(account, item_ids))

    async def history(self, account: str, response_id: str) -> list[Item]:
        """The items of the conversation up to and with this response, oldest first.

        Raises `RequestError` if a response of the chain is not kept.
        """
        return await self._run(lambda: self._history(account, response_id))

    async def _run(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock, store_faults("--responses-store"):
                return work()

        return await asyncio.to_thread(locked)

    def _save(self, account: str, stored: StoredResponse) -> None:
        with transaction(self._database):
            self._replace(account, stored)

    def _replace(self, account: str, stored: StoredResponse) -> None:
        response = stored.response
        body, items = _encode(response), _encode(stored.items)
        size = len(body) + len(items)
        self._delete("id = ?", (response.id,))
        if size > self._capacity:
            logger.warning(
                "the response %s is not kept: it has %d bytes, and responses_store_size is %d",
                *(response.id, size, self._capacity),
            )
            return
        while self._kept() + size > self._capacity:
            oldest = "id IN (SELECT id FROM responses ORDER BY created LIMIT 16)"
            if not self._delete(oldest, ()):
                break
        row = (response.id, account, time.time(), response.previous_response_id, response.status, body, items, size)
        self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, self._owners.own))
        self._database.execute("UPDATE kept SET bytes = bytes + ?", (size,))

    def _kept(self) -> int:
        return int(self._database.execute("SELECT bytes FROM kept").fetchone()[0])

    def _load(self, account: str, response_id: str) -> StoredResponse | None:
        query = "SELECT body, items, owner FROM responses WHERE id = ? AND account = ?"
        row = self._database.execute(query, (response_id, account)).fetchone()
        if row is None:
            return None
        body, items, owner = row
        response = _decode_response(body)
        if response.status in RUNNING and not self._owners.lives(owner):
            response.status = "failed"
            response.error = ResponseError("server_error", "the server ended while this response was generated")
        return StoredResponse(response, _decode_items(items))

    def _find_items(self, account: str, item_ids: Sequence[str]) -> list[Item]:
        begins = dict.fromkeys(begin for item_id in item_ids if (begin := response_id_of(item_id)) is not None)
        if len(begins) > MAX_CHAIN:
            raise RequestError(f"input refers to items of more than {MAX_CHAIN} responses", param="input")
        found: dict[str, Item] = {}
        query = "SELECT body FROM responses WHERE id >= ? AND id < ? AND account = ?"
        for begin in begins:
            for (body,) in self._database.execute(query, (begin, begin + "~", account)):
                found |= {item["id"]: item for item in _decode_response(body).output}
        for item_id in item_ids:
            if item_id not in found:
                raise RequestError(
                    f"input refers to the item {item_id[:100]!r}, which is in no response that is kept here; send the "
                    "item itself",
                    param="input",
                    code="item_not_found",
                )
        return [found[item_id] for item_id in item_ids]

    def _history(self, account: str, response_id: str) -> list[Item]:
        turns: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None:
            stored = self._load(account, wanted)
            if stored is None or len(turns) == MAX_CHAIN:
                raise RequestError(
                    f"previous_response_id: the response {wanted[:100]!r} is not kept here"
                    if stored is None
                    else f"previous_response_id: the conversation has more than {MAX_CHAIN} responses; start another",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            if stored.response.status in RUNNING:
                raise RequestError(
                    f"previous_response_id: the response {wanted!r} is {stored.response.status}; wait until it ends",
                    param="previous_response_id",
                    code="previous_response_not_ready",
                )
            turns.append(stored)
            wanted = stored.response.previous_response_id
        return [item for turn in reversed(turns) for item in (*turn.items, *turn.response.output)]

    def _delete_one(self, account: str, response_id: str) -> bool:
        with transaction(self._database):
            return self._delete("id = ? AND account = ?", (response_id, account)) > 0

    def _delete(self, condition: str, values: Sequence[str]) -> int:
        rows = self._database.execute(f"DELETE FROM responses WHERE {condition} RETURNING size", values).fetchall()
        self._database.execute("UPDATE kept SET bytes = bytes - ?", (sum(size for (size,) in rows),))
        return len(rows)
