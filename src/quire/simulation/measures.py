"""Measures: sums over the steps and requests of a simulation, in bounded memory, and the figures made from them.

Shares and batch sizes are averages over busy time: a step is weighted by its seconds, idle time does not count.
"""

import math
import statistics
from array import array
from collections.abc import Sequence
from typing import Any

BUCKETS_PER_OCTAVE = 64
"""Resolution of the gaps between tokens: about one percent."""
MAX_TIMELINE = 256
"""Most intervals of the timeline; longer runs get longer intervals."""


class GapHistogram:
    """Counts of durations in buckets of equal ratio; quantiles are exact to half a bucket."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def add(self, seconds: float, count: int = 1) -> None:
        bucket = math.floor(math.log2(seconds) * BUCKETS_PER_OCTAVE) if seconds > 0 else -(2**31)
        self.counts[bucket] = self.counts.get(bucket, 0) + count

    def quantile(self, percent: float) -> float | None:
        """The duration that `percent` of all durations do not exceed; None if there are none."""
        wanted = sum(self.counts.values()) * percent / 100
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return 0.0 if bucket == -(2**31) else float(2 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE))
        return None


class _Tenant:
    """Latencies of one tenant's requests."""

    def __init__(self) -> None:
        self.ttft = array("d")
        self.num_good = 0


class Measures:
    """Sums over steps and times of requests.

    Waste by kind is a share of all `num_slots`; with `of_allocated`, of the allocated slots, as in the paper: blocks
    are allocated on demand there, and the rest of the pool is free for any request.
    """

    def __init__(
        self, num_slots: int, *, of_allocated: bool, ttft_limit: float, tbt_limit: float, warm_up: int = 0
    ) -> None:
        """Measuring begins when `warm_up` requests have finished."""
        self._num_slots = num_slots
        self._of_allocated = of_allocated
        self._ttft_limit, self._tbt_limit = ttft_limit, tbt_limit
        self._begin(0.0)
        self._warm_up = warm_up

    def _begin(self, now: float) -> None:
        """Start to measure at `now`."""
        self._start = now
        self._warm_up = 0
        """Requests that must finish before measuring begins; 0 once it has begun."""
        self.num_steps = 0
        self.num_tokens = 0
        """Tokens generated."""
        self.gaps = GapHistogram()
        self.finished = self.failed = self.cancelled = self.refused = 0
        self._good = 0
        self._busy = 0.0
        self._batch = self._filled = self._reserved = self._internal = self._allocated = self._saved = 0.0
        self._peak_batch = 0
        self._ttft, self._normalized, self._latency = array("d"), array("d"), array("d")
        self._tenants: dict[str, _Tenant] = {}
        self._timeline: list[list[float]] = []
        """Per interval: busy seconds, and batch and filled slots times seconds."""
        self._interval = 1.0

    def step(
        self,
        now: float,
        seconds: float,
        batch: int,
        filled: int,
        reserved: int,
        internal: int,
        allocated: int,
        saved: int,
    ) -> None:
        """Count a step that ends at `now`. `allocated` slots are `filled` with tokens, `reserved` for tokens that will
        come, or `internal` waste; without sharing, `saved` more would be needed."""
        self.num_steps += 1
        self._busy += seconds
        weight = batch * seconds
        self._batch += weight
        self._filled += filled * seconds
        self._reserved += reserved * seconds
        self._internal += internal * seconds
        self._allocated += allocated * seconds
        self._saved += saved * seconds
        if batch > self._peak_batch:
            self._peak_batch = batch
        place = int(now / self._interval)
        while place >= MAX_TIMELINE:
            self._halve_timeline()
            place = int(now / self._interval)
        timeline = self._timeline
        while len(timeline) <= place:
            timeline.append([0.0, 0.0, 0.0])
        point = timeline[place]
        point[0] += seconds
        point[1] += weight
        point[2] += filled * seconds

    def request_finished(
        self, arrival: float, first_token: float, end: float, num_output: int, tenant: str = ""
    ) -> None:
        """Count a request that got all of its output, `num_output` tokens per sample."""
        ttft, latency = first_token - arrival, end - arrival
        self.finished += 1
        self._ttft.append(ttft)
        self._latency.append(latency)
        self._normalized.append(latency / num_output)
        good = ttft <= self._ttft_limit and end - first_token <= self._tbt_limit * max(1, num_output - 1)
        self._good += good
        if tenant:
            known = self._tenants.setdefault(tenant, _Tenant())
            known.ttft.append(ttft)
            known.num_good += good
        if self.finished == self._warm_up:
            self._begin(end)

    def _halve_timeline(self) -> None:
        points = self._timeline
        if len(points) % 2:
            points.append([0.0, 0.0, 0.0])
        self._timeline = [
            [mine + other for mine, other in zip(points[index], points[index + 1], strict=True)]
            for index in range(0, len(points), 2)
        ]
        self._interval *= 2

    def result(self, now: float) -> dict[str, Any]:
        """All figures of a simulation that ended at `now`. Times in seconds, shares in percent."""
        duration = now - self._start
        busy = self._busy or 1.0
        pool = busy * self._num_slots
        whole = (self._allocated or 1.0) if self._of_allocated else pool
        return {
            "finished": self.finished,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "refused": self.refused,
            "duration_s": duration,
            "busy_s": self._busy,
            "steps": self.num_steps,
            "generated_tokens": self.num_tokens,
            "requests_per_s": self.finished / duration if duration else 0.0,
            "tokens_per_s": self.num_tokens / duration if duration else 0.0,
            "goodput_per_s": self._good / duration if duration else 0.0,
            "goodput_pct": 100 * self._good / self.finished if self.finished else 0.0,
            "mean_batch": self._batch / busy,
            "peak_batch": self._peak_batch,
            "token_states_pct": 100 * self._filled / whole,
            "reservation_pct": 100 * self._reserved / whole,
            "internal_pct": 100 * self._internal / whole,
            "external_pct": 100 * (whole - self._allocated) / whole if self._allocated else 0.0,
            "token_states_of_pool_pct": 100 * self._filled / pool,
            "saved_by_sharing_pct": 100 * self._saved / (self._allocated + self._saved) if self._allocated else 0.0,
            **spread_of("normalized_latency", self._normalized),
            **spread_of("latency", self._latency),
            **spread_of("ttft", self._ttft),
            "ttft_max": max(self._ttft, default=None),
            **{f"tbt_p{percent}": self.gaps.quantile(percent) for percent in (50, 90, 99)},
            "tenants": {
                name: {
                    "finished": len(tenant.ttft),
                    "goodput_pct": 100 * tenant.num_good / len(tenant.ttft),
                    **spread_of("ttft", tenant.ttft),
                }
                for name, tenant in self._tenants.items()
            },
            "timeline": [
                {
                    "time": index * self._interval,
                    "batch": batch / seconds,
                    "token_states_pct": 100 * filled / seconds / self._num_slots,
                }
                for index, (seconds, batch, filled) in enumerate(self._timeline)
                if seconds
            ],
        }


def spread_of(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles as `name`_mean, _p50, _p90 and _p99; None if there are no values."""
    ordered = sorted(values)
    figures: dict[str, float | None] = {f"{name}_mean": statistics.fmean(ordered) if ordered else None}
    for percent in (50, 90, 99):
        figures[f"{name}_p{percent}"] = percentile(ordered, percent) if ordered else None
    return figures


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ordered values are, interpolated."""
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
