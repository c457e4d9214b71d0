"""DiskBlocks: the disk tier's files. Blocks are written and read by two threads, and checked before anybody sees them.

    FOLDER/quire-kv-1/lock                              held by the one process that uses the folder
    FOLDER/quire-kv-1/<fingerprint>/<ab>/<ab…name>      one block: header, then keys and values of all layers

The header holds a magic number, the fingerprint (what else decides the values: weights, dtypes, layout, see
`engine.fingerprint`), the block's name, the length of the content and a BLAKE2b digest of all that and the content. A
file is written under another name and renamed, so it is there whole or not at all; what a crash of the machine tears
all the same does not match its digest, is removed, and counts as never stored. Nothing is synced: a lost block costs
its recomputation, a sync would cost every step around it.

What to store and what to forget is not decided here.
"""

import errno
import fcntl
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from quire.errors import ConfigError
from quire.step import OffloadResult

FORMAT = "quire-kv-1"
FINGERPRINT_BYTES, NAME_BYTES = 16, 32
_HEADER = struct.Struct(f"<8s{FINGERPRINT_BYTES}s{NAME_BYTES}sQ32s")
_MAGIC = b"QUIREKV1"
HEADER_BYTES = _HEADER.size
_CLUSTER = 4096
"""What a file takes of a disk is a multiple of this."""
_UNFINISHED = ".part"
CLOSE_SECONDS = 4.0

Write = Callable[[int, memoryview], int]
"""os.write, or what a test puts in its place: (file descriptor, bytes) → how many of them were written."""

logger = logging.getLogger(__name__)


def file_bytes(block_bytes: int) -> int:
    """What a block takes of the disk."""
    return -(-(HEADER_BYTES + block_bytes) // _CLUSTER) * _CLUSTER


class DiskBlocks:
    """The files of one model's blocks, and two threads. `save`, `read` and `forget` return at once.

    `stored` is what was there at the start, the least recently used first: (name, bytes), and for blocks of other
    models, which only take room, (fingerprint + name, bytes).
    """

    def __init__(self, folder: Path, fingerprint: bytes, block_bytes: int, lock: int, write: Write) -> None:
        self.block_bytes = block_bytes
        self.stored: list[tuple[bytes, int]] = []
        self._root = folder
        self._fingerprint = fingerprint
        self._lock = lock
        self._write = write
        self._failed = False
        self._unused: list[bytearray] = []
        """Buffers of header and content, as many as were ever needed at once."""
        self._result = OffloadResult()
        self._arrived: dict[bytes, bytearray] = {}
        self._news = threading.Condition()
        """Guards the two above."""
        self._to_write: queue.SimpleQueue[tuple[bytes, bytearray | None] | None] = queue.SimpleQueue()
        """A block to write, or without content a file to remove."""
        self._to_read: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"quire {work.__name__}", daemon=True)
            for work in (self._write_files, self._read_files)
        ]

    @classmethod
    def open(
        cls, folder: str | Path, fingerprint: bytes, block_bytes: int, *, write: Write = os.write
    ) -> "DiskBlocks | None":
        """Take the folder and list what it holds. None, with a line in the log, if it is full or in use.

        Raises `ConfigError` for a folder that cannot be used.
        """
        root = Path(folder).expanduser() / FORMAT
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_mode & 0o077:
                root.chmod(0o700)  # it holds what users have written
            (root / fingerprint.hex()).mkdir(mode=0o700, exist_ok=True)
            lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                logger.warning("disk tier: cannot begin at %s: %s; running without it", root, error.strerror)
                return None
            raise ConfigError(
                f"disk_cache is {str(folder)!r}, which cannot be used: {error}; give a folder to write in"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            logger.warning("disk tier: another process uses %s; running without it", root)
            return None
        store = cls(root, fingerprint, block_bytes, lock, write)
        store._list_files()
        for thread in store._threads:
            thread.start()
        return store

    # -- the step's side ----------------------------------------------------------------------------------------------

    def new_buffer(self) -> bytearray:
        """HEADER_BYTES and room for a block after them, to be filled and given to `save`."""
        try:
            return self._unused.pop()
        except IndexError:
            return bytearray(HEADER_BYTES + self.block_bytes)

    def give_back(self, buffer: bytearray) -> None:
        self._unused.append(buffer)

    def save(self, name: bytes, buffer: bytearray) -> None:
        """Write a block; the buffer belongs to the store from now on."""
        self._to_write.put((name, buffer))

    def forget(self, name: bytes) -> None:
        """Remove a block, after what was to be written before."""
        self._to_write.put((name, None))

    def read(self, name: bytes) -> None:
        self._to_read.put(name)

    def take(self, name: bytes) -> bytearray:
        """The buffer of a read that `collect` has reported; give it back after use."""
        with self._news:
            return self._arrived.pop(name)

    def collect(self, wait_seconds: float = 0.0) -> OffloadResult:
        """What has ended since the last call; waits up to `wait_seconds` for a read to end."""
        with self._news:
            if wait_seconds > 0:
                self._news.wait_for(lambda: bool(self._result.read or self._result.failed_reads), wait_seconds)
            result, self._result = self._result, OffloadResult(stopped=self._result.stopped)
            return result

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what is queued, for `seconds` at most, and let go of the folder."""
        self._to_write.put(None)
        self._to_read.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._failed = True  # a writer that is still at it leaves the rest
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- the threads' side --------------------------------------------------------------------------------------------

    def _path(self, key: bytes) -> Path:
        fingerprint, name = self._fingerprint, key
        if len(key) > NAME_BYTES:
            fingerprint, name = key[:FINGERPRINT_BYTES], key[FINGERPRINT_BYTES:]
        return self._root / fingerprint.hex() / name.hex()[:2] / name.hex()

    def _write_files(self) -> None:
        while (job := self._to_write.get()) is not None:
            name, buffer = job
            if buffer is None:
                self._path(name).unlink(missing_ok=True)
                continue
            stored = False
            if not self._failed:
                try:
                    self._write_file(name, buffer)
                    stored = True
                except OSError as error:
                    self._failed = True
                    logger.warning(
                        "disk tier: cannot write to %s: %s; no more blocks are stored there, those there still serve",
                        self._root,
                        error.strerror or error,
                    )
            self.give_back(buffer)
            with self._news:
                (self._result.stored if stored else self._result.failed_stores).append(name)
                self._result.stopped = self._failed

    def _write_file(self, name: bytes, buffer: bytearray) -> None:
        content = memoryview(buffer)[HEADER_BYTES:]
        fields = (_MAGIC, self._fingerprint, name, self.block_bytes)
        _HEADER.pack_into(buffer, 0, *fields, self._digest(name, content))
        path = self._path(name)
        unfinished = path.with_suffix(_UNFINISHED)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                rest = memoryview(buffer)
                while rest:
                    rest = rest[self._write(file, rest) :]
            finally:
                os.close(file)
            unfinished.rename(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def _read_files(self) -> None:
        while (name := self._to_read.get()) is not None:
            started = time.perf_counter()
            buffer = self.new_buffer()
            reason = self._read_file(name, buffer)
            seconds = time.perf_counter() - started
            with self._news:
                if reason is None:
                    self._arrived[name] = buffer
                    self._result.read.append((name, seconds))
                else:
                    self.give_back(buffer)
                    self._result.failed_reads.append((name, reason))
                self._news.notify_all()

    def _read_file(self, name: bytes, buffer: bytearray) -> str | None:
        """Fill `buffer`; or say why not, and remove the file."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                num_bytes, rest = 0, memoryview(buffer)
                while rest and (count := file.readinto(rest)):
                    num_bytes += count
                    rest = rest[count:]
                whole = num_bytes == len(buffer) and not file.read(1)
            os.utime(path)  # the order of use outlives the process
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            logger.warning("disk tier: cannot read %s: %s; its tokens are computed", path, error.strerror or error)
            return "corrupt"
        if whole:
            magic, fingerprint, named, length, digest = _HEADER.unpack_from(buffer)
            content = memoryview(buffer)[HEADER_BYTES:]
            if (magic, fingerprint, named, length) == (_MAGIC, self._fingerprint, name, self.block_bytes) and (
                digest == self._digest(name, content)
            ):
                return None
        state = "does not match its checksum" if whole else f"has not the {len(buffer)} bytes it should"
        logger.warning("disk tier: %s %s; removed, its tokens are computed", path, state)
        path.unlink(missing_ok=True)
        return "corrupt"

    def _digest(self, name: bytes, content: memoryview) -> bytes:
        digest = blake2b(_MAGIC + self._fingerprint + name + self.block_bytes.to_bytes(8, "little"), digest_size=32)
        digest.update(content)
        return digest.digest()

    # -- at start -----------------------------------------------------------------------------------------------------

    def _list_files(self) -> None:
        """Fill `stored`, and remove what an earlier process left unfinished or truncated."""
        found: list[tuple[int, bytes, int]] = []
        mine = self._fingerprint.hex()
        for model in os.scandir(self._root):
            if not _is_hex(model.name, FINGERPRINT_BYTES) or not model.is_dir(follow_symlinks=False):
                continue
            for group in os.scandir(model):
                for file in os.scandir(group) if group.is_dir(follow_symlinks=False) else ():
                    if file.name.endswith(_UNFINISHED):
                        os.unlink(file)
                    elif _is_hex(file.name, NAME_BYTES):
                        status = file.stat(follow_symlinks=False)
                        key = bytes.fromhex(file.name)
                        if model.name != mine:
                            key = bytes.fromhex(model.name) + key
                        elif status.st_size != HEADER_BYTES + self.block_bytes:
                            logger.warning("disk tier: %s has %d bytes; removed", file.path, status.st_size)
                            os.unlink(file)
                            continue
                        size = -(-status.st_size // _CLUSTER) * _CLUSTER
                        found.append((status.st_mtime_ns, key, size))
        found.sort()
        self.stored = [(key, size) for _, key, size in found]


def _is_hex(text: str, num_bytes: int) -> bool:
    return len(text) == 2 * num_bytes and not set(text) - set("0123456789abcdef")
