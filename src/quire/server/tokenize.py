"""/tokenize, /detokenize, /v1/chat/completions/render and /tokenizer_info: prompts as the served model gets them."""

from quire.errors import RequestError
from quire.server.chat_turn import chat_prompt
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.limits import check_work
from quire.server.params import check_available
from quire.server.prompts import render, tokenize
from quire.server.protocol import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from quire.server.replies import AddedToken, Detokenized, RenderedChat, Tokenized, TokenizerInfo


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
