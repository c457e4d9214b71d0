"""/tokenize and /detokenize: from text to token ids of the served model, and back."""

from quire.errors import RequestError
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.limits import check_work
from quire.server.params import check_available
from quire.server.prompts import off_loop, render, tokenize
from quire.server.protocol import DetokenizeRequest, TokenizeRequest
from quire.server.replies import Detokenized, Tokenized

MAX_CHARS = 1_000_000
"""Most characters of /tokenize: the reply lists every token."""


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
    if len(text) > MAX_CHARS:
        raise RequestError(
            f"the prompt has {len(text):,} characters; at most {MAX_CHARS:,} are tokenised here", param="prompt"
        )
    check_work([text], 1, context.settings)
    special = special if request.add_special_tokens is None else request.add_special_tokens
    (tokens,) = await tokenize(tokenizer, [text], add_special_tokens=special)
    strings = None
    if request.return_token_strs:
        strings = await off_loop(len(tokens), lambda: [tokenizer.id_to_text(token) for token in tokens])
    await context.reply(Tokenized(len(tokens), context.engine.max_model_len, tokens, strings))


async def detokenize_tokens(context: RequestContext) -> None:
    request = await context.read(DetokenizeRequest)
    tokenizer = context.tokenizer()
    context.check_model(request.model)
    tokens = request.tokens
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < 2**31:
            raise RequestError(f"tokens holds {token}; token ids are from 0 to 2147483647", param="tokens")
    last = max(tokens, default=0)
    if last >= tokenizer.vocab_size:
        unknown = next((token for token in set(tokens) if not tokenizer.token_bytes(token)), None)
        if unknown is not None:
            raise RequestError(
                f"tokens holds {unknown}; the model's vocabulary ends at {tokenizer.vocab_size - 1}", param="tokens"
            )
    text = await off_loop(len(tokens), lambda: tokenizer.decode(tokens, skip_special_tokens=False))
    await context.reply(Detokenized(prompt=text))


ENDPOINTS = (
    Endpoint("POST", "/tokenize", tokenize_text, "Text or messages to tokens", TokenizeRequest, Tokenized),
    Endpoint("POST", "/detokenize", detokenize_tokens, "Tokens to text", DetokenizeRequest, Detokenized),
)
