"""From prompts and messages to token ids: the four shapes of a prompt, and the chat template."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as brief
from typing import Any, TypeVar, cast

from msgspec.structs import asdict

from quire.engine.image_prompt import ImagePrompt, no_truncation
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.sampling_params import SamplingParams
from quire.server.backend import ChatRenderer
from quire.server.protocol import ChatCompletionRequest, Message, TokenizeRequest
from quire.server.tools.plain_prompt import with_plain_tools
from quire.server.tools.request import read_tools

T = TypeVar("T")

RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
"""Template variables that a request sets by fields of its own, not by chat_template_kwargs."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Values of reasoning_effort in the protocols."""
_CHARS_PER_MESSAGE = 16
"""Characters whose tokenisation costs as much as the conversion of one message."""
_INLINE_CHARS = 8192
"""Texts up to this length take about a millisecond. Longer texts are tokenised in a thread, so that streams go on."""


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One entry per prompt. Raises `RequestError` for an empty list or a list of mixed shapes."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise RequestError("prompt mixes texts, tokens and lists of tokens; give one kind", param="prompt")
    if kinds == {int}:
        return [cast(list[int], prompt)]
    prompts = cast(list[str | list[int]], prompt)
    if [] in prompts:
        raise RequestError("prompt holds an empty list of tokens; give at least one token", param="prompt")
    return prompts


async def tokenize(
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | list[int]],
    *,
    add_special_tokens: bool,
    max_tokens: int | None = None,
    param: str = "prompt",
) -> list[list[int]]:
    """Token ids of each prompt. A prompt that is a list of token ids is returned unchanged and needs no tokenizer.

    Raises `RequestError`, without tokenising, for a text that has more than `max_tokens` tokens for certain. `param` is
    the field that the client sent them in.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if tokenizer is None or not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    most_chars = None if max_tokens is None else tokenizer.most_chars(max_tokens)
    longest = max(map(len, texts))
    if most_chars is not None and longest > most_chars:
        raise RequestError(
            f"the prompt has {longest:,} characters, which are more than {max_tokens} tokens, but this model's maximum "
            f"context length is {max_tokens} tokens: the prompt is too long; shorten it or set truncate_prompt_tokens",
            param=param,
            code="context_length_exceeded",
        )
    encoded = await off_loop(
        sum(map(len, texts)), lambda: tokenizer.encode_all(texts, add_special_tokens=add_special_tokens)
    )
    remaining = iter(encoded)
    return [next(remaining) if isinstance(prompt, str) else prompt for prompt in prompts]


def longest_prompt(params: SamplingParams, max_model_len: int) -> int | None:
    """Tokens of the longest prompt that can be served with `params`; None if it is truncated."""
    return max_model_len if params.truncate_prompt_tokens is None else None


def truncated(
    prompts: list[list[int]], params: SamplingParams, side: str | None, max_model_len: int
) -> list[list[int]]:
    """The prompts without the last tokens beyond `truncate_prompt_tokens`, if `side` is right. The engine removes
    first tokens, for the side left."""
    keep = params.truncate_prompt_tokens
    if side != "right" or keep is None:
        return prompts
    if any(isinstance(prompt, ImagePrompt) for prompt in prompts):
        raise no_truncation()
    keep = keep if keep > 0 else max(1, max_model_len - (params.max_tokens or 1))
    return [prompt[:keep] for prompt in prompts]


async def render(template: ChatRenderer | None, request: ChatCompletionRequest | TokenizeRequest) -> str:
    """The prompt text for the messages of `request`. Raises `RequestError` if the template refuses them."""
    messages = request.messages or []
    if template is None:
        raise RequestError(
            "the model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    plain = await off_loop(
        len(messages) * _CHARS_PER_MESSAGE, lambda: [_plain(message, index) for index, message in enumerate(messages)]
    )
    continued = request.continue_final_message or False
    opens_answer = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    choice = getattr(request, "tool_choice", None)
    tools = request.tools if read_tools(request.tools, choice) is not None else None
    variables = _variables(request)
    plain, shown_tools = with_plain_tools(plain, tools, template.source)
    return await template.render(
        plain,
        add_generation_prompt=opens_answer,
        continue_final_message=continued,
        tools=shown_tools,
        documents=request.documents,
        **variables,
    )


def _variables(request: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any]:
    """What `request` sets besides messages, tools and documents. Raises `RequestError` for a name that Quire sets."""
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        if request.reasoning_effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort is {brief(request.reasoning_effort)}; there is {', '.join(EFFORTS)}. For a template "
                "that knows other words, send chat_template_kwargs",
                param="reasoning_effort",
            )
        variables["reasoning_effort"] = request.reasoning_effort
        if request.reasoning_effort == "none":
            variables |= {"enable_thinking": False, "thinking": False}
    given = request.chat_template_kwargs or {}
    if taken := given.keys() & RESERVED_VARIABLES:
        raise RequestError(
            f"chat_template_kwargs holds {min(taken)!r}, which is a field of the request; set it there",
            param="chat_template_kwargs",
        )
    return variables | given


def _plain(message: Message, index: int) -> dict[str, Any]:
    """The message as templates expect it: role "developer" renamed to "system", absent fields left out."""
    if message.role not in ROLES:
        raise RequestError(
            f"messages[{index}].role is {message.role[:50]!r}; there is {', '.join(ROLES)}", param="messages"
        )
    for number, call in enumerate(message.tool_calls or ()):
        _check_call(call, f"messages[{index}].tool_calls[{number}]")
    fields = {name: value for name, value in asdict(message).items() if value is not None}
    if message.role == "developer":
        fields["role"] = "system"
    if message.role == "assistant":  # an answer may have been empty; templates ask whether a call has content
        fields.setdefault("content", None if message.tool_calls else "")
    if (reasoning := message.reasoning or message.reasoning_content) is not None:
        fields |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates know one or the other
    return fields


def _check_call(call: Mapping[str, Any], place: str) -> None:
    """Raise `RequestError` unless `call`, at `place`, names a function and gives arguments as text or object."""
    match call.get("function"):
        case {"name": str(), **rest} if isinstance(rest.get("arguments", ""), str | Mapping):
            return
    raise RequestError(
        f"{place}.function is {brief(call.get('function'))}; it is an object with a name, and arguments as JSON text",
        param="messages",
    )


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread if its `size` (characters or tokens) is not small."""
    return work() if size <= _INLINE_CHARS else await asyncio.to_thread(work)
