"""The disk tier's folder, which several engines may share: who uses it (`Lease`), what lies in it (`FolderListing`).

    FOLDER/quire-kv-1/lock                  held shared by every engine; an older Quire locks it for itself
    FOLDER/quire-kv-1/leases/<engine>       one file for each engine, touched every few seconds

An engine whose lease was not renewed for LEASE_SECONDS is gone; the next engine that looks removes its lease and its
unfinished files. All times are those of the files, so clocks of machines need not agree. A lease guards no content: a
block is checked against its digest by every engine that reads it.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Collection
from pathlib import Path

from quire.errors import ConfigError

LEASE_SECONDS = 30.0
FINGERPRINT_BYTES, HASH_BYTES = 16, 32
UNFINISHED = ".part"
_CLUSTER = 4096
"""Bytes; the disk space of a file is a multiple of this."""
_SETTLED_NS = 2 * 10**9
"""A folder that changed this long ago cannot have changed again within the resolution of its time."""

logger = logging.getLogger(__name__)


def space_of(num_bytes: int) -> int:
    """The disk space of a file."""
    return -(-num_bytes // _CLUSTER) * _CLUSTER


def _lock_shared(root: Path) -> int | None:
    """A file descriptor that holds the folder's lock; None if an engine of an older Quire has it for itself."""
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        pass  # a file system without locks; the leases are enough among engines that know them
    return lock


class Lease:
    """The lease of this engine, and which others are live."""

    def __init__(self, root: Path) -> None:
        """Raises `OSError` if the folder cannot be written."""
        self.name = os.urandom(8).hex()
        self.now_ns = 0
        """The time at the last renewal, by the clock of the file system."""
        self.others: frozenset[str] = frozenset()
        """The other engines with a live lease, at the last renewal."""
        self._folder = root / "leases"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._changed_ns = -1
        self.renew()

    def renew(self) -> bool:
        """Renew the lease and look at the others. Returns whether an engine came or left since the last renewal."""
        path = self._folder / self.name
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.utime(file)
            self.now_ns = os.fstat(file).st_mtime_ns
        finally:
            os.close(file)
        live = set()
        for entry in os.scandir(self._folder):
            try:
                age = self.now_ns - entry.stat(follow_symlinks=False).st_mtime_ns
                if age > LEASE_SECONDS * 1e9:
                    os.unlink(entry)
                elif entry.name != self.name:
                    live.add(entry.name)
            except FileNotFoundError:
                continue
        before, self._changed_ns = self._changed_ns, self._folder.stat().st_mtime_ns
        self.others = frozenset(live)
        return before != self._changed_ns

    def is_live(self, name: str) -> bool:
        return name == self.name or name in self.others

    def release(self) -> None:
        (self._folder / self.name).unlink(missing_ok=True)


class FolderListing:
    """The files of all blocks below a folder, and how they change."""

    def __init__(self, root: Path, fingerprint: bytes, sizes: Collection[int]) -> None:
        """`sizes`: bytes that a file of this fingerprint may have."""
        self._root = root
        self._mine = fingerprint.hex()
        self._sizes = sizes
        self._seen: dict[str, dict[str, int]] = {}
        """Folder → names of its blocks and the time of each one's last use."""
        self._settled: dict[str, int] = {}
        """Folder → its time of change, where nothing can have changed since it was listed."""

    def look(self, lease: Lease, *, whole: bool) -> list[tuple[bytes, int]]:
        """What came and went since the last look, the least recently used first: (key, bytes), 0 bytes for what went.

        A key is a block's hash, of other models their fingerprint and the hash. `whole` looks also into folders that
        did not change; it finds the unfinished files of engines that are gone.
        """
        changes: list[tuple[int, bytes, int]] = []
        folders = set()
        for model in _folders(self._root, FINGERPRINT_BYTES):
            for group in _folders(model, 1):
                folders.add(group.path)
                changes += self._look_into(model.name, group.path, lease, whole=whole)
        for gone in self._seen.keys() - folders:
            changes += [(0, self._key(Path(gone).parent.name, name), 0) for name in self._seen.pop(gone)]
            self._settled.pop(gone, None)
        changes.sort()
        return [(key, size) for _, key, size in changes]

    def _look_into(self, model: str, folder: str, lease: Lease, *, whole: bool) -> list[tuple[int, bytes, int]]:
        try:
            changed = os.stat(folder).st_mtime_ns
            if not whole and self._settled.get(folder) == changed:
                return []
            self._settled.pop(folder, None)
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return []
        if lease.now_ns - changed > _SETTLED_NS:
            self._settled[folder] = changed
        before, seen = self._seen.get(folder, {}), {}
        changes = []
        for entry in entries:
            if entry.name in before:
                seen[entry.name] = before[entry.name]
            elif entry.name.endswith(UNFINISHED):
                writer = entry.name.removesuffix(UNFINISHED).partition(".")[2]
                if not lease.is_live(writer):
                    Path(entry.path).unlink(missing_ok=True)
            elif is_hex(entry.name, HASH_BYTES) and (found := self._stat(model, entry)) is not None:
                seen[entry.name] = found[0]
                changes.append((found[0], self._key(model, entry.name), found[1]))
        self._seen[folder] = seen
        return [*changes, *((0, self._key(model, name), 0) for name in before.keys() - seen.keys())]

    def _stat(self, model: str, entry: os.DirEntry[str]) -> tuple[int, int] | None:
        """Time of use and space of a block's file; one of this model that was cut short is removed."""
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if model == self._mine and status.st_size not in self._sizes:
            logger.warning("disk tier: %s has %d bytes; removed", entry.path, status.st_size)
            Path(entry.path).unlink(missing_ok=True)
            return None
        return status.st_mtime_ns, space_of(status.st_size)

    def _key(self, model: str, name: str) -> bytes:
        return bytes.fromhex(name if model == self._mine else model + name)


def open_folder(folder: str | Path, root: Path, fingerprint: bytes) -> tuple[int, Lease] | None:
    """Make the folders of a tier, for its owner alone; its lock and this engine's lease.

    None, with a line in the log, if the disk is full or an older Quire uses the folder. Raises `ConfigError` for a
    folder that cannot be used.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_mode & 0o077:
            root.chmod(0o700)  # it holds KV of users' texts
        (root / fingerprint.hex()).mkdir(mode=0o700, exist_ok=True)
        lock = _lock_shared(root)
        if lock is None:
            logger.warning("disk tier: a process of an older Quire uses %s; running without it", root)
            return None
        try:
            return lock, Lease(root)
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            logger.warning("disk tier: cannot begin at %s: %s; running without it", root, error.strerror)
            return None
        raise ConfigError(
            f"disk_cache is {str(folder)!r}, which cannot be used: {error}; give a folder to write in"
        ) from error


def is_hex(text: str, num_bytes: int) -> bool:
    return len(text) == 2 * num_bytes and not set(text) - set("0123456789abcdef")


def _folders(root: Path | os.DirEntry[str], num_bytes: int) -> list[os.DirEntry[str]]:
    """The folders below `root` with names of so many hexadecimal bytes."""
    try:
        entries = list(os.scandir(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if is_hex(entry.name, num_bytes) and entry.is_dir(follow_symlinks=False)]
