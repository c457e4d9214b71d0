"""Throughput: the log line, and when a client that was turned away should come back."""

import pytest

from quire.engine import throughput
from quire.engine.throughput import Throughput
from quire.outputs import EngineStats


def test_when_to_come_back_is_what_the_scheduler_predicts() -> None:
    """Ten waiting requests are predicted to start within 30 s. Three of twelve must start to make room in a queue of
    ten."""
    rates = Throughput(None)
    rates.update(EngineStats(num_waiting=10, predicted_queue_seconds=30.0))
    assert rates.retry_after(12, 10) == 9
    rates.update(EngineStats(num_waiting=10))
    assert rates.retry_after(12, 10) == 60, "nothing is predicted, and nothing has finished"
    rates.count_finished(15)
    assert rates.retry_after(12, 10) == 6, "15 finished in 30 s, 3 must"


def test_a_line_only_when_tokens_were_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "LOG_INTERVAL", 0.0)
    lines: list[str] = []
    rates = Throughput(lines.append)
    rates.update(EngineStats(total_prompt_tokens=10, total_generated_tokens=3, num_running=2))
    rates.update(EngineStats(total_prompt_tokens=10, total_generated_tokens=3, num_running=2))
    assert len(lines) == 1
    assert "2 running, 0 waiting" in lines[0]
    rates.restart()
    assert (rates.stats.num_running, rates.stats.total_prompt_tokens) == (0, 10)
    rates.update(EngineStats(total_prompt_tokens=1, total_generated_tokens=1))
    assert "-" not in lines[1]


def test_what_the_engine_has_not_reported_waits_only_if_it_has_a_queue_or_no_place() -> None:
    rates = Throughput(None)
    assert [rates.num_waiting(live, 8) for live in (0, 8, 11)] == [0, 0, 3]
    rates.update(EngineStats(num_running=5))
    assert [rates.num_waiting(live, 8) for live in (5, 8, 11)] == [0, 0, 3]
    rates.update(EngineStats(num_running=5, num_waiting=2))  # no memory for a sixth
    assert [rates.num_waiting(live, 8) for live in (7, 9)] == [2, 4]
