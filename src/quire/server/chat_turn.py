"""ChatTurn: what a chat request asks of the engine, and how its reply is read.

Every endpoint that continues a conversation builds a `ChatCompletionRequest`, makes a turn of it and renders the
`Answer` in its own words. Only this file brings template, tools, constraint and reader together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quire.errors import RequestError
from quire.sampling_params import SamplingParams
from quire.server.endpoint import RequestContext
from quire.server.errors import naming
from quire.server.generation import Generation
from quire.server.limits import check_lengths, check_work
from quire.server.params import chat_params, check_available, sent_names
from quire.server.prompts import render, tokenize, truncated
from quire.server.protocol import ChatCompletionRequest
from quire.server.scheduling_info import scheduling_info
from quire.server.tools.detect import find_format
from quire.server.tools.events import PlainReader, Reader
from quire.server.tools.grammar import constrain
from quire.server.tools.reader import ReadingOptions, ReplyFormat, ReplyReader
from quire.server.tools.request import ToolUse, read_tools


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
    use = read_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    text = await render(engine.chat_template, request)
    check_work([text], params.num_samples, context.settings, param="messages")
    prompts = await tokenize(tokenizer, [text], add_special_tokens=request.add_special_tokens or False)
    prompts = truncated(prompts, params, request.truncation_side, engine.max_model_len)
    with naming(sent_names(request)):
        check_lengths(prompts, params, engine.max_model_len, param="messages")
    params, reader = _read_as(_reply_format(context), request, params, use, text)
    return ChatTurn(Generation(prompts, params, scheduling_info(request, context.client)), reader)


def _reply_format(context: RequestContext) -> ReplyFormat:
    """How the model writes calls and reasoning, unless the settings say it."""
    template, settings = context.engine.chat_template, context.settings
    return find_format(
        "" if template is None else template.source,
        context.tokenizer(),
        settings.tool_call_parser,
        settings.reasoning_parser,
        "" if template is None else template.response_template,
    )


def _read_as(
    form: ReplyFormat, request: ChatCompletionRequest, params: SamplingParams, use: ToolUse | None, prompt: str
) -> tuple[SamplingParams, Callable[[], Reader]]:
    """The parameters with the constraint on the whole reply, and the maker of its readers."""
    last = request.messages[-1].content
    opening = form.opening(prompt, last if request.continue_final_message and isinstance(last, str) else None)
    constraint = constrain(
        form,
        use,
        params.structured_outputs,
        opening=opening,
        thinking_budget=request.thinking_token_budget,
    )
    if constraint is not params.structured_outputs:
        if params.beam_width is not None:
            raise RequestError("tools and reasoning do not go with a beam search", param="beam_width")
        params = params.with_changes(structured_outputs=constraint)
    if use is None and form.thinking is None:
        return params, PlainReader
    options = ReadingOptions(
        form,
        use,
        opening=opening,
        shows_reasoning=request.include_reasoning is not False,
        hides_special_tokens=params.skip_special_tokens,
    )
    return params.with_changes(skip_special_tokens=False), partial(ReplyReader, options)
