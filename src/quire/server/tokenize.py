"""/tokenize, /detokenize, /v1/chat/completions/render and /tokenizer_info: prompts as the served model gets them."""

from quire.errors import RequestError
from quire.server.chat_turn import chat_prompt
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.images import image_support, without_images
from quire.server.limits import check_work
from quire.server.params import check_available
from quire.server.prompts import off_loop, render, tokenize
from quire.server.protocol import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from quire.server.replies import AddedToken, Detokenized, RenderedChat, Tokenized, TokenizerInfo

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
        shown, images = await without_images(context, request)
        text, special = await render(context.engine.chat_template, shown), False
        if images:
            text = image_support(context).expander.expand_text(text, images)
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


async def render_chat(context: RequestContext) -> None:
    """The prompt of a chat, which is not answered."""
    request = await context.read(ChatCompletionRequest)
    context.check_model(request.model)
    check_available(request)
    prompt = await chat_prompt(context, request)
    await context.reply(
        RenderedChat(
            prompt=prompt.text,
            token_ids=prompt.token_ids,
            count=len(prompt.token_ids),
            max_model_len=context.engine.max_model_len,
        )
    )


async def describe_tokenizer(context: RequestContext) -> None:
    tokenizer, template = context.tokenizer(), context.engine.chat_template
    await context.reply(
        TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            model_max_length=context.engine.max_model_len,
            special_tokens=tokenizer.special_tokens,
            added_tokens_decoder={
                str(token_id): AddedToken(content, token_id in tokenizer.special_ids)
                for token_id, content in tokenizer.added_tokens.items()
            },
            chat_template=template.source if template is not None else None,
        )
    )


ENDPOINTS = (
    Endpoint("POST", "/tokenize", tokenize_text, "Text or messages to tokens", TokenizeRequest, Tokenized),
    Endpoint("POST", "/detokenize", detokenize_tokens, "Tokens to text", DetokenizeRequest, Detokenized),
    Endpoint(
        "POST", "/v1/chat/completions/render", render_chat, "The prompt of a chat", ChatCompletionRequest, RenderedChat
    ),
    Endpoint("GET", "/tokenizer_info", describe_tokenizer, "The model's tokenizer", reply=TokenizerInfo),
)
