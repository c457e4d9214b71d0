"""EventFrame: an encoded event with gaps, for streams in which event after event differs in a text or a number only."""

import msgspec

GAP = "\0gap\0"
"""Stands for a value that `fill` gives. No client can send it: it would be no name of a model."""

_encode = msgspec.json.Encoder().encode
_ENCODED_GAP = _encode(GAP)


class EventFrame:
    """The bytes that all events of one kind share, encoded once."""

    __slots__ = ("_first", "_last", "_rest")

    def __init__(self, event: bytes) -> None:
        """`event` is encoded with `GAP` in place of each value that varies."""
        self._first, *self._rest = event.split(_ENCODED_GAP)
        self._last = self._rest[-1]

    def fill_one(self, value: str | int) -> bytes:
        """The event with the value of its only gap."""
        return b"".join((self._first, _encode(value), self._last))

    def fill(self, *values: str | int) -> bytes:
        """The event with a value for each gap, in their order in the JSON."""
        parts = [self._first]
        for value, following in zip(values, self._rest, strict=True):
            parts += (_encode(value), following)
        return b"".join(parts)
