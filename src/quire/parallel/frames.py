"""Frames: byte strings with their length before them, over a blocking socket between ranks."""

import socket
import struct

_LENGTH = struct.Struct(">Q")


def send_frame(sock: socket.socket, body: bytes) -> None:
    """Send one frame. Raises `OSError` if the other end has closed."""
    sock.sendall(_LENGTH.pack(len(body)) + body)


def receive_frame(sock: socket.socket) -> bytes | None:
    """The next frame; None if the other end has closed."""
    header = _receive(sock, _LENGTH.size)
    return None if header is None else _receive(sock, _LENGTH.unpack(header)[0])


def _receive(sock: socket.socket, num_bytes: int) -> bytes | None:
    buffer = bytearray(num_bytes)
    rest = memoryview(buffer)
    while rest:
        try:
            count = sock.recv_into(rest)
        except ConnectionResetError:
            return None
        if not count:
            return None
        rest = rest[count:]
    return bytes(buffer)
