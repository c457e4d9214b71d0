"""Answer: one generation, sent whole or as server-sent events, in the words of one endpoint.

`Answer` runs the generation and keeps its choices; it knows no endpoint. A `Renderer` writes the choices
in an endpoint's words: `chat.py` and `completions.py` hold one each. A further endpoint that generates is one
file: renderer and handler.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from quire import __version__
from quire.engine.request_streams import Tap
from quire.errors import EngineUnavailableError, RequestError
from quire.outputs import CompletionOutput, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.adapters import find_adapter
from quire.server.backend import Engine
from quire.server.endpoint import RequestContext
from quire.server.errors import ErrorDetail, error_body
from quire.server.generation import Generation, UsageCounter, sample_error
from quire.server.handover import MOVED, STREAM_HEADER, PromptBlocks, block_hashes, mark
from quire.server.protocol import StreamOptions
from quire.server.replies import Usage
from quire.server.streaming import DONE, EVENT_STREAM, DirectWriter, StreamForm
from quire.server.tools.events import Event, Message, PlainReader, Reader, TextDelta, ToolCallBegin

_encode = msgspec.json.Encoder().encode


def sse(body: object, event: str = "") -> bytes:
    """One server-sent event with `body` as JSON; `event` is its type, for protocols that name their events."""
    name = b"event: " + event.encode() + b"\n" if event else b""
    return name + b"data: " + _encode(body) + b"\n\n"


def choice_error(sample: CompletionOutput) -> ErrorDetail | UnsetType:
    """The `error` field of a choice: absent unless the sample failed."""
    return error_body(sample_error(sample)).error if sample.finish_reason == "error" else UNSET


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
    reader: Reader
    """Finds reasoning and tool calls in the deltas."""
    num_events: int = 0
    """Events sent for its deltas so far."""
    events: Sequence[Event] = ()
    """Text, reasoning and tool calls of the present delta."""
    message: Message = field(default_factory=Message)
    """The sum of `events`; kept where `sample` is."""
    calls_tools: bool = False
    """A tool call has begun."""

    def read(self, delta: CompletionOutput) -> None:
        """Set `events` to those of `delta`."""
        self.events = self.reader.read(delta.text, delta.token_ids, finished=delta.finished)
        for event in self.events:
            if type(event) is ToolCallBegin:
                self.calls_tools = True

    def keep(self, delta: CompletionOutput) -> None:
        """Add `delta` and its events to `sample` and `message`."""
        self.sample.extend(delta)
        for event in self.events:
            self.message.add(event)

    def only_text(self, delta: CompletionOutput) -> str | None:
        """The text of `delta` if it adds nothing else, as nearly every delta does; else None."""
        if delta.finish_reason is not None or len(self.events) != 1:
            return None
        (event,) = self.events
        return event.text if type(event) is TextDelta else None

    def finish_reason(self, delta: CompletionOutput) -> str | None:
        """The finish reason in `delta`; "tool_calls" for a reply that stopped by itself and calls a tool."""
        return "tool_calls" if self.calls_tools and delta.finish_reason == "stop" else delta.finish_reason


class Renderer(Protocol):
    """Writes an answer as one endpoint does. Subclass it: the attributes below have OpenAI's defaults."""

    keeps_samples: ClassVar[bool] = False
    """`ending` reads `Choice.sample` or `Choice.message`."""
    done: ClassVar[bytes] = DONE
    """Ends every stream, after errors too."""
    ping: ClassVar[bytes] = b""
    """An event that says nothing, for times of silence; empty: none."""
    content_type: ClassVar[bytes] = EVENT_STREAM

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        """Events sent once per choice, before its first delta."""
        ...

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        """The events for text, tokens or a finish reason that the engine added to `choice`; see `choice.events`."""
        ...

    def text_events(self, choice: Choice, usage: UsageCounter) -> "Callable[[str], bytes] | None":
        """What writes the event for a text and nothing else, once `delta` has written one; None if events hold more."""
        return None

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
    reader: Callable[[], Reader] = PlainReader
    """Makes the reader of each choice."""
    _num_finished: int = field(default=0, init=False)
    """Choices that have ended."""
    _choices: dict[int, Choice] = field(default_factory=dict, init=False)
    _prompts: dict[int, RequestOutput] = field(default_factory=dict, init=False)
    _text_events: dict[int, Callable[[str], bytes]] = field(default_factory=dict, init=False)
    """By choice, where `Renderer.text_events` has one."""

    async def send(self, context: RequestContext, *, stream: bool) -> None:
        """Answer the request of `context` within its time. The generation is cancelled if the client leaves."""
        self.generation = replace(self.generation, timeout=context.timeout())
        context.scope["state"]["usage"] = self.usage
        if context.is_prefilled:
            self.generation = self.generation.prefilled()
        if context.computes_prompt:
            await context.reply_when_done(self.computed_prompt(context.engine))
        elif context.asks_for_prompt:
            await context.reply(await self.prompt_blocks(context.engine))
        elif stream:
            await context.stream(self.stream_events(context), self.stream_form(marked=context.handover is not None))
        else:
            await context.reply_when_done(self.whole(context.engine))

    async def computed_prompt(self, engine: Engine) -> PromptBlocks:
        """The blocks of the prompt, once the engine has computed them; the one token that it samples is dropped."""
        described = await self.prompt_blocks(engine)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        async with aclosing(replace(self.generation, params=params, progress={}).run(engine)) as outputs:
            async for _ in outputs:
                pass
        return described

    async def prompt_blocks(self, engine: Engine) -> PromptBlocks:
        """The blocks that the answer's prompt fills."""
        prompts, scheduling = self.generation.prompts, self.generation.scheduling
        adapter = await find_adapter(engine, scheduling.adapter)
        digest = adapter.digest if adapter is not None else ""
        hashes = block_hashes(prompts[0], engine.block_size, scheduling.cache_salt, digest)
        num_tokens = sum(map(len, prompts))
        return PromptBlocks(
            engine.model_names[0], engine.block_size, num_tokens, hashes, self.generation.content(digest), __version__
        )

    def stream_form(self, *, marked: bool) -> StreamForm:
        """How the answer's stream is written; `marked` for a router that knows marks."""
        renderer = self.renderer
        if not marked:
            return StreamForm(renderer.failure, renderer.done, renderer.ping, renderer.content_type)

        def failure(error: RequestError) -> bytes:
            return MOVED if isinstance(error, EngineUnavailableError) else renderer.failure(error)

        ping = renderer.ping + mark(()) if renderer.ping else b""
        return StreamForm(failure, renderer.done, ping, renderer.content_type, ((STREAM_HEADER, b"marked"),))

    def stream_events(self, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """The events for the client of `context`, or for the router, which wants them marked and goes on where another
        server stopped."""
        if context.handover is None:
            return self.events(context.engine, direct=context.direct)
        self.generation = replace(self.generation, progress=context.handover.progress)
        return self.events(context.engine, marked=True, direct=context.direct)

    async def events(
        self, engine: Engine, *, marked: bool = False, direct: DirectWriter | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; events of one step of the engine come as one item. With `marked` a mark
        follows each item but the last: the last steps of an answer count only with its end. Items that `direct` can
        write at once are not yielded."""
        replayed = {choice // self.generation.params.n for choice in self.generation.progress}
        tap = None if direct is None else self._tap(direct, marked)
        async with aclosing(self.generation.run(engine, tap)) as outputs:
            async for prompt_index, output in outputs:
                item = self._item(prompt_index, output, marked)
                if prompt_index in replayed:  # the first output of the prompt, which the client has
                    replayed.remove(prompt_index)
                elif item:
                    yield item
        self._count_reasoning()
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
                    choice.read(delta)
                    choice.keep(delta)
        self._count_reasoning()
        choices = [self._choices[index] for index in sorted(self._choices)]
        if all(choice.sample.finish_reason == "error" for choice in choices):
            raise sample_error(choices[0].sample)
        return self.renderer.whole(choices, self.usage)

    def _tap(self, direct: DirectWriter, marked: bool) -> Tap:
        """Writes the events of tokens that add nothing but text. It runs for every token, so it calls little."""
        usage, text_events, write = self.usage, self._text_events, direct.write

        def add(index: int, text: str, token_id: int, now: float) -> None:
            usage.completion_tokens += usage.counts_output
            write_text = text_events.get(index)
            if write_text is None:
                write(self._token_events(index, text, token_id, marked))
            elif text:
                write(write_text(text))

        return Tap(direct.ready, add)

    def _token_events(self, index: int, text: str, token_id: int, marked: bool) -> bytes:
        """The events of one token; keeps what writes the next ones, where texts are all that differs."""
        delta = CompletionOutput(index, text, [token_id])
        events = self._delta_events(0, self._prompts[0], delta)
        if marked:
            events.append(mark([(index, delta)]))
        elif (write_text := self._quick_text(self._choices[index])) is not None:
            self._text_events[index] = write_text
        return b"".join(events)

    def _quick_text(self, choice: Choice) -> Callable[[str], bytes] | None:
        if not choice.num_events or self.every_token or type(choice.reader) is not PlainReader:
            return None
        return self.renderer.text_events(choice, self.usage)

    def _item(self, prompt_index: int, output: RequestOutput, marked: bool) -> bytes:
        """The events of one output."""
        self.usage.add(prompt_index, output)
        events = self._events(prompt_index, output)
        if marked and self._num_finished < self.generation.num_choices:
            events.append(mark([(self._index(prompt_index, delta), delta) for delta in output.outputs]))
        return b"".join(events)

    def _events(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        if len(output.outputs) == 1:
            return self._delta_events(prompt_index, output, output.outputs[0])
        return [event for delta in output.outputs for event in self._delta_events(prompt_index, output, delta)]

    def _delta_events(self, prompt_index: int, output: RequestOutput, delta: CompletionOutput) -> list[bytes]:
        """The events of one choice of `output`, which may be any output of the prompt."""
        events: list[bytes] = []
        index = self._index(prompt_index, delta)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._open(index, prompt_index, output)
            events += self.renderer.opening(choice, self.usage)
        choice.read(delta)
        self._num_finished += delta.finished
        if choice.events or delta.finished or delta.logprobs or self.every_token:
            events.append(self.renderer.delta(choice, delta, self.usage))
            choice.num_events += 1
        if self.renderer.keeps_samples:
            choice.keep(delta)
        return events

    def _count_reasoning(self) -> None:
        self.usage.reasoning_tokens = sum(choice.reader.num_reasoning_tokens for choice in self._choices.values())

    def _index(self, prompt_index: int, delta: CompletionOutput) -> int:
        return prompt_index * self.generation.params.n + delta.index

    def _open(self, index: int, prompt_index: int, output: RequestOutput) -> Choice:
        prompt = self._prompts.setdefault(prompt_index, output)
        choice = Choice(index, prompt_index, prompt, not self._choices, CompletionOutput(index), self.reader())
        self._choices[index] = choice
        return choice
