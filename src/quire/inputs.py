"""Prompts as mappings, by vLLM's names. They are plain dicts for `LLM.generate`; the types are for type checkers."""

from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt` is the text that the output shows."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
