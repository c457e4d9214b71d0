"""Output: collects the events of one reply while a parser reads it."""

import re
import secrets
import string
from collections.abc import Callable, Iterable
from uuid import uuid4

from quire.server.tools.events import (
    ArgumentsDelta,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from quire.server.tools.request import Tool, ToolUse
from quire.server.tools.sink import NotACallError

_NAME = re.compile(r"[\w.:/-]{1,128}")
_ALPHANUMERIC = string.ascii_letters + string.digits


class Output:
    """Text, reasoning and calls as events. White space next to a mark belongs to the mark and is left out.

    It is also the sink of the calls (see `sink`).
    """

    def __init__(
        self,
        use: ToolUse | None,
        *,
        decode: Callable[[str], str],
        id_style: str = "call",
        shows_reasoning: bool = True,
        on_call: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_call` is called when a call begins."""
        self.known_only = False
        """Only names of the tools make a call."""
        self._use = use
        self._decode = decode
        self._id_style = id_style
        self._shows_reasoning = shows_reasoning
        self._on_call = on_call
        self._events: list[Event] = []
        self._kind: type[TextDelta] | type[ReasoningDelta] = TextDelta
        self._space = ""
        """White space that is shown if more text follows."""
        self._trims = False
        """White space comes next that is left out."""
        self._gap = ""
        """White space around a mark, to stand between the text before and after it."""
        self._shown: set[type] = set()
        self._num_calls = 0
        self._muted = False
        self._ids: set[str] = set()

    def take(self) -> list[Event]:
        """The events since the last call; neighbours of one kind joined."""
        events, self._events = self._events, []
        return events if len(events) < 2 else list(_joined(events))

    def text(self, text: str) -> None:
        """Text for the user."""
        self._show(TextDelta, text)

    def reasoning(self, text: str) -> None:
        """Text of the reasoning."""
        self._show(ReasoningDelta, text)

    def mark(self) -> None:
        """A mark that is not shown stands here."""
        self._gap = self._space or self._gap
        self._space, self._trims = "", True

    def paragraph(self) -> None:
        """What follows is another part of the reply: a blank line separates it from an earlier part of its kind."""
        self._gap, self._space, self._trims = "\n\n", "", True

    def finish(self) -> None:
        """The reply has ended: show the white space that was held."""
        if self._space:
            self._emit(self._kind, self._space)
        self._space = ""

    def _show(self, kind: type[TextDelta] | type[ReasoningDelta], text: str) -> None:
        if kind is not self._kind:
            self._kind, self._space = kind, ""
        if self._trims:
            shown = text.lstrip()
            self._gap = self._gap or text[: len(text) - len(shown)]
            if not shown:
                return
            text = self._gap + shown if kind in self._shown else shown
            self._gap, self._trims = "", False
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._shown.add(kind)
            self._emit(kind, shown)

    def _emit(self, kind: type[TextDelta] | type[ReasoningDelta], text: str) -> None:
        if kind is TextDelta or self._shows_reasoning:
            self._events.append(kind(self._decode(text)))

    # -- the sink of the calls ----------------------------------------------------------------------------------------

    def begin(self, name: str, call_id: str = "", *, known_only: bool = False) -> Tool | None:
        """A call begins; returns the tool. Raises `NotACallError` for a name that cannot be a tool's."""
        tool = self._use.find(name) if self._use is not None else None
        space, _, member = name.partition(".")
        if tool is None and space == member and self._use is not None and (tool := self._use.find(space)):
            name = space  # the model took a name without a namespace for both
        if not _NAME.fullmatch(name) or (tool is None and (known_only or self.known_only)):
            raise NotACallError
        self._muted = self._num_calls > 0 and self._use is not None and not self._use.parallel
        self._num_calls += 1
        self._on_call()
        if not self._muted:
            self.mark()
            self._events.append(ToolCallBegin(self._num_calls - 1, self._unique(call_id), name))
        return tool

    def arguments(self, text: str) -> None:
        """Part of the JSON text of the arguments."""
        if not self._muted:
            self._events.append(ArgumentsDelta(self._num_calls - 1, self._decode(text)))

    def end(self) -> None:
        """The call has ended."""
        if not self._muted:
            self._events.append(ToolCallEnd(self._num_calls - 1))

    def _unique(self, call_id: str) -> str:
        """The id that the model wrote, if it can be used, else a new one."""
        if self._id_style == "nine" and not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
            call_id = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        elif not call_id or len(call_id) > 128 or call_id in self._ids or self._id_style == "call":
            call_id = f"call_{uuid4().hex[:24]}"
        self._ids.add(call_id)
        return call_id


def _joined(events: Iterable[Event]) -> Iterable[Event]:
    last: Event | None = None
    for event in events:
        match last, event:
            case TextDelta(before), TextDelta(text):
                last = TextDelta(before + text)
            case ReasoningDelta(before), ReasoningDelta(text):
                last = ReasoningDelta(before + text)
            case ArgumentsDelta(index, before), ArgumentsDelta(same, text) if index == same:
                last = ArgumentsDelta(index, before + text)
            case _:
                if last is not None:
                    yield last
                last = event
    if last is not None:
        yield last
