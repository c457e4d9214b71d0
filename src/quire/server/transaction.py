"""transaction: keeps all changes of several SQLite statements, or none."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


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
