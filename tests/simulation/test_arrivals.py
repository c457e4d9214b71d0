"""Arrivals: their rate and their spread, and that a seed decides them."""

import itertools
import statistics
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.simulation.arrivals import Arrival, arrivals_of, expected_requests
from quire.simulation.settings import SimulationSettings
from quire.simulation.trace import Trace, TraceRow
from tests.simulation.traces import lengths


def made(trace: Trace, **options: Any) -> list[Arrival]:
    return list(arrivals_of(trace, SimulationSettings(trace="made", **options)))


@pytest.mark.parametrize(
    ("options", "cv"),
    [({}, 1.0), ({"arrivals": "gamma", "cv": 3.0}, 3.0), ({"arrivals": "gamma", "cv": 0.5}, 0.5)],
)
def test_rate_and_spread(options: dict[str, Any], cv: float) -> None:
    times = [0.0, *(arrival.time for arrival in made(lengths(50), rate=4.0, num_requests=20_000, **options))]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= 0
    # The mean of n gaps strays by cv / √n of itself; four times that is once in 16,000 seeds.
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=4 * cv / 20_000**0.5)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_bursts_come_together_at_the_rate_asked_for() -> None:
    times = [
        arrival.time for arrival in made(lengths(5), rate=10.0, arrivals="bursts", burst_size=8, num_requests=8000)
    ]
    assert all(len(set(times[start : start + 8])) == 1 for start in range(0, 8000, 8))
    assert len(set(times)) == 1000
    assert times[-1] == pytest.approx(800, rel=0.13)


def test_a_trace_is_stretched_and_begun_again() -> None:
    trace = Trace("t", [TraceRow(1, 1, 0.0), TraceRow(2, 2, 3.0), TraceRow(3, 3, 4.0)])
    assert [arrival.time for arrival in made(trace)] == [0.0, 3.0, 4.0]
    again = made(trace, num_requests=5)
    assert [arrival.time for arrival in again] == [0.0, 3.0, 4.0, 6.0, 9.0]
    assert [arrival.row.prompt_tokens for arrival in again] == [1, 2, 3, 1, 2]
    assert [arrival.time for arrival in made(trace, rate=1.0)] == [0.0, 1.5, 2.0]
    assert [arrival.time for arrival in made(trace, duration=3.5)] == [0.0, 3.0]


def test_all_at_once() -> None:
    trace = Trace("t", [TraceRow(1, 1, 0.0)] * 3)
    assert len(made(trace)) == 3
    for options in ({"num_requests": 4}, {"rate": 1.0}):
        with pytest.raises(ConfigError, match="arrive at once"):
            made(trace, **options)


def test_a_full_queue_counts_only_what_was_asked_for() -> None:
    stream = arrivals_of(lengths(3), SimulationSettings(trace="made", saturate=True, num_requests=4))
    first = list(itertools.islice(stream, 9))
    assert [arrival.counted for arrival in first] == [True] * 4 + [False] * 5
    assert {arrival.time for arrival in first} == {0.0}


def test_the_seed_decides() -> None:
    trace = lengths(50)
    assert made(trace, rate=1.0, seed=1) == made(trace, rate=1.0, seed=1)
    assert made(trace, rate=1.0, seed=1) != made(trace, rate=1.0, seed=2)


def test_a_rate_is_needed() -> None:
    for options in ({"arrivals": "gamma"}, {"arrivals": "trace"}, {}):
        with pytest.raises(ConfigError, match=r"need a rate|holds no arrivals"):
            made(lengths(2), **options)


def test_expected_requests() -> None:
    trace = lengths(7)
    for options, expected in (({}, 7), ({"num_requests": 3}, 3), ({"duration": 3.0}, None)):
        assert expected_requests(trace, SimulationSettings(trace="made", rate=1.0, **options)) == expected
