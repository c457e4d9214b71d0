"""PartList: a reply as the sequence of its parts (text, reasoning, tool calls), for protocols that stream such parts.

The events of an `Answer` are deltas; these protocols also say where each part begins and ends.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from quire.server.tools.events import (
    ArgumentsDelta,
    Event,
    Message,
    ReasoningDelta,
    TextDelta,
    ToolCallBegin,
    ToolCallEnd,
)


class PartKind(StrEnum):
    """What a part is."""

    TEXT = "text"
    REASONING = "reasoning"
    TOOL_CALL = "tool_call"


@dataclass(slots=True)
class Part:
    """One part of a reply, as far as it was generated."""

    kind: PartKind
    index: int
    """Its place among the parts."""
    call_id: str = ""
    name: str = ""
    """The called tool."""
    pieces: list[str] = field(default_factory=list)
    """The pieces of `text`: adding to a long text would copy it each time."""

    @property
    def text(self) -> str:
        """For a tool call the arguments, as JSON text."""
        return "".join(self.pieces)


class Opened(NamedTuple):
    """A part begins."""

    part: Part


class Added(NamedTuple):
    """A part grows by `text`."""

    part: Part
    text: str


class Closed(NamedTuple):
    """A part is complete."""

    part: Part


Change = Opened | Added | Closed


@dataclass(slots=True)
class PartList:
    """The parts of one sample. At most one is open."""

    parts: list[Part] = field(default_factory=list)
    _is_open: bool = False

    @classmethod
    def of(cls, message: Message) -> "PartList":
        """The parts of a whole reply: reasoning, text, then tool calls."""
        parts = cls()
        events: list[Event] = [ReasoningDelta(message.reasoning)] if message.reasoning else []
        if message.text:
            events.append(TextDelta(message.text))
        for index, call in enumerate(message.tool_calls):
            events += [ToolCallBegin(index, call.id, call.name), ArgumentsDelta(index, call.arguments)]
        parts.read(events)
        parts.close()
        return parts

    def read(self, events: Iterable[Event]) -> list[Change]:
        """What `events` change."""
        changes: list[Change] = []
        for event in events:
            match event:
                case TextDelta(text):
                    changes += self._add(PartKind.TEXT, text)
                case ReasoningDelta(text):
                    changes += self._add(PartKind.REASONING, text)
                case ToolCallBegin(_, call_id, name):
                    changes += self._open(Part(PartKind.TOOL_CALL, len(self.parts), call_id, name))
                case ArgumentsDelta(_, text):
                    changes += self._add(PartKind.TOOL_CALL, text)
                case ToolCallEnd():
                    changes += self.close()
        return changes

    def extend_text(self, text: str) -> Part | None:
        """Add `text` to the open part if that is a text, and return it; None if there is none, and nothing changes."""
        part = self.parts[-1] if self._is_open else None
        if part is None or part.kind is not PartKind.TEXT:
            return None
        part.pieces.append(text)
        return part

    def close(self) -> list[Change]:
        """Close the open part, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        return [Closed(self.parts[-1])]

    def _open(self, part: Part) -> list[Change]:
        changes = [*self.close(), Opened(part)]
        self.parts.append(part)
        self._is_open = True
        return changes

    def _add(self, kind: PartKind, text: str) -> list[Change]:
        opened = self._open(Part(kind, len(self.parts))) if not self._is_open or self.parts[-1].kind is not kind else []
        part = self.parts[-1]
        part.pieces.append(text)
        return [*opened, Added(part, text)]
