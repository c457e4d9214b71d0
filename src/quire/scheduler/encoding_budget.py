"""EncodingBudget: how much of an image a step encodes beside sequences that decode, by the times of late steps.

A client that reads a stream waits for whole steps. So the time that encoding adds to a step is a share of what the step
would take without it. Both times are measured: a step in `_EVERY` encodes nothing.
"""

from collections import deque

from quire.scheduler.limits import SchedulerLimits

SHARE = 0.35
"""What encoding adds to a step, by the time of the step; single steps add more, since pieces have a size."""
_EVERY = 16
_NUM_TIMES = 15
_MIN_TOKENS = 8
"""On most machines a step of one token takes as long as one of so many, as both read all weights."""


class EncodingBudget:
    """Amounts are in tokens of images."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._most = limits.max_step_image_tokens
        self._tokens_of_text_token = limits.max_step_image_tokens / limits.max_num_batched_tokens
        self._alone: deque[float] = deque(maxlen=_NUM_TIMES)
        """Seconds of the last steps that only decoded."""
        self._encoding: deque[tuple[float, float]] = deque(maxlen=_NUM_TIMES)
        """(tokens encoded, seconds added) of the last steps that decoded and encoded."""
        self._num_since = 0
        """Steps with encoding since one without."""

    def of_step(self, num_decoding: int) -> float:
        """How much a step may encode in which so many sequences decode."""
        if not num_decoding:
            return self._most
        if self._num_since >= _EVERY:
            return 0.0
        if not self._alone or not self._encoding:
            return min(self._most, self._tokens_of_text_token * max(num_decoding, _MIN_TOKENS))
        tokens, seconds = map(sum, zip(*self._encoding, strict=True))
        return min(self._most, SHARE * _median(self._alone) * tokens / seconds)

    def measure(self, num_encoded: float, seconds: float, *, only_decodes: bool) -> None:
        """Record a step that encoded so much; `only_decodes`: it computed one token of each sequence besides."""
        self._num_since = self._num_since + 1 if num_encoded else 0
        if not only_decodes:
            return
        if not num_encoded:
            self._alone.append(seconds)
        elif self._alone:
            alone = _median(self._alone)
            # Noise may make a step with encoding the faster one; what it adds counts for a little at least.
            self._encoding.append((num_encoded, max(seconds - alone, alone / 20)))


def _median(times: deque[float]) -> float:
    return sorted(times)[len(times) // 2]
