"""ReplyReader: reads one sample's text as reasoning, text and tool calls, in one format."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from quire.engine.tokenizer import Tokenizer
from quire.server.tools.calls import read_calls
from quire.server.tools.channels import read_channels
from quire.server.tools.events import Event
from quire.server.tools.format_types import Channels, Framed, Messages, Thinking, ToolFormat
from quire.server.tools.marks import Marks, TokenFinder
from quire.server.tools.messages import MessageReader
from quire.server.tools.output import Output
from quire.server.tools.request import ToolUse
from quire.server.tools.row_texts import mapped, texts_of
from quire.server.tools.scanner import Scan, Scanner
from quire.server.tools.sink import NotACallError

MAX_FALSE_CALLS = 32
"""Marks of one reply that may open no call. Each may mean that the rest is read twice, so further marks are text."""


class ReplyFormat:
    """The formats of one model, bound to its vocabulary."""

    def __init__(
        self, tools: ToolFormat | Framed | None, thinking: Thinking | Framed | None, tokenizer: Tokenizer | None
    ) -> None:
        """Without a tokenizer, all marks are text."""
        self.tools = tools
        self.thinking = thinking
        self.marks = Marks(tokenizer, [text for row in (tools, thinking) if row is not None for text in texts_of(row)])
        self.special_ids = frozenset[int]() if tokenizer is None else tokenizer.special_ids
        self.encoded_tools: ToolFormat | Framed | None = None if tools is None else mapped(tools, self.marks.encode)
        self.encoded_thinking: Thinking | Framed | None = (
            None if thinking is None else mapped(thinking, self.marks.encode)
        )

    def opening(self, prompt: str, continued: str | None = None) -> "Opening":
        """What `prompt` says about the reasoning of the reply. Only its end counts, not earlier turns.

        `continued` is the text of the message that the reply continues, if it is not a new one.
        """
        match self.thinking:
            case Thinking(opens=begins, closes=ends):
                unmarked = Opening.FREE
            case Messages(reasoning=reasoning, text=text):
                begins, ends, unmarked = (reasoning[0].strip(),), (text[0].strip(),), Opening.CLOSED
            case _:
                return Opening.FREE
        if continued is not None:
            begin, end = (max(map(continued.rfind, marks)) for marks in (begins, ends))
            return unmarked if begin == end else Opening.OPEN if begin > end else Opening.CLOSED
        tail = prompt.rstrip()
        return Opening.OPEN if tail.endswith(begins) else Opening.CLOSED if tail.endswith(ends) else Opening.FREE


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
        row, thinking = options.form.encoded_tools, options.form.encoded_thinking
        self._framed = next((each for each in (row, thinking) if isinstance(each, Framed)), None)
        self._in_header = options.opening is Opening.FREE
        self._tools = row if isinstance(row, ToolFormat) and options.use is not None else None
        self._calls_tools = options.use is not None
        self._think_opens = thinking.opens if isinstance(thinking, Thinking) else ()
        self._think_closes = thinking.closes if isinstance(thinking, Thinking) else ()
        self._openers = tuple(mark.strip() for mark in self._tools.openers) if self._tools is not None else ()
        self._has_thought = options.opening is not Opening.FREE
        self._num_false_calls = 0

    def run(self) -> Scan[None]:
        """Read the whole reply."""
        match self._framed:
            case Channels() as form:
                yield from read_channels(self._scan, form, self._output, self, calls_tools=self._calls_tools)
                return
            case Messages() as form:
                made = MessageReader(self._scan, form, self._output, self, calls_tools=self._calls_tools)
                yield from made.run(in_header=self._in_header)
                return
        if not self.thinking and self._think_opens:
            self.thinking = yield from self._opens_thinking()
        if self.thinking:
            yield from self._think()
        yield from self._bare_calls()
        while mark := (yield from self._text()):
            if mark in self._think_opens:
                yield from self._think()
                yield from self._bare_calls()
            elif mark in self._think_closes:
                self._scan.position += len(mark)
            elif not (yield from self._calls()):
                self._scan.position += len(mark)
                self._output.text(mark)

    def _opens_thinking(self) -> Scan[bool]:
        """True if the reply begins with the mark that opens the reasoning. Reads nothing."""
        start = self._scan.pin()
        yield from self._scan.space()
        found = False
        for mark in self._think_opens:
            found = found or (yield from self._scan.at(mark))
        self._scan.back_to(start)
        return found

    def _text(self) -> Scan[str]:
        """Show text up to a mark that may mean something, and return that mark."""
        stops = self._openers
        # A mark that is a token may open the reasoning anywhere, one that is text only at the beginning.
        stops += tuple(mark for mark in self._think_opens if len(mark) == 1)
        if self._has_thought:
            stops += self._think_closes  # some models close the reasoning twice
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
        for mark in self._think_opens:
            if (yield from self._scan.accept(mark)):  # may stand in the prompt and in the reply
                break
        while True:
            mark = yield from self._scan.until((*self._think_closes, *self._openers), self._output.reasoning)
            if not mark:
                return
            if mark in self._think_closes:
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
