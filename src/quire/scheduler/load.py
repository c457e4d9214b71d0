"""Load: what the requests in hand will still ask for, in tokens, memory and seconds, by the predictions of admission.

For whoever is outside and decides by it: when a client should come back, which replica a request goes to, how many
replicas there should be.
"""

from quire.kv_cache.block_pool import BlockPool
from quire.outputs import EngineStats
from quire.scheduler.forecast import Forecast
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import SequenceGroup

REFRESHED_EVERY = 0.5
"""Seconds; predicting costs about a microsecond per sequence."""
MAX_LOOKED_AT = 1024
"""Waiting groups that are looked at; the others are taken to be like them."""


class Load:
    """Writes the `predicted_…` fields of the counts."""

    def __init__(self, pool: BlockPool, groups: RequestQueues, forecast: Forecast) -> None:
        self._pool = pool
        self._queues = groups
        self._forecast = forecast
        self._since = 0.0
        self._tokens_then = 0
        self._rate: float | None = None
        """Tokens generated per second, while there was work."""

    def begin(self, now: float, stats: EngineStats) -> None:
        """There is work again: time counts from here."""
        self._since, self._tokens_then = now, stats.total_generated_tokens

    def refresh(self, now: float, stats: EngineStats) -> None:
        """Bring the fields up to date if they are old."""
        if not self._queues.by_id:
            stats.predicted_output_tokens, stats.predicted_kv_cache_usage = 0, 0.0
            stats.predicted_queue_seconds = 0.0
            return
        elapsed = now - self._since
        if elapsed < REFRESHED_EVERY:
            return
        rate = (stats.total_generated_tokens - self._tokens_then) / elapsed
        self._rate = rate if self._rate is None else (self._rate + rate) / 2
        self.begin(now, stats)
        waiting, running = self._queues.waiting, self._queues.running
        known = list(waiting.first_known(MAX_LOOKED_AT))
        num_waiting_tokens = self._tokens_to_come(known)
        num_running_tokens = self._tokens_to_come(running)
        if num_waiting_tokens is None or num_running_tokens is None:
            stats.predicted_output_tokens = stats.predicted_queue_seconds = stats.predicted_kv_cache_usage = None
            return
        if known:
            num_waiting_tokens *= len(waiting) / len(known)
        stats.predicted_output_tokens = round(num_running_tokens + num_waiting_tokens)
        # In a full engine, one starts when as much has ended: all have started when as much as they need was generated.
        stats.predicted_queue_seconds = num_waiting_tokens / self._rate if self._rate else None
        peak = self._forecast.peak(running, self._pool.num_used)
        stats.predicted_kv_cache_usage = None if peak is None else peak / self._pool.num_blocks

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
