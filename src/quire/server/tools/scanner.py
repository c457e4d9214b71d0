"""Scanner: reads a text that arrives in pieces. What it finds does not depend on how the text was cut.

Its methods are generators that stop at `yield` until more text has come. A decision is made only when no further text
could change it, or when the text has ended.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from quire.server.tools.marks import overlap

T = TypeVar("T")
Scan = Generator[None, None, T]
"""A scan that waits for text and returns a T."""

MAX_HEADER_CHARS = 512
"""Characters of the longest name or key. If no mark follows within them, the text is no call."""
_OUTSIDE = re.compile(r'[^"{}\[\]]*')
_INSIDE = re.compile(r'[^"\\]*')
_BARE_END = re.compile(r"[\s,}\]]")
_SPACE = re.compile(r"\s*")


class Scanner:
    """The text so far and a position in it."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False
        """No more text will come."""
        self._num_dropped = 0
        self._pin: int | None = None

    def feed(self, text: str) -> None:
        """Append a piece."""
        self.text += text

    def forget(self) -> None:
        """Drop the text that the scan will not return to."""
        read = self.position if self._pin is None else self._pin - self._num_dropped
        if read:
            self.text = self.text[read:]
            self.position -= read
            self._num_dropped += read

    def pin(self) -> int:
        """Keep the text from here on until `unpin`. Returns the place, for `back_to`."""
        place = self._num_dropped + self.position
        if self._pin is None:  # an earlier pin keeps more
            self._pin = place
        return place

    def unpin(self) -> None:
        """The scan will not go back."""
        self._pin = None

    def back_to(self, place: int) -> None:
        """Go back to a pinned place."""
        self.position = place - self._num_dropped
        self._pin = None

    @property
    def rest(self) -> str:
        """The text that has come and was not read yet."""
        return self.text[self.position :]

    def peek(self, length: int = 1) -> Scan[str]:
        """The next `length` characters; fewer at the end."""
        while len(self.text) - self.position < length and not self.ended:
            yield
        return self.text[self.position : self.position + length]

    def space(self) -> Scan[None]:
        """Skip white space."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or self.ended:
                return
            yield

    def at(self, mark: str) -> Scan[bool]:
        """True if `mark` comes next. Reads nothing."""
        while True:
            have = self.text[self.position : self.position + len(mark)]
            if have == mark:
                return True
            if self.ended or not mark.startswith(have):
                return False
            yield

    def accept(self, mark: str) -> Scan[bool]:
        """Read `mark` if it comes next."""
        found = yield from self.at(mark)
        if found:
            self.position += len(mark)
        return found

    def until(self, stops: tuple[str, ...], show: Callable[[str], None], limit: int = 0) -> Scan[str]:
        """Pass on the text before the first of `stops`, piece by piece, and return that stop without reading it.

        Returns "" at the end of the text. With a `limit` it also does so where no stop begins within so many
        characters. It looks no further than that, so that a reply full of false marks takes no longer than another.
        """
        find = re.compile("|".join(re.escape(stop) for stop in sorted(stops, key=len, reverse=True)))
        longest = max(map(len, stops))
        num_shown = 0
        while True:
            last = self.position + limit - num_shown if limit else len(self.text)  # where a stop may begin
            match = find.search(self.text, self.position, last + longest)
            if match and match.start() > last:
                match = None
            # A longer stop that begins at the same place or earlier may still be incomplete.
            end = match.start() if match else len(self.text)
            held = 0
            if not (self.ended or match):
                tail = self.text[max(self.position, len(self.text) - longest) :]
                held = max(overlap(tail, stop) for stop in stops)
            piece = self.text[self.position : min(end - held, last + 1)]
            if piece:
                self.position += len(piece)
                num_shown += len(piece)
                show(piece)
            if match:
                return match[0]
            if self.ended or (limit and num_shown > limit):
                return ""
            yield

    def json(self, show: Callable[[str], None]) -> Scan[bool]:
        """Pass on one JSON value, piece by piece. Returns False if the text ends before it does."""
        first = yield from self.peek()
        if first in ("{", "["):
            return (yield from self._nested(show))
        if first == '"':
            self._show(self.position + 1, show)
            return (yield from self._string(show))
        while True:
            match = _BARE_END.search(self.text, self.position)
            if match or self.ended:
                self._show(match.start() if match else len(self.text), show)
                return match is not None
            yield

    def _nested(self, show: Callable[[str], None]) -> Scan[bool]:
        depth = 0
        while True:
            match = _OUTSIDE.match(self.text, self.position)
            assert match is not None
            end = match.end()
            if end == len(self.text):
                self._show(end, show)
                if self.ended:
                    return False
                yield
                continue
            char = self.text[end]
            self._show(end + 1, show)
            if char == '"':
                if not (yield from self._string(show)):
                    return False
                continue
            depth += 1 if char in "{[" else -1
            if depth <= 0:
                return True

    def _string(self, show: Callable[[str], None]) -> Scan[bool]:
        """The rest of a string whose first quote has been read."""
        while True:
            match = _INSIDE.match(self.text, self.position)
            assert match is not None
            end = match.end()
            if end < len(self.text) and self.text[end] == '"':
                self._show(end + 1, show)
                return True
            escape_waits = end == len(self.text) - 1
            if end == len(self.text) or escape_waits:
                self._show(len(self.text) if self.ended else end, show)
                if self.ended:
                    return False
                yield
                continue
            self._show(end + 2, show)

    def _show(self, end: int, show: Callable[[str], None]) -> None:
        if end > self.position:
            show(self.text[self.position : end])
            self.position = end
