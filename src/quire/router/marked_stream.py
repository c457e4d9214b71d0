"""MarkedStream: cuts the bytes of a server's stream at its marks (see `quire.server.handover`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from quire.request import SampleProgress
from quire.server.handover import MARK, MOVED, read_mark


class BrokenStreamError(Exception):
    """The server did not end its stream: it died, the network broke, or it says that it cannot go on."""


@dataclass(slots=True)
class MarkedStream:
    """What a client has got of an answer. It outlives the servers that write it."""

    progress: dict[int, SampleProgress] = field(default_factory=dict)
    """Choices, by index, with the tokens whose events were passed on."""
    num_tokens: int = 0
    """Tokens of all choices."""
    _buffer: bytes = b""
    """Bytes behind the last mark."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events up to each mark that is complete. Raises `BrokenStreamError` for a mark that says so."""
        self._buffer += data
        while (start := self._find_mark()) >= 0:
            end = self._buffer.find(b"\n\n", start)
            if end < 0:
                return
            events, content = self._buffer[:start], self._buffer[start : end + 2]
            self._buffer = self._buffer[end + 2 :]
            if content == MOVED:
                raise BrokenStreamError("the server is going away")
            self._record(content[len(MARK) :])
            if events:
                yield events

    def end(self) -> bytes:
        """The events behind the last mark, for a stream that its server has ended."""
        rest, self._buffer = self._buffer, b""
        return rest

    def cut(self) -> None:
        """The server is gone: drop what follows the last mark."""
        self._buffer = b""

    def _find_mark(self) -> int:
        if self._buffer.startswith(MARK):
            return 0
        at = self._buffer.find(b"\n" + MARK)
        return at + 1 if at >= 0 else -1

    def _record(self, content: bytes) -> None:
        try:
            entries = read_mark(content)
        except msgspec.DecodeError as error:
            raise BrokenStreamError(f"the server sent a mark that cannot be read: {error}") from None
        for choice, token_ids, reason in entries:
            before = self.progress.get(choice)
            known = before.token_ids if before is not None else []
            known += token_ids
            self.progress[choice] = SampleProgress(known, reason)
            self.num_tokens += len(token_ids)
