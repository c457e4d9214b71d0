"""LineRenderer: an Answer as Ollama's reply, or as lines of JSON. And Ollama's form of errors."""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from quire.errors import RequestError
from quire.outputs import CompletionOutput
from quire.server.answers import Choice, Renderer
from quire.server.errors import ErrorForm
from quire.server.generation import UsageCounter
from quire.server.logprobs import LogprobFormat
from quire.server.ollama.protocol import (
    ChatLine,
    Function,
    GenerateLine,
    OllamaError,
    OllamaMessage,
    Timing,
    ToolCall,
)
from quire.server.parts import Added, Change, Closed, Part, PartKind, PartList

Logprobs = list[dict[str, Any]]
Line = ChatLine | GenerateLine

ERRORS = ErrorForm(OllamaError, lambda error, _: OllamaError(error.message))
NDJSON = "application/x-ndjson"
_encode = msgspec.json.Encoder().encode


def now() -> str:
    """The present time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class LineRenderer(Renderer):
    """Ollama's lines. A call of a tool is one line, sent when it is complete."""

    model: str
    is_chat: bool
    """The endpoint is /api/chat; otherwise it is /api/generate."""
    logprobs: LogprobFormat | None
    done: ClassVar[bytes] = b""
    content_type: ClassVar[bytes] = NDJSON.encode()
    _parts: PartList = field(default_factory=PartList)
    _started: int = field(default_factory=time.monotonic_ns)
    _first_token: int = 0
    """When it came, in nanoseconds after the request."""
    _last: CompletionOutput = field(default_factory=lambda: CompletionOutput(0))

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        self._first_token = _nanoseconds_to_token(choice)
        return ()

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        changes = self._parts.read(choice.events)
        if delta.finished:
            changes += self._parts.close()
            self._last = delta
        lines = [line for change in changes if (line := self._changed(change)) is not None]
        if lines and (found := self._logprobs(delta)):
            lines[0].logprobs = found
        return b"".join(_encode(line) + b"\n" for line in lines)

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        line = self._line("", UNSET, [])
        self._finish(line, self._last, usage)
        return (_encode(line) + b"\n",)

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> Line:
        choice = choices[0]
        self._first_token = _nanoseconds_to_token(choice)
        message = choice.message
        calls = [_call(part) for part in PartList.of(message).parts if part.kind is PartKind.TOOL_CALL]
        line = self._line(message.text, message.reasoning or UNSET, calls)
        line.logprobs = self._logprobs(choice.sample) or UNSET
        self._finish(line, choice.sample, usage)
        return line

    def failure(self, error: RequestError) -> bytes:
        return _encode(OllamaError(error.message)) + b"\n"

    def loaded(self, reason: str) -> Line:
        """The reply to a request without a prompt; `reason` is load or unload."""
        line = self._line("", UNSET, [])
        line.done, line.done_reason = True, reason
        return line

    def _changed(self, change: Change) -> Line | None:
        match change:
            case Added(Part(PartKind.TEXT), text):
                return self._line(text, UNSET, [])
            case Added(Part(PartKind.REASONING), text):
                return self._line("", text, [])
            case Closed(Part(PartKind.TOOL_CALL) as part):
                return self._line("", UNSET, [_call(part)])
        return None

    def _line(self, text: str, thinking: str | UnsetType, calls: list[ToolCall]) -> Line:
        if not self.is_chat:
            return GenerateLine(model=self.model, created_at=now(), response=text, thinking=thinking, done=False)
        message = OllamaMessage("assistant", text, thinking, calls or UNSET)
        return ChatLine(model=self.model, created_at=now(), message=message, done=False)

    def _finish(self, line: Line, sample: CompletionOutput, counter: UsageCounter) -> None:
        """Make `line` the last one."""
        usage, total = counter.usage(), time.monotonic_ns() - self._started
        first = min(self._first_token, total)
        line.done = True
        timing: Timing = line
        timing.done_reason = "length" if sample.finish_reason == "length" else "stop"
        timing.total_duration, timing.load_duration = total, 0
        timing.prompt_eval_count, timing.prompt_eval_duration = usage.prompt_tokens, first
        timing.eval_count, timing.eval_duration = usage.completion_tokens, total - first

    def _logprobs(self, delta: CompletionOutput) -> Logprobs:
        if self.logprobs is None or delta.logprobs is None:
            return []
        found: Logprobs = msgspec.to_builtins(self.logprobs.for_chat(delta.token_ids, delta.logprobs).content or [])
        return found


def _nanoseconds_to_token(choice: Choice) -> int:
    times = choice.prompt.metrics
    if times is None or times.first_token_time is None:
        return 0
    return int((times.first_token_time - times.arrival_time) * 1e9)


def _call(part: Part) -> ToolCall:
    try:
        arguments = json.loads(part.text)
    except (ValueError, RecursionError):  # cut off, which the reason says
        arguments = {}
    return ToolCall(Function(part.name, arguments if isinstance(arguments, dict) else {}), part.call_id)
