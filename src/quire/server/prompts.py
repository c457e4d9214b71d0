"""From prompts and messages to token ids: the four shapes of a prompt, and the chat template."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from msgspec.structs import asdict

from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.sampling_params import SamplingParams
from quire.server.backend import ChatRenderer
from quire.server.protocol import ChatCompletionRequest, Message, TokenizeRequest

T = TypeVar("T")

TEMPLATE_OPTIONS = frozenset({"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort", "date_string"})
"""Template variables that a request may set. The server sets the others."""
_CHARS_PER_MESSAGE = 16
"""Converting a message costs as much as tokenising so many characters."""
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
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    add_special_tokens: bool,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt. A prompt that is a list of token ids is returned unchanged.

    Raises `RequestError`, without tokenising, for a text that has more than `max_tokens` tokens for certain.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    most_chars = None if max_tokens is None else tokenizer.most_chars(max_tokens)
    longest = max(map(len, texts), default=0)
    if most_chars is not None and longest > most_chars:
        raise RequestError(
            f"the prompt has {longest:,} characters, which are more than {max_tokens} tokens, this model's maximum "
            "context length: the prompt is too long; shorten it or set truncate_prompt_tokens",
            param="prompt",
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


async def render(template: ChatRenderer | None, request: ChatCompletionRequest | TokenizeRequest) -> str:
    """The prompt text for the messages of `request`. Raises `RequestError` if the template refuses them."""
    messages = request.messages or []
    if template is None:
        raise RequestError(
            "the model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
        )
    options: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        options["reasoning_effort"] = request.reasoning_effort
    if unknown := options.keys() - TEMPLATE_OPTIONS:
        raise RequestError(
            f"chat_template_kwargs holds {min(unknown)!r}; allowed are {', '.join(sorted(TEMPLATE_OPTIONS))}",
            param="chat_template_kwargs",
        )
    plain = await off_loop(len(messages) * _CHARS_PER_MESSAGE, lambda: [_plain(message) for message in messages])
    continued = request.continue_final_message or False
    opens_answer = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    return await template.render(plain, add_generation_prompt=opens_answer, continue_final_message=continued, **options)


def _plain(message: Message) -> dict[str, Any]:
    """The message as templates expect it: role "developer" renamed to "system", absent fields left out."""
    fields = {name: value for name, value in asdict(message).items() if value is not None}
    if message.role == "developer":
        fields["role"] = "system"
    return fields


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread if its `size` (characters or tokens) is not small."""
    return work() if size <= _INLINE_CHARS else await asyncio.to_thread(work)
