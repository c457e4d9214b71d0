"""/v1/messages and /v1/messages/count_tokens: Anthropic's chat."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from quire.errors import RequestError
from quire.server.answers import Answer
from quire.server.anthropic.blocks import SENT_NAMES, hosted_types, to_chat
from quire.server.anthropic.protocol import (
    AnthropicMessage,
    CountRequest,
    MessagesRequest,
    MessageUsage,
    TokenCount,
)
from quire.server.anthropic.renderer import ERRORS, MessageRenderer
from quire.server.chat_turn import chat_prompt, chat_turn
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import naming
from quire.server.params import check_absent
from quire.server.protocol import ChatCompletionRequest

T = TypeVar("T")

_REFUSED = ("mcp_servers", "container")
_WISHES = ("thinking_token_budget", "continue_final_message")


async def create_message(context: RequestContext) -> None:
    request = await context.read(MessagesRequest)
    context.check_generates()
    model = context.check_model(request.model)
    check_absent(request, _REFUSED)
    if hosted := hosted_types(request):
        context.warn(f"{', '.join(hosted)} run on Anthropic's servers; they are left out")
    with naming(SENT_NAMES):
        turn = await _granted(to_chat(request), lambda chat: chat_turn(context, chat, clips_output=True))
    turn = turn.named(SENT_NAMES)
    message = AnthropicMessage(id=context.answer_id("msg_"), model=model, content=[], usage=MessageUsage(0, 0, 0))
    renderer = MessageRenderer(message, is_clipped=turn.generation.params.max_tokens != request.max_tokens)
    answer = Answer(turn.generation, renderer, reader=turn.reader)
    await answer.send(context, stream=bool(request.stream))


async def _granted(chat: ChatCompletionRequest, work: Callable[[ChatCompletionRequest], Awaitable[T]]) -> T:
    """The result of `work` on `chat`. With thinking, Anthropic's clients must send a budget, and a text of the
    assistant at the end is to be continued. A model that cannot do one or the other runs without it."""
    for _ in _WISHES:
        try:
            return await work(chat)
        except RequestError as error:
            if error.param not in _WISHES or getattr(chat, error.param) is None:
                raise
            setattr(chat, error.param, None)
    return await work(chat)


async def count_tokens(context: RequestContext) -> None:
    request = await context.read(CountRequest)
    context.check_model(request.model)
    check_absent(request, _REFUSED)
    with naming(SENT_NAMES):
        prompt = await _granted(to_chat(request), lambda chat: chat_prompt(context, chat))
    await context.reply(TokenCount(len(prompt.token_ids)))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/messages",
        create_message,
        "Anthropic's chat",
        MessagesRequest,
        AnthropicMessage,
        streams=True,
        queues=True,
        errors=ERRORS,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "Tokens of a prompt",
        CountRequest,
        TokenCount,
        errors=ERRORS,
    ),
)
