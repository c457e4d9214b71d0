"""What a reply consists of: text, reasoning and tool calls, as events of a stream or as a whole message.

Joined deltas of one kind are the same however the model's text was cut into pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct


class TextDelta(Struct, frozen=True):
    """Text for the user."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """Text of the model's reasoning."""

    text: str


class ToolCallBegin(Struct, frozen=True):
    """A tool call begins. Calls of one reply are numbered from 0 and never interleave."""

    index: int
    id: str
    name: str


class ArgumentsDelta(Struct, frozen=True):
    """Part of a call's arguments: the parts join to one JSON text."""

    index: int
    text: str


class ToolCallEnd(Struct, frozen=True):
    """A tool call is complete, or was cut off by the end of the reply."""

    index: int


Event = TextDelta | ReasoningDelta | ToolCallBegin | ArgumentsDelta | ToolCallEnd


@dataclass(slots=True)
class ToolCall:
    """One call of a tool."""

    id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass(slots=True)
class Message:
    """A reply as a whole: the sum of its events."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Append one event."""
        match event:
            case TextDelta(text):
                self.text += text
            case ReasoningDelta(text):
                self.reasoning += text
            case ToolCallBegin(_, call_id, name):
                self.tool_calls.append(ToolCall(call_id, name))
            case ArgumentsDelta(index, text):
                self.tool_calls[index].arguments += text


class Reader(Protocol):
    """Turns one sample's text into events. It is made per sample and reads it once, piece by piece."""

    num_reasoning_tokens: int
    """Tokens read so far that belong to the reasoning."""

    def read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Event]:
        """The events that the next piece completes. Text that may begin a marker waits; `finished` releases it."""
        ...


class PlainReader:
    """Reads a reply that is text and nothing else."""

    num_reasoning_tokens = 0

    def read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Event]:
        return [TextDelta(text)] if text else []
