"""Owners: which servers that use one store of responses still live. A server that ended leaves responses half made.

Each server locks a byte of its own in a file beside the store. The system frees the byte when the server ends, however
it ends, so nothing needs to be renewed or cleaned.
"""

import fcntl
import os
import secrets
import struct
import weakref

_LOCK = "hhqqi"
"""struct flock: type, whence, start, length, process."""


class Owners:
    """This server, and others that use the store of the same file."""

    def __init__(self, store: str | None) -> None:
        """`store` is the store's file; None if it is in memory, which no other server sees. Raises `OSError`."""
        self.own = secrets.randbits(62)
        """Names this server in the store."""
        self._file: int | None = None
        if store is not None:
            self._file = os.open(f"{store}-servers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            weakref.finalize(self, os.close, self._file)
            self._ask(fcntl.F_OFD_SETLK, self.own)

    def lives(self, owner: int | None) -> bool:
        """Whether the server that `owner` names has not ended."""
        if owner == self.own:
            return True
        if owner is None or self._file is None:
            return False
        return self._ask(fcntl.F_OFD_GETLK, owner) != fcntl.F_UNLCK

    def _ask(self, command: int, byte: int) -> int:
        """Lock a byte, or ask who has. Returns the type of the lock that is in the way."""
        assert self._file is not None
        answer = fcntl.fcntl(self._file, command, struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        return int(struct.unpack_from(_LOCK, answer)[0])
