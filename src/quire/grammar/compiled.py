"""Grammar: a compiled grammar. Matcher: the state of one text in it. No llguidance here."""

from collections.abc import Callable
from typing import Protocol


class Matcher(Protocol):
    """The state of one text in a grammar: the used part of llguidance's LLMatcher.

    No method raises. A matcher that got a wrong token, or exceeded its limits, stays in error from then on.
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
    """A compiled grammar over a vocabulary. Every constrained sequence has its own matcher."""

    __slots__ = ("__weakref__", "eos_token_ids", "matcher", "num_mask_words", "worn")

    def __init__(self, matcher: Callable[[], Matcher], *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        """Makes a matcher at the beginning of the text."""
        self.eos_token_ids = eos_token_ids
        """Tokens that end the text in an accepting state."""
        self.num_mask_words = -(-vocab_size // 32)
        """Words of a mask over the vocabulary: 32 tokens each, lowest bit first."""
        self.worn = False
        """A matcher has failed. Matchers share cached state, so the grammar is compiled again for the next request."""
