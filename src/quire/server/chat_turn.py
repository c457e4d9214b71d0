"""ChatTurn: what a chat request asks of the engine, and how its reply is read.

Every endpoint that continues a conversation builds a `ChatCompletionRequest`, makes a turn of it and renders the
`Answer` in its own words. Only this file brings template, tools, constraint and reader together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from quire.errors import RequestError
from quire.server.endpoint import RequestContext
from quire.server.errors import naming
from quire.server.generation import Generation
from quire.server.limits import check_lengths, check_work
from quire.server.params import chat_params, check_available, sent_names
from quire.server.prompts import render, tokenize, truncated
from quire.server.protocol import ChatCompletionRequest
from quire.server.scheduling_info import scheduling_info
from quire.server.tools.events import PlainReader, Reader
from quire.server.tools.request import read_tools


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation."""

    generation: Generation
    reader: Callable[[], Reader]
    """Makes the reader of each choice; see `Answer.reader`."""


async def chat_prompt(context: RequestContext, request: ChatCompletionRequest, num_samples: int = 1) -> list[int]:
    """The prompt for the messages of `request`. Raises `RequestError` if the template refuses them."""
    text = await render(context.engine.chat_template, request)
    check_work([text], num_samples, context.settings, param="messages")
    (prompt,) = await tokenize(context.tokenizer(), [text], add_special_tokens=request.add_special_tokens or False)
    return prompt


async def chat_turn(
    context: RequestContext, request: ChatCompletionRequest, *, clips_output: bool = False
) -> ChatTurn:
    """The turn that `request` asks for. Raises `RequestError` if it cannot be served. With `clips_output` a limit
    beyond the context becomes what the context holds."""
    check_available(request)
    engine = context.engine
    params = chat_params(request, engine.default_params)
    if read_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls) is not None:
        raise RequestError("tool calling is not available yet; set tool_choice to none", param="tools")
    prompts = [await chat_prompt(context, request, params.num_samples)]
    prompts = truncated(prompts, params, request.truncation_side, engine.max_model_len)
    room = engine.max_model_len - len(prompts[0])
    if clips_output and params.max_tokens is not None and 0 < room < params.max_tokens:
        params = params.with_changes(max_tokens=room)
    with naming(sent_names(request)):
        check_lengths(prompts, params, engine.max_model_len, param="messages")
    return ChatTurn(Generation(prompts, params, scheduling_info(request, context.client)), PlainReader)
