"""BlockServer: gives the blocks in an engine's disk tier to other engines that have the shared key."""

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from quire.errors import ConfigError
from quire.runner.peer_link import PeerError, PeerLink

MAX_CONNECTIONS = 16
HANDSHAKE_SECONDS = 2.0
SEND_SECONDS = 10.0
"""Longest time that a client may take for a part of a block."""
LONGEST_WAIT_MS = 1000
_POLL_SECONDS = 0.005

logger = logging.getLogger(__name__)


class BlockServer:
    """A thread that accepts, and one for each connection. `path` says where a block lies, or would lie."""

    def __init__(
        self,
        address: tuple[str, int],
        key: bytes,
        fingerprint: bytes,
        path: Callable[[bytes], Path],
        header: struct.Struct,
    ) -> None:
        """Raises `ConfigError` for an address that cannot be used."""
        self._key = key
        self._fingerprint = fingerprint
        self._path = path
        self._header = header
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._closed = False
        self._said: tuple[str, str] | None = None
        """What the log said last, so that nobody can fill it."""
        host, port = address
        try:
            self._listener = socket.create_server(address, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise ConfigError(
                f"kv_transfer_config: kv_ip is {host!r} and kv_port is {port}, where nobody can listen: "
                f"{error.strerror}; choose another address or port"
            ) from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="quire gives blocks", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, (host, *_) = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(1.0)  # no file descriptor is left
                continue
            if not self._free.acquire(blocking=False):
                sock.close()
                continue
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock, host), name="quire gives blocks", daemon=True).start()

    def _serve(self, sock: socket.socket, host: str) -> None:
        try:
            link = PeerLink(sock, self._key, self._fingerprint)
            link.deadline = time.monotonic() + HANDSHAKE_SECONDS
            try:
                link.accept()
            except PeerError as error:
                if self._said != (host, str(error)):
                    self._said = host, str(error)
                    logger.warning("KV transfer: an engine at %s gets no blocks: %s", host, error)
                return
            link.deadline = None
            while True:
                sock.settimeout(None)  # until its next request comes, an engine may wait for ever
                block_hash, wait_ms = link.next_question()
                sock.settimeout(SEND_SECONDS)
                self._give(link, block_hash, time.monotonic() + min(wait_ms, LONGEST_WAIT_MS) / 1000)
        except PeerError:
            pass  # it has gone
        finally:
            self._open.discard(sock)
            sock.close()
            self._free.release()

    def _give(self, link: PeerLink, block_hash: bytes, deadline: float) -> None:
        path = self._path(block_hash)
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    header, size = file.read(self._header.size), os.fstat(file.fileno()).st_size
                    rest = size - self._header.size
                    if rest < 0 or self._header.unpack(header)[-2] != rest:
                        break  # torn by a crash; the next read here removes it
                    link.answer(block_hash, header)
                    while rest:
                        part = file.read(min(rest, 1 << 20))
                        link.send(part)
                        rest -= len(part) or self._cut(path)
                    return
            except FileNotFoundError:
                if time.monotonic() >= deadline or self._closed:
                    break
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                logger.warning("KV transfer: cannot read %s: %s", path, error.strerror or error)
                break
        link.answer(block_hash, None)

    @staticmethod
    def _cut(path: Path) -> int:
        raise PeerError(f"{path} became shorter while it was read")
