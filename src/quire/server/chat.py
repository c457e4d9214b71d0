"""/v1/chat/completions: messages in, the assistant's next message out, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from quire.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from quire.server.exchange import Endpoint, Exchange
from quire.server.generation import Job, Tally
from quire.server.limits import check_lengths, check_work
from quire.server.logprobs import LogprobForms, prompt_logprobs
from quire.server.params import chat_params, check_available
from quire.server.prompts import render, tokenize
from quire.server.protocol import ChatCompletionRequest, StreamOptions
from quire.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
)
from quire.server.sender import sender_of

_encode = msgspec.json.Encoder().encode


async def create_chat_completion(exchange: Exchange) -> None:
    request = await exchange.read(ChatCompletionRequest)
    exchange.check_ready()
    model = exchange.check_model(request.model)
    check_available(request)
    engine, tokenizer = exchange.engine, exchange.tokenizer()
    params = chat_params(request, engine.default_params)
    text = await render(engine.chat_template, request)
    check_work([text], params.num_samples, exchange.settings)
    prompts = await tokenize(tokenizer, [text], add_special_tokens=request.add_special_tokens or False)
    check_lengths(prompts, params, engine.max_model_len)
    job = Job(prompts, params, sender_of(request, exchange.client))
    answer = _Answer(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        request=request,
        forms=LogprobForms(tokenizer, request.return_tokens_as_token_ids or False, request.top_logprobs or 0),
        echo=_echo(request),
    )
    if request.stream:
        await exchange.stream(answer.events(exchange, job))
    else:
        await exchange.reply_when_done(answer.whole(exchange, job))


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer in the making: what stays the same over its choices and events."""

    id: str
    created: int
    model: str
    request: ChatCompletionRequest
    forms: LogprobForms
    echo: str
    """Comes before the text of every choice."""

    async def whole(self, exchange: Exchange, job: Job) -> ChatCompletion:
        """The reply, once all samples have ended."""
        (output,) = await job.whole(exchange.engine)
        tally = Tally()
        tally.add(0, output)
        reply = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(sample) for sample in output.outputs],
            usage=tally.usage(),
        )
        if self.request.return_token_ids:
            reply.prompt_token_ids = output.prompt_token_ids
        if output.prompt_logprobs is not None:
            reply.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return reply

    async def events(self, exchange: Exchange, job: Job) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events: of each choice a role first, then text as it comes."""
        options = self.request.stream_options or StreamOptions()
        tally = Tally()
        opened: set[int] = set()
        async with aclosing(job.run(exchange.engine)) as outputs:
            async for _, output in outputs:
                tally.add(0, output)
                chunks = []
                for delta in output.outputs:
                    if delta.index not in opened:
                        chunks.append(self._opening(delta.index, None if opened else output))
                        opened.add(delta.index)
                    if self._tells(delta):
                        chunks.append(self._chunk([self._chunk_choice(delta)]))
                for chunk in chunks:
                    if options.include_usage:
                        chunk.usage = tally.usage() if options.continuous_usage_stats else None
                if chunks:
                    yield b"".join(b"data: " + _encode(chunk) + b"\n\n" for chunk in chunks)
        if options.include_usage:
            last = self._chunk([])
            last.usage = tally.usage()
            yield b"data: " + _encode(last) + b"\n\n"

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=sample.index,
            message=AssistantMessage(content=self.echo + sample.text),
            logprobs=self._logprobs(sample.token_ids, sample.logprobs),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            token_ids=self._token_ids(sample),
        )

    def _opening(self, index: int, output: RequestOutput | None) -> ChatChunk:
        """The first event of a choice; the stream's very first also tells of the prompt (`output`)."""
        chunk = self._chunk([ChatChunkChoice(index, Delta(role="assistant", content=self.echo))])
        if output is not None and self.request.return_token_ids:
            chunk.prompt_token_ids = output.prompt_token_ids
        if output is not None and output.prompt_logprobs is not None:
            chunk.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return chunk

    def _chunk_choice(self, delta: CompletionOutput) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=delta.index,
            delta=Delta(content=delta.text) if delta.text or not delta.finished else Delta(),
            logprobs=self._logprobs(delta.token_ids, delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finished else UNSET,
            token_ids=self._token_ids(delta),
        )

    def _tells(self, delta: CompletionOutput) -> bool:
        """Whether a delta is worth an event; a token may hold only part of a character."""
        return bool(delta.text or delta.finished or delta.logprobs or self.request.return_token_ids)

    def _token_ids(self, delta: CompletionOutput) -> list[int] | UnsetType:
        return delta.token_ids if self.request.return_token_ids else UNSET

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)

    def _logprobs(self, token_ids: list[int], positions: list[PositionLogprobs] | None) -> ChatLogprobs | None:
        if not self.request.logprobs or positions is None:
            return None
        return self.forms.for_chat(token_ids, positions)


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
