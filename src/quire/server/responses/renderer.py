"""ResponseRenderer: an Answer as a response object, or as its events."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from quire.errors import RequestError
from quire.outputs import CompletionOutput
from quire.server.answers import Choice, Renderer, sse
from quire.server.event_frame import GAP, EventFrame
from quire.server.generation import UsageCounter
from quire.server.logprobs import LogprobFormat
from quire.server.parts import Added, Change, Closed, Opened, Part, PartKind, PartList
from quire.server.responses.namespaces import split
from quire.server.responses.protocol import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from quire.server.responses.store import item_id_of
from quire.server.tools.events import TextDelta

Json = dict[str, Any]


@dataclass(slots=True)
class ResponseRenderer(Renderer):
    """OpenAI's response objects. `response` is the present state, and final once the answer has ended."""

    response: ResponseObject
    logprobs: LogprobFormat | None
    """None if the client did not ask for them."""
    done: ClassVar[bytes] = b""
    _parts: PartList = field(default_factory=PartList)
    _ids: list[str] = field(default_factory=list)
    """Ids of the items, which are the parts."""
    _logprobs: list[Json] = field(default_factory=list)
    """Log-probabilities of the present text."""
    _pending: list[Json] = field(default_factory=list)
    """Log-probabilities of tokens whose text has not been sent."""
    _finish_reason: str | None = None
    _number: int = 0
    _frame: tuple[Part, EventFrame] | None = None
    """A part, and the event that adds a text to it."""

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        self.response = replace(self.response, status="in_progress")
        return [self._event(f"response.{name}", response=self.response) for name in ("created", "in_progress")]

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        if self.logprobs is None and (text := choice.only_text(delta)):
            return self._add_text(text)
        self._finish_reason = delta.finish_reason
        self._pending += self._entries(delta)
        changes = self._parts.read(choice.events)
        if delta.finished:
            changes += self._parts.close()
        return b"".join(event for change in changes for event in self._events(change))

    def text_events(self, choice: Choice, usage: UsageCounter) -> Callable[[str], bytes] | None:
        return self._add_text if self.logprobs is None else None

    def _add_text(self, text: str) -> bytes:
        if (part := self._parts.extend_text(text)) is not None:
            return self._text_event(part, text)
        changes = self._parts.read([TextDelta(text)])
        return b"".join(event for change in changes for event in self._events(change))

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        self._finish(self._parts, usage)
        return [self._event(f"response.{self.response.status}", response=self.response)]

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> ResponseObject:
        sample = choices[0].sample
        self._finish_reason = sample.finish_reason
        self._logprobs = self._entries(sample)
        parts = PartList.of(choices[0].message)
        self._finish(parts, usage)
        return self.response

    def failure(self, error: RequestError) -> bytes:
        self.fail(error)
        return self._event("response.failed", response=self.response)

    def fail(self, error: RequestError) -> None:
        """End the response with `error`."""
        code = "server_error" if error.status >= 500 else error.code
        self.response = replace(self.response, status="failed", error=ResponseError(code, error.message))

    def _finish(self, parts: PartList, usage: UsageCounter) -> None:
        is_cut = self._finish_reason == "length"
        self.response = replace(
            self.response,
            status="incomplete" if is_cut else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            output=[self._item(part, self._status(part, parts)) for part in parts.parts],
            usage=_usage(usage),
        )

    def _status(self, part: Part, parts: PartList) -> str:
        """The last item of a reply that ran into its limit is incomplete."""
        return "incomplete" if self._finish_reason == "length" and part is parts.parts[-1] else "completed"

    def _events(self, change: Change) -> list[bytes]:
        part = change.part
        place: Json = {"output_index": part.index}
        item_id = self._id(part)
        match change:
            case Opened():
                added = self._event(
                    "response.output_item.added", **place, item=self._item(part, "in_progress", empty=True)
                )
                content = [] if part.kind is PartKind.TOOL_CALL else [self._content_event("added", part, {"text": ""})]
                return [added, *content]
            case Added(_, text):
                if part.kind is PartKind.TOOL_CALL:
                    name = "response.function_call_arguments.delta"
                    return [self._event(name, **place, item_id=item_id, delta=text)]
                extra = {}
                if part.kind is PartKind.TEXT:
                    extra["logprobs"], self._pending = self._pending, []
                    self._logprobs += extra["logprobs"]
                name = f"response.{_CONTENT[part.kind]}.delta"
                return [self._event(name, **place, item_id=item_id, content_index=0, delta=text, **extra)]
            case Closed():
                return [
                    *self._closing(part, place),
                    self._event(
                        "response.output_item.done", **place, item=self._item(part, self._status(part, self._parts))
                    ),
                ]

    def _text_event(self, part: Part, text: str) -> bytes:
        """The event of `Added` for a text without log-probabilities."""
        if self._frame is None or self._frame[0] is not part:
            place = {"output_index": part.index, "item_id": self._id(part), "content_index": 0}
            name = "response.output_text.delta"
            event = {"type": name, "sequence_number": GAP, **place, "delta": GAP, "logprobs": []}
            self._frame = (part, EventFrame(sse(event, name)))
        self._number += 1
        return self._frame[1].fill(self._number - 1, text)

    def _closing(self, part: Part, place: Json) -> list[bytes]:
        place = {**place, "item_id": self._id(part)}
        if part.kind is PartKind.TOOL_CALL:
            name = "response.function_call_arguments.done"
            named = split(part.name, self.response.tools)
            return [self._event(name, **place, name=named["name"], arguments=part.text)]
        extra: Json = {"logprobs": self._logprobs} if part.kind is PartKind.TEXT else {}
        name = f"response.{_CONTENT[part.kind]}.done"
        done = self._event(name, **place, content_index=0, text=part.text, **extra)
        return [done, self._content_event("done", part, {})]

    def _content_event(self, name: str, part: Part, changes: Json) -> bytes:
        content = {**self._content(part), **changes}
        return self._event(
            f"response.content_part.{name}",
            output_index=part.index,
            item_id=self._id(part),
            content_index=0,
            part=content,
        )

    def _item(self, part: Part, status: str, *, empty: bool = False) -> Json:
        """The item of `part`. `empty`: without content, for the event that opens it."""
        content = [] if empty else [self._content(part)]
        head = {"id": self._id(part), "status": status}
        match part.kind:
            case PartKind.TEXT:
                return {"type": "message", **head, "role": "assistant", "content": content}
            case PartKind.REASONING:
                return {"type": "reasoning", **head, "summary": [], "content": content}
            case PartKind.TOOL_CALL:
                call = {"call_id": part.call_id, "arguments": "" if empty else part.text}
                return {"type": "function_call", **head, **split(part.name, self.response.tools), **call}

    def _content(self, part: Part) -> Json:
        if part.kind is PartKind.REASONING:
            return {"type": "reasoning_text", "text": part.text}
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": self._logprobs}

    def _id(self, part: Part) -> str:
        while len(self._ids) <= part.index:
            self._ids.append(item_id_of(self.response.id, _ID_PREFIXES[part.kind], len(self._ids)))
        return self._ids[part.index]

    def _entries(self, delta: CompletionOutput) -> list[Json]:
        if self.logprobs is None or delta.logprobs is None:
            return []
        found = self.logprobs.for_chat(delta.token_ids, delta.logprobs).content or []
        entries: list[Json] = msgspec.to_builtins(found)
        return entries

    def _event(self, kind: str, /, **fields: object) -> bytes:
        event = sse({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return event


_CONTENT = {PartKind.TEXT: "output_text", PartKind.REASONING: "reasoning_text"}
_ID_PREFIXES = {PartKind.TEXT: "msg", PartKind.REASONING: "rs", PartKind.TOOL_CALL: "fc"}


def _usage(counter: UsageCounter) -> ResponseUsage:
    usage = counter.usage()
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(counter.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )
