"""/v1/models: the names the server answers to."""

import time

from quire.server.exchange import Endpoint, Exchange
from quire.server.responses import ModelCard, ModelList

_STARTED = int(time.time())


async def list_models(exchange: Exchange) -> None:
    exchange.tokenizer()  # what the model can take is known from when its tokenizer is
    names = exchange.engine.model_names
    await exchange.reply(ModelList(data=[_card(exchange, name) for name in names]))


async def get_model(exchange: Exchange) -> None:
    exchange.tokenizer()
    await exchange.reply(_card(exchange, exchange.check_model(exchange.scope["path_params"]["model"])))


def _card(exchange: Exchange, name: str) -> ModelCard:
    engine = exchange.engine
    return ModelCard(id=name, created=_STARTED, root=engine.model_names[0], max_model_len=engine.max_model_len)


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "The names the server answers to", reply=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", get_model, "One of them", reply=ModelCard),
)
