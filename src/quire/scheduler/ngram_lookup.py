"""NgramLookup and NgramProposer: drafts without a model, by looking up the sequence's last tokens in its own text.

Prompt lookup (Saxena, 2023): summaries, edits and code repeat what they were given. The positions of each token are
chained, the latest first, as in the dictionaries of LZ77's descendants (deflate). The chain of the last token is
searched for the longest run of tokens that occurred before. Indexing a token costs O(1), a lookup at most
`_MAX_POSITIONS` steps.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from quire.scheduler.acceptance import Draft

_MAX_POSITIONS = 64
"""Positions of the last token that are tried, the latest first."""
NONE = -1


class Match(NamedTuple):
    """An earlier occurrence of the tokens at the end of a sequence."""

    start: int
    """Index of the token that followed the earlier occurrence."""
    length: int
    """Number of tokens that match."""


class NgramLookup:
    """Finds earlier occurrences of a sequence's last `shortest` to `longest` tokens. Its list of tokens only grows."""

    __slots__ = ("_before", "_found", "_latest", "_longest", "_num_seen", "_shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[int, int] = {}
        """Token → its latest position, the end of the sequence left out."""
        self._before = array("i")
        """Position → the position of the same token before it; for every position but the last."""
        self._found: Match | None = None
        """The last match."""
        self._num_seen = 0
        """The number of tokens when it was found."""

    def find(self, token_ids: Sequence[int]) -> Match | None:
        """The longest match, and of several the latest.

        If the last match was `longest` tokens long and the tokens since then continue it, it is kept.
        """
        self._found = self._continue(token_ids) or self._look_up(token_ids)
        self._num_seen = len(token_ids)
        return self._found

    def _continue(self, token_ids: Sequence[int]) -> Match | None:
        """The last match, if the new tokens continue it and no match can be longer."""
        if self._found is None:
            return None
        start, length = self._found
        num_new = len(token_ids) - self._num_seen
        if length + num_new < self._longest or token_ids[start : start + num_new] != token_ids[self._num_seen :]:
            return None
        return Match(start + num_new, self._longest)

    def _look_up(self, token_ids: Sequence[int]) -> Match | None:
        self._index(token_ids)
        end = len(token_ids) - 1
        position = self._latest.get(token_ids[end], NONE) if end >= 0 else NONE
        before, longest, length, found = self._before, self._longest, 0, NONE
        for _ in range(_MAX_POSITIONS):
            if position < length:  # the chain ends, or there are too few tokens before this position
                break
            if token_ids[position - length] == token_ids[end - length]:
                # The token that would make the match longer is equal, so the ones between may be.
                common = 1
                while (
                    common < longest and common <= position and token_ids[position - common] == token_ids[end - common]
                ):
                    common += 1
                if common > length:
                    length, found = common, position
                    if length == longest:
                        break
            position = before[position]
        return Match(found + 1, length) if length >= self._shortest else None

    def _index(self, token_ids: Sequence[int]) -> None:
        """Enter all new tokens but the last, which nothing follows yet."""
        latest, before = self._latest, self._before
        for index in range(len(before), len(token_ids) - 1):
            token = token_ids[index]
            before.append(latest.get(token, NONE))
            latest[token] = index


_NOTHING = Draft([])


class NgramProposer:
    """Proposes the tokens that followed the match. A row of `PROPOSERS`."""

    __slots__ = ("_lookup",)

    def __init__(self, shortest: int, longest: int) -> None:
        self._lookup = NgramLookup(shortest, longest)

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> Draft:
        """Drafts of kind n follow matches of 2**n to 2**(n + 1) − 1 tokens: the longer the match, the better."""
        match = self._lookup.find(token_ids)
        if match is None:
            return _NOTHING
        start, length = match
        return Draft(follow(token_ids, start, max_tokens), length.bit_length() - 1)


def follow(token_ids: Sequence[int], start: int, max_tokens: int) -> list[int]:
    """The tokens from `start` on. Where they end they repeat from `start`, so a loop is followed round."""
    followed = list(token_ids[start : start + max_tokens])
    for index in range(max_tokens - len(followed)):
        followed.append(followed[index])
    return followed
