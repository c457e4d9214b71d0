import pytest

from quire.scheduler.length_curve import MIN_ANSWERS
from tests.scheduler.checked_engine import Engine, new_request

STEP = 0.1
"""Seconds."""


def loaded_engine() -> Engine:
    """Two hundred requests for about 20 tokens each, and rows for eight."""
    engine = Engine(64, 4, max_num_seqs=8, max_num_batched_tokens=32)
    engine.scheduler._clock = lambda: STEP * engine.num_steps
    for number in range(200):
        engine.add(new_request(f"{number}", 4, max_tokens=16 + number % 9))
    return engine


def test_nothing_is_predicted_before_answers_are_known() -> None:
    engine = loaded_engine()
    for _ in range(10):
        engine.step()
    stats = engine.scheduler.stats()
    assert (stats.predicted_output_tokens, stats.predicted_queue_seconds) == (None, None)
    assert stats.predicted_kv_cache_usage is None


def test_predictions_come_true() -> None:
    engine = loaded_engine()
    while len(engine.clients) > 200 - 2 * MIN_ANSWERS:
        engine.step()
        engine.scheduler.stats()
    stats, now = engine.scheduler.stats(), engine.num_steps
    generated = stats.total_generated_tokens
    assert stats.predicted_output_tokens is not None
    assert stats.predicted_queue_seconds is not None
    assert stats.predicted_kv_cache_usage is not None
    most_used = 0
    while engine.scheduler.stats().num_waiting:
        engine.step()
        most_used = max(most_used, engine.scheduler.stats().num_used_blocks)
    assert stats.predicted_queue_seconds == pytest.approx(STEP * (engine.num_steps - now), rel=0.15)
    # Of the requests that ran then, not of those that came while they ran.
    assert 0.6 * most_used / 64 < stats.predicted_kv_cache_usage <= most_used / 64
    engine.run()
    total = engine.scheduler.stats().total_generated_tokens
    assert stats.predicted_output_tokens == pytest.approx(total - generated, rel=0.05)


def test_an_idle_engine_has_nothing_to_come() -> None:
    engine = loaded_engine()
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.predicted_output_tokens, stats.predicted_queue_seconds) == (0, 0.0)
    assert stats.predicted_kv_cache_usage == 0.0
