"""Answer: one generation, sent whole or as server-sent events, in the words of one endpoint.

`Answer` runs the generation and keeps its choices; it knows no endpoint. A `Renderer` writes the choices
in an endpoint's words: `chat.py` and `completions.py` hold one each. A further endpoint that generates is one
file: renderer and handler.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from quire.errors import RequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.server.backend import Engine
from quire.server.endpoint import RequestContext
from quire.server.errors import error_body
from quire.server.generation import Generation, UsageCounter
from quire.server.protocol import StreamOptions
from quire.server.replies import Usage
from quire.server.streaming import DONE

_encode = msgspec.json.Encoder().encode


def sse(body: object, event: str = "") -> bytes:
    """One server-sent event with `body` as JSON; `event` is its type, for protocols that name their events."""
    name = b"event: " + event.encode() + b"\n" if event else b""
    return name + b"data: " + _encode(body) + b"\n\n"


def event_usage(options: StreamOptions, usage: UsageCounter) -> Usage | UnsetType | None:
    """The `usage` field of an event that is not the last: absent, null, or the usage so far."""
    if not options.include_usage:
        return UNSET
    return usage.usage() if options.continuous_usage_stats else None


@dataclass(slots=True)
class Choice:
    """One sample of one prompt, as a client counts them."""

    index: int
    """prompt_index × n + the sample's index."""
    prompt_index: int
    prompt: RequestOutput
    """First output for the prompt. It holds the prompt's token ids and log-probabilities."""
    is_first: bool
    """No other choice of the answer was opened before this one."""
    sample: CompletionOutput
    """The sum of the deltas. Kept for whole replies, and for streams whose renderer sets `keeps_samples`."""
    num_events: int = 0
    """Events sent for its deltas so far."""


class Renderer(Protocol):
    """Writes an answer as one endpoint does. Subclass it: the attributes below have OpenAI's defaults."""

    keeps_samples: ClassVar[bool] = False
    """`ending` reads `Choice.sample`."""
    done: ClassVar[bytes] = DONE
    """Ends every stream, after errors too."""

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        """Events sent once per choice, before its first delta."""
        ...

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        """The event for text, tokens or a finish reason that the engine added to `choice`."""
        ...

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        """Events sent when all choices have finished."""
        ...

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> object:
        """The reply of a request that does not stream: a value that msgspec encodes. `choices` are in order."""
        ...

    def failure(self, error: RequestError) -> bytes:
        """The event for an error after the stream has begun."""
        return sse(error_body(error))


@dataclass(slots=True)
class Answer:
    """One generation on its way to one client. Use it once."""

    generation: Generation
    renderer: Renderer
    every_token: bool = False
    """Send an event also for a token without text, such as the first part of a character."""
    usage: UsageCounter = field(default_factory=UsageCounter)
    _choices: dict[int, Choice] = field(default_factory=dict, init=False)
    _prompts: dict[int, RequestOutput] = field(default_factory=dict, init=False)

    async def send(self, context: RequestContext, *, stream: bool) -> None:
        """Answer the request of `context` within its time. The generation is cancelled if the client leaves."""
        self.generation = replace(self.generation, timeout=context.timeout())
        if stream:
            events, renderer = self.events(context.engine), self.renderer
            await context.stream(events, failure=renderer.failure, done=renderer.done)
        else:
            await context.reply_when_done(self.whole(context.engine))

    async def events(self, engine: Engine) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; events of one step of the engine come as one item."""
        async with aclosing(self.generation.run(engine)) as outputs:
            async for prompt_index, output in outputs:
                self.usage.add(prompt_index, output)
                if events := self._events(prompt_index, output):
                    yield b"".join(events)
        if last := self.renderer.ending(self._choices.values(), self.usage):
            yield b"".join(last)

    async def whole(self, engine: Engine) -> object:
        """The reply once all choices have finished: the sum of the same deltas."""
        async with aclosing(self.generation.run(engine)) as outputs:
            async for prompt_index, output in outputs:
                self.usage.add(prompt_index, output)
                for delta in output.outputs:
                    index = self._index(prompt_index, delta)
                    choice = self._choices.get(index) or self._open(index, prompt_index, output)
                    choice.sample.extend(delta)
        return self.renderer.whole([self._choices[index] for index in sorted(self._choices)], self.usage)

    def _events(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        events: list[bytes] = []
        for delta in output.outputs:
            index = self._index(prompt_index, delta)
            choice = self._choices.get(index)
            if choice is None:
                choice = self._open(index, prompt_index, output)
                events += self.renderer.opening(choice, self.usage)
            if delta.text or delta.finished or delta.logprobs or self.every_token:
                events.append(self.renderer.delta(choice, delta, self.usage))
                choice.num_events += 1
            if self.renderer.keeps_samples:
                choice.sample.extend(delta)
        return events

    def _index(self, prompt_index: int, delta: CompletionOutput) -> int:
        return prompt_index * self.generation.params.n + delta.index

    def _open(self, index: int, prompt_index: int, output: RequestOutput) -> Choice:
        prompt = self._prompts.setdefault(prompt_index, output)
        choice = Choice(index, prompt_index, prompt, not self._choices, CompletionOutput(index))
        self._choices[index] = choice
        return choice
