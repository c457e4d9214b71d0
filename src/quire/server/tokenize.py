"""/tokenize and /detokenize: from text to token ids of the served model, and back."""

from quire.errors import RequestError
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.limits import check_work
from quire.server.params import check_available
from quire.server.prompts import render, tokenize
from quire.server.protocol import DetokenizeRequest, TokenizeRequest
from quire.server.replies import Detokenized, Tokenized


async def tokenize_text(context: RequestContext) -> None:
    request = await context.read(TokenizeRequest)
    tokenizer = context.tokenizer()
    context.check_model(request.model)
    check_available(request)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if request.messages is not None:
        text, special = await render(context.engine.chat_template, request), False
    else:
        text, special = request.prompt or "", True
    check_work([text], 1, context.settings)
    special = special if request.add_special_tokens is None else request.add_special_tokens
    (tokens,) = await tokenize(tokenizer, [text], add_special_tokens=special)
    await context.reply(
        Tokenized(
            count=len(tokens),
            max_model_len=context.engine.max_model_len,
            tokens=tokens,
            token_strs=[tokenizer.id_to_text(token) for token in tokens] if request.return_token_strs else None,
        )
    )


async def detokenize_tokens(context: RequestContext) -> None:
    request = await context.read(DetokenizeRequest)
    tokenizer = context.tokenizer()
    context.check_model(request.model)
    for token in request.tokens:
        if not 0 <= token < 2**31:
            raise RequestError(f"tokens holds {token}; token ids are from 0 to 2147483647", param="tokens")
        if token >= tokenizer.vocab_size and not tokenizer.token_bytes(token):
            raise RequestError(
                f"tokens holds {token}; the model's vocabulary ends at {tokenizer.vocab_size - 1}", param="tokens"
            )
    await context.reply(Detokenized(prompt=tokenizer.decode(request.tokens, skip_special_tokens=False)))


ENDPOINTS = (
    Endpoint("POST", "/tokenize", tokenize_text, "Text or messages to tokens", TokenizeRequest, Tokenized),
    Endpoint("POST", "/detokenize", detokenize_tokens, "Tokens to text", DetokenizeRequest, Detokenized),
)
