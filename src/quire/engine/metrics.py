"""Metrics: what the engine and its front count, for Prometheus.

Each metric is one row of a table below: name, help text, and how to read its value. A metric that vLLM has too is
exported under two names, `quire:…` and `vllm:…`: dashboards, autoscalers and routers already ask for the latter. The
engine's counts come as snapshots (`record_stats`); events of single requests as they happen (`observe_…`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quire.engine.fast_histogram import FastHistogram
from quire.memory_stats import TierStats
from quire.outputs import EngineStats, RequestMetrics

_OWN, _ALIAS = "quire:", "vllm:"
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_PHASE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)
_PREEMPTIONS = (0, 1, 2, 3, 5, 10, 20)

_Source = TypeVar("_Source")
_Kind = TypeVar("_Kind", Gauge, Counter)


class _EndedRequest(NamedTuple):
    """A request that has ended, as the histograms read it."""

    times: RequestMetrics
    num_prompt_tokens: int
    num_generated_tokens: int
    n: int
    max_tokens: int | None

    @property
    def ran(self) -> bool:
        """Whether it got a token."""
        times = self.times
        return None not in (times.first_scheduled_time, times.first_token_time, times.last_token_time)

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds per token and sample after the first."""
        if self.num_generated_tokens <= self.n:
            return None
        seconds = _between("first_token_time", "last_token_time")(self)
        return None if seconds is None else seconds * self.n / (self.num_generated_tokens - self.n)


def _between(begin: str, end: str) -> Callable[[_EndedRequest], float | None]:
    """Reads the seconds between two of `RequestMetrics`' times; None for a request that never ran."""

    def read(request: _EndedRequest) -> float | None:
        if not request.ran:
            return None
        seconds: float = getattr(request.times, end) - getattr(request.times, begin)
        return seconds

    return read


def _queue_time(request: _EndedRequest) -> float | None:
    scheduled = request.times.first_scheduled_time
    return None if scheduled is None else scheduled - request.times.arrival_time


class _Row(NamedTuple, Generic[_Source]):
    """One gauge or counter."""

    name: str
    about: str
    read: Callable[[_Source], float | None]
    """Its value in a snapshot; None: not known."""
    in_vllm: bool = False
    """vLLM exports a metric of this name."""


class _HistogramRow(NamedTuple):
    """One histogram of ended requests; vLLM exports all of them."""

    name: str
    about: str
    buckets: Sequence[float]
    read: Callable[[_EndedRequest], float | None]
    """None: not observed."""


_GAUGES: tuple[_Row[EngineStats], ...] = (
    _Row("num_requests_running", "Requests that hold memory", attrgetter("num_running"), True),
    _Row("num_requests_waiting", "Requests that wait for memory or a place", attrgetter("num_waiting"), True),
    _Row("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", attrgetter("kv_cache_usage"), True),
    _Row("num_kv_blocks", "KV blocks in the pool", attrgetter("num_blocks")),
    _Row("num_used_kv_blocks", "KV blocks in use", attrgetter("num_used_blocks")),
    _Row(
        "num_named_free_kv_blocks",
        "Free KV blocks that a prefix may still find",
        attrgetter("num_cached_free_blocks"),
    ),
    _Row("num_pinned_kv_blocks", "KV blocks that registered prefixes hold", attrgetter("num_pinned_blocks")),
    _Row("kv_slots_filled", "Token slots that hold KV", attrgetter("num_filled_slots")),
    _Row("kv_slots_allocated", "Token slots of the blocks in use", attrgetter("num_allocated_slots")),
    _Row("kv_slots_shared", "Token slots that sharing saved", attrgetter("num_shared_slots")),
    _Row("kv_waste_perc", "Share of the allocated slots that hold no token, 0 to 1", attrgetter("waste")),
    _Row(
        "predicted_output_tokens",
        "Tokens that requests in hand will still generate",
        attrgetter("predicted_output_tokens"),
    ),
    _Row(
        "predicted_kv_cache_usage_perc",
        "The most of the pool that running requests will use, 1: all of it",
        attrgetter("predicted_kv_cache_usage"),
    ),
    _Row(
        "predicted_queue_seconds",
        "Until all requests that wait now have started; NaN while it cannot be known",
        attrgetter("predicted_queue_seconds"),
    ),
    _Row("grammar_cache_grammars", "Compiled grammars that are kept", attrgetter("num_grammars")),
    _Row("grammar_cache_bytes", "Bytes they took when they were compiled", attrgetter("num_grammar_bytes")),
)
_COUNTERS: tuple[_Row[EngineStats], ...] = (
    _Row(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache",
        attrgetter("total_prefix_queries"),
        True,
    ),
    _Row("prefix_cache_hits", "Prompt tokens found in the prefix cache", attrgetter("total_prefix_hits"), True),
    _Row("num_preemptions", "Preempted requests", attrgetter("total_preemptions"), True),
    _Row(
        "prompt_tokens",
        "Prompt tokens, computed or found in the prefix cache",
        lambda stats: stats.total_prompt_tokens + stats.total_prefix_hits,
        True,
    ),
    _Row("generation_tokens", "Tokens generated", attrgetter("total_generated_tokens"), True),
    _Row("steps", "Steps of the engine", attrgetter("total_steps")),
    _Row("kv_block_evictions", "Blocks of the prefix cache whose space was taken", attrgetter("total_evictions")),
    _Row("kv_block_copies", "Blocks copied on write", attrgetter("total_block_copies")),
    _Row("spec_decode_num_drafts", "Runs of drafted tokens", attrgetter("total_drafts"), True),
    _Row("spec_decode_num_draft_tokens", "Drafted tokens computed", attrgetter("total_draft_tokens"), True),
    _Row("spec_decode_num_accepted_tokens", "Drafted tokens that held", attrgetter("total_accepted_tokens"), True),
)
_STATE_GAUGES: tuple[_Row[EngineStats], ...] = (
    _Row("state_slots", "Slots for recurrent states", attrgetter("states.num_slots")),
    _Row("state_slots_running", "Slots of running sequences", attrgetter("states.num_running")),
    _Row("state_snapshots", "Recurrent states that prompts can begin with", attrgetter("states.num_snapshots")),
)
_STATE_COUNTERS: tuple[_Row[EngineStats], ...] = (
    _Row("state_snapshots_saved", "Snapshots of recurrent states kept", attrgetter("states.total_saved")),
    _Row("state_snapshots_evicted", "Snapshots whose slot was needed", attrgetter("states.total_evicted")),
    _Row("state_snapshot_hits", "Sequences that started from a snapshot", attrgetter("states.total_hits")),
)
_TIER_GAUGES: tuple[_Row[TierStats], ...] = (
    _Row("kv_tier_blocks", "KV blocks in a tier below the pool", attrgetter("num_blocks")),
    _Row("kv_tier_bytes", "Bytes they take", attrgetter("num_bytes")),
    _Row("kv_tier_stopped", "1 if the tier takes no more blocks, because writing failed", attrgetter("stopped")),
)
_TIER_COUNTERS: tuple[_Row[TierStats], ...] = (
    _Row("kv_tier_hits", "Tokens loaded from a tier instead of computed", attrgetter("total_hits")),
    _Row("kv_tier_saved_blocks", "KV blocks saved to a tier", attrgetter("total_saved")),
    _Row("kv_tier_loaded_blocks", "KV blocks loaded from a tier", attrgetter("total_loaded")),
    _Row("kv_tier_saved_bytes", "Bytes saved to a tier", attrgetter("total_saved_bytes")),
    _Row("kv_tier_loaded_bytes", "Bytes loaded from a tier", attrgetter("total_loaded_bytes")),
    _Row("kv_tier_dropped_blocks", "KV blocks that were not saved", attrgetter("total_dropped")),
    _Row("kv_tier_evicted_blocks", "KV blocks a tier evicted to make room", attrgetter("total_evicted")),
    _Row("kv_tier_corrupt_blocks", "KV blocks that were altered or truncated when read", attrgetter("total_corrupt")),
    _Row("kv_tier_recomputed_blocks", "KV blocks computed, since loading is slower", attrgetter("total_recomputed")),
)
_HISTOGRAMS = (
    _HistogramRow(
        "time_to_first_token_seconds",
        "From arrival to the first token",
        _FIRST_TOKEN,
        _between("arrival_time", "first_token_time"),
    ),
    _HistogramRow(
        "request_time_per_output_token_seconds",
        "Mean time per token after the first",
        _BETWEEN_TOKENS,
        attrgetter("time_per_token"),
    ),
    _HistogramRow(
        "e2e_request_latency_seconds",
        "From arrival to the last token",
        _PHASE,
        _between("arrival_time", "last_token_time"),
    ),
    _HistogramRow("request_queue_time_seconds", "From arrival to the first step", _PHASE, _queue_time),
    _HistogramRow(
        "request_inference_time_seconds",
        "From the first step to the last token",
        _PHASE,
        _between("first_scheduled_time", "last_token_time"),
    ),
    _HistogramRow(
        "request_prefill_time_seconds",
        "From the first step to the first token",
        _PHASE,
        _between("first_scheduled_time", "first_token_time"),
    ),
    _HistogramRow(
        "request_decode_time_seconds",
        "From the first token to the last",
        _PHASE,
        _between("first_token_time", "last_token_time"),
    ),
    _HistogramRow("request_prompt_tokens", "Prompt tokens of a request", _TOKENS, attrgetter("num_prompt_tokens")),
    _HistogramRow(
        "request_generation_tokens", "Tokens generated per request", _TOKENS, attrgetter("num_generated_tokens")
    ),
    _HistogramRow("request_params_n", "Samples asked for", _SAMPLES, attrgetter("n")),
    _HistogramRow("request_params_max_tokens", "Tokens allowed", _TOKENS, attrgetter("max_tokens")),
    _HistogramRow(
        "request_num_preemptions", "Preemptions of a request", _PREEMPTIONS, attrgetter("times.num_preemptions")
    ),
)


class Metrics(Collector):
    """All metrics of one process, in their own registry. Not safe for threads that write at the same time."""

    def __init__(self, model_name: str = "", engine: int = 0) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._latest = EngineStats()
        self._published = EngineStats()
        self._described_pool = False
        ProcessCollector(registry=self.registry)
        self._gauges = [
            (self._add_row(Gauge, row).labels(**self._labels), row.read) for row in (*_GAUGES, *_STATE_GAUGES)
        ]
        counters = (*_COUNTERS, *_STATE_COUNTERS)
        self._counters = [(self._add_row(Counter, row).labels(**self._labels), row.read) for row in counters]
        self._tier_gauges = [(self._add_row(Gauge, row, "tier"), row.read) for row in _TIER_GAUGES]
        self._tier_counters = [(self._add_row(Counter, row, "tier"), row.read) for row in _TIER_COUNTERS]
        self._hits_by_origin = self._add_counter(
            "prefix_cache_hits_by_origin", "prefix_cache_hits by where their KV was: device, host, disk", "origin"
        )
        self._misses = self._add_counter(
            "prefix_cache_misses", "Prompts not found as a whole, by why the first block was not", "reason"
        )
        self._endings = self._add_counter(
            "request_success", "Samples by how they ended", "finished_reason", in_vllm=True
        )
        self._step_tokens = self._add_histogram(
            "iteration_tokens_total", "Tokens per step, mean of a snapshot", _TOKENS
        )
        self._token_gaps = FastHistogram(
            _OWN + "inter_token_latency_seconds", "Between two tokens of a request", self._labels, _BETWEEN_TOKENS
        )
        self._register(self._token_gaps, in_vllm=True)
        self.observe_token_gap = self._token_gaps.observe
        """Takes the seconds between two tokens of one sample."""
        self._histograms = [(self._add_histogram(row.name, row.about, row.buckets), row.read) for row in _HISTOGRAMS]
        self._http = Counter("http_requests", "HTTP requests", ["handler", "method", "status"], registry=None)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Until the last byte of the answer was handed over",
            ["handler", "method"],
            buckets=_PHASE,
            registry=None,
        )
        self._register(self._http, in_vllm=False)
        self._register(self._http_seconds, in_vllm=False)

    def record_stats(self, stats: EngineStats) -> None:
        """Keep a snapshot. This is cheap: metrics are updated when they are rendered."""
        if stats.total_steps < self._latest.total_steps:  # a new engine process, which counts from 0 again
            self._publish()
            self._published = self._latest = EngineStats()
        if steps := stats.total_steps - self._latest.total_steps:
            tokens = stats.total_prompt_tokens + stats.total_generated_tokens
            tokens -= self._latest.total_prompt_tokens + self._latest.total_generated_tokens
            self._step_tokens.observe(tokens / steps)
        self._latest = stats

    def observe_request(
        self,
        times: RequestMetrics,
        *,
        finish_reasons: Sequence[str],
        num_prompt_tokens: int,
        num_generated_tokens: int,
        n: int,
        max_tokens: int | None,
    ) -> None:
        """Count a request that has ended; `finish_reasons` has one entry per sample."""
        for reason in finish_reasons:
            self._endings.labels(**self._labels, finished_reason=reason).inc()
        request = _EndedRequest(times, num_prompt_tokens, num_generated_tokens, n, max_tokens)
        for histogram, read in self._histograms:
            value = read(request)
            if value is not None:
                histogram.observe(value)

    def observe_http(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `handler` is the path of the route."""
        method = method if method in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self._http.labels(handler, method, status).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    @property
    def latencies(self) -> dict[str, Histogram | FastHistogram]:
        return {"first_token": self._histograms[0][0], "next_token": self._token_gaps}

    def render(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """All metrics, for prometheus_client."""
        self._publish()
        return self.registry.collect()

    def _publish(self) -> None:
        """Bring gauges and counters to the latest snapshot."""
        stats, before = self._latest, self._published
        self._published = stats
        for gauge, read in self._gauges:
            value = read(stats)
            gauge.set(math.nan if value is None else value)
        for counter, read in self._counters:
            _increase(counter, read(stats), read(before))
        for origin, hits in stats.prefix_hits.items():
            counter = self._hits_by_origin.labels(**self._labels, origin=origin)
            _increase(counter, hits, before.prefix_hits.get(origin, 0))
        for reason, misses in stats.prefix_misses.items():
            counter = self._misses.labels(**self._labels, reason=reason)
            _increase(counter, misses, before.prefix_misses.get(reason, 0))
        for name, tier in stats.tiers.items():
            tier_before = before.tiers.get(name, TierStats())
            for gauge, read_tier in self._tier_gauges:
                gauge.labels(**self._labels, tier=name).set(read_tier(tier) or 0)
            for counter, read_tier in self._tier_counters:
                _increase(counter.labels(**self._labels, tier=name), read_tier(tier), read_tier(tier_before))
        if stats.num_blocks and not self._described_pool:
            self._describe_pool(stats)

    def _describe_pool(self, stats: EngineStats) -> None:
        labels = {
            "block_size": str(stats.block_size),
            "num_gpu_blocks": str(stats.num_blocks),
            "kv_cache_size_tokens": str(stats.num_blocks * stats.block_size),
        }
        info = Gauge(f"{_OWN}cache_config_info", "The KV pool, as labels", [*self._labels, *labels], registry=None)
        info.labels(**self._labels, **labels).set(1)
        self._register(info, in_vllm=True)
        self._described_pool = True

    def _add_row(self, kind: type[_Kind], row: _Row[_Source], *labels: str) -> _Kind:
        metric = kind(_OWN + row.name, row.about, [*self._labels, *labels], registry=None)
        self._register(metric, in_vllm=row.in_vllm)
        return metric

    def _add_counter(self, name: str, about: str, label: str, *, in_vllm: bool = False) -> Counter:
        counter = Counter(_OWN + name, about, [*self._labels, label], registry=None)
        self._register(counter, in_vllm=in_vllm)
        return counter

    def _add_histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(_OWN + name, about, [*self._labels], buckets=buckets, registry=None)
        self._register(histogram, in_vllm=True)
        return histogram.labels(**self._labels)

    def _register(self, metric: MetricWrapperBase | FastHistogram, *, in_vllm: bool) -> None:
        self.registry.register(_Exported(metric, in_vllm=in_vllm))


def _increase(counter: Counter, now: float | None, before: float | None) -> None:
    counter.inc(max(0, (now or 0) - (before or 0)))


class _Exported(Collector):
    """A metric under its names. Leaves out the times of creation, which would double the size of a scrape."""

    def __init__(self, metric: MetricWrapperBase | FastHistogram, *, in_vllm: bool) -> None:
        self._metric = metric
        self._in_vllm = in_vllm

    def collect(self) -> Iterable[Metric]:
        for family in self._metric.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
            if self._in_vllm:
                alias = Metric(family.name.replace(_OWN, _ALIAS), family.documentation, family.type, family.unit)
                alias.samples = [sample._replace(name=sample.name.replace(_OWN, _ALIAS)) for sample in family.samples]
                yield alias
