"""LengthCurve and LengthClass: the lengths of answers of one kind, from those that ended and those that still run.

An answer that was cut off at its limit, given up by its client, or that still runs is *censored*: all it says is that
its length would be more than so many tokens. Leaving such answers out would favour the short ones, which end first, so
the estimate is Kaplan and Meier's (1958), over a sliding window.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from enum import Enum
from itertools import groupby
from typing import NamedTuple, Protocol

WINDOW = 512
"""Answers that a class remembers: few enough to follow a shift within minutes of traffic."""
MIN_ANSWERS = 32
"""Answers that must have ended before a class is believed."""
_RENEWED_EVERY = 32
"""Endings of a class after which its curve is drawn anew."""
_ROUNDING = 1e-9
"""Shares of answers that are no further apart are one: a product of fractions and the fraction it is, for instance."""


class Ending(Enum):
    """What an answer's length says."""

    NATURAL = "the model ended it there"
    LIMIT = "it was cut off at max_tokens"
    GIVEN_UP = "its client left, or it failed"


class Answer(NamedTuple):
    """An observed length in tokens."""

    length: int
    ending: Ending


class LengthCurve:
    """The distribution of the lengths in a sample with censoring, by Kaplan and Meier."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        ordered = sorted(answers, key=lambda answer: (answer.length, answer.ending is Ending.LIMIT))
        self._lengths: list[int] = []
        """Lengths at which answers ended by themselves, ascending."""
        self._falling: list[float] = []
        """For each of them, minus the share of answers that are longer: ascending, for bisection."""
        survival, num_left = 1.0, len(ordered)
        for length, group in groupby(ordered, key=lambda answer: answer.length):
            endings = [answer.ending for answer in group]
            num_natural = endings.count(Ending.NATURAL)
            if num_natural:
                survival *= 1 - num_natural / num_left
                self._lengths.append(length)
                self._falling.append(-survival)
            num_left -= len(endings)
        self._reach_limit = bool(ordered) and ordered[-1].ending is Ending.LIMIT
        """Whether those that were longest went on to their limit."""
        self._areas = [0.0] * (len(self._lengths) + 1)
        """For each length, the sum of the shares that are longer, over all tokens from there to the last length."""
        for place in range(len(self._lengths) - 2, -1, -1):
            width = self._lengths[place + 1] - self._lengths[place]
            self._areas[place] = self._areas[place + 1] - self._falling[place] * width

    def quantile(self, share: float, beyond: int, limit: int) -> int:
        """The length that `share` of the answers longer than `beyond` tokens do not exceed, at most `limit`."""
        longer = self._share_longer(beyond)
        place = bisect_left(self._falling, -(1 - share) * longer - _ROUNDING)
        if longer > 0 and place < len(self._lengths):
            return min(limit, max(beyond + 1, self._lengths[place]))
        return self._past_experience(beyond, limit)

    def mean(self, beyond: int, limit: int) -> float:
        """The mean length of answers longer than `beyond` tokens and cut off at `limit`."""
        longer = self._share_longer(beyond)
        if longer <= 0 or not self._lengths or beyond >= self._lengths[-1]:
            return float(self._past_experience(beyond, limit))
        tail = -self._falling[-1] * max(0, self._past_experience(self._lengths[-1], limit) - self._lengths[-1])
        expected = self._area_from(beyond) - self._area_from(limit) + (tail if limit > self._lengths[-1] else 0.0)
        return min(float(limit), beyond + max(1.0, expected / longer))

    def _past_experience(self, beyond: int, limit: int) -> int:
        """What to expect of an answer longer than all that ended by themselves."""
        if self._reach_limit or not self._lengths:
            return limit
        return min(limit, 2 * max(beyond, self._lengths[-1]))

    def _share_longer(self, length: int) -> float:
        place = bisect_right(self._lengths, length)
        return -self._falling[place - 1] if place else 1.0

    def _area_from(self, length: int) -> float:
        """The sum of the shares that are longer, over all tokens from `length` to the last length."""
        place = bisect_right(self._lengths, length)
        if place == len(self._lengths):
            return 0.0
        return self._areas[place] + self._share_longer(length) * (self._lengths[place] - length)


class Running(Protocol):
    """An answer in the making."""

    @property
    def num_output_tokens(self) -> int: ...


class LengthClass:
    """One class: its last answers, and the sequences that run."""

    __slots__ = ("_answers", "_curve", "_num_new", "live")

    def __init__(self) -> None:
        self._answers: deque[Answer] = deque(maxlen=WINDOW)
        self._curve: LengthCurve | None = None
        self._num_new = 0
        self.live: dict[Running, None] = {}

    def note(self, answer: Answer) -> None:
        self._answers.append(answer)
        self._num_new += 1
        if self._num_new >= _RENEWED_EVERY:
            self._curve, self._num_new = None, 0

    @property
    def curve(self) -> LengthCurve | None:
        """None while too little is known."""
        if len(self._answers) < MIN_ANSWERS:
            return None
        if self._curve is None:
            running = (Answer(answer.num_output_tokens, Ending.GIVEN_UP) for answer in self.live)
            self._curve = LengthCurve((*self._answers, *running))
        return self._curve
