"""BatchStore: files, batches and answers in one folder. What `add_answers` has saved survives any kill.

An answer belongs to a line of a batch, and a line has at most one. A file lies in `files/` under its id; it is written
beside its place and renamed, so it is whole or absent. Methods raise what SQLite and the disk raise.
"""

import os
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from quire.errors import ConfigError
from quire.option_values import expand_home
from quire.server.auth import Client
from quire.server.batches.objects import ENDED, Batch, FileObject
from quire.server.transaction import make_private, transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, account TEXT, purpose TEXT, bytes INTEGER, data BLOB);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, account TEXT, salt TEXT, ended INTEGER, data BLOB);
CREATE TABLE IF NOT EXISTS answers (
    batch_id TEXT, line INTEGER, succeeded INTEGER, data BLOB, PRIMARY KEY (batch_id, line)) WITHOUT ROWID;
"""
_VERSION = 1
_MOST_AT_ONCE = 256
STORE = "--batch-dir"
"""What errors call the store."""


class Answered(NamedTuple):
    """The answer to one line."""

    line: int
    succeeded: bool
    data: bytes
    """An encoded `OutputLine`."""


class BatchStore:
    """Use it from one thread at a time."""

    def __init__(self, folder: str | Path, name: str = STORE) -> None:
        """Opens or makes the store, which errors call `name`. Raises `ConfigError` if it cannot be used, or another
        process uses it."""
        self.name = name
        self._folder = expand_home(folder)
        try:
            self._files = self._folder / "files"
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = self._folder / "batches.sqlite3"
            make_private(database)
            self._db = sqlite3.connect(database, isolation_level=None, check_same_thread=False, timeout=0.5)
            # One process owns a store: two would answer the same lines.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            with transaction(self._db):
                self._check_version()
            self._remove_strays()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"batch_dir {self._folder} cannot be used: {error}; give a folder that can be written and that no "
                "other server uses"
            ) from None

    def close(self) -> None:
        self._db.close()

    # -- files --------------------------------------------------------------------------------------------------------

    def path_of(self, file_id: str) -> Path:
        """Where the content of a file lies."""
        return self._files / file_id

    def add_file(self, file: FileObject, account: str, partial: Path) -> None:
        """Keep a file whose content is in `partial`, which lies in the folder of the files and is moved."""
        _sync(partial)
        partial.replace(self.path_of(file.id))
        _sync(self._files)  # the name too is on the disk before the row
        with transaction(self._db):
            self._db.execute(
                "INSERT OR REPLACE INTO files (id, account, purpose, bytes, data, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (file.id, account, file.purpose, file.bytes, msgspec.json.encode(file), file.expires_at),
            )

    def file(self, file_id: str, account: str) -> FileObject | None:
        row = self._db.execute("SELECT data FROM files WHERE id = ? AND account = ?", (file_id, account)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=FileObject)

    def files(
        self, account: str, now: float, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> list[FileObject]:
        """At most `limit` files of an account whose time is not over, newest first unless `ascending`, from the one
        that follows `after`."""
        wanted: dict[str, Any] = {"coalesce(expires_at, 1e18) > ?": now}
        if purpose is not None:
            wanted["purpose = ?"] = purpose
        rows = self._page("files", account, after=after, limit=limit, ascending=ascending, wanted=wanted)
        return [msgspec.json.decode(data, type=FileObject) for data in rows]

    def total_bytes(self) -> int:
        """Bytes of all files of all accounts."""
        return int(self._db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()[0])

    def delete_file(self, file_id: str, account: str) -> bool:
        """Returns whether there was one. The content goes first: that frees space when a full disk refuses the rest,
        and a second call then removes the row."""
        if self.file(file_id, account) is None:
            return False
        self.path_of(file_id).unlink(missing_ok=True)
        with transaction(self._db):
            self._db.execute("DELETE FROM files WHERE id = ? AND account = ?", (file_id, account))
        return True

    def delete_expired(self, now: float, in_use: Collection[str]) -> float | None:
        """Delete files whose time is over, except those in use; at most 256 at once. Returns the time of the next file
        that is not in use, which may be over; None if no such file has one."""
        rows = self._db.execute(
            "SELECT id, account, expires_at FROM files WHERE expires_at IS NOT NULL ORDER BY expires_at LIMIT ?",
            (_MOST_AT_ONCE + len(in_use) + 1,),
        ).fetchall()
        free = [row for row in rows if row[0] not in in_use]
        over = [row for row in free if row[2] <= now][:_MOST_AT_ONCE]
        for file_id, account, _ in over:
            self.delete_file(file_id, account)
        return next((float(expires_at) for _, _, expires_at in free[len(over) :]), None)

    # -- batches ------------------------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch, client: Client) -> None:
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO batches (id, account, salt, ended, data) VALUES (?, ?, ?, 0, ?)",
                (batch.id, client.account, client.salt, msgspec.json.encode(batch)),
            )

    def save(self, batch: Batch) -> None:
        with transaction(self._db):
            self._save(batch)

    def batch(self, batch_id: str, account: str) -> Batch | None:
        query = "SELECT data FROM batches WHERE id = ? AND account = ?"
        row = self._db.execute(query, (batch_id, account)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Batch)

    def batches(self, account: str, *, after: str | None, limit: int) -> list[Batch]:
        """At most `limit` batches of an account, newest first, from the one that follows `after`."""
        rows = self._page("batches", account, after=after, limit=limit)
        return [msgspec.json.decode(data, type=Batch) for data in rows]

    def unended(self) -> list[tuple[Batch, Client]]:
        """Batches that are not over and their senders, oldest first."""
        rows = self._db.execute("SELECT data, account, salt FROM batches WHERE NOT ended ORDER BY number")
        return [
            (msgspec.json.decode(data, type=Batch), Client(account, salt, background=True))
            for data, account, salt in rows
        ]

    # -- answers ------------------------------------------------------------------------------------------------------

    def add_answers(self, batch: Batch, answers: Iterable[Answered]) -> None:
        """Keep answers, and the counts of `batch`. A line that has an answer keeps it."""
        with transaction(self._db):
            self._db.executemany(
                "INSERT OR IGNORE INTO answers (batch_id, line, succeeded, data) VALUES (?, ?, ?, ?)",
                ((batch.id, *answer) for answer in answers),
            )
            self._save(batch)

    def answered_lines(self, batch_id: str) -> dict[int, bool]:
        """Line → whether it succeeded, for every line with an answer."""
        rows = self._db.execute("SELECT line, succeeded FROM answers WHERE batch_id = ?", (batch_id,))
        return {line: bool(succeeded) for line, succeeded in rows}

    def write_answers(self, batch_id: str, file_id: str, *, succeeded: bool) -> Path | None:
        """Write the answers that succeeded, or failed, in the order of the lines. Returns where; None if there are
        none. The file is not kept before `add_file`."""
        rows = self._db.execute(
            "SELECT data FROM answers WHERE batch_id = ? AND succeeded = ? ORDER BY line", (batch_id, succeeded)
        )
        partial, empty = self.path_of(f"{file_id}.partial"), True
        with partial.open("wb") as out:
            for (data,) in rows:
                out.write(data + b"\n")
                empty = False
        if empty:
            partial.unlink()
        return None if empty else partial

    def end(self, batch: Batch) -> None:
        """Save a batch that is over. Its answers are in its files, so they are dropped here."""
        assert batch.status in ENDED
        with transaction(self._db):
            self._save(batch)
            self._db.execute("DELETE FROM answers WHERE batch_id = ?", (batch.id,))

    # -- below --------------------------------------------------------------------------------------------------------

    def _save(self, batch: Batch) -> None:
        self._db.execute(
            "UPDATE batches SET data = ?, ended = ? WHERE id = ?",
            (msgspec.json.encode(batch), batch.status in ENDED, batch.id),
        )

    def _page(
        self,
        table: str,
        account: str,
        *,
        after: str | None,
        limit: int,
        ascending: bool = False,
        wanted: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[bytes]:
        order, compare = ("ASC", ">") if ascending else ("DESC", "<")
        query = " AND ".join((f"SELECT data FROM {table} WHERE account = ?", *wanted))
        values = [account, *wanted.values()]
        if after is not None:
            query += f" AND number {compare} (SELECT number FROM {table} WHERE id = ? AND account = ?)"
            values += [after, account]
        rows = self._db.execute(f"{query} ORDER BY number {order} LIMIT ?", (*values, limit))
        return [data for (data,) in rows]

    def _remove_strays(self) -> None:
        """Remove content without a row, which a kill or a fault left."""
        known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
        for path in self._files.iterdir():
            if path.name.startswith("file-") and path.name not in known:
                path.unlink()

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise ConfigError(f"batch_dir {self._folder} was written by another version of Quire; give a new folder")
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        if not any(name == "expires_at" for _, name, *_ in self._db.execute("PRAGMA table_info(files)")):
            self._db.execute("ALTER TABLE files ADD COLUMN expires_at INTEGER")  # the store is older
        self._db.execute("CREATE INDEX IF NOT EXISTS expiries ON files (expires_at) WHERE expires_at IS NOT NULL")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
