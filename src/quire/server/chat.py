"""/v1/chat/completions: from messages to the assistant's next message, whole or as a stream."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from quire.outputs import CompletionOutput
from quire.server.answers import Answer, Choice, Renderer, choice_error, event_usage, sse
from quire.server.chat_turn import chat_turn
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.event_frame import GAP, EventFrame
from quire.server.generation import UsageCounter
from quire.server.logprobs import LogprobFormat, prompt_logprobs
from quire.server.protocol import ChatCompletionRequest, StreamOptions
from quire.server.replies import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    ToolCallDelta,
    ToolCallReply,
)
from quire.server.tools.events import ArgumentsDelta, Event, Message, ReasoningDelta, TextDelta, ToolCallBegin


async def create_chat_completion(context: RequestContext) -> None:
    request = await context.read(ChatCompletionRequest)
    context.check_generates()
    model = context.check_model(request.model)
    turn = await chat_turn(context, request)
    renderer = ChatRenderer(
        id=context.answer_id("chatcmpl-"),
        created=context.created(),
        model=model,
        request=request,
        options=request.stream_options or StreamOptions(),
        logprobs=LogprobFormat(
            context.tokenizer(), request.return_tokens_as_token_ids or False, request.top_logprobs or 0
        ),
        echo=_echo(request),
    )
    answer = Answer(turn.generation, renderer, every_token=bool(request.return_token_ids), reader=turn.reader)
    await answer.send(context, stream=bool(request.stream))


@dataclass(frozen=True, slots=True)
class ChatRenderer(Renderer):
    """OpenAI's chat objects. Each choice of a stream opens with an event that holds its role."""

    id: str
    created: int
    model: str
    request: ChatCompletionRequest
    options: StreamOptions
    logprobs: LogprobFormat
    echo: str
    """Text in front of every choice."""
    _frames: dict[int, EventFrame] = field(default_factory=dict, init=False)
    """By choice: an event that adds a text and nothing else."""

    @property
    def _only_texts_vary(self) -> bool:
        request = self.request
        return not (request.logprobs or request.return_token_ids or self.options.continuous_usage_stats)

    def _frame(self, choice: Choice, usage: UsageCounter) -> EventFrame:
        frame = self._frames.get(choice.index)
        if frame is None:
            chunk = self._chunk([ChatChunkChoice(choice.index, Delta(content=GAP))], usage)
            frame = self._frames[choice.index] = EventFrame(sse(chunk))
        return frame

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        chunk = self._chunk([ChatChunkChoice(choice.index, Delta(role="assistant", content=self.echo))], usage)
        if choice.is_first:
            self._add_prompt(chunk, choice)
        return (sse(chunk),)

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        if self._only_texts_vary and (text := choice.only_text(delta)) is not None:
            return self._frame(choice, usage).fill(text)
        parts = _deltas(choice.events)
        if not parts:
            parts = [Delta() if delta.finished else Delta(content="")]
        *earlier, last = parts
        chunk_choice = ChatChunkChoice(
            index=choice.index,
            delta=last,
            logprobs=self._logprobs(delta),
            finish_reason=choice.finish_reason(delta),
            stop_reason=delta.stop_reason if delta.finished else UNSET,
            token_ids=self._token_ids(delta),
            error=choice_error(delta),
        )
        chunks = [*(ChatChunkChoice(choice.index, part) for part in earlier), chunk_choice]
        return b"".join(sse(self._chunk([chunk], usage)) for chunk in chunks)

    def text_events(self, choice: Choice, usage: UsageCounter) -> Callable[[str], bytes] | None:
        return self._frame(choice, usage).fill_one if self._only_texts_vary else None

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        if not self.options.include_usage:
            return ()
        chunk = self._chunk([], usage)
        chunk.usage = usage.usage()
        return (sse(chunk),)

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> ChatCompletion:
        reply = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(choice) for choice in choices],
            usage=usage.usage(),
        )
        self._add_prompt(reply, choices[0])
        return reply

    def _choice(self, choice: Choice) -> ChatChoice:
        sample = choice.sample
        return ChatChoice(
            index=choice.index,
            message=_message(choice.message, self.echo),
            logprobs=self._logprobs(sample),
            finish_reason=choice.finish_reason(sample),
            stop_reason=sample.stop_reason,
            token_ids=self._token_ids(sample),
            error=choice_error(sample),
        )

    def _add_prompt(self, reply: ChatChunk | ChatCompletion, choice: Choice) -> None:
        if self.request.return_token_ids:
            reply.prompt_token_ids = choice.prompt.prompt_token_ids
        if choice.prompt.prompt_logprobs is not None:
            reply.prompt_logprobs = prompt_logprobs(choice.prompt.prompt_logprobs)

    def _token_ids(self, delta: CompletionOutput) -> list[int] | UnsetType:
        return delta.token_ids if self.request.return_token_ids else UNSET

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageCounter) -> ChatChunk:
        chunk = ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)
        chunk.usage = event_usage(self.options, usage)
        return chunk

    def _logprobs(self, delta: CompletionOutput) -> ChatLogprobs | None:
        if not self.request.logprobs or delta.logprobs is None:
            return None
        return self.logprobs.for_chat(delta.token_ids, delta.logprobs)


def _deltas(events: Sequence[Event]) -> list[Delta]:
    """The events of one step as OpenAI's deltas."""
    deltas: list[Delta] = []
    for event in events:
        match event:
            case TextDelta(text):
                deltas.append(Delta(content=text))
            case ReasoningDelta(text):
                deltas.append(Delta(reasoning=text, reasoning_content=text))
            case ToolCallBegin(index, call_id, name):
                function = CalledFunction("", name)
                deltas.append(Delta(tool_calls=[ToolCallDelta(index, function, call_id, "function")]))
            case ArgumentsDelta(index, text):
                deltas.append(Delta(tool_calls=[ToolCallDelta(index, CalledFunction(text))]))
    return deltas


def _message(message: Message, echo: str) -> AssistantMessage:
    text = echo + message.text
    reply = AssistantMessage(content=None if message.tool_calls and not text else text)
    if message.reasoning:
        reply.reasoning = reply.reasoning_content = message.reasoning
    if message.tool_calls:
        reply.tool_calls = [
            ToolCallReply(call.id, CalledFunction(call.arguments, call.name)) for call in message.tool_calls
        ]
    return reply


def _echo(request: ChatCompletionRequest) -> str:
    last = request.messages[-1].content
    return last if request.echo and request.continue_final_message and isinstance(last, str) else ""


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        create_chat_completion,
        "The assistant's next message",
        ChatCompletionRequest,
        ChatCompletion,
        streams=True,
        queues=True,
    ),
)
