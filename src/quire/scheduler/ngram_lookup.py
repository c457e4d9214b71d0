"""NgramLookup: where the last tokens of a sequence stood before, and what followed them there: a draft without a model.

Prompt lookup (Saxena, 2023): summaries, edits and code repeat what they were given. For every length of n-gram a hash
table holds the position after its latest occurrence; what is found is compared token by token, so that a collision
costs a draft and never yields a wrong one. A token costs O(1) to index, amortised over the growth of the tables, and
at most 16 bytes for each length.
"""

from array import array
from collections.abc import Sequence

_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
"""Odd 32-bit numbers, one for each distance from the end of an n-gram."""
MAX_LENGTH = len(_MULTIPLIERS)
_MASK = 0xFFFF_FFFF
_MIN_BITS = 6


class NgramLookup:
    """The n-grams of one sequence, `shortest` to `longest` tokens long. It follows a list of tokens that only grows."""

    __slots__ = ("_bits", "_longest", "_num_indexed", "_shortest", "_tables")

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._bits = _MIN_BITS
        self._num_indexed = 1
        self._tables = self._empty_tables()
        """For each length, hash → index of the token after the n-gram that was indexed last; 0: none."""

    def draft(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """What followed the longest n-gram that ends `token_ids` where it occurred last; at most `max_tokens`.

        A draft that reaches the end of the tokens goes on with its own beginning, so that a loop is followed round.
        """
        num_tokens = len(token_ids)
        self._index(token_ids)
        shift, key, keys = 32 - self._bits, 0, []
        for distance in range(min(self._longest, num_tokens - 1)):
            key = key + (token_ids[num_tokens - 1 - distance] + 1) * _MULTIPLIERS[distance] & _MASK
            keys.append(key)
        for length in range(len(keys), self._shortest - 1, -1):
            start = self._tables[length - self._shortest][keys[length - 1] >> shift]
            if start and token_ids[start - length : start] == token_ids[num_tokens - length :]:
                drafted = list(token_ids[start : start + max_tokens])
                for place in range(max_tokens - len(drafted)):
                    drafted.append(drafted[place])
                return drafted
        return []

    def _index(self, token_ids: Sequence[int]) -> None:
        """Enter the n-grams before every token that is new; the last ones are followed by nothing yet."""
        num_tokens = len(token_ids)
        if num_tokens > 1 << self._bits >> 1:
            self._bits = (2 * num_tokens - 1).bit_length()
            self._tables = self._empty_tables()
            self._num_indexed = 1
        shift, shortest, longest, tables = 32 - self._bits, self._shortest, self._longest, self._tables
        for position in range(self._num_indexed, num_tokens):
            key = 0
            for distance in range(min(longest, position)):
                key = key + (token_ids[position - 1 - distance] + 1) * _MULTIPLIERS[distance] & _MASK
                if distance + 1 >= shortest:
                    tables[distance + 1 - shortest][key >> shift] = position
        self._num_indexed = num_tokens

    def _empty_tables(self) -> list["array[int]"]:
        return [array("i", bytes(4 << self._bits)) for _ in range(self._shortest, self._longest + 1)]
