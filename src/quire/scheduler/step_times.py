"""StepTimes and StepCurve: how long a step takes, by its number of tokens, by recent measurements."""

import bisect
import math
from collections import deque

MIN_TIMES = 3
"""Steps of a size that must have been measured before the size is known."""
_NUM_TIMES = 7
"""Number of last steps of one size whose median counts."""
_MAX_AGE = 30.0
"""Seconds after which a time is stale: contexts have grown, and neighbours on the machine have come or gone."""


class StepTimes:
    """The last times of steps, by size class."""

    def __init__(self) -> None:
        self._times: dict[int, _Times] = {}
        self._drafted = False
        """Whether the last step computed drafts."""

    def measure(self, num_tokens: int, seconds: float, now: float, *, drafted: bool = False) -> None:
        """Record a step that only decoded; `drafted`: it computed drafts.

        A step without drafts right after a step with drafts is ignored. It cannot continue from the step before as it
        would if there were no drafts, and that is what drafts are compared with.
        """
        follows_drafts, self._drafted = self._drafted and not drafted, drafted
        if follows_drafts:
            return
        size = _size_class(num_tokens)
        times = self._times.get(size)
        if times is None or now - times.last > _MAX_AGE:
            times = self._times[size] = _Times()
        times.add(seconds, now)

    def curve(self, num_tokens: int, now: float) -> "StepCurve | None":
        """The recent times; None if too few steps of `num_tokens` were."""
        own = self._times.get(_size_class(num_tokens))
        if own is None or own.num < MIN_TIMES or now - own.last > _MAX_AGE:
            return None
        return StepCurve(
            sorted((size, each.median) for size, each in self._times.items() if now - each.last <= _MAX_AGE)
        )


class _Times:
    """The last times of steps of one size class."""

    __slots__ = ("_median", "_seconds", "last")

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_NUM_TIMES)
        self._median: float | None = None
        self.last = 0.0
        """When the last step ended."""

    @property
    def num(self) -> int:
        return len(self._seconds)

    @property
    def median(self) -> float:
        """Computed on demand: most steps are followed by one of the same size for which no draft is sought."""
        if self._median is None:
            self._median = sorted(self._seconds)[len(self._seconds) // 2]
        return self._median

    def add(self, seconds: float, now: float) -> None:
        self._seconds.append(seconds)
        self._median = None
        self.last = now


class StepCurve:
    """Seconds of a step as a function of its number of tokens, interpolated between measured sizes.

    A step counts as no slower than a step of more tokens. Beyond the largest measured size, more tokens count as free:
    trying them is the way to measure them.
    """

    def __init__(self, points: list[tuple[int, float]]) -> None:
        """`points` are (tokens, seconds), in the order of tokens."""
        self._points = points
        least = math.inf
        for place in range(len(points) - 1, -1, -1):
            size, seconds = points[place]
            if seconds > least:
                points[place] = size, least
            else:
                least = seconds

    def seconds(self, num_tokens: int) -> float:
        place = bisect.bisect_left(self._points, (num_tokens, 0.0))
        if place == len(self._points):
            return self._points[-1][1]
        right, after = self._points[place]
        if place == 0:
            return after
        left, before = self._points[place - 1]
        return before + (after - before) * (num_tokens - left) / (right - left)

    def rate(self, num_tokens: int) -> float:
        """Tokens per second."""
        return num_tokens / self.seconds(num_tokens)

    def best_rate(self, first: int, last: int) -> float:
        """The most tokens per second of any step of `first` to `last` tokens: it lies at the end of a segment."""
        sizes = {first, last, *(size for size, _ in self._points if first < size < last)}
        return max(map(self.rate, sizes))


def _size_class(num_tokens: int) -> int:
    """Sizes up to 16 tokens have a class each; a larger size shares it with those less than an eighth larger."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
