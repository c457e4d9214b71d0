"""SQLite databases: `transaction` keeps all changes of several statements, or none; `make_private` hides the file."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Keep what is written inside, or nothing of it after an error. `database` has isolation_level None."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # SQLite ends it by itself after some errors, such as a full disk
            database.execute("ROLLBACK")
        raise


def make_private(database: Path) -> None:
    """Make the file, if there is none, such that other users of the machine cannot read it: it holds prompts. SQLite
    gives its other files the same mode. Raises `OSError`."""
    if not database.exists():
        database.touch(mode=0o600)
