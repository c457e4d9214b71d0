"""PeerLink: the connection on which an engine fetches KV blocks of another, as both ends see it.

    listener → client   MAGIC, a nonce
    client → listener   MAGIC, a nonce, the fingerprint, and a code over both nonces and the fingerprint
    listener → client   a status, and a code over both nonces and the status
    client → listener   a block hash, how many milliseconds to wait for it, and a code         (again and again)
    listener → client   a status and a code; if the block is here, also its header and content

Codes are BLAKE2b with the shared key, later with a key of this connection, and count messages: nobody without the key
gets a block, and none can be altered, repeated or exchanged, since a block's header holds the digest of its content.
Nothing is encrypted. Each message has a size that its reader knows, so no end takes more than it asked for.
"""

import hmac
import os
import socket
import struct
import time
from hashlib import blake2b

from quire.runner.disk_folder import FINGERPRINT_BYTES, HASH_BYTES

MAGIC = b"QUIREPL1"
NONCE_BYTES = CODE_BYTES = 16
HERE, MISSING, WRONG_KEY, OTHER_MODEL = b"\x00", b"\x01", b"\x02", b"\x03"
_WAIT = struct.Struct("<H")


class PeerError(Exception):
    """The other end is gone, slow, or not what it should be."""


class PeerLink:
    """One end of a connection. Its methods raise `PeerError`."""

    def __init__(self, sock: socket.socket, key: bytes, fingerprint: bytes) -> None:
        self._socket = sock
        self._key = blake2b(key, digest_size=32).digest()
        self._fingerprint = fingerprint
        self._num_messages = 0
        self.deadline: float | None = None
        """By when what is received must be here, on the monotonic clock."""

    @property
    def socket(self) -> socket.socket:
        return self._socket

    def accept(self) -> None:
        """Be the listener's end: let a client in that has the key and the same model."""
        own = os.urandom(NONCE_BYTES)
        self.send(MAGIC + own)
        magic, nonce, fingerprint, code = self._parts(len(MAGIC), NONCE_BYTES, FINGERPRINT_BYTES, CODE_BYTES)
        status = HERE
        if magic != MAGIC or not hmac.compare_digest(code, self._code(b"client", own, nonce, fingerprint)):
            status = WRONG_KEY
        elif fingerprint != self._fingerprint:
            status = OTHER_MODEL
        self.send(status + self._code(b"listener", own, nonce, status))
        if status != HERE:
            raise PeerError("it has another key" if status == WRONG_KEY else "it has another model or version")
        self._begin(own, nonce)

    def join(self) -> None:
        """Be the client's end."""
        magic, nonce = self._parts(len(MAGIC), NONCE_BYTES)
        if magic != MAGIC:
            raise PeerError("it is no engine that gives blocks")
        own = os.urandom(NONCE_BYTES)
        self.send(MAGIC + own + self._fingerprint + self._code(b"client", nonce, own, self._fingerprint))
        status, code = self._parts(1, CODE_BYTES)
        if not hmac.compare_digest(code, self._code(b"listener", nonce, own, status)):
            raise PeerError("it has another key")
        if status != HERE:
            raise PeerError("it has another model, other weights or another version")
        self._begin(nonce, own)

    def ask(self, block_hash: bytes, wait_ms: int) -> None:
        """Ask for a block; the listener may wait for it to be stored."""
        self.send(self._sealed(block_hash + _WAIT.pack(wait_ms)))

    def next_question(self) -> tuple[bytes, int]:
        """The next block that the client wants, and the milliseconds to wait for it."""
        body = self._opened(HASH_BYTES + _WAIT.size)
        return body[:HASH_BYTES], _WAIT.unpack(body[HASH_BYTES:])[0]

    def answer(self, block_hash: bytes, header: bytes | None) -> None:
        """Say whether a block is here; its content follows its header."""
        if header is None:
            self.send(self._code(MISSING, block_hash, b"") + MISSING)
        else:
            self.send(self._code(HERE, block_hash, header) + HERE + header)

    def next_answer(self, block_hash: bytes, header_bytes: int) -> bytes | None:
        """The header of the block that was asked for; None if it is not there."""
        code, status = self._parts(CODE_BYTES, 1)
        header = self.receive(header_bytes) if status == HERE else b""
        if not hmac.compare_digest(code, self._code(status, block_hash, header)):
            raise PeerError("an answer does not match its code")
        return header if status == HERE else None

    def send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise PeerError(str(error)) from error

    def receive(self, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        self.receive_into(memoryview(buffer))
        return bytes(buffer)

    def receive_into(self, rest: memoryview) -> None:
        while rest:
            if self.deadline is not None:
                self._socket.settimeout(max(0.001, self.deadline - time.monotonic()))
            try:
                count = self._socket.recv_into(rest)
            except OSError as error:
                raise PeerError(str(error)) from error
            if not count:
                raise PeerError("it closed the connection")
            rest = rest[count:]

    # -- codes --------------------------------------------------------------------------------------------------------

    def _begin(self, listener_nonce: bytes, client_nonce: bytes) -> None:
        self._key = self._code(b"session", listener_nonce, client_nonce) * 2

    def _code(self, *parts: bytes) -> bytes:
        digest = blake2b(key=self._key, digest_size=CODE_BYTES)
        for part in (self._num_messages.to_bytes(8, "little"), *parts):
            digest.update(len(part).to_bytes(8, "little") + part)
        self._num_messages += 1
        return digest.digest()

    def _sealed(self, body: bytes) -> bytes:
        return body + self._code(b"question", body)

    def _opened(self, num_bytes: int) -> bytes:
        body, code = self._parts(num_bytes, CODE_BYTES)
        if not hmac.compare_digest(code, self._code(b"question", body)):
            raise PeerError("a question does not match its code")
        return body

    def _parts(self, *sizes: int) -> list[bytes]:
        whole, parts, begin = self.receive(sum(sizes)), [], 0
        for size in sizes:
            parts.append(whole[begin : begin + size])
            begin += size
        return parts
