"""DiskBlocks: the disk tier's files, which several engines may share. A block is checked before it is used.

    FOLDER/quire-kv-1/<fingerprint>/<ab>/<ab…hash>      one block: header, then keys and values of all layers

The header holds a magic number, the fingerprint (everything else that decides the values: weights, dtypes, layout; see
`engine.fingerprint`), the block's hash, the length of the content and a BLAKE2b digest of all that and the content. A
file is written under a name of its engine's own and then renamed, so it is there completely or not at all, and the last
of several equal ones stays. A file that a crash damaged does not match its digest; it is removed and counts as never
stored. Nothing is synced: a lost block costs its recomputation, while a sync would cost every step around it.

Three threads write, read, and look what other engines have stored and removed (`disk_folder`). The scheduler decides
what to store and what to remove.
"""

import contextlib
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

from quire.option_values import expand_home
from quire.runner.block_server import BlockServer
from quire.runner.disk_folder import (
    FINGERPRINT_BYTES,
    HASH_BYTES,
    UNFINISHED,
    FolderListing,
    Lease,
    open_folder,
    space_of,
)
from quire.runner.peer_blocks import BlockSource, PeerBlocks
from quire.step import OffloadResult

FORMAT = "quire-kv-1"
_HEADER = struct.Struct(f"<8s{FINGERPRINT_BYTES}s{HASH_BYTES}sQ32s")
_MAGIC = b"QUIREKV1"
HEADER_BYTES = _HEADER.size
CLOSE_SECONDS = 4.0
_LOOK_SECONDS = 1.0
"""Time between two looks at what other engines stored."""
_ALONE_SECONDS = 5.0
"""Time between two renewals of the lease without other engines."""
_LOOK_SHARE = 20
"""A look may take one n-th of the time; in a large folder they are rarer."""

Write = Callable[[int, memoryview], int]
"""os.write, or a test's stand-in: (file descriptor, bytes) → number of bytes written."""

logger = logging.getLogger(__name__)


def file_bytes(block_bytes: int) -> int:
    """The disk space of a block."""
    return space_of(HEADER_BYTES + block_bytes)


class DiskBlocks:
    """The files of one model's blocks, and three threads. `save`, `read` and `remove` return at once.

    `stored` lists the blocks found at the start, the least recently used first: (hash, bytes). Blocks of other models,
    which only take space, are (fingerprint + hash, bytes).
    """

    def __init__(
        self, folder: Path, fingerprint: bytes, sizes: Sequence[int], lock: int, lease: Lease, write: Write
    ) -> None:
        self._sizes = frozenset(sizes)
        """Bytes that a content may have: those of a block, and of a recurrent state."""
        self._listing = FolderListing(folder, fingerprint, {HEADER_BYTES + size for size in sizes})
        self.stored = self._listing.look(lease, whole=True)
        self._root = folder
        self._fingerprint = fingerprint
        self._lock = lock
        self._lease = lease
        self._write = write
        self._failed = False
        self._server: BlockServer | None = None
        self._source: BlockSource | None = None
        """Where blocks come from that have no file here."""
        self._unused: dict[int, list[bytearray]] = {}
        """Bytes of content → free buffers of header and content. Buffers are kept: there are as many as were ever in
        use at once."""
        self._result = OffloadResult()
        self._arrived: dict[bytes, bytearray] = {}
        self._news = threading.Condition()
        """Guards the two above and the one below."""
        self._changes: dict[bytes, int] = {}
        """Blocks that came or went and their bytes, 0 if they went."""
        self._closing = threading.Event()
        self._to_write: queue.SimpleQueue[tuple[bytes, bytearray | None] | None] = queue.SimpleQueue()
        """(hash, buffer) is a block to write, (hash, None) a file to remove, None the end."""
        self._to_read: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"quire {work.__name__}", daemon=True)
            for work in (self._write_files, self._read_files, self._watch_folder)
        ]

    @classmethod
    def open(cls, folder: str | Path, fingerprint: bytes, *sizes: int, write: Write = os.write) -> "DiskBlocks | None":
        """Join the engines that use the folder and list its blocks, whose contents have one of `sizes` bytes. None,
        with a line in the log, if the disk is full or an older Quire uses the folder.

        Raises `ConfigError` for a folder that cannot be used.
        """
        root = expand_home(folder) / FORMAT
        opened = open_folder(folder, root, fingerprint)
        if opened is None:
            return None
        store = cls(root, fingerprint, sizes, *opened, write)
        for thread in store._threads:
            thread.start()
        return store

    def give(self, address: tuple[str, int], key: bytes) -> int:
        """Give blocks to engines that have the key. Returns the port. Raises `ConfigError` if it cannot be used."""
        self._server = BlockServer(address, key, self._fingerprint, self._path, _HEADER)
        return self._server.port

    def fetch_from(self, peers: Sequence[str], key: bytes) -> None:
        """Read blocks that have no file from these engines."""
        self._source = PeerBlocks(peers, key, self._fingerprint, self._sizes, _HEADER, self._is_right)

    # -- the step's side ----------------------------------------------------------------------------------------------

    def new_buffer(self, num_bytes: int) -> bytearray:
        """A buffer of HEADER_BYTES and a content of `num_bytes`, to be filled and passed to `save`."""
        try:
            return self._unused[num_bytes].pop()
        except (KeyError, IndexError):
            return bytearray(HEADER_BYTES + num_bytes)

    def release_buffer(self, buffer: bytearray) -> None:
        """The buffer is not used any more."""
        self._unused.setdefault(len(buffer) - HEADER_BYTES, []).append(buffer)

    def save(self, block_hash: bytes, buffer: bytearray) -> None:
        """Write a block. The buffer belongs to this object from now on."""
        self._to_write.put((block_hash, buffer))

    def remove(self, block_hash: bytes) -> None:
        """Remove a block, after the writes that were queued before."""
        self._to_write.put((block_hash, None))

    def read(self, block_hash: bytes) -> None:
        """Read a block; `collect` reports it."""
        self._to_read.put(block_hash)

    def take_buffer(self, block_hash: bytes) -> bytearray:
        """The buffer of a read that `collect` has reported. Release it after use."""
        with self._news:
            return self._arrived.pop(block_hash)

    def collect(self, wait_seconds: float = 0.0) -> OffloadResult:
        """What has ended since the last call. Waits up to `wait_seconds` for a read to end."""
        with self._news:
            if wait_seconds > 0:
                self._news.wait_for(lambda: bool(self._result.read or self._result.failed_reads), wait_seconds)
            result, self._result = self._result, OffloadResult(stopped=self._result.stopped)
            return result

    def take_changes(self) -> Sequence[tuple[bytes, int]]:
        """What came and went since the last call, also by this engine: (key, bytes), 0 bytes for what went."""
        if not self._changes:
            return ()
        with self._news:
            changes, self._changes = self._changes, {}
        return tuple(changes.items())

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write the queued blocks, for at most `seconds`, and leave the folder."""
        self._closing.set()
        if self._server is not None:
            self._server.close()
        self._to_write.put(None)
        self._to_read.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._failed = True  # a writer that is still busy skips the rest
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            with contextlib.suppress(OSError):
                self._lease.release()

    # -- the threads' side --------------------------------------------------------------------------------------------

    def _path(self, key: bytes) -> Path:
        fingerprint, block_hash = self._fingerprint, key
        if len(key) > HASH_BYTES:
            fingerprint, block_hash = key[:FINGERPRINT_BYTES], key[FINGERPRINT_BYTES:]
        return self._root / fingerprint.hex() / block_hash.hex()[:2] / block_hash.hex()

    def _write_files(self) -> None:
        while (job := self._to_write.get()) is not None:
            block_hash, buffer = job
            if buffer is None:
                self._path(block_hash).unlink(missing_ok=True)
                continue
            stored = False
            if not self._failed:
                try:
                    self._write_file(block_hash, buffer)
                    stored = True
                except FileNotFoundError:
                    pass  # this process stood still for so long that another engine took it for gone
                except OSError as error:
                    self._failed = True
                    logger.warning(
                        "disk tier: cannot write to %s: %s; no more blocks are stored there, those there still serve",
                        self._root,
                        error.strerror or error,
                    )
            self.release_buffer(buffer)
            with self._news:
                (self._result.stored if stored else self._result.failed_stores).append(block_hash)
                self._result.stopped = self._failed

    def _write_file(self, block_hash: bytes, buffer: bytearray) -> None:
        content = memoryview(buffer)[HEADER_BYTES:]
        fields = (_MAGIC, self._fingerprint, block_hash, len(content))
        _HEADER.pack_into(buffer, 0, *fields, self._digest(block_hash, content))
        path = self._path(block_hash)
        unfinished = path.with_suffix(f".{self._lease.name}{UNFINISHED}")
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
        while (block_hash := self._to_read.get()) is not None:
            started = time.perf_counter()
            buffer, reason = self._read_file(block_hash)
            seconds = time.perf_counter() - started
            with self._news:
                if buffer is not None:
                    self._arrived[block_hash] = buffer
                    self._result.read.append((block_hash, seconds))
                else:
                    self._result.failed_reads.append((block_hash, reason))
                self._news.notify_all()
        if self._source is not None:
            self._source.close()

    def _read_file(self, block_hash: bytes) -> tuple[bytearray | None, str]:
        """A buffer with header and content. If that fails, None and the reason; a damaged file is removed."""
        path = self._path(block_hash)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size - HEADER_BYTES
                buffer = self.new_buffer(size if size in self._sizes else max(self._sizes))
                num_bytes, rest = 0, memoryview(buffer)
                while rest and (count := file.readinto(rest)):
                    num_bytes += count
                    rest = rest[count:]
                whole = num_bytes == len(buffer) and not file.read(1)
            os.utime(path)  # keeps the order of use for the next process
        except FileNotFoundError:
            return self._fetch(block_hash)
        except OSError as error:
            logger.warning("disk tier: cannot read %s: %s; its tokens are computed", path, error.strerror or error)
            return None, "corrupt"
        if whole and self._is_right(block_hash, buffer):
            return buffer, ""
        state = "does not match its checksum" if whole else f"has not the {len(buffer)} bytes it should"
        logger.warning("disk tier: %s %s; removed, its tokens are computed", path, state)
        path.unlink(missing_ok=True)
        self.release_buffer(buffer)
        return None, "corrupt"

    def _fetch(self, block_hash: bytes) -> tuple[bytearray | None, str]:
        """The block from another engine. It stays in no file here until it leaves the pool."""
        buffer = None if self._source is None else self._source.fetch(block_hash, self.new_buffer)
        return (None, "missing") if buffer is None else (buffer, "")

    def _is_right(self, block_hash: bytes, buffer: bytearray) -> bool:
        """Whether a buffer holds this block of this model, and every bit of it."""
        *header, digest = _HEADER.unpack_from(buffer)
        content = memoryview(buffer)[HEADER_BYTES:]
        expected = [_MAGIC, self._fingerprint, block_hash, len(content)]
        return header == expected and bool(digest == self._digest(block_hash, content))

    def _digest(self, block_hash: bytes, content: memoryview) -> bytes:
        header = _MAGIC + self._fingerprint + block_hash + len(content).to_bytes(8, "little")
        digest = blake2b(header, digest_size=32)
        digest.update(content)
        return digest.digest()

    def _watch_folder(self) -> None:
        seconds, failed = _ALONE_SECONDS, False
        while not self._closing.wait(seconds):
            started = time.perf_counter()
            try:
                came_or_left = self._lease.renew()
                if came_or_left or self._lease.others:
                    changes = self._listing.look(self._lease, whole=came_or_left)
                    with self._news:
                        self._changes.update(changes)
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("disk tier: cannot look at %s: %s", self._root, error.strerror or error)
                failed = True
            took = time.perf_counter() - started
            seconds = max(_LOOK_SECONDS if self._lease.others else _ALONE_SECONDS, _LOOK_SHARE * took)
