"""/v1/models: the model names that the server accepts."""

import time

from quire.server.endpoint import Endpoint, RequestContext
from quire.server.replies import ModelCard, ModelList

_STARTED = int(time.time())


async def list_models(context: RequestContext) -> None:
    context.tokenizer_if_any()  # max_model_len is known once the tokenizer is loaded
    names = context.model_names
    await context.reply(ModelList(data=[_card(context, name) for name in names]))


async def get_model(context: RequestContext) -> None:
    context.tokenizer_if_any()
    await context.reply(_card(context, context.check_model(context.path_params["model"])))


def _card(context: RequestContext, name: str) -> ModelCard:
    engine = context.engine
    base = engine.model_names[0]
    card = ModelCard(id=name, created=_STARTED, root=base, max_model_len=engine.max_model_len)
    if name in engine.adapters:
        card.root, card.parent = name, base
    return card


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "The model names that the server accepts", reply=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", get_model, "One of them", reply=ModelCard),
)
