"""LearnedSize and FirstTokenTimes: how many tokens take a given time, and in which time clients get their first token.

Both are learned from steps: a bound in tokens would fit one machine.
"""

from collections import deque
from collections.abc import Callable
from math import inf

_NUM_TIMES = 15


class LearnedSize:
    """The tokens that a step may hold to take a given time."""

    def __init__(self, least: int) -> None:
        """`least`: the size on a machine however slow."""
        self._least = least
        self.num_tokens = 2 * least

    def learn(self, num_tokens: int, seconds: float, wanted: float) -> None:
        """A step of `num_tokens` took `seconds`."""
        if seconds > wanted:
            self.num_tokens = max(self._least, int(num_tokens * wanted / seconds))
        elif num_tokens >= self.num_tokens:
            self.num_tokens += 1 + self.num_tokens // 4


class FirstTokenTimes:
    """The last times in which clients got their first token."""

    def __init__(self, clock: Callable[[], float], about_seconds: float) -> None:
        """`about_seconds`: the time after a first token for which others are expected."""
        self._clock = clock
        self._about_seconds = about_seconds
        self._seconds: deque[float] = deque(maxlen=_NUM_TIMES)
        self._seen_at = -inf

    @property
    def are_recent(self) -> bool:
        """Whether clients are about."""
        return bool(self._seconds) and self._clock() - self._seen_at < self._about_seconds

    @property
    def median(self) -> float:
        """In seconds; there is a time."""
        return sorted(self._seconds)[len(self._seconds) // 2]

    def note(self, seconds: float) -> None:
        """A client got its first token so long after its prompt was begun."""
        self._seconds.append(seconds)
        self._seen_at = self._clock()
