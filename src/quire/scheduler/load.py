"""Load: what the requests in hand will still ask for, in tokens, memory and seconds, by the predictions of admission.

For whoever is outside and decides by it: when a client should come back, which replica a request goes to, how many
replicas there should be.
"""

from typing import NamedTuple

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.forecast import Forecast
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.step_totals import StepTotals

REFRESHED_EVERY = 0.5
"""Seconds; predicting costs about a microsecond per sequence."""
MAX_LOOKED_AT = 1024
"""Waiting groups that are looked at; the others are taken to be like them."""


class Predictions(NamedTuple):
    """None: too little is known of how long answers are."""

    output_tokens: int | None = None
    """Tokens that running and waiting requests will still generate."""
    kv_cache_usage: float | None = None
    """The most that running requests will use, as a share of the pool's blocks."""
    queue_seconds: float | None = None
    """Until all requests that wait now have started."""


class Load:
    """Makes predictions, and keeps them for a while."""

    def __init__(self, pool: BlockPool, queues: RequestQueues, forecast: Forecast, totals: StepTotals) -> None:
        self._pool = pool
        self._queues = queues
        self._forecast = forecast
        self._totals = totals
        self._predictions = Predictions()
        self._since = 0.0
        self._tokens_then = 0
        self._rate: float | None = None
        """Tokens generated per second, while there was work."""

    def begin(self, now: float) -> None:
        """There is work again: time counts from here."""
        self._since, self._tokens_then = now, self._totals.total_generated_tokens

    def refresh(self, now: float) -> Predictions:
        """The predictions, made anew if they are old."""
        if not self._queues.by_id:
            self._predictions = Predictions(0, 0.0, 0.0)
        elif now - self._since >= REFRESHED_EVERY:
            rate = (self._totals.total_generated_tokens - self._tokens_then) / (now - self._since)
            self._rate = rate if self._rate is None else (self._rate + rate) / 2
            self.begin(now)
            self._predictions = self._predict()
        return self._predictions

    def _predict(self) -> Predictions:
        waiting, running = self._queues.waiting, self._queues.running
        known = list(waiting.first_known(MAX_LOOKED_AT))
        num_waiting_tokens = self._tokens_to_come(known)
        num_running_tokens = self._tokens_to_come(running)
        if num_waiting_tokens is None or num_running_tokens is None:
            return Predictions()
        if known:
            num_waiting_tokens *= len(waiting) / len(known)
        peak = self._forecast.peak(running, self._pool.num_used)
        return Predictions(
            output_tokens=round(num_running_tokens + num_waiting_tokens),
            kv_cache_usage=None if peak is None else peak / self._pool.num_blocks,
            # In a full engine a request starts when as much has ended: all have started when as much as they need was
            # generated.
            queue_seconds=num_waiting_tokens / self._rate if self._rate else None,
        )

    def _tokens_to_come(self, groups: list[SequenceGroup]) -> float | None:
        """Output that groups will still generate, on average; None while too little is known."""
        total = 0.0
        for group in groups:
            curve = group.length_curve
            if curve is None:
                return None
            for sequence in group.sequences:
                num_output = sequence.num_output_tokens
                total += curve.mean(num_output, group.request.max_tokens) - num_output
        return total
