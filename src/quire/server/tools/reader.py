"""ReplyReader: reads one sample's text as reasoning, text and tool calls, in one format."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from quire.engine.tokenizer import Tokenizer
from quire.server.tools.calls import read_calls
from quire.server.tools.channels import read_channels
from quire.server.tools.events import Event
from quire.server.tools.format_types import Channels, Thinking, ToolFormat
from quire.server.tools.marks import Marks, TokenFinder
from quire.server.tools.output import Output
from quire.server.tools.request import ToolUse
from quire.server.tools.scanner import Scan, Scanner
from quire.server.tools.sink import NotACallError

MAX_FALSE_CALLS = 32
"""Marks of one reply that may open no call. Each may mean that the rest is read twice, so further marks are text."""


class ReplyFormat:
    """The formats of one model, bound to its vocabulary."""

    def __init__(
        self, tools: ToolFormat | Channels | None, thinking: Thinking | Channels | None, tokenizer: Tokenizer | None
    ) -> None:
        """Without a tokenizer, all marks are text."""
        self.tools = tools
        self.thinking = thinking
        self.marks = Marks(tokenizer, [text for row in (tools, thinking) if row is not None for text in _texts(row)])
        self.special_ids = frozenset[int]() if tokenizer is None else tokenizer.special_ids
        self.encoded_tools: ToolFormat | Channels | None = None if tools is None else _mapped(tools, self.marks)
        self.encoded_thinking: Thinking | Channels | None = None if thinking is None else _mapped(thinking, self.marks)

    def opening(self, prompt: str, continued: str | None = None) -> "Opening":
        """What `prompt` says about the reasoning of the reply. Only its end counts, not earlier turns.

        `continued` is the text of the message that the reply continues, if it is not a new one.
        """
        if not isinstance(self.thinking, Thinking):
            return Opening.FREE
        begin, end = self.thinking.open.strip(), self.thinking.close.strip()
        if continued is not None:
            if begin not in continued and end not in continued:
                return Opening.FREE
            return Opening.OPEN if continued.rfind(begin) > continued.rfind(end) else Opening.CLOSED
        tail = prompt.rstrip()
        return Opening.OPEN if tail.endswith(begin) else Opening.CLOSED if tail.endswith(end) else Opening.FREE


class Opening(Enum):
    """Where the reasoning stands when the reply begins."""

    OPEN = "open"
    """The prompt has opened it: the reply begins inside."""
    CLOSED = "closed"
    """The prompt holds all of it, often nothing."""
    FREE = "free"
    """The model may open it."""


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """How the replies of one request are read."""

    form: ReplyFormat
    use: ToolUse | None
    """The tools; None reads no calls."""
    opening: Opening = Opening.FREE
    shows_reasoning: bool = True
    hides_special_tokens: bool = True


class ReplyReader:
    """Reads one sample. Its events do not depend on how the text is cut into pieces."""

    def __init__(self, options: ReadingOptions) -> None:
        self.num_reasoning_tokens = 0
        form = options.form
        hidden = form.special_ids if options.hides_special_tokens else frozenset[int]()
        self._finder = TokenFinder(form.marks, hidden)
        self._scan = Scanner()
        row = form.encoded_tools
        self._output = Output(
            options.use,
            decode=form.marks.decode,
            id_style=row.id_style if isinstance(row, ToolFormat) else "call",
            shows_reasoning=options.shows_reasoning,
            on_call=self._scan.unpin,
        )
        self._parser = _Parser(self._scan, self._output, options)
        self._steps = self._parser.run()

    def read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Event]:
        """The events that the next piece completes."""
        was_thinking = self._parser.thinking
        self._scan.forget()
        self._scan.feed(self._finder.read(text, token_ids, finished=finished))
        self._scan.ended = finished
        if next(self._steps, self) is self or finished:
            self._output.finish()
        if was_thinking and self._parser.thinking:
            self.num_reasoning_tokens += len(token_ids)
        return self._output.take()


class _Parser:
    """The grammar of a reply: reasoning, text and calls, in any order."""

    def __init__(self, scan: Scanner, output: Output, options: ReadingOptions) -> None:
        self.thinking = options.opening is Opening.OPEN
        self._scan = scan
        self._output = output
        self._channels = next(
            (row for row in (options.form.encoded_tools, options.form.encoded_thinking) if isinstance(row, Channels)),
            None,
        )
        row, thinking = options.form.encoded_tools, options.form.encoded_thinking
        self._tools = row if isinstance(row, ToolFormat) and options.use is not None else None
        self._calls_tools = options.use is not None
        self._think_open = thinking.open.strip() if isinstance(thinking, Thinking) else ""
        self._think_close = thinking.close.strip() if isinstance(thinking, Thinking) else ""
        self._openers = tuple(mark.strip() for mark in self._tools.openers) if self._tools is not None else ()
        self._has_thought = options.opening is not Opening.FREE
        self._num_false_calls = 0

    def run(self) -> Scan[None]:
        """Read the whole reply."""
        if self._channels is not None:
            yield from read_channels(self._scan, self._channels, self._output, self, calls_tools=self._calls_tools)
            return
        if not self.thinking and self._think_open:
            self.thinking = yield from self._opens_thinking()
        if self.thinking:
            yield from self._think()
        yield from self._bare_calls()
        while mark := (yield from self._text()):
            if mark == self._think_open:
                yield from self._think()
                yield from self._bare_calls()
            elif mark == self._think_close:
                self._scan.position += len(mark)
            elif not (yield from self._calls()):
                self._scan.position += len(mark)
                self._output.text(mark)

    def _opens_thinking(self) -> Scan[bool]:
        """True if the reply begins with the mark that opens the reasoning. Reads nothing."""
        start = self._scan.pin()
        yield from self._scan.space()
        found = yield from self._scan.at(self._think_open)
        self._scan.back_to(start)
        return found

    def _text(self) -> Scan[str]:
        """Show text up to a mark that may mean something, and return that mark."""
        stops = self._openers
        if len(self._think_open) == 1:
            stops += (self._think_open,)  # a token; as a text it opens the reasoning only at the beginning
        if self._has_thought and self._think_close:
            stops += (self._think_close,)  # some models close the reasoning twice
        if stops:
            return (yield from self._scan.until(stops, self._output.text))
        while True:
            self._output.text(self._scan.rest)
            self._scan.position = len(self._scan.text)
            if self._scan.ended:
                return ""
            yield

    def _think(self) -> Scan[None]:
        """Show reasoning up to its end: the mark, a tool call, or the end of the reply."""
        self.thinking = self._has_thought = True
        self._output.mark()
        yield from self._scan.space()
        yield from self._scan.accept(self._think_open)  # may stand in the prompt and in the reply
        while True:
            mark = yield from self._scan.until((self._think_close, *self._openers), self._output.reasoning)
            if not mark:
                return
            if mark == self._think_close:
                self._scan.position += len(mark)
                break
            if (yield from self._calls(known_only=True)):
                break
            self._scan.position += len(mark)
            self._output.reasoning(mark)
        self.thinking = False
        self._output.mark()

    def _bare_calls(self) -> Scan[None]:
        """Read calls that stand at the beginning without a mark."""
        if self._tools is None or not self._tools.bare:
            return
        start = self._scan.pin()
        yield from self._scan.space()
        if (yield from self._scan.peek()) not in ("{", "[") or not (yield from self._calls(start, known_only=True)):
            self._scan.back_to(start)

    def _calls(self, start: int | None = None, *, known_only: bool = False) -> Scan[bool]:
        """Read calls from their opener on. Returns False if it opens no call; the scan is then back at `start`."""
        assert self._tools is not None
        if self._num_false_calls >= MAX_FALSE_CALLS:
            return False
        start = self._scan.pin() if start is None else start
        self._output.known_only = known_only
        try:
            yield from read_calls(self._scan, self._tools, self._output)
        except NotACallError:
            self._num_false_calls += 1
            self._scan.back_to(start)
            return False
        finally:
            self._scan.unpin()
        self._output.mark()
        return True


def _texts(row: object) -> list[str]:
    """All texts of a row, those of its parts included."""
    found: list[str] = []
    for name, value in _marks_of(row):
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, tuple):
            found += [text for text in value if isinstance(text, str)]
        elif name == "body":
            found += _texts(value)
    return found


def _mapped(row: Any, marks: Marks) -> Any:
    """The row with its tokens as characters."""
    changes: dict[str, Any] = {}
    for name, value in _marks_of(row):
        if isinstance(value, str):
            changes[name] = marks.encode(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(marks.encode(text) for text in value)
        elif name == "body":
            changes[name] = _mapped(value, marks)
    return replace(row, **changes)


def _marks_of(row: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(row, f.name)) for f in fields(row) if f.name not in ("names", "in_template", "id_style")]
