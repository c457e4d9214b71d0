"""NgramLookup: where the last tokens of a sequence stood before, and what followed them there: a draft without a model.

Prompt lookup (Saxena, 2023): summaries, edits and code repeat what they were given. The places of each token are
chained, the latest first, as in the dictionaries of LZ77's descendants (deflate), and the chain of the last token is
followed for the longest run that stood before. A token costs O(1) to index, and a lookup at most `_MAX_PLACES` steps.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

_MAX_PLACES = 64
"""Places of the last token that are tried, the latest first."""
NONE = -1


class Match(NamedTuple):
    """A run of tokens that ends the sequence and stood before."""

    start: int
    """Index of the token after it, where it stood before."""
    length: int
    """Tokens of the run."""


class NgramLookup:
    """The runs of one sequence, `shortest` to `longest` tokens long. It follows a list of tokens that only grows."""

    __slots__ = ("_before", "_found", "_latest", "_longest", "_num_seen", "_shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[int, int] = {}
        """Token → index of its latest place, the end of the sequence left out."""
        self._before = array("i")
        """For each index but the last, that of the same token before it."""
        self._found: Match | None = None
        self._num_seen = 0
        """Tokens when that was found."""

    def find(self, token_ids: Sequence[int]) -> Match | None:
        """The longest run that ends `token_ids` and stood before; of several the latest, but that which goes on if it
        is `longest` tokens long."""
        self._found = self._go_on(token_ids) or self._look_up(token_ids)
        self._num_seen = len(token_ids)
        return self._found

    def _go_on(self, token_ids: Sequence[int]) -> Match | None:
        """What was found last, if what has come since went on there too and no run can be longer."""
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
        place = self._latest.get(token_ids[end], NONE) if end >= 0 else NONE
        before, longest, length, found = self._before, self._longest, 0, NONE
        for _ in range(_MAX_PLACES):
            if place < length:  # the chain ends, or what is before this place is too short
                break
            if token_ids[place - length] == token_ids[end - length]:
                # Where the token that makes it longer fits, so may the others.
                common = 1
                while common < longest and common <= place and token_ids[place - common] == token_ids[end - common]:
                    common += 1
                if common > length:
                    length, found = common, place
                    if length == longest:
                        break
            place = before[place]
        return Match(found + 1, length) if length >= self._shortest else None

    def _index(self, token_ids: Sequence[int]) -> None:
        """Enter all tokens that are new but the last, which is followed by nothing yet."""
        latest, before = self._latest, self._before
        for index in range(len(before), len(token_ids) - 1):
            token = token_ids[index]
            before.append(latest.get(token, NONE))
            latest[token] = index


def follow(token_ids: Sequence[int], start: int, max_tokens: int) -> list[int]:
    """The tokens from `start` on. Where they end it goes on with its own beginning: a loop is followed round."""
    followed = list(token_ids[start : start + max_tokens])
    for place in range(max_tokens - len(followed)):
        followed.append(followed[place])
    return followed
