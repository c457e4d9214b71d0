"""BadWords: the tokens that would complete a forbidden token sequence at the end of the output."""

from collections import defaultdict, deque
from collections.abc import Sequence
from copy import copy


class BadWords:
    """Keeps as much of the output's end as the longest word needs. Words match inside the output only."""

    __slots__ = ("_by_last_prefix_token", "_recent", "_single")

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._single: list[int] = []
        # A word is completed right after the token before its last. So that token selects the words to compare.
        self._by_last_prefix_token: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
        longest = 1
        for word in words:
            *prefix, last = word
            if not 0 <= last < vocab_size:
                continue
            longest = max(longest, len(prefix))
            if prefix:
                self._by_last_prefix_token[prefix[-1]].append((prefix, last))
            else:
                self._single.append(last)
        self._recent: deque[int] = deque(maxlen=longest)

    def fork(self) -> "BadWords":
        """An independent copy."""
        child = copy(self)
        child._recent = self._recent.copy()
        return child

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self._recent.append(token_id)

    def completions(self) -> list[int]:
        """Tokens that must not come next."""
        completions = list(self._single)
        if self._recent and (candidates := self._by_last_prefix_token.get(self._recent[-1])):
            recent = list(self._recent)
            completions += [last for prefix, last in candidates if recent[-len(prefix) :] == prefix]
        return completions
