"""WeightsCache: packed weights on disk, so that a second start maps them and packs nothing.

There is one safetensors file for each checkpoint and packing, FOLDER/quire-weights-<key>.safetensors. It holds the
packed weights in the order in which layers ask for them. Its metadata holds a digest of everything that is read from
it: the source of each weight, its dtype and shape, and every byte. A file that does not match is a miss. A file is
written under another name and renamed, so it exists whole or not at all. The least recently used files are removed
when the folder would exceed its limit.

No torch: a file is checked while torch is being imported.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from quire.errors import CheckpointError
from quire.models.safetensors_file import Entry, read_header
from quire.option_values import expand_home

CLOSE_SECONDS = 5.0
"""Shorter than the API process waits for its engine to end."""
_PREFIX, _SUFFIX, _UNFINISHED = "quire-weights-", ".safetensors", ".part"
_DIGEST_BYTES = 16
_PAGE = 4096
_PIECE_BYTES = 16 << 20
_MAX_CHECKING_THREADS = 4

Write = Callable[[int, memoryview], int]
"""os.write or a test's replacement: (file descriptor, bytes) → number of bytes written."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A part of a packed weight, in a mapped file or in memory of its own."""

    source: str
    """A text that says what it was packed from, and how; `PackedWeights` makes it."""
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    content: memoryview


class WeightsCache:
    """The file of one key. `load` reads it, and `store` writes it in a thread. Neither makes a start fail."""

    def __init__(self, folder: str | Path, key: bytes, max_bytes: int, *, write: Write = os.write) -> None:
        self._folder = expand_home(folder)
        self.path = self._folder / f"{_PREFIX}{key.hex()}{_SUFFIX}"
        self._max_bytes = max_bytes
        self._write = write
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self, num_threads: int = 1) -> list[PackedTensor]:
        """The stored parts, every byte checked by at most `num_threads`; none if the file is missing or damaged."""
        try:
            entries, metadata = read_header(self.path)
            with self.path.open("rb") as file:
                # Private and writable as far as torch knows; nothing writes.
                mapping = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            sources = json.loads(metadata["sources"])
            tensors = [
                PackedTensor(source, entry.dtype, entry.shape, mapping[entry.begin : entry.end])
                for source, entry in zip(sources, _in_order(entries), strict=True)
            ]
            with ThreadPoolExecutor(min(_MAX_CHECKING_THREADS, num_threads)) as pool:
                checksums = list(pool.map(zlib.crc32, (tensor.content for tensor in tensors)))
            if metadata["digest"] != _digest(tensors, checksums):
                raise CheckpointError("its bytes do not match their digest")
        except FileNotFoundError:
            return []
        except (OSError, CheckpointError, ValueError, KeyError, TypeError) as error:
            logger.warning("weights cache: %s cannot be used: %s; the checkpoint is packed anew", self.path, error)
            return []
        with contextlib.suppress(OSError):  # a read-only folder
            os.utime(self.path)  # the order of use outlives the process
        return tensors

    def store(self, tensors: Sequence[PackedTensor]) -> None:
        """Write the file in a thread. A failure is logged."""
        self._thread = threading.Thread(target=self._store, args=(tensors,), name="quire weights cache", daemon=True)
        self._thread.start()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for `store`, at most `seconds`; then stop it."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._closed.set()
                self._thread.join()

    def _store(self, tensors: Sequence[PackedTensor]) -> None:
        num_bytes = sum(len(tensor.content) for tensor in tensors)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            if not self._make_room(num_bytes):
                logger.warning(
                    "weights cache: the packed weights take %d bytes, weights_cache_size is %d; they are not stored",
                    *(num_bytes, self._max_bytes),
                )
                return
            unfinished = self.path.with_suffix(f".{os.getpid()}{_UNFINISHED}")
            try:
                if self._write_file(unfinished, tensors):
                    unfinished.rename(self.path)
                    logger.info("weights cache: stored %d bytes as %s", num_bytes, self.path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                "weights cache: cannot write to %s: %s; nothing is stored", self._folder, error.strerror or error
            )

    def _write_file(self, path: Path, tensors: Sequence[PackedTensor]) -> bool:
        """True if the file is whole; `close` may stop its writing."""
        header = _header(tensors, "0" * 2 * _DIGEST_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a process that died holds none
            # Allocate before writing, so that a full disk is left as it was.
            os.posix_fallocate(descriptor, 0, len(header) + sum(len(tensor.content) for tensor in tensors))
            self._write_all(descriptor, memoryview(header))
            checksums = []
            for tensor in tensors:
                checksum = 0
                for begin in range(0, len(tensor.content), _PIECE_BYTES):
                    if self._closed.is_set():
                        return False
                    piece = tensor.content[begin : begin + _PIECE_BYTES]
                    checksum = zlib.crc32(piece, checksum)
                    self._write_all(descriptor, piece)
                checksums.append(checksum)
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._write_all(descriptor, memoryview(_header(tensors, _digest(tensors, checksums))))
            return True
        finally:
            os.close(descriptor)

    def _write_all(self, descriptor: int, content: memoryview) -> None:
        while content:
            content = content[self._write(descriptor, content) :]

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the least recently used files until `num_bytes` more fit the limit."""
        files = sorted(
            (status.st_mtime_ns, status.st_size, path)
            for path in self._folder.glob(f"{_PREFIX}*{_SUFFIX}")
            if path != self.path
            for status in (path.stat(),)
        )
        if num_bytes > self._max_bytes:
            return False
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > self._max_bytes:
                path.unlink(missing_ok=True)
                total -= size
                logger.warning("weights cache: removed %s to stay below weights_cache_size", path)
        return True

    def _remove_unfinished(self) -> None:
        """Remove files of processes that died while writing."""
        for path in self._folder.glob(f"{_PREFIX}*{_UNFINISHED}"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _in_order(entries: dict[str, Entry]) -> list[Entry]:
    return [entries[str(index)] for index in range(len(entries))]


def _header(tensors: Sequence[PackedTensor], digest: str) -> bytes:
    """Length and header of a safetensors file; its size does not depend on the digest. Tensors begin on a page."""
    header: dict[str, object] = {
        "__metadata__": {"digest": digest, "sources": json.dumps([tensor.source for tensor in tensors])}
    }
    end = 0
    for index, tensor in enumerate(tensors):
        begin, end = end, end + len(tensor.content)
        header[str(index)] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _digest(tensors: Sequence[PackedTensor], checksums: Sequence[int]) -> str:
    described = [
        [tensor.source, tensor.dtype, *tensor.shape, checksum]
        for tensor, checksum in zip(tensors, checksums, strict=True)
    ]
    return blake2b(json.dumps(described).encode(), digest_size=_DIGEST_BYTES).hexdigest()
