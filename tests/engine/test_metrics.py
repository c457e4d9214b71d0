"""Metrics: names under which others query them, and counters that only grow."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.engine.metrics import Metrics
from quire.memory_stats import TierStats
from quire.outputs import EngineStats, RequestMetrics

LABELS = '{engine="0",model_name="m"}'


def value(metrics: Metrics, name: str, labels: str = LABELS) -> float:
    for line in metrics.render().decode().splitlines():
        if line.startswith(f"{name}{labels} "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no {name}{labels}")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("m")


VLLM_NAMES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total"),
    *("iteration_tokens_total_count", "request_prompt_tokens_count", "request_generation_tokens_count"),
    *("request_params_n_count", "request_params_max_tokens_count", "time_to_first_token_seconds_count"),
    *(
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
    ),
    *("request_inference_time_seconds_count", "request_prefill_time_seconds_count"),
    *("request_decode_time_seconds_count", "request_num_preemptions_count"),
)


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_both_names(metrics: Metrics, name: str) -> None:
    assert value(metrics, f"quire:{name}") == value(metrics, f"vllm:{name}")


def test_gauges_follow_the_latest_snapshot(metrics: Metrics) -> None:
    metrics.record_stats(EngineStats(num_running=5, num_waiting=9, num_blocks=10, num_used_blocks=4, total_steps=1))
    metrics.record_stats(EngineStats(num_running=3, num_blocks=10, num_used_blocks=5, total_steps=2))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.5
    assert 'vllm:cache_config_info{block_size="0"' in metrics.render().decode()


def test_predictions_that_cannot_be_made_are_not_numbers(metrics: Metrics) -> None:
    metrics.record_stats(EngineStats(total_steps=1, predicted_queue_seconds=2.5, predicted_kv_cache_usage=1.25))
    assert value(metrics, "quire:predicted_queue_seconds") == 2.5
    assert value(metrics, "quire:predicted_kv_cache_usage_perc") == 1.25
    assert math.isnan(value(metrics, "quire:predicted_output_tokens"))


def test_counters_survive_a_restart_of_the_engine(metrics: Metrics) -> None:
    metrics.record_stats(EngineStats(total_steps=10, total_generated_tokens=100))
    assert value(metrics, "vllm:generation_tokens_total") == 100
    metrics.record_stats(EngineStats(total_steps=20, total_generated_tokens=150))
    metrics.record_stats(EngineStats(total_steps=1, total_generated_tokens=7))
    metrics.record_stats(EngineStats(total_steps=2, total_generated_tokens=9))
    assert value(metrics, "vllm:generation_tokens_total") == 159
    assert value(metrics, "vllm:generation_tokens_total") == 159


def test_prefix_hits_by_origin_and_misses_by_reason(metrics: Metrics) -> None:
    def by(label: str, value: str) -> str:
        return LABELS.replace('m"}', f'm",{label}="{value}"}}')

    metrics.record_stats(EngineStats(total_steps=1, prefix_hits={"device": 32}, prefix_misses={"salt": 1}))
    metrics.record_stats(EngineStats(total_steps=2, prefix_hits={"device": 48, "disk": 16}, prefix_misses={"salt": 3}))
    assert value(metrics, "quire:prefix_cache_hits_by_origin_total", by("origin", "device")) == 48
    metrics.record_stats(EngineStats(total_steps=1, prefix_hits={"disk": 64}, prefix_misses={"evicted": 2}))
    assert value(metrics, "quire:prefix_cache_hits_by_origin_total", by("origin", "disk")) == 80
    assert value(metrics, "quire:prefix_cache_misses_total", by("reason", "salt")) == 3
    assert value(metrics, "quire:prefix_cache_misses_total", by("reason", "evicted")) == 2
    assert "vllm:prefix_cache_misses" not in metrics.render().decode()


def test_a_request(metrics: Metrics) -> None:
    times = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=10.5,
        first_token_time=11.0,
        last_token_time=13.0,
        num_preemptions=1,
    )
    metrics.observe_request(
        times, finish_reasons=["stop"], num_prompt_tokens=7, num_generated_tokens=5, n=1, max_tokens=None
    )
    for name, seconds in (
        ("time_to_first_token_seconds", 1.0),
        ("e2e_request_latency_seconds", 3.0),
        ("request_queue_time_seconds", 0.5),
        ("request_inference_time_seconds", 2.5),
        ("request_prefill_time_seconds", 0.5),
        ("request_decode_time_seconds", 2.0),
        ("request_time_per_output_token_seconds", 0.5),
    ):
        assert value(metrics, f"vllm:{name}_sum") == seconds
    assert value(metrics, "vllm:request_params_max_tokens_count") == 0
    ended = '{engine="0",finished_reason="stop",model_name="m"}'
    assert value(metrics, "vllm:request_success_total", ended) == 1


def test_a_request_that_never_ran(metrics: Metrics) -> None:
    metrics.observe_request(
        RequestMetrics(1.0),
        finish_reasons=["abort"],
        num_prompt_tokens=1,
        num_generated_tokens=0,
        n=1,
        max_tokens=1,
    )
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0


def test_no_times_of_creation(metrics: Metrics) -> None:
    metrics.observe_http(handler="/health", method="GET", status=200, seconds=0.1)
    assert "_created" not in metrics.render().decode()


def test_each_metric_is_described_once(metrics: Metrics) -> None:
    """promtool refuses a second HELP line for one name."""
    metrics.observe_http(handler="/health", method="GET", status=200, seconds=0.1)
    described = [line.split()[2] for line in metrics.render().decode().splitlines() if line.startswith("# HELP ")]
    assert len(described) == len(set(described)) > 80


def test_the_text_is_valid_for_prometheus(metrics: Metrics) -> None:
    """promtool refuses a second HELP or TYPE line, and a sample that stands outside its family."""
    tiers = {"host": TierStats(num_blocks=1), "disk": TierStats(num_blocks=2)}
    stats = EngineStats(num_blocks=4, block_size=16, total_steps=1, tiers=tiers, prefix_misses={"new": 1})
    metrics.record_stats(stats)
    for status in (200, 404):
        metrics.observe_http(handler="/v1/completions", method="POST", status=status, seconds=0.1)
    text = metrics.render().decode()
    for kind in ("HELP", "TYPE"):
        names = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {kind} ")]
        assert len(names) > 90
        assert len(names) == len(set(names))
    families = list(text_string_to_metric_families(text))
    assert all(family.type != "unknown" and family.documentation for family in families)
    samples = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(samples) == len(set(samples))
    named = [name for family in families for name in {sample.name for sample in family.samples}]
    assert len(named) == len(set(named))
