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


async def chat_turn(context: RequestContext, request: ChatCompletionRequest) -> ChatTurn:
    """The turn that `request` asks for. Raises `RequestError` if it cannot be served."""
    check_available(request)
    engine, tokenizer = context.engine, context.tokenizer()
    params = chat_params(request, engine.default_params)
    if read_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls) is not None:
        raise RequestError("tool calling is not available yet; set tool_choice to none", param="tools")
    text = await render(engine.chat_template, request)
    check_work([text], params.num_samples, context.settings, param="messages")
    prompts = await tokenize(tokenizer, [text], add_special_tokens=request.add_special_tokens or False)
    prompts = truncated(prompts, params, request.truncation_side, engine.max_model_len)
    with naming(sent_names(request)):
        check_lengths(prompts, params, engine.max_model_len, param="messages")
    return ChatTurn(Generation(prompts, params, scheduling_info(request, context.client)), PlainReader)
