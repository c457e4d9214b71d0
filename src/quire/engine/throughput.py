"""Throughput: the latest stats of the engine, and the rates derived from them: the log line and Retry-After."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from quire.outputs import EngineStats

LOG_INTERVAL = 10.0
"""Seconds between two log lines."""
RATE_WINDOW = 30.0
"""Seconds over which the rate of finished requests is measured, for Retry-After."""
MAX_RETRY_AFTER = 60
"""Seconds."""


class Throughput:
    """Owns the latest `EngineStats` of the process that answers clients."""

    def __init__(self, report: Callable[[str], None] | None) -> None:
        """`report` gets the log line; None logs nothing."""
        self.stats = EngineStats()
        self._report = report
        self._finish_times: deque[float] = deque(maxlen=1024)
        self._last_log = (time.monotonic(), 0, 0)
        """Time of the last log line, and the totals of prompt and output tokens at that time."""

    def update(self, stats: EngineStats) -> None:
        """Keep the latest stats; log a line if it is time and tokens were computed since the last one."""
        self.stats = stats
        then, prompt_tokens, generated = self._last_log
        now = time.monotonic()
        if now - then < LOG_INTERVAL:
            return
        busy = (stats.total_prompt_tokens, stats.total_generated_tokens) != (prompt_tokens, generated)
        if busy and self._report is not None:
            self._report(
                f"{(stats.total_prompt_tokens - prompt_tokens) / (now - then):.0f} prompt and "
                f"{(stats.total_generated_tokens - generated) / (now - then):.0f} output tokens/s, "
                f"{stats.num_running} running, {stats.num_waiting} waiting, "
                f"KV cache {stats.kv_cache_usage:.1%} used, {stats.waste:.1%} of it wasted, "
                f"{stats.total_preemptions} preemptions"
            )
        self._last_log = (now, stats.total_prompt_tokens, stats.total_generated_tokens)

    def restart(self) -> None:
        """The engine process died: it holds nothing, and the next one counts from 0."""
        self.stats = replace(self.stats, num_running=0, num_waiting=0, num_used_blocks=0, num_pinned_blocks=0)
        self._last_log = (time.monotonic(), 0, 0)

    def count_finished(self, num_requests: int) -> None:
        """Requests that finished just now."""
        self._finish_times.extend([time.monotonic()] * num_requests)

    def num_waiting(self, num_live: int, max_num_seqs: int) -> int:
        """How many of `num_live` requests wait. Where the engine has no queue, the ones that it has not reported yet
        are taken to run while there are places."""
        num_running = self.stats.num_running if self.stats.num_waiting else max_num_seqs
        return max(0, num_live - num_running)

    def retry_after(self, num_waiting: int, max_queue_size: int) -> int:
        """Seconds until the queue has room: by the scheduler's prediction, else by the rate of finished requests."""
        excess, predicted = num_waiting - max_queue_size + 1, self.stats.predicted_queue_seconds
        if predicted is not None and self.stats.num_waiting:
            seconds = excess * predicted / self.stats.num_waiting
        else:
            now = time.monotonic()
            recent = sum(1 for moment in self._finish_times if moment > now - RATE_WINDOW)
            seconds = excess * RATE_WINDOW / max(1, recent)
        return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))
