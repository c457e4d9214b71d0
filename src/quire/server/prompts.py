"""From prompts and messages to token ids: the four shapes of a prompt, and the chat template."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from msgspec.structs import asdict

from quire.engine.chat_template import ChatTemplate
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.server.protocol import ChatCompletionRequest, Message, TokenizeRequest

T = TypeVar("T")

TEMPLATE_OPTIONS = frozenset({"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort", "date_string"})
"""Template variables that a request may set. The server sets the others."""
_INLINE_CHARS = 8192
"""Texts up to this length take about a millisecond. Longer texts are tokenised in a thread, so that streams go on."""


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One entry per prompt. Raises `RequestError` for an empty list or a list of mixed shapes."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise RequestError("prompt mixes texts, tokens and lists of tokens; give one kind", param="prompt")
    if kinds == {int}:
        return [[item for item in prompt if isinstance(item, int)]]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if [] in prompts:
        raise RequestError("prompt holds an empty list of tokens; give at least one token", param="prompt")
    return prompts


async def tokenize(
    tokenizer: Tokenizer | None, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt. A prompt that is a list of token ids is returned unchanged and needs no tokenizer."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if tokenizer is None or not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    encoded = await _off_loop(
        sum(map(len, texts)),
        lambda: [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts],
    )
    remaining = iter(encoded)
    return [next(remaining) if isinstance(prompt, str) else prompt for prompt in prompts]


async def render(template: ChatTemplate | None, request: ChatCompletionRequest | TokenizeRequest) -> str:
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
    plain = [_plain(message) for message in messages]
    continued = request.continue_final_message or False
    opens_answer = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    return await _off_loop(
        sum(len(message.content or "") for message in messages),
        lambda: template.render(plain, add_generation_prompt=opens_answer, continue_final_message=continued, **options),
    )


def _plain(message: Message) -> dict[str, Any]:
    """The message as templates expect it: role "developer" renamed to "system", absent fields left out."""
    fields = {name: value for name, value in asdict(message).items() if value is not None}
    if message.role == "developer":
        fields["role"] = "system"
    return fields


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _INLINE_CHARS else await asyncio.to_thread(work)
