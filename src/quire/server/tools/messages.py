"""Reads replies that are rows of messages, each with a header that says what follows."""

from quire.server.tools.calls import read_calls
from quire.server.tools.channels import State
from quire.server.tools.format_types import Messages
from quire.server.tools.output import Output
from quire.server.tools.scanner import MAX_HEADER_CHARS, Scan, Scanner
from quire.server.tools.sink import NotACallError

MAX_FALSE_CALLS = 32
"""Messages of one reply that may hold no call. Each means that its text is read twice, so further ones are text."""


class MessageReader:
    """Reads one reply. Headers and the marks between messages are not shown."""

    def __init__(self, scan: Scanner, form: Messages, output: Output, state: State, *, calls_tools: bool) -> None:
        self._scan = scan
        self._form = form
        self._output = output
        self._state = state
        self._num_calls_left = MAX_FALSE_CALLS if calls_tools else 0
        self._stops = (form.begin, *form.heads, *form.ends)

    def run(self, *, in_header: bool) -> Scan[None]:
        """Read the whole reply. With `in_header` it begins within a header, else within a message."""
        if in_header:
            yield from self._header(self._form.opening, 0)
        while True:
            show = self._output.reasoning if self._state.thinking else self._output.text
            mark = yield from self._scan.until(self._stops, show)
            if not mark:
                return
            self._output.mark()
            self._state.thinking = False
            if mark in self._form.ends:
                self._scan.position += len(mark)
            elif mark == self._form.begin:
                yield from self._header(mark, len(mark))
            else:
                yield from self._header(self._form.opening, 0)

    def _header(self, before: str, skipped: int) -> Scan[None]:
        """A header up to its last mark, and the calls that follow. `before` has come of it, and `skipped` characters
        of that are in the text. A text that is no header is shown."""
        scan, form = self._scan, self._form
        start, parts = scan.pin(), list[str]()
        scan.position += skipped
        stop = yield from scan.until(self._stops, parts.append, MAX_HEADER_CHARS)
        if stop not in form.heads:
            scan.back_to(start)
            self._output.text(scan.text[scan.position : scan.position + skipped])
            scan.position += skipped
            return
        scan.unpin()
        scan.position += len(stop)
        head = f"{before}{''.join(parts)}{stop}"
        self._output.paragraph()
        self._state.thinking = head.endswith(form.reasoning[0].strip())
        if head.endswith((*form.text_heads, form.text[0].strip())) or self._state.thinking:
            return
        if head.endswith(form.calls_head.rpartition("{name}")[2].strip()):
            yield from self._calls()

    def _calls(self) -> Scan[None]:
        """The calls of a message. What is no call is text."""
        if not self._num_calls_left:
            return
        start = self._scan.pin()
        try:
            yield from self._scan.space()
            yield from read_calls(self._scan, self._form.calls, self._output)
        except NotACallError:
            self._num_calls_left -= 1
            self._scan.back_to(start)
            return
        self._scan.unpin()
        self._output.mark()
