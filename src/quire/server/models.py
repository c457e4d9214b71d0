"""/v1/models: the model names that the server accepts."""

import time

from quire.server.capabilities import capabilities
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.replies import ModelCard, ModelList

_STARTED = int(time.time())


async def list_models(context: RequestContext) -> None:
    context.tokenizer_if_any()  # max_model_len is known once the tokenizer is loaded
    await context.reply(ModelList(data=[_card(own, name) for own in contexts_of(context) for name in own.model_names]))


async def get_model(context: RequestContext) -> None:
    context.tokenizer_if_any()
    name = context.path_params["model"]
    own = next((own for own in contexts_of(context) if name in own.model_names), context)
    await context.reply(_card(own, own.check_model(name)))


def contexts_of(context: RequestContext) -> list[RequestContext]:
    """The request with each engine that serves."""
    vectors = context.for_vectors()
    return [context] if vectors.engine is context.engine else [context, vectors]


def _card(context: RequestContext, name: str) -> ModelCard:
    engine = context.engine
    base = engine.model_names[0]
    card = ModelCard(
        id=name,
        created=_STARTED,
        root=base,
        max_model_len=engine.max_model_len,
        capabilities=capabilities(context) if engine.state != "loading" else [],
    )
    if name in engine.adapters:
        card.root, card.parent = name, base
    return card


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "The model names that the server accepts", reply=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", get_model, "One of them", reply=ModelCard),
)
