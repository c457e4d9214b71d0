"""Measures: quantiles against sorted values, averages against sums, and memory that does not grow."""

import random

import pytest

from quire.simulation.measures import BUCKETS_PER_OCTAVE, MAX_TIMELINE, GapHistogram, Measures


def test_quantiles_are_right_to_a_percent() -> None:
    draw = random.Random(1)
    values = [draw.lognormvariate(-3, 1.5) for _ in range(5001)]
    histogram = GapHistogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for percent in (1, 50, 90, 99):
        exact = values[round(percent / 100 * 5000)]
        assert histogram.quantile(percent) == pytest.approx(exact, rel=1.5 / BUCKETS_PER_OCTAVE)
    assert GapHistogram().quantile(50) is None


def test_nothing_took_no_time() -> None:
    histogram = GapHistogram()
    histogram.add(0.0, 3)
    histogram.add(1.0)
    assert histogram.quantile(50) == 0.0
    assert histogram.quantile(99) == pytest.approx(1.0, rel=0.02)


def test_steps_weigh_by_their_time_and_shares_add_up() -> None:
    measures = Measures(100, of_allocated=False, ttft_limit=1.0, tbt_limit=0.1)
    measures.step(1.0, 1.0, 2, 10, 20, 30, 60, 0)
    measures.step(4.0, 3.0, 6, 50, 0, 10, 60, 0)
    figures = measures.result(4.0)
    assert figures["mean_batch"] == 5.0
    assert figures["token_states_pct"] == 40.0
    assert figures["reservation_pct"] == 5.0
    assert figures["internal_pct"] == 15.0
    assert figures["external_pct"] == 40.0
    paged = Measures(100, of_allocated=True, ttft_limit=1.0, tbt_limit=0.1)
    paged.step(1.0, 1.0, 2, 30, 0, 30, 60, 20)
    figures = paged.result(1.0)
    assert (figures["token_states_pct"], figures["internal_pct"], figures["external_pct"]) == (50.0, 50.0, 0.0)
    assert figures["token_states_of_pool_pct"] == 30.0
    assert figures["saved_by_sharing_pct"] == 25.0


def test_goodput_counts_who_met_both_limits() -> None:
    measures = Measures(1, of_allocated=True, ttft_limit=1.0, tbt_limit=0.1)
    measures.request_finished(0.0, 1.0, 1.5, 6)
    measures.request_finished(0.0, 1.1, 1.2, 6)
    measures.request_finished(0.0, 0.5, 1.1, 6)
    measures.request_finished(2.0, 2.5, 2.5, 1)
    figures = measures.result(10.0)
    assert figures["goodput_per_s"] == 0.2
    assert figures["ttft_p50"] == pytest.approx(0.75)
    assert figures["normalized_latency_mean"] == pytest.approx((1.5 / 6 + 1.2 / 6 + 1.1 / 6 + 0.5) / 4)


def test_the_timeline_is_bounded_and_loses_nothing() -> None:
    measures = Measures(10, of_allocated=True, ttft_limit=1.0, tbt_limit=0.1)
    for step in range(1, 5001):
        measures.step(step * 7.0, 7.0, 3, 5, 0, 0, 10, 0)
    timeline = measures.result(35_000.0)["timeline"]
    assert MAX_TIMELINE / 2 < len(timeline) <= MAX_TIMELINE
    assert {point["batch"] for point in timeline} == {3.0}
    assert {point["token_states_pct"] for point in timeline} == {50.0}
    assert timeline[-1]["time"] <= 35_000


def test_a_run_without_a_step_has_figures() -> None:
    figures = Measures(10, of_allocated=False, ttft_limit=1.0, tbt_limit=0.1).result(0.0)
    assert figures["finished"] == 0
    assert figures["ttft_p50"] is None


def test_nothing_counts_before_the_warm_up_is_over() -> None:
    measures = Measures(10, of_allocated=True, ttft_limit=1.0, tbt_limit=1.0, warm_up=2)
    for now in (1.0, 2.0):
        measures.step(now, 1.0, 9, 9, 0, 0, 9, 0)
        measures.num_tokens += 9
        measures.request_finished(0.0, now, now, 1)
    measures.step(4.0, 2.0, 3, 3, 0, 0, 6, 0)
    measures.num_tokens += 4
    measures.request_finished(2.0, 3.0, 4.0, 1)
    figures = measures.result(4.0)
    assert (figures["steps"], figures["finished"], figures["duration_s"], figures["mean_batch"]) == (1, 1, 2.0, 3.0)
    assert (figures["tokens_per_s"], figures["ttft_p50"]) == (2.0, 1.0)
