"""Policies in a simulation: what clients say they may need, what they get, and the policies to compare with."""

import json
import random
from typing import Any

import pytest

from quire.simulation.rivals import RULES, make_queues
from quire.simulation.settings import ADMISSIONS, SCHEDULING_POLICIES, SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.trace import Trace, TraceRow
from tests.simulation.traces import SLOW, TINY, lengths


def figures_of(trace: Trace, **options: Any) -> dict[str, Any]:
    return run_simulation(trace, TINY, SLOW, SimulationSettings(trace="made", **{"kv_slots": 1000, **options}))


def test_every_policy_of_the_settings_can_be_simulated() -> None:
    assert (tuple(make_queues({})), tuple(RULES)) == (SCHEDULING_POLICIES, ADMISSIONS)


def test_answers_end_where_they_end_whatever_their_limit() -> None:
    exact = figures_of(lengths(200), rate=300.0)
    claimed = figures_of(lengths(200), rate=300.0, max_tokens=128)
    assert exact["preemptions"] > 0
    assert exact == claimed, "first come, first served does not look at limits"
    cut = figures_of(lengths(200), rate=300.0, max_tokens=50)
    assert cut["generated_tokens"] == sum(min(50, row.output_tokens) for row in lengths(200).rows)


def test_a_row_s_own_limit_counts_more_than_the_settings() -> None:
    figures = figures_of(Trace("t", [TraceRow(4, 30, 0.0, max_tokens=10)]), max_tokens=20)
    assert figures["generated_tokens"] == 10


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("admission", ADMISSIONS)
def test_one_seed_one_result_and_every_request_ends(policy: str, admission: str) -> None:
    faults: dict[str, Any] = {"step_failures": 0.01, "engine_deaths": 0.003, "cancellations": 0.2, "check_every": 7}
    options = {"rate": 300.0, "max_tokens": 128, "scheduling_policy": policy, "admission": admission, **faults}
    first, again = (json.dumps(figures_of(lengths(150), **options)) for _ in range(2))
    assert first == again
    assert json.loads(first)["requests"] == 150


def test_who_knows_all_lengths_is_fastest_on_average() -> None:
    latency = {
        policy: figures_of(lengths(300), rate=300.0, max_tokens=128, scheduling_policy=policy)["latency_mean"]
        for policy in ("fcfs", "oracle-shortest")
    }
    assert latency["oracle-shortest"] < 0.8 * latency["fcfs"]


def test_reserving_what_is_asked_for_preempts_less_and_runs_fewer() -> None:
    current, ratio = (
        figures_of(lengths(300), rate=300.0, max_tokens=128, admission=admission)
        for admission in ("current", "new-token-ratio")
    )
    assert ratio["preemptions"] < current["preemptions"] / 4
    assert ratio["mean_batch"] < current["mean_batch"]


def test_shares_are_fair_though_one_tenant_floods() -> None:
    """Nine of ten requests are one tenant's. First come, first served has the other wait behind them all."""
    draw = random.Random(3)
    rows = [
        TraceRow(
            draw.randint(1, 60), draw.randint(1, 60), 0.002 * number, (), 128, "few" if number % 10 == 9 else "many"
        )
        for number in range(300)
    ]
    ends: dict[str, float] = {}
    for policy in ("fcfs", "fair"):
        figures = figures_of(Trace("made", rows), scheduling_policy=policy)
        ends[policy] = figures["tenants"]["few"]["ttft_p50"]
    assert ends["fair"] < ends["fcfs"] / 2
