"""PeerBlocks: fetches KV blocks from other engines by their hashes, over TCP.

A peer that is gone, slow, has another model or key, or answers with anything but the block, is left alone for a while:
then its blocks are missing, and the engine computes the tokens itself.
"""

import logging
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from quire.runner.peer_link import PeerError, PeerLink

CONNECT_SECONDS = 1.0
FETCH_SECONDS = 2.0
"""Longest time for a block to come."""
WAIT_MS = 500
"""How long a peer may wait for a block that it is about to store."""
AWAY_SECONDS = 5.0
_EAGER_SECONDS = 2.0
"""After a block that was not there, others are not waited for, for this long."""

logger = logging.getLogger(__name__)


class BlockSource(Protocol):
    """Where blocks come from that no tier of this engine holds. One over RDMA would be another class."""

    def fetch(self, block_hash: bytes, new_buffer: Callable[[int], bytearray]) -> bytearray | None:
        """A buffer of header and content, made by `new_buffer` for the bytes of the content and checked; None if the
        block cannot be had."""
        ...

    def close(self) -> None: ...


class PeerBlocks:
    """Satisfies `BlockSource`. Used by one thread."""

    def __init__(
        self,
        peers: Sequence[str],
        key: bytes,
        fingerprint: bytes,
        sizes: Collection[int],
        header: struct.Struct,
        is_right: Callable[[bytes, bytearray], bool],
    ) -> None:
        """`sizes` are the bytes that a content may have, which the field before the last of `header` says. `is_right`
        checks a buffer against its digest, for the hash that was asked for."""
        self._peers = [_Peer(peer, key, fingerprint) for peer in peers]
        self._sizes = sizes
        self._header = header
        self._is_right = is_right
        self._missed_at = float("-inf")

    def fetch(self, block_hash: bytes, new_buffer: Callable[[int], bytearray]) -> bytearray | None:
        for peer in self._peers:
            wait_ms = WAIT_MS if time.monotonic() - self._missed_at > _EAGER_SECONDS else 0
            try:
                link = peer.connected()
                if link is not None and (buffer := self._fetch(link, block_hash, wait_ms, new_buffer)) is not None:
                    return buffer
            except PeerError as error:
                peer.leave(str(error))
        self._missed_at = time.monotonic()
        return None

    def _fetch(
        self, link: PeerLink, block_hash: bytes, wait_ms: int, new_buffer: Callable[[int], bytearray]
    ) -> bytearray | None:
        link.deadline = time.monotonic() + FETCH_SECONDS + wait_ms / 1000
        link.ask(block_hash, wait_ms)
        header = link.next_answer(block_hash, self._header.size)
        if header is None:
            return None
        num_bytes = self._header.unpack(header)[-2]
        if num_bytes not in self._sizes:
            raise PeerError(f"it says that a block has {num_bytes} bytes")
        buffer = new_buffer(num_bytes)
        buffer[: len(header)] = header
        link.receive_into(memoryview(buffer)[len(header) :])
        if not self._is_right(block_hash, buffer):
            raise PeerError("a block does not match its checksum")
        return buffer

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


class _Peer:
    """One other engine and the connection to it."""

    def __init__(self, address: str, key: bytes, fingerprint: bytes) -> None:
        self._address = address
        self._key = key
        self._fingerprint = fingerprint
        self._link: PeerLink | None = None
        self._away_until = 0.0
        self._said = ""
        """The reason in the log, which says each once in a row."""

    def connected(self) -> PeerLink | None:
        """The connection; None while the peer is left alone. Raises `PeerError`."""
        if self._link is None and time.monotonic() >= self._away_until:
            host, _, port = self._address.rpartition(":")
            try:
                sock = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
            except OSError as error:
                raise PeerError(error.strerror or str(error)) from error
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._link = PeerLink(sock, self._key, self._fingerprint)
            self._link.deadline = time.monotonic() + FETCH_SECONDS
            self._link.join()
            self._said = ""
        return self._link

    def leave(self, reason: str) -> None:
        """Ask this peer for nothing for a while."""
        self.close()
        self._away_until = time.monotonic() + AWAY_SECONDS
        if reason != self._said:
            logger.warning("KV transfer: no blocks from %s: %s; prompts are computed here", self._address, reason)
            self._said = reason

    def close(self) -> None:
        if self._link is not None:
            self._link.socket.close()
            self._link = None
