"""/v1/chat/completions: from messages to the assistant's next message, whole or as a stream."""

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from quire.outputs import CompletionOutput
from quire.server.answers import Answer, Choice, Renderer, event_usage, sse
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.generation import Generation, UsageCounter
from quire.server.limits import check_lengths, check_work
from quire.server.logprobs import LogprobFormat, prompt_logprobs
from quire.server.params import chat_params, check_available
from quire.server.prompts import longest_prompt, render, tokenize
from quire.server.protocol import ChatCompletionRequest, StreamOptions
from quire.server.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
)
from quire.server.scheduling_info import scheduling_info


async def create_chat_completion(context: RequestContext) -> None:
    request = await context.read(ChatCompletionRequest)
    context.check_ready()
    model = context.check_model(request.model)
    check_available(request)
    engine, tokenizer = context.engine, context.tokenizer()
    params = chat_params(request, engine.default_params)
    text = await render(engine.chat_template, request)
    check_work([text], params.num_samples, context.settings)
    prompts = await tokenize(
        tokenizer,
        [text],
        add_special_tokens=request.add_special_tokens or False,
        max_tokens=longest_prompt(params, engine.max_model_len),
    )
    check_lengths(prompts, params, engine.max_model_len)
    renderer = ChatRenderer(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        request=request,
        options=request.stream_options or StreamOptions(),
        logprobs=LogprobFormat(tokenizer, request.return_tokens_as_token_ids or False, request.top_logprobs or 0),
        echo=_echo(request),
    )
    generation = Generation(prompts, params, scheduling_info(request, context.client))
    answer = Answer(generation, renderer, every_token=bool(request.return_token_ids))
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

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        chunk = self._chunk([ChatChunkChoice(choice.index, Delta(role="assistant", content=self.echo))], usage)
        if choice.is_first:
            self._add_prompt(chunk, choice)
        return (sse(chunk),)

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        chunk_choice = ChatChunkChoice(
            index=choice.index,
            delta=Delta(content=delta.text) if delta.text or not delta.finished else Delta(),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finished else UNSET,
            token_ids=self._token_ids(delta),
        )
        return sse(self._chunk([chunk_choice], usage))

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
            message=AssistantMessage(content=self.echo + sample.text),
            logprobs=self._logprobs(sample),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            token_ids=self._token_ids(sample),
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
    ),
)
