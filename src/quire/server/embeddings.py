"""/v1/embeddings: vectors of texts or tokens. `embed_all` is also behind Ollama's endpoint, scores and classes."""

import asyncio
import base64
from array import array
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Literal, cast

from msgspec import Struct

from quire.embeddings import EmbeddingRequestOutput, shortened
from quire.engine.input_processor import Prompt
from quire.engine.model_task import check_dimensions_of, check_embeds
from quire.errors import RequestError
from quire.server.adapters import find_adapter
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import naming
from quire.server.generation import UsageCounter
from quire.server.limits import check_work
from quire.server.prompts import split_prompts, tokenize
from quire.server.protocol import Priority, Salt
from quire.server.scheduling_info import checked_priority

MAX_INPUTS = 2048
_AT_ONCE = 256
"""Most inputs of one request in the engine's queue at a time; the queue has a limit."""


class EmbeddingsRequest(Struct, kw_only=True):
    """Body of /v1/embeddings."""

    input: str | list[str | int | list[int]]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian float32."""
    dimensions: int | None = None
    """Keep the first numbers only, and scale them to length 1 again."""
    normalize: bool | None = None
    """Scale to length 1; by default so, unless the model's modules leave it out."""
    prompt_name: str | None = None
    """A prompt of the model's folder to put before every text, such as query."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens of each input, of a model that generates the last ones; −1: what the context
    holds."""
    add_special_tokens: bool | None = None
    user: Salt | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None


class Embedding(Struct):
    """One vector."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(Struct):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    """Reply of /v1/embeddings."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


async def create_embeddings(context: RequestContext) -> None:
    context = context.for_vectors()
    request = await context.read(EmbeddingsRequest)
    context.check_ready()
    model = context.check_model(request.model)
    check_embeds(context.engine.model_config)
    check_dimensions_of(context.engine.model_config, request.dimensions)
    with naming({"prompt": "input"}):
        inputs = split_prompts(request.input)
        check_texts(inputs, request.input)
        prompts = with_prompt(context, inputs, request.prompt_name)
        special, truncates = request.add_special_tokens is not False, request.truncate_prompt_tokens is not None
        token_ids = await input_tokens(context, prompts, special=special, truncates=truncates)
        options: dict[str, Any] = {
            "normalize": request.normalize,
            "truncate_prompt_tokens": request.truncate_prompt_tokens,
            "priority": checked_priority(context, request.priority),
            "cache_salt": context.client.salt + (request.cache_salt or ""),
            "tenant": context.client.account or request.user or "",
        }
        work = embed_all(context, token_ids, request.dimensions, options)
        await context.reply_when_done(_reply(work, model, as_text=request.encoding_format == "base64"))


def check_texts(inputs: Sequence[str | list[int]], given: object) -> None:
    """Raise `RequestError` for an empty text."""
    for index, text in enumerate(inputs):
        if text == "":
            name = "input" if isinstance(given, str) else f"input[{index}]"
            raise RequestError(f"{name} is an empty text; give at least one character, or leave it out", param="input")


def with_prompt(
    context: RequestContext, inputs: Sequence[str | list[int]], name: str | None
) -> Sequence[str | list[int]]:
    """The inputs with the model's prompt of this name, or its default one, before every text. Raises `RequestError`
    for a name that the model does not have."""
    prompts = context.engine.text_prompts
    return [prompts.apply([one], name)[0] if isinstance(one, str) else one for one in inputs]


async def input_tokens(
    context: RequestContext, prompts: Sequence[str | list[int]], *, special: bool, truncates: bool
) -> list[list[int]]:
    """Token ids of the inputs, which `truncates` will cut. Raises `RequestError` for too many inputs or characters."""
    check_count(len(prompts), "input")
    check_work(prompts, 1, context.settings, param="input")
    needs_text = any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = context.tokenizer() if needs_text else context.tokenizer_if_any()
    longest = None if truncates else context.engine.max_model_len
    return await tokenize(tokenizer, prompts, add_special_tokens=special, max_tokens=longest)


def check_count(count: int, param: str) -> None:
    """Raise `RequestError` for more inputs than one request may have."""
    if count > MAX_INPUTS:
        raise RequestError(f"{param} holds {count} inputs; at most {MAX_INPUTS} are allowed", param=param)


async def embed_all(
    context: RequestContext, prompts: Sequence[Prompt], dimensions: int | None, options: dict[str, Any]
) -> list[EmbeddingRequestOutput]:
    """Embed the prompts, many at a time; the first error ends all. `options` are those of `Engine.embed`. Raises the
    refusals of API key and engine."""
    pooling = context.engine.model_config.pooling
    num_waiting, num_tokens = min(len(prompts), _AT_ONCE), _num_kept(context, prompts, options)
    options["adapter"] = await find_adapter(context.engine, context.adapter_name)
    with context.key_use.admit(num_waiting, num_tokens, context.engine.max_queue_size):
        outputs = await _embed_admitted(context, prompts, options)
    lengths = {index: len(output.prompt_token_ids) for index, output in enumerate(outputs)}
    context.scope["state"]["usage"] = UsageCounter(prompt_tokens=lengths)
    if dimensions is not None:
        allowed = () if pooling is None else pooling.matryoshka_dimensions
        for output in outputs:
            output.outputs.embedding = shortened(output.outputs.embedding, dimensions, allowed)
    return outputs


def _num_kept(context: RequestContext, prompts: Sequence[Prompt], options: dict[str, Any]) -> int:
    """Tokens of the prompts after truncation."""
    given, longest = options["truncate_prompt_tokens"], context.engine.max_model_len
    most = longest if given is None or given < 0 else min(given, longest)
    lists = [prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else prompt for prompt in prompts]
    return sum(min(len(cast(Sequence[int], token_ids)), most) for token_ids in lists)


async def _embed_admitted(
    context: RequestContext, prompts: Sequence[Prompt], options: dict[str, Any]
) -> list[EmbeddingRequestOutput]:
    free = asyncio.Semaphore(_AT_ONCE)

    async def embed(prompt: Prompt) -> EmbeddingRequestOutput:
        async with free:
            return await context.engine.embed(prompt, **options)

    tasks = [asyncio.create_task(embed(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _reply(work: Coroutine[Any, Any, list[EmbeddingRequestOutput]], model: str, *, as_text: bool) -> Embeddings:
    outputs = await work
    vectors = [output.outputs.embedding for output in outputs]
    data = [Embedding(index, _encoded(vector) if as_text else vector) for index, vector in enumerate(vectors)]
    return Embeddings(data, model, usage_of(outputs))


def usage_of(outputs: Sequence[EmbeddingRequestOutput]) -> EmbeddingsUsage:
    """The tokens of the prompts."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return EmbeddingsUsage(num_tokens, num_tokens)


def _encoded(vector: list[float]) -> str:
    return base64.b64encode(array("f", vector).tobytes()).decode()


ENDPOINTS = (Endpoint("POST", "/v1/embeddings", create_embeddings, "Vectors of texts", EmbeddingsRequest, Embeddings),)
