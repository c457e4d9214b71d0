"""/api/chat, /api/generate and /api/embed: Ollama's chat, completions and embeddings."""

import re
import time
from typing import Any

from quire.engine.model_task import check_embeds
from quire.errors import RequestError
from quire.server.answers import Answer
from quire.server.chat_turn import ChatTurn, fitting_turn
from quire.server.completions import completion_generation
from quire.server.embeddings import embed_all, input_tokens, with_prompt
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import naming
from quire.server.logprobs import LogprobFormat
from quire.server.ollama.conversion import SENT_NAMES, asks_for_nothing, to_chat, to_completion
from quire.server.ollama.models import checked_model
from quire.server.ollama.protocol import (
    ChatLine,
    ChatRequest,
    EmbedReply,
    EmbedRequest,
    GenerateLine,
    GenerateRequest,
    GenerationFields,
    OldEmbedReply,
)
from quire.server.ollama.renderer import ERRORS, NDJSON, LineRenderer
from quire.server.params import check_absent
from quire.server.scheduling_info import checked_priority
from quire.server.tools.events import PlainReader

_DURATION = re.compile(r"|-?\d+(\.\d*)?|-?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")
"""Nothing, plain seconds, or a duration as Go writes it, the language of Ollama."""


async def chat(context: RequestContext) -> None:
    await _generate(context, await context.read(ChatRequest))


async def generate(context: RequestContext) -> None:
    request = await context.read(GenerateRequest)
    check_absent(request, ("template", "context", *(("images",) if request.raw or request.suffix else ())))
    await _generate(context, request)


async def embed(context: RequestContext) -> None:
    request = await context.read(EmbedRequest)
    if request.input is None:
        raise RequestError("input is missing; give a text or a list of texts", param="input")
    texts = [request.input] if isinstance(request.input, str) else request.input
    started = time.monotonic_ns()
    vectors, num_tokens = await _embed(context, request, texts)
    total = time.monotonic_ns() - started
    await context.reply(EmbedReply(request.model, vectors, total, 0, num_tokens))


async def embed_one(context: RequestContext) -> None:
    request = await context.read(EmbedRequest)
    if request.prompt is None:
        raise RequestError("prompt is missing; give a text", param="prompt")
    vectors, _ = await _embed(context, request, [request.prompt])
    await context.reply(OldEmbedReply(vectors[0]))


async def _generate(context: RequestContext, request: GenerationFields) -> None:
    context.check_generates()
    _check_keep_alive(request.keep_alive)
    request.model, name = checked_model(context, request.model), request.model
    with_logprobs = bool(request.logprobs or request.top_logprobs)
    form = LogprobFormat(context.tokenizer(), as_token_ids=False, num_top=request.top_logprobs or 0)
    renderer = LineRenderer(name, isinstance(request, ChatRequest), form if with_logprobs else None)
    if asks_for_nothing(request):
        await context.reply(renderer.loaded("unload" if request.keep_alive in (0, "0", "0s") else "load"))
        return
    with naming(SENT_NAMES):
        turn = (await _turn(context, request)).named(SENT_NAMES)
    await Answer(turn.generation, renderer, reader=turn.reader).send(context, stream=request.stream is not False)


def _check_keep_alive(value: float | str | None) -> None:
    """Raise `RequestError` for a text that is no duration."""
    if isinstance(value, str) and not _DURATION.fullmatch(value):
        raise RequestError(
            f"keep_alive is {value[:50]!r}; it is seconds as a number, or a duration such as 5m or 1h30m",
            param="keep_alive",
        )


async def _turn(context: RequestContext, request: GenerationFields) -> ChatTurn:
    if isinstance(request, GenerateRequest) and (request.raw or request.suffix):
        completion = to_completion(request)
        prompts = [request.prompt or ""]
        generation = await completion_generation(context, completion, prompts, clips_output=True)
        return ChatTurn(generation, PlainReader)
    return await fitting_turn(context, to_chat(request), truncates=request.truncate is not False, clips_output=True)


async def _embed(context: RequestContext, request: EmbedRequest, texts: list[str]) -> tuple[list[list[float]], int]:
    """The vectors of the inputs, and the number of input tokens."""
    context = context.for_vectors()
    context.check_ready()
    checked_model(context, request.model)
    check_embeds(context.engine.model_config)
    with naming({"prompt": "input"}):
        inputs, truncates = with_prompt(context, texts, None), request.truncate is not False
        prompts = await input_tokens(context, inputs, special=True, truncates=truncates)
    options: dict[str, Any] = {
        "normalize": True,
        "truncate_prompt_tokens": None if request.truncate is False else -1,
        "priority": checked_priority(context, None),
        "cache_salt": context.client.salt,
        "tenant": context.client.account,
    }
    outputs = await embed_all(context, prompts, request.dimensions, options)
    return [o.outputs.embedding for o in outputs], sum(len(o.prompt_token_ids) for o in outputs)


ENDPOINTS = (
    Endpoint(
        "POST",
        "/api/chat",
        chat,
        "Ollama's chat",
        ChatRequest,
        ChatLine,
        streams=True,
        queues=True,
        stream_type=NDJSON,
        errors=ERRORS,
    ),
    Endpoint(
        "POST",
        "/api/generate",
        generate,
        "Ollama's completions",
        GenerateRequest,
        GenerateLine,
        streams=True,
        queues=True,
        stream_type=NDJSON,
        errors=ERRORS,
    ),
    Endpoint("POST", "/api/embed", embed, "Ollama's embeddings", EmbedRequest, EmbedReply, errors=ERRORS),
    Endpoint("POST", "/api/embeddings", embed_one, "Their old form", EmbedRequest, OldEmbedReply, errors=ERRORS),
)
