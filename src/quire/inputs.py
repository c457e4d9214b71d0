"""Prompts as mappings, by vLLM's names. They are plain dicts for `LLM.generate`; the types are for type checkers."""

from typing import Any, NotRequired, TypedDict


class MultiModalData(TypedDict):
    """What is not text in a prompt."""

    image: Any
    """An image, or a list of them: objects of Pillow, bytes, paths or data URLs."""


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    multi_modal_data: NotRequired[MultiModalData]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt` is the text that the output shows."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    multi_modal_data: NotRequired[MultiModalData]
