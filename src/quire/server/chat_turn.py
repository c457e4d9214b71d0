"""ChatTurn: what a chat request asks of the engine, and how its reply is read.

Every endpoint that continues a conversation builds a `ChatCompletionRequest`, makes a turn of it and renders the
`Answer` in its own words. Only this file brings template, tools, constraint and reader together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile
from typing import NamedTuple

from msgspec import structs

from quire.errors import RequestError
from quire.sampling_params import SamplingParams
from quire.server.endpoint import RequestContext
from quire.server.errors import naming
from quire.server.generation import Generation
from quire.server.images import image_support, without_images
from quire.server.limits import check_lengths, check_work
from quire.server.params import chat_params, check_available, sent_names
from quire.server.prompts import longest_prompt, render, tokenize, truncated
from quire.server.protocol import ChatCompletionRequest
from quire.server.scheduling_info import scheduling_info
from quire.server.tools.detect import find_format
from quire.server.tools.events import PlainReader, Reader
from quire.server.tools.grammar import constrain
from quire.server.tools.reader import ReadingOptions, ReplyFormat, ReplyReader
from quire.server.tools.request import ToolUse, read_tools

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation."""

    generation: Generation
    reader: Callable[[], Reader]
    """Makes the reader of each choice; see `Answer.reader`."""

    def named(self, names: Mapping[str, str]) -> "ChatTurn":
        """See `Generation.named`."""
        return replace(self, generation=self.generation.named(names))


async def fitting_turn(
    context: RequestContext, request: ChatCompletionRequest, *, truncates: bool, clips_output: bool = False
) -> ChatTurn:
    """The turn of `request`; with `truncates`, without the older half of its messages as often as they do not fit.
    System messages stay, and no result of a tool stays without its call."""
    while True:
        try:
            return await chat_turn(context, request, clips_output=clips_output)
        except RequestError as error:
            kept = [message for message in request.messages if message.role in _SYSTEM_ROLES]
            others = [message for message in request.messages if message.role not in _SYSTEM_ROLES]
            later = list(dropwhile(lambda message: message.role == "tool", others[(len(others) + 1) // 2 :]))
            if not truncates or error.code != "context_length_exceeded" or not later:
                raise
            request = structs.replace(request, messages=[*kept, *later])


class ChatPrompt(NamedTuple):
    """The prompt of a turn."""

    text: str
    token_ids: list[int]


async def chat_prompt(
    context: RequestContext, request: ChatCompletionRequest, num_samples: int = 1, max_tokens: int | None = None
) -> ChatPrompt:
    """The prompt for the messages of `request`. Raises `RequestError` if the template refuses them, or if they have
    more than `max_tokens` tokens for certain."""
    shown, images = await without_images(context, request)
    text = await render(context.engine.chat_template, shown)
    check_work([text], num_samples, context.settings, param="messages")
    expander = image_support(context).expander if images else None
    (token_ids,) = await tokenize(
        context.tokenizer(),
        [text if expander is None else expander.expand_text(text, images)],
        add_special_tokens=request.add_special_tokens or False,
        max_tokens=max_tokens,
        param="messages",
    )
    return ChatPrompt(text, token_ids if expander is None else expander.locate(text, token_ids, images))


async def chat_turn(context: RequestContext, request: ChatCompletionRequest, *, clips_output: bool = False) -> ChatTurn:
    """The turn that `request` asks for. Raises `RequestError` if it cannot be served. With `clips_output` a limit
    beyond the context becomes what the context holds."""
    check_available(request)
    engine = context.engine
    params = chat_params(request, engine.default_params)
    use = read_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    text, token_ids = await chat_prompt(
        context, request, params.num_samples, longest_prompt(params, engine.max_model_len)
    )
    prompts = truncated([token_ids], params, request.truncation_side, engine.max_model_len)
    room = engine.max_model_len - len(prompts[0])
    if clips_output and params.max_tokens is not None and 0 < room < params.max_tokens:
        params = params.with_changes(max_tokens=room)
    names = sent_names(request)
    with naming(names):
        check_lengths(prompts, params, engine.max_model_len, param="messages")
    params, reader = _read_as(reply_format(context), request, params, use, text)
    return ChatTurn(Generation(prompts, params, scheduling_info(request, context), sent_names=names), reader)


def reply_format(context: RequestContext) -> ReplyFormat:
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
