"""Metrics: what the engine and its front count, for Prometheus.

A metric that vLLM has too has two names, `quire:…` and `vllm:…`: by the latter dashboards, autoscalers and routers
already ask.
Counts of the engine come as snapshots (`record_stats`); what befalls single requests as it happens (`observe_…`).
"""

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quire.outputs import EngineStats, RequestMetrics, TierStats

_OWN, _ALIAS = "quire:", "vllm:"
_WITHOUT_ALIAS = frozenset(
    {
        "num_kv_blocks",
        "num_used_kv_blocks",
        "num_named_free_kv_blocks",
        "num_pinned_kv_blocks",
        "kv_slots_filled",
        "kv_slots_allocated",
        "kv_slots_shared",
        "kv_waste_perc",
        "predicted_output_tokens",
        "predicted_kv_cache_usage_perc",
        "predicted_queue_seconds",
        "steps",
        "kv_block_evictions",
        "kv_block_copies",
        "grammar_cache_grammars",
        "grammar_cache_bytes",
        "prefix_cache_hits_by_origin",
        "prefix_cache_misses",
        "kv_tier_blocks",
        "kv_tier_bytes",
        "kv_tier_stopped",
        "kv_tier_hits",
        "kv_tier_saved_blocks",
        "kv_tier_loaded_blocks",
        "kv_tier_saved_bytes",
        "kv_tier_loaded_bytes",
        "kv_tier_dropped_blocks",
        "kv_tier_evicted_blocks",
        "kv_tier_corrupt_blocks",
        "kv_tier_recomputed_blocks",
    }
)
"""What vLLM does not count."""
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_BETWEEN_TOKENS = (
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_PHASE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)
_PREEMPTIONS = (0, 1, 2, 3, 5, 10, 20)


_Metric = TypeVar("_Metric", Gauge, Counter)


class Metrics:
    """All metrics of one process, in a registry of their own. Not safe for threads that write at the same time."""

    def __init__(self, model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self.content_type = CONTENT_TYPE_LATEST
        self._labels = {"model_name": model_name, "engine": "0"}
        self._latest = EngineStats()
        self._published = EngineStats()
        self._described_pool = False
        ProcessCollector(registry=self.registry)

        self._running = self._gauge("num_requests_running", "Requests that hold memory")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for memory or a place")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1")
        self._blocks = self._gauge("num_kv_blocks", "KV blocks in the pool")
        self._used_blocks = self._gauge("num_used_kv_blocks", "KV blocks in use")
        self._named_free_blocks = self._gauge("num_named_free_kv_blocks", "Free KV blocks that a prefix may still find")
        self._pinned_blocks = self._gauge("num_pinned_kv_blocks", "KV blocks that registered prefixes hold")
        self._filled = self._gauge("kv_slots_filled", "Token slots that hold KV")
        self._allocated = self._gauge("kv_slots_allocated", "Token slots of the blocks in use")
        self._shared = self._gauge("kv_slots_shared", "Token slots that sharing saved")
        self._waste = self._gauge("kv_waste_perc", "Share of the allocated slots that hold no token, 0 to 1")
        self._predicted_tokens = self._gauge(
            "predicted_output_tokens", "Tokens that requests in hand will still generate"
        )
        self._predicted_usage = self._gauge(
            "predicted_kv_cache_usage_perc", "The most of the pool that running requests will use, 1: all of it"
        )
        self._predicted_queue = self._gauge(
            "predicted_queue_seconds", "Until all requests that wait now have started; NaN while it cannot be known"
        )

        self._grammars = self._gauge("grammar_cache_grammars", "Compiled grammars that are kept")
        self._grammar_bytes = self._gauge("grammar_cache_bytes", "Bytes they took when they were compiled")

        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("num_preemptions", "Preempted requests")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self._generated_tokens = self._counter("generation_tokens", "Tokens generated")
        self._steps = self._counter("steps", "Steps of the engine")
        self._evictions = self._counter("kv_block_evictions", "Named blocks whose space was taken")
        self._copies = self._counter("kv_block_copies", "Blocks copied on write")
        self._hits_by_origin = self._labelled(
            Counter, "prefix_cache_hits_by_origin", "The same by where their KV was: device, host, disk", "origin"
        )
        self._misses = self._labelled(
            Counter, "prefix_cache_misses", "Prompts not found as a whole, by why the first block was not", "reason"
        )
        self._drafts = self._counter("spec_decode_num_drafts", "Runs of drafted tokens")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafted tokens computed")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that held")
        self._tier_gauges = [
            (self._labelled(Gauge, name, about, "tier"), attrgetter(field))
            for name, about, field in (
                ("kv_tier_blocks", "KV blocks in a tier below the pool", "num_blocks"),
                ("kv_tier_bytes", "Bytes they take", "num_bytes"),
                ("kv_tier_stopped", "1 if the tier takes no more blocks, because writing failed", "stopped"),
            )
        ]
        self._tier_counters = [
            (self._labelled(Counter, name, about, "tier"), attrgetter(field))
            for name, about, field in (
                ("kv_tier_hits", "Tokens loaded from a tier instead of computed", "total_hits"),
                ("kv_tier_saved_blocks", "KV blocks saved to a tier", "total_saved"),
                ("kv_tier_loaded_blocks", "KV blocks loaded from a tier", "total_loaded"),
                ("kv_tier_saved_bytes", "Bytes saved to a tier", "total_saved_bytes"),
                ("kv_tier_loaded_bytes", "Bytes loaded from a tier", "total_loaded_bytes"),
                ("kv_tier_dropped_blocks", "KV blocks that were not saved", "total_dropped"),
                ("kv_tier_evicted_blocks", "KV blocks a tier forgot to make room", "total_evicted"),
                ("kv_tier_corrupt_blocks", "KV blocks that were altered or truncated when read", "total_corrupt"),
                ("kv_tier_recomputed_blocks", "KV blocks computed, since loading is slower", "total_recomputed"),
            )
        ]
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens per step, mean of a snapshot", _TOKENS)
        self._endings = Counter(
            f"{_OWN}request_success",
            "Samples by how they ended",
            [*self._labels, "finished_reason"],
            registry=None,
        )
        self._add(self._endings)

        seconds = self._histogram
        self._first_token = seconds("time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN)
        self._between = seconds("inter_token_latency_seconds", "Between two tokens of a request", _BETWEEN_TOKENS)
        self._per_token = seconds(
            "request_time_per_output_token_seconds", "Mean time per token after the first", _BETWEEN_TOKENS
        )
        self._whole = seconds("e2e_request_latency_seconds", "From arrival to the last token", _PHASE)
        self._queued = seconds("request_queue_time_seconds", "From arrival to the first step", _PHASE)
        self._inference = seconds("request_inference_time_seconds", "From the first step to the last token", _PHASE)
        self._prefill = seconds("request_prefill_time_seconds", "From the first step to the first token", _PHASE)
        self._decode = seconds("request_decode_time_seconds", "From the first token to the last", _PHASE)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._request_generated = self._histogram("request_generation_tokens", "Tokens generated per request", _TOKENS)
        self._request_n = self._histogram("request_params_n", "Samples asked for", _SAMPLES)
        self._request_max = self._histogram("request_params_max_tokens", "Tokens allowed", _TOKENS)
        self._request_preemptions = self._histogram("request_num_preemptions", "Preemptions of a request", _PREEMPTIONS)

        self._http = Counter("http_requests", "HTTP requests", ["handler", "method", "status"], registry=self.registry)
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Until the last byte of the answer was handed over",
            ["handler", "method"],
            buckets=_PHASE,
            registry=None,
        )
        self._add(self._http)
        self._add(self._http_seconds)

    def record_stats(self, stats: EngineStats) -> None:
        """Take note of a snapshot; it costs next to nothing, the rest is done when somebody asks."""
        if stats.total_steps < self._latest.total_steps:  # a new engine process, which counts from 0 again
            self._publish()
            self._published = self._latest = EngineStats()
        if steps := stats.total_steps - self._latest.total_steps:
            tokens = stats.total_prompt_tokens + stats.total_generated_tokens
            tokens -= self._latest.total_prompt_tokens + self._latest.total_generated_tokens
            self._step_tokens.observe(tokens / steps)
        self._latest = stats

    def observe_token_gap(self, seconds: float) -> None:
        """Time between two tokens of one sample."""
        self._between.observe(seconds)

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
        self._request_prompt.observe(num_prompt_tokens)
        self._request_generated.observe(num_generated_tokens)
        self._request_n.observe(n)
        self._request_preemptions.observe(times.num_preemptions)
        if max_tokens is not None:
            self._request_max.observe(max_tokens)
        arrival, scheduled = times.arrival_time, times.first_scheduled_time
        first, last = times.first_token_time, times.last_token_time
        if scheduled is not None:
            self._queued.observe(scheduled - arrival)
        if scheduled is None or first is None or last is None:
            return
        self._first_token.observe(first - arrival)
        self._whole.observe(last - arrival)
        self._inference.observe(last - scheduled)
        self._prefill.observe(first - scheduled)
        self._decode.observe(last - first)
        if num_generated_tokens > n:
            self._per_token.observe((last - first) * n / (num_generated_tokens - n))

    def observe_http(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `handler` is the path of the route."""
        method = method if method in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self._http.labels(handler, method, status).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        self._publish()
        return generate_latest(self.registry)

    def _publish(self) -> None:
        """Bring gauges and counters to the latest snapshot."""
        stats, before = self._latest, self._published
        self._published = stats
        for gauge, value in (
            (self._running, stats.num_running),
            (self._waiting, stats.num_waiting),
            (self._usage, stats.kv_cache_usage),
            (self._blocks, stats.num_blocks),
            (self._used_blocks, stats.num_used_blocks),
            (self._named_free_blocks, stats.num_cached_free_blocks),
            (self._pinned_blocks, stats.num_pinned_blocks),
            (self._filled, stats.num_filled_slots),
            (self._allocated, stats.num_allocated_slots),
            (self._shared, stats.num_shared_slots),
            (self._waste, stats.waste),
            (self._predicted_tokens, _or_nan(stats.predicted_output_tokens)),
            (self._predicted_usage, _or_nan(stats.predicted_kv_cache_usage)),
            (self._predicted_queue, _or_nan(stats.predicted_queue_seconds)),
            (self._grammars, stats.num_grammars),
            (self._grammar_bytes, stats.num_grammar_bytes),
        ):
            gauge.set(value)
        for counter, now, then in (
            (self._prefix_queries, stats.total_prefix_queries, before.total_prefix_queries),
            (self._prefix_hits, stats.total_prefix_hits, before.total_prefix_hits),
            (self._preemptions, stats.total_preemptions, before.total_preemptions),
            (self._prompt_tokens, stats.total_prompt_tokens, before.total_prompt_tokens),
            (self._generated_tokens, stats.total_generated_tokens, before.total_generated_tokens),
            (self._steps, stats.total_steps, before.total_steps),
            (self._evictions, stats.total_evictions, before.total_evictions),
            (self._copies, stats.total_block_copies, before.total_block_copies),
            (self._drafts, stats.total_drafts, before.total_drafts),
            (self._draft_tokens, stats.total_draft_tokens, before.total_draft_tokens),
            (self._accepted_tokens, stats.total_accepted_tokens, before.total_accepted_tokens),
        ):
            counter.inc(max(0, now - then))
        for origin, hits in stats.prefix_hits.items():
            more = hits - before.prefix_hits.get(origin, 0)
            self._hits_by_origin.labels(**self._labels, origin=origin).inc(max(0, more))
        for reason, misses in stats.prefix_misses.items():
            more = misses - before.prefix_misses.get(reason, 0)
            self._misses.labels(**self._labels, reason=reason).inc(max(0, more))
        for name, tier in stats.tiers.items():
            tier_before = before.tiers.get(name, TierStats())
            for tier_gauge, value_of in self._tier_gauges:
                tier_gauge.labels(**self._labels, tier=name).set(value_of(tier))
            for tier_counter, value_of in self._tier_counters:
                more = value_of(tier) - value_of(tier_before)
                tier_counter.labels(**self._labels, tier=name).inc(max(0, more))
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
        self._add(info)
        self._described_pool = True

    def _gauge(self, name: str, about: str) -> Gauge:
        metric = Gauge(_OWN + name, about, [*self._labels], registry=None)
        self._add(metric)
        return metric.labels(**self._labels)

    def _labelled(self, kind: type[_Metric], name: str, about: str, label: str) -> _Metric:
        metric = kind(_OWN + name, about, [*self._labels, label], registry=None)
        self._add(metric)
        return metric

    def _counter(self, name: str, about: str) -> Counter:
        metric = Counter(_OWN + name, about, [*self._labels], registry=None)
        self._add(metric)
        return metric.labels(**self._labels)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(_OWN + name, about, [*self._labels], buckets=buckets, registry=None)
        self._add(metric)
        return metric.labels(**self._labels)

    def _add(self, metric: MetricWrapperBase) -> None:
        self.registry.register(_Named(metric))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class _Named(Collector):
    """Reports a metric under its names, and without the times of creation, which would double what is scraped."""

    def __init__(self, metric: MetricWrapperBase) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        for family in self._metric.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
            own_name = family.name.removeprefix(_OWN)
            if own_name not in _WITHOUT_ALIAS and own_name != family.name:
                alias = Metric(_ALIAS + own_name, family.documentation, family.type, family.unit)
                alias.samples = [sample._replace(name=sample.name.replace(_OWN, _ALIAS)) for sample in family.samples]
                yield alias
