"""A reader of protobuf's wire format, for the one message type that Quire reads."""

from collections.abc import Iterator

Field = tuple[int, int | bytes]
"""Number of a field and its value: an integer, or the bytes of a text, a message or a number of fixed width."""

_WIDTHS = {1: 8, 5: 4}


def fields(message: bytes) -> Iterator[Field]:
    """The fields of a message in order. Raises `ValueError` for bytes that are no message."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("a field has the number 0")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in _WIDTHS:
            size = _WIDTHS[kind]
        else:
            raise ValueError(f"a field is of the wire type {kind}")
        if at + size > end:
            raise ValueError(f"a field of {size} bytes ends after the message")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of up to 64 bits at an offset, and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer does not end")
