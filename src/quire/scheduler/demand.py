"""Demand: what unfinished requests are expected to need: tokens, memory and seconds of waiting.

It is read from outside: when should a client come back, which replica gets a request, how many replicas should run?
"""

from dataclasses import dataclass

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.forecast import Forecast
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import Progress

REFRESHED_EVERY = 0.5
"""Seconds between forecasts; one costs about a microsecond per sequence."""
MAX_PEEKED = 1024
"""Waiting groups that a forecast looks at; it takes the others to be like them."""


@dataclass(frozen=True, slots=True)
class DemandForecast:
    """None while too little is known of the lengths of answers."""

    output_tokens: int | None = None
    """Tokens that running and waiting requests will still generate."""
    kv_cache_usage: float | None = None
    """Peak use of running requests, as a share of the pool's blocks."""
    queue_seconds: float | None = None
    """Seconds until all requests that wait now have started."""


class Demand:
    """Owned by the scheduler."""

    def __init__(self, pool: BlockPool, queues: RequestQueues, forecast: Forecast, progress: Progress) -> None:
        self._pool = pool
        self._queues = queues
        self._forecast = forecast
        self._progress = progress
        self._last = DemandForecast()
        self._since = 0.0
        """When the last forecast was made, or work began after that."""
        self._num_generated_then = 0
        self._rate: float | None = None
        """Tokens generated per second while there was work."""

    def begin(self, now: float) -> None:
        """There is work again: measure the rate from here."""
        self._since, self._num_generated_then = now, self._progress.total_generated_tokens

    def forecast(self, now: float) -> DemandForecast:
        """The expected demand; at most `REFRESHED_EVERY` seconds old."""
        if not self._queues.by_id:
            self._last = DemandForecast(0, 0.0, 0.0)
        elif now - self._since >= REFRESHED_EVERY:
            self._measure_rate(now)
            self._last = self._new_forecast()
        return self._last

    def _measure_rate(self, now: float) -> None:
        rate = (self._progress.total_generated_tokens - self._num_generated_then) / (now - self._since)
        self._rate = rate if self._rate is None else (self._rate + rate) / 2
        self.begin(now)

    def _new_forecast(self) -> DemandForecast:
        waiting, running = self._queues.waiting, self._queues.running
        peeked = list(waiting.peek(MAX_PEEKED))
        num_waiting_tokens = _tokens_to_come(peeked)
        num_running_tokens = _tokens_to_come(running)
        if num_waiting_tokens is None or num_running_tokens is None:
            return DemandForecast()
        if peeked:
            num_waiting_tokens *= len(waiting) / len(peeked)
        peak = self._forecast.peak(running, self._pool.num_used)
        return DemandForecast(
            output_tokens=round(num_running_tokens + num_waiting_tokens),
            kv_cache_usage=None if peak is None else peak / self._pool.num_blocks,
            # In a full engine a group starts when as much has ended. So all have started once as many tokens as they
            # need were generated.
            queue_seconds=num_waiting_tokens / self._rate if self._rate else None,
        )


def _tokens_to_come(groups: list[SequenceGroup]) -> float | None:
    """Output tokens that groups will still generate, on average; None while too little is known."""
    total = 0.0
    for group in groups:
        curve = group.length_curve
        if curve is None:
            return None
        for sequence in group.sequences:
            num_output = sequence.num_output_tokens
            total += curve.mean(num_output, group.request.max_tokens) - num_output
    return total
