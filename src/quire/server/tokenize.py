"""/tokenize and /detokenize: text to the served model's tokens and back."""

from quire.errors import RequestError
from quire.server.exchange import Endpoint, Exchange
from quire.server.limits import check_work
from quire.server.params import check_available
from quire.server.prompts import render, tokenize
from quire.server.protocol import DetokenizeRequest, TokenizeRequest
from quire.server.responses import Detokenized, Tokenized


async def tokenize_text(exchange: Exchange) -> None:
    request = await exchange.read(TokenizeRequest)
    tokenizer = exchange.tokenizer()
    exchange.check_model(request.model)
    check_available(request)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if request.messages is not None:
        text, special = await render(exchange.engine.chat_template, request), False
    else:
        text, special = request.prompt or "", True
    check_work([text], 1, exchange.settings)
    special = special if request.add_special_tokens is None else request.add_special_tokens
    (tokens,) = await tokenize(tokenizer, [text], add_special_tokens=special)
    await exchange.reply(
        Tokenized(
            count=len(tokens),
            max_model_len=exchange.engine.max_model_len,
            tokens=tokens,
            token_strs=[tokenizer.id_to_text(token) for token in tokens] if request.return_token_strs else None,
        )
    )


async def detokenize_tokens(exchange: Exchange) -> None:
    request = await exchange.read(DetokenizeRequest)
    tokenizer = exchange.tokenizer()
    exchange.check_model(request.model)
    for token in request.tokens:
        if not 0 <= token < 2**31:
            raise RequestError(f"tokens holds {token}; token ids are from 0 to 2147483647", param="tokens")
    await exchange.reply(Detokenized(prompt=tokenizer.decode(request.tokens, skip_special_tokens=False)))


ENDPOINTS = (
    Endpoint("POST", "/tokenize", tokenize_text, "Text or messages to tokens", TokenizeRequest, Tokenized),
    Endpoint("POST", "/detokenize", detokenize_tokens, "Tokens to text", DetokenizeRequest, Detokenized),
)
