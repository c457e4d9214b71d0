"""/score, /rerank and /classify, as vLLM, Jina and Cohere have them."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from quire.embeddings import EmbeddingRequestOutput
from quire.engine.model_task import check_classifies, check_scores
from quire.engine.scoring import Scorer, make_pairs, ranked
from quire.errors import RequestError
from quire.server.embeddings import EmbeddingsUsage, check_count, embed_all, input_tokens, usage_of
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import naming
from quire.server.limits import check_work
from quire.server.prompts import split_prompts
from quire.server.protocol import Priority, Salt
from quire.server.scheduling_info import checked_priority

Texts = str | list[str]


class VectorFields(Struct, kw_only=True):
    """Fields of every body here."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens of each prompt; −1: what the context holds. Default: a longer one is refused."""
    user: Salt | None = None
    priority: Priority | None = None


class ScoreRequest(VectorFields, kw_only=True):
    """Body of /score: one text for all, or as many as on the other side. Each side has several names."""

    data_1: Texts | None = None
    data_2: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    instruction: str | None = None
    """The task of a reranker that reads one (Qwen3-Reranker)."""


class Document(Struct):
    """A text as an object, as Jina and Cohere accept it."""

    text: str


class RerankRequest(VectorFields, kw_only=True):
    """Body of /rerank, /v1/rerank and /v2/rerank."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    """Return only the best; 0: all."""
    return_documents: bool | None = None
    """With the texts (the default, except for /v2/rerank)."""
    max_tokens_per_doc: int | None = None
    """Cut documents to this many tokens."""
    max_tokens_per_query: int | None = None
    instruction: str | None = None


class ClassifyRequest(VectorFields, kw_only=True):
    """Body of /classify."""

    input: str | list[str | int | list[int]]
    """As in /v1/embeddings."""


class Score(Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(Struct):
    """Reply of /score."""

    id: str
    data: list[Score]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


class Ranked(Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class BilledUnits(Struct):
    search_units: int = 1


class RerankMeta(Struct):
    """What Cohere's clients read of it."""

    billed_units: BilledUnits
    api_version: dict[str, str]


class Reranking(Struct):
    """Reply of /rerank: best first."""

    id: str
    model: str
    usage: EmbeddingsUsage
    results: list[Ranked]
    meta: RerankMeta


class ClassOf(Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(Struct):
    """Reply of /classify."""

    id: str
    data: list[ClassOf]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


async def score(context: RequestContext) -> None:
    context = context.for_vectors()
    request = await context.read(ScoreRequest)
    first = _side(request, ("data_1", "text_1", "queries"))
    second = _side(request, ("data_2", "text_2", "documents", "items"))
    with naming({"data_1": first[0], "data_2": second[0]}):
        pairs = make_pairs(first[1], second[1])
    options: dict[str, Any] = {"instruction": request.instruction}

    async def reply() -> Scores:
        model, scores, outputs = await _score(context, request, pairs, options)
        data = [Score(index, value) for index, value in enumerate(scores)]
        return Scores(f"score-{uuid.uuid4().hex}", data, model, usage_of(outputs))

    await context.reply_when_done(reply())


async def rerank(context: RequestContext) -> None:
    context = context.for_vectors()
    request = await context.read(RerankRequest)
    if not request.documents:
        raise RequestError("documents is empty; give at least one text", param="documents")
    for name, low in (("top_n", 0), ("max_tokens_per_doc", 1), ("max_tokens_per_query", 1)):
        value = getattr(request, name)
        if value is not None and value < low:
            raise RequestError(f"{name} is {value}; it must be at least {low}", param=name)
    texts = [one if isinstance(one, str) else one.text for one in request.documents]
    shows = request.return_documents
    shows = not context.scope["path"].startswith("/v2/") if shows is None else shows
    options: dict[str, Any] = {
        "instruction": request.instruction,
        "max_tokens_per_query": request.max_tokens_per_query,
        "max_tokens_per_doc": request.max_tokens_per_doc,
    }

    async def reply() -> Reranking:
        model, scores, outputs = await _score(context, request, make_pairs(request.query, texts), options)
        results = [
            Ranked(index, scores[index], Document(texts[index]) if shows else None)
            for index in ranked(scores, request.top_n)
        ]
        meta = RerankMeta(BilledUnits(), {"version": "2"})
        return Reranking(f"rerank-{uuid.uuid4().hex}", model, usage_of(outputs), results, meta)

    await context.reply_when_done(reply())


async def classify(context: RequestContext) -> None:
    context = context.for_vectors()
    request = await context.read(ClassifyRequest)
    context.check_ready()
    model, engine = context.check_model(request.model), context.engine
    check_classifies(engine.model_config)
    scorer = Scorer(engine.model_config, context.tokenizer_if_any(), engine.max_model_len)
    truncates = request.truncate_prompt_tokens is not None
    with naming({"prompt": "input"}):
        prompts = await input_tokens(context, split_prompts(request.input), special=True, truncates=truncates)

        async def reply() -> Classes:
            outputs = await embed_all(context, prompts, None, _options(context, request))
            found = [scorer.probabilities(output.outputs.embedding) for output in outputs]
            data = [ClassOf(index, scorer.label(probs), probs, len(probs)) for index, probs in enumerate(found)]
            return Classes(f"classify-{uuid.uuid4().hex}", data, model, usage_of(outputs))

        await context.reply_when_done(reply())


async def _score(
    context: RequestContext, request: VectorFields, pairs: Sequence[tuple[str, str]], options: dict[str, Any]
) -> tuple[str, list[float], list[EmbeddingRequestOutput]]:
    """The model's name, the score of each pair, and the outputs that they were made of."""
    context.check_ready()
    model, engine = context.check_model(request.model), context.engine
    check_scores(engine.model_config)
    check_count(len(pairs), "documents")
    check_work([text for pair in pairs for text in pair], 1, context.settings, param="documents")
    scorer = Scorer(engine.model_config, context.tokenizer(), engine.max_model_len)
    truncates = request.truncate_prompt_tokens is not None
    with naming({"prompt": "documents"}):
        plan = await asyncio.to_thread(lambda: scorer.plan(pairs, truncates=truncates, **options))
        outputs = await embed_all(context, plan.prompts, None, _options(context, request))
    return model, plan.scores(outputs), outputs


def _options(context: RequestContext, request: VectorFields) -> dict[str, Any]:
    """What `Engine.embed` takes. A classification head's outputs and vectors for cosines are not scaled."""
    return {
        "normalize": False,
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "priority": checked_priority(context, request.priority),
        "cache_salt": context.client.salt,
        "tenant": context.client.account or request.user or "",
    }


def _side(request: ScoreRequest, names: Sequence[str]) -> tuple[str, Texts]:
    """The name and the texts of one side of the pairs. Raises `RequestError` unless one of the names is given."""
    given = [(name, value) for name in names if (value := getattr(request, name)) is not None]
    if len(given) != 1:
        shown = " and ".join(name for name, _ in given) or "none"
        raise RequestError(f"{shown} of {', '.join(names)} is given; give one of them", param=names[0])
    return given[0]


ENDPOINTS = (
    *(Endpoint("POST", path, score, "Scores of pairs", ScoreRequest, Scores) for path in ("/score", "/v1/score")),
    *(
        Endpoint("POST", path, rerank, "Documents by relevance", RerankRequest, Reranking)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    *(
        Endpoint("POST", path, classify, "Classes of texts", ClassifyRequest, Classes)
        for path in ("/classify", "/v1/classify")
    ),
)
