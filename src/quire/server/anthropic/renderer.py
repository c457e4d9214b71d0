"""MessageRenderer: an Answer as Anthropic's message, or as its events. And Anthropic's form of errors."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import UNSET
from msgspec.structs import replace

from quire.errors import RequestError
from quire.outputs import CompletionOutput
from quire.server.answers import Choice, Renderer, sse
from quire.server.anthropic.protocol import AnthropicError, AnthropicErrorDetail, AnthropicMessage, MessageUsage
from quire.server.errors import ErrorForm
from quire.server.event_frame import GAP, EventFrame
from quire.server.generation import UsageCounter
from quire.server.parts import Added, Change, Closed, Opened, Part, PartKind, PartList
from quire.server.tools.events import TextDelta

PING = sse({"type": "ping"}, "ping")
_UNSIGNED = "unsigned"
"""Signature of a thinking block: clients send it back, and nobody checks it here."""
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(slots=True)
class MessageRenderer(Renderer):
    """Anthropic's messages. Each part of the reply is a content block."""

    message: AnthropicMessage
    """Without content; what the reply begins with."""
    is_clipped: bool
    """The context holds fewer tokens than `max_tokens`."""
    done: ClassVar[bytes] = b""
    ping: ClassVar[bytes] = PING
    _parts: PartList = field(default_factory=PartList)
    _last: CompletionOutput = field(default_factory=lambda: CompletionOutput(0))
    _stop_reason: str = "end_turn"
    _frame: tuple[Part, EventFrame] | None = None
    """A part, and the event that adds a text to it."""

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        start = replace(self.message, usage=_usage(usage, num_output=0))
        return [sse({"type": "message_start", "message": start}, "message_start"), PING]

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        if text := choice.only_text(delta):
            return self._add_text(text)
        changes = self._parts.read(choice.events)
        if delta.finished:
            changes += self._parts.close()
            self._last, self._stop_reason = delta, self._reason(choice, delta)
        return b"".join(event for change in changes for event in _events(change))

    def text_events(self, choice: Choice, usage: UsageCounter) -> Callable[[str], bytes] | None:
        return self._add_text

    def _add_text(self, text: str) -> bytes:
        part = self._parts.extend_text(text)
        if part is None:
            return b"".join(event for change in self._parts.read([TextDelta(text)]) for event in _events(change))
        if self._frame is None or self._frame[0] is not part:
            event = _event("content_block_delta", part, delta=_delta(PartKind.TEXT, GAP))
            self._frame = (part, EventFrame(event))
        return self._frame[1].fill(text)

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": _stop_sequence(self._last)}
        end = {"type": "message_delta", "delta": delta, "usage": _usage(usage)}
        return [sse(end, "message_delta"), sse({"type": "message_stop"}, "message_stop")]

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> AnthropicMessage:
        (choice,) = choices
        return replace(
            self.message,
            content=[_block(part) for part in PartList.of(choice.message).parts],
            stop_reason=self._reason(choice, choice.sample),
            stop_sequence=_stop_sequence(choice.sample),
            usage=_usage(usage),
        )

    def failure(self, error: RequestError) -> bytes:
        return sse(_error_body(error, ""), "error")

    def _reason(self, choice: Choice, sample: CompletionOutput) -> str:
        match choice.finish_reason(sample):
            case "tool_calls":
                return "tool_use"
            case "length":
                return "model_context_window_exceeded" if self.is_clipped else "max_tokens"
        return "stop_sequence" if _stop_sequence(sample) is not None else "end_turn"


def _events(change: Change) -> list[bytes]:
    part = change.part
    match change:
        case Opened():
            block = _block(Part(part.kind, part.index, part.call_id, part.name))
            if part.kind is PartKind.REASONING:
                block["signature"] = ""
            return [_event("content_block_start", part, content_block=block)]
        case Added(_, text):
            return [_event("content_block_delta", part, delta=_delta(part.kind, text))] if text else []
        case Closed():
            signature = {"type": "signature_delta", "signature": _UNSIGNED}
            signed = [_event("content_block_delta", part, delta=signature)] if part.kind is PartKind.REASONING else []
            return [*signed, _event("content_block_stop", part)]


def _event(name: str, part: Part, **fields: object) -> bytes:
    return sse({"type": name, "index": part.index, **fields}, name)


def _delta(kind: PartKind, text: str) -> dict[str, str]:
    match kind:
        case PartKind.TEXT:
            return {"type": "text_delta", "text": text}
        case PartKind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case PartKind.TOOL_CALL:
            return {"type": "input_json_delta", "partial_json": text}


def _block(part: Part) -> dict[str, Any]:
    match part.kind:
        case PartKind.TEXT:
            return {"type": "text", "text": part.text}
        case PartKind.REASONING:
            return {"type": "thinking", "thinking": part.text, "signature": _UNSIGNED}
        case PartKind.TOOL_CALL:
            return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _input(part.text)}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object; empty if they were cut off, which the stop reason says."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _stop_sequence(sample: CompletionOutput) -> str | None:
    return sample.stop_reason if isinstance(sample.stop_reason, str) else None


def _usage(counter: UsageCounter, num_output: int | None = None) -> MessageUsage:
    usage = counter.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens if num_output is None else num_output,
        cache_read_input_tokens=cached,
    )


def _error_body(error: RequestError, request_id: str) -> AnthropicError:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return AnthropicError(AnthropicErrorDetail(kind, error.message), request_id=request_id or UNSET)


ERRORS = ErrorForm(AnthropicError, _error_body, {503: 529})
"""How /v1/messages answers errors. Anthropic's clients know 529 as an overloaded server."""
