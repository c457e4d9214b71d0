"""Grammar and Matcher: a compiled grammar, and one text's place in it, as the rest of the engine sees them."""

from collections.abc import Callable
from typing import Protocol


class Matcher(Protocol):
    """One text's place in a grammar: what is used of llguidance's LLMatcher, which is one.

    Nothing raises: a matcher that got a wrong token, or that takes too much, is in error from then on.
    """

    def consume_token(self, token_id: int, /) -> bool: ...
    def consume_tokens(self, token_ids: list[int], /) -> bool: ...
    def validate_tokens(self, token_ids: list[int], /) -> int: ...
    def unsafe_compute_mask_ptr(self, pointer: int, num_bytes: int, /) -> None: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def is_stopped(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...
    def deep_copy(self) -> "Matcher": ...


class Grammar:
    """A compiled grammar over a vocabulary; every sequence that follows it has a matcher of its own."""

    __slots__ = ("__weakref__", "eos_token_ids", "matcher", "num_mask_words", "worn")

    def __init__(self, matcher: Callable[[], Matcher], *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        """Makes a matcher that has consumed nothing."""
        self.eos_token_ids = eos_token_ids
        """Tokens that end the text where the grammar accepts it."""
        self.num_mask_words = -(-vocab_size // 32)
        """A mask over the vocabulary is this many words of 32 tokens, the lowest bit first."""
        self.worn = False
        """A matcher has failed. What matchers learn of a grammar they share, so it is compiled anew for the next."""
