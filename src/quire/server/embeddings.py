"""/v1/embeddings: vectors of texts or tokens. `embed_all` is also behind Ollama's endpoint."""

import asyncio
import base64
import math
from array import array
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from msgspec import Struct

from quire.embeddings import EmbeddingRequestOutput
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
_AT_ONCE = 64
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
    """Scale to length 1 (the default)."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many last tokens of each input; −1: what the context holds."""
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
    request = await context.read(EmbeddingsRequest)
    context.check_ready()
    model = context.check_model(request.model)
    with naming({"prompt": "input"}):
        prompts = split_prompts(request.input)
        token_ids = await input_tokens(context, prompts, special=request.add_special_tokens is not False)
        options: dict[str, Any] = {
            "normalize": request.normalize is not False,
            "truncate_prompt_tokens": request.truncate_prompt_tokens,
            "priority": checked_priority(context, request.priority),
            "cache_salt": context.client.salt + (request.cache_salt or ""),
            "tenant": context.client.account or request.user or "",
        }
        work = embed_all(context, token_ids, request.dimensions, options)
        await context.reply_when_done(_reply(work, model, as_text=request.encoding_format == "base64"))


async def input_tokens(
    context: RequestContext, prompts: Sequence[str | list[int]], *, special: bool
) -> list[list[int]]:
    """Token ids of the inputs. Raises `RequestError` for too many inputs or characters."""
    if len(prompts) > MAX_INPUTS:
        raise RequestError(f"input holds {len(prompts)} inputs; at most {MAX_INPUTS} are allowed", param="input")
    check_work(prompts, 1, context.settings, param="input")
    needs_text = any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = context.tokenizer() if needs_text else context.tokenizer_if_any()
    return await tokenize(tokenizer, prompts, add_special_tokens=special)


async def embed_all(
    context: RequestContext, prompts: Sequence[list[int]], dimensions: int | None, options: dict[str, Any]
) -> list[EmbeddingRequestOutput]:
    """Embed the prompts, many at a time; the first error ends all. `options` are those of `Engine.embed`. Raises the
    refusals of API key and engine."""
    num_waiting, num_tokens = min(len(prompts), _AT_ONCE), _num_kept(context, prompts, options)
    options["adapter"] = await find_adapter(context.engine, context.adapter_name)
    with context.key_use.admit(num_waiting, num_tokens, context.engine.max_queue_size):
        outputs = await _embed_admitted(context, prompts, options)
    lengths = {index: len(output.prompt_token_ids) for index, output in enumerate(outputs)}
    context.scope["state"]["usage"] = UsageCounter(prompt_tokens=lengths)
    if dimensions is not None:
        for output in outputs:
            output.outputs.embedding = _shortened(output.outputs.embedding, dimensions)
    return outputs


def _num_kept(context: RequestContext, prompts: Sequence[list[int]], options: dict[str, Any]) -> int:
    """Tokens of the prompts after truncation."""
    given, longest = options["truncate_prompt_tokens"], context.engine.max_model_len
    most = longest if given is None or given < 0 else min(given, longest)
    return sum(min(len(prompt), most) for prompt in prompts)


async def _embed_admitted(
    context: RequestContext, prompts: Sequence[list[int]], options: dict[str, Any]
) -> list[EmbeddingRequestOutput]:
    free = asyncio.Semaphore(_AT_ONCE)

    async def embed(prompt: list[int]) -> EmbeddingRequestOutput:
        async with free:
            return await context.engine.embed(prompt, **options)

    tasks = [asyncio.create_task(embed(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shortened(vector: list[float], dimensions: int) -> list[float]:
    if not 1 <= dimensions <= len(vector):
        raise RequestError(
            f"dimensions is {dimensions}; the model's vectors have {len(vector)} numbers", param="dimensions"
        )
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return [value / length for value in kept] if length else kept


async def _reply(work: Coroutine[Any, Any, list[EmbeddingRequestOutput]], model: str, *, as_text: bool) -> Embeddings:
    outputs = await work
    vectors = [output.outputs.embedding for output in outputs]
    data = [Embedding(index, _encoded(vector) if as_text else vector) for index, vector in enumerate(vectors)]
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return Embeddings(data, model, EmbeddingsUsage(num_tokens, num_tokens))


def _encoded(vector: list[float]) -> str:
    return base64.b64encode(array("f", vector).tobytes()).decode()


ENDPOINTS = (Endpoint("POST", "/v1/embeddings", create_embeddings, "Vectors of texts", EmbeddingsRequest, Embeddings),)
