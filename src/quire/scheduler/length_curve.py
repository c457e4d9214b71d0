"""LengthCurve and LengthClass: how long answers of one kind are, from answers that ended and answers that still run.

An answer that was cut off at its limit, was aborted, or still runs is *censored*: it shows only that its length would
be more than so many tokens. Leaving such answers out would favour short ones, which end first. So the estimate is
Kaplan and Meier's (1958), over a sliding window.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from enum import Enum
from itertools import groupby
from typing import NamedTuple, Protocol

WINDOW = 512
"""Answers that a class keeps: few enough to follow a shift within minutes of traffic."""
MIN_ANSWERS = 32
"""Answers that must have ended before a class has a curve."""
_RECOMPUTED_EVERY = 32
"""Ended answers after which a class computes its curve again."""
_ROUNDING = 1e-9
"""Shares of answers that differ by no more are equal: a product of fractions differs from its exact value."""


class Ending(Enum):
    """Why an answer ended, which decides what its length shows."""

    NATURAL = "the model ended it there"
    LIMIT = "it was cut off at max_tokens"
    ABORTED = "its client left, or it failed"


class Answer(NamedTuple):
    """One observation."""

    length: int
    """In tokens."""
    ending: Ending


class LengthCurve:
    """The distribution of the lengths in a sample with censoring, by Kaplan and Meier."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        ordered = sorted(answers, key=lambda answer: (answer.length, answer.ending is Ending.LIMIT))
        self._lengths: list[int] = []
        """Lengths of answers that ended by themselves, ascending."""
        self._negated_shares: list[float] = []
        """For each length, the share of answers that are longer, negated: ascending, for bisection."""
        survival, num_left = 1.0, len(ordered)
        for length, group in groupby(ordered, key=lambda answer: answer.length):
            endings = [answer.ending for answer in group]
            num_natural = endings.count(Ending.NATURAL)
            if num_natural:
                survival *= 1 - num_natural / num_left
                self._lengths.append(length)
                self._negated_shares.append(-survival)
            num_left -= len(endings)
        self._reached_limit = bool(ordered) and ordered[-1].ending is Ending.LIMIT
        """Whether the longest answers reached their limit."""
        self._areas = [0.0] * (len(self._lengths) + 1)
        """For each length, the shares of longer answers, summed over all tokens from there to the last length."""
        for place in range(len(self._lengths) - 2, -1, -1):
            width = self._lengths[place + 1] - self._lengths[place]
            self._areas[place] = self._areas[place + 1] - self._negated_shares[place] * width

    def quantile(self, share: float, beyond: int, limit: int) -> int:
        """The length that `share` of the answers with more than `beyond` tokens do not exceed; at most `limit`."""
        longer = self._share_longer(beyond)
        place = bisect_left(self._negated_shares, -(1 - share) * longer - _ROUNDING)
        if longer > 0 and place < len(self._lengths):
            return min(limit, max(beyond + 1, self._lengths[place]))
        return self._extrapolate(beyond, limit)

    def mean(self, beyond: int, limit: int) -> float:
        """The mean length of answers with more than `beyond` tokens, cut off at `limit`."""
        longer = self._share_longer(beyond)
        if longer <= 0 or not self._lengths or beyond >= self._lengths[-1]:
            return float(self._extrapolate(beyond, limit))
        tail = -self._negated_shares[-1] * max(0, self._extrapolate(self._lengths[-1], limit) - self._lengths[-1])
        expected = self._area_from(beyond) - self._area_from(limit) + (tail if limit > self._lengths[-1] else 0.0)
        return min(float(limit), beyond + max(1.0, expected / longer))

    def _extrapolate(self, beyond: int, limit: int) -> int:
        """The expected length of an answer that is longer than all that ended by themselves."""
        if self._reached_limit or not self._lengths:
            return limit
        return min(limit, 2 * max(beyond, self._lengths[-1]))

    def _share_longer(self, length: int) -> float:
        place = bisect_right(self._lengths, length)
        return -self._negated_shares[place - 1] if place else 1.0

    def _area_from(self, length: int) -> float:
        """The shares of longer answers, summed over all tokens from `length` to the last length."""
        place = bisect_right(self._lengths, length)
        if place == len(self._lengths):
            return 0.0
        return self._areas[place] + self._share_longer(length) * (self._lengths[place] - length)


class RunningAnswer(Protocol):
    """A sequence that still generates."""

    @property
    def num_output_tokens(self) -> int: ...


class LengthClass:
    """One class of requests: its last answers, and its running sequences."""

    __slots__ = ("_answers", "_curve", "_num_new", "running")

    def __init__(self) -> None:
        self._answers: deque[Answer] = deque(maxlen=WINDOW)
        self._curve: LengthCurve | None = None
        self._num_new = 0
        self.running: dict[RunningAnswer, None] = {}

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)
        self._num_new += 1
        if self._num_new >= _RECOMPUTED_EVERY:
            self._curve, self._num_new = None, 0

    @property
    def curve(self) -> LengthCurve | None:
        """None while too little is known."""
        if len(self._answers) < MIN_ANSWERS:
            return None
        if self._curve is None:
            running = (Answer(each.num_output_tokens, Ending.ABORTED) for each in self.running)
            self._curve = LengthCurve((*self._answers, *running))
        return self._curve
