"""Clusters: nothing is lost, policies do what they promise, and what is late or dead changes only figures."""

from typing import Any

import pytest

from quire.errors import ConfigError
from quire.scheduler.decode_batch import PlainSteps
from quire.scheduler.scheduler import Scheduler
from quire.simulation.cluster_settings import ClusterSettings
from quire.simulation.cluster_workload import AgentShape, GroupShape, agent_sessions, group_sessions
from quire.simulation.oracles import EqualCapacity, ForgetsNothing
from quire.simulation.run_cluster import run_cluster
from quire.simulation.settings import SimulationSettings
from quire.simulation.trace import HASH_BLOCK_TOKENS, Trace, TraceRow
from tests.simulation.traces import SLOW, TINY

SHARED = Trace(
    "shared",
    [
        TraceRow(3 * HASH_BLOCK_TOKENS + 40, 8, 0.4 * index, (0, index % 13 + 1, index % 13 + 21, 100 + index))
        for index in range(60)
    ],
)
"""Thirteen groups of prompts that share three blocks of 512 tokens."""


def run(trace: Trace | None = SHARED, **options: Any) -> dict[str, Any]:
    cluster_names = ClusterSettings.__slots__
    cluster = ClusterSettings(**{"cluster": 4, **{k: v for k, v in options.items() if k in cluster_names}})
    given = {"kv_slots": 20_000, "max_model_len": 16_384, "num_devices": 1, "restart_time": 1.0}
    given |= {name: value for name, value in options.items() if name not in cluster_names}
    settings = SimulationSettings(trace="agents" if trace is None else trace.name, block_size=64, **given)
    figures = run_cluster(trace, TINY, SLOW, settings, cluster)
    assert figures["lost"] == 0
    return figures


def test_least_work_finds_what_an_oracle_finds_and_keeps_the_balance() -> None:
    figures = run()
    assert figures["finished"] == 60
    assert figures["of_oracle_pct"] >= 80  # a new group may begin on two replicas
    assert figures["of_equal_oracle_pct"] == pytest.approx(figures["of_oracle_pct"]), "nothing is evicted"
    assert figures["prefix_hit_pct"] > 1.2 * run(routing="round-robin")["prefix_hit_pct"]
    assert figures["most_work_to_mean"] <= 1.3


def test_agents_follow_their_blocks() -> None:
    ours = run(None, cluster=2, rate=1.0, num_requests=4, num_kinds=2, kv_slots=150_000, max_model_len=100_000)
    assert (ours["finished"], ours["refused"]) == (4 * 33, 0)
    assert ours["of_oracle_pct"] >= 95
    assert ours["most_work_to_mean"] <= 1.3


def test_an_oracle_of_equal_capacity_evicts_what_was_used_longest_ago() -> None:
    oracle = EqualCapacity(4)
    assert [oracle.find(blocks, 0) for blocks in ([1, 2], [1, 2, 3], [9])] == [0, 2, 0]
    assert oracle.find([1, 2, 3], 1) == 3  # the output's block is the fifth: 9 goes
    assert oracle.find([9], 0) == 0
    assert oracle.find([1, 2, 3], 0) == 2  # 3 went before its parents
    everything = ForgetsNothing()
    assert [everything.find(blocks, 9) for blocks in ([1, 2], [1, 3], [1, 2, 4], [1, 3])] == [0, 1, 2, 2]


def test_agents_have_the_published_shape() -> None:
    sessions = list(agent_sessions(AgentShape(), 60, 1.0, seed=0))
    turns = [turn for session in sessions for turn in session.turns]
    assert {len(session.turns) for session in sessions} == {33}
    ratio = sum(turn.prompt_tokens for turn in turns) / sum(turn.output_tokens for turn in turns)
    assert 115 < ratio < 147
    pauses = sorted(turn.pause for turn in turns)
    assert 4.5 < pauses[len(pauses) // 2] < 5.5
    assert 60 < pauses[len(pauses) * 99 // 100] < 105
    for session in sessions[:5]:
        for before, after in zip(session.turns, session.turns[1:], strict=False):
            assert after.pieces[: len(before.pieces)] == before.pieces


@pytest.mark.parametrize("routing", ["least-work", "sticky"])
def test_requests_of_a_dead_replica_go_on(routing: str) -> None:
    """Nothing is lost when all replicas die in turn, and when they die at once."""
    in_turn = run(routing=routing, deaths=("3:0", "6:1", "9:2", "12:3"))
    assert in_turn["finished"] == 60
    at_once = run(routing=routing, deaths=tuple(f"5:{number}" for number in range(4)))
    assert at_once["finished"] + at_once["refused"] == 60


def test_a_rolling_update_moves_no_request() -> None:
    figures = run(rolling_update=2.0)
    assert (figures["finished"], figures["moved"]) == (60, 0)
    assert figures["prefix_hit_pct"] < run()["prefix_hit_pct"]  # each replica came back empty


def test_a_full_cluster_refuses() -> None:
    figures = run(max_replica_requests=1, cluster=1, rate=50.0)
    assert figures["refused"] > 0
    assert figures["finished"] + figures["refused"] == 60


@pytest.mark.parametrize("event_delay", [0.0, 5.0, 1000.0])
def test_late_news_loses_nothing(event_delay: float) -> None:
    assert run(event_delay=event_delay, kv_slots=4_000)["finished"] == 60


def test_the_same_seed_gives_the_same_figures() -> None:
    assert run(None, rate=3.0, num_requests=1, seed=3) == run(None, rate=3.0, num_requests=1, seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": 9999}, "from 0 to 4096"),
        ({"routing": "best"}, "must be one of least-work"),
        ({"event_delay": -1.0}, "event_delay"),
        ({"deaths": ("5",)}, "SECONDS:REPLICA"),
        ({"deaths": ("5:9",)}, "replicas are 0 to 3"),
        ({"rolling_update": -1.0}, "rolling_update"),
        ({"n": 2}, "a simulated cluster lacks that"),
        ({"shared_prefix": 5}, "a simulated cluster lacks that"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "round-robin", "event_delay": 3.0, "kv_slots": 4_000},
        {"deaths": ("3:0", "6.5:1", "9:2"), "rolling_update": 12.0},
        {
            "trace": None,
            "rate": 3.0,
            "num_requests": 3,
            "deaths": ("40:0",),
            "kv_slots": 90_000,
            "max_model_len": 90_000,
        },
    ],
)
def test_runs_of_plain_steps_change_no_figure(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"trace": SHARED, **options}
    figures, num_plain = run(**asked), 0
    each = Scheduler.plain_steps

    def counted(scheduler: Scheduler) -> PlainSteps:
        nonlocal num_plain
        num_plain += each(scheduler).num_steps > 1
        return PlainSteps(0)

    monkeypatch.setattr(Scheduler, "plain_steps", counted)
    step_by_step = run(**asked)
    assert num_plain > 20
    assert figures.pop("most_busy_to_mean") == pytest.approx(step_by_step.pop("most_busy_to_mean"))
    assert figures == step_by_step


def test_agents_need_a_rate() -> None:
    with pytest.raises(ConfigError, match="agents need a rate"):
        run(None)


def test_groups_of_prompts_share_their_beginning() -> None:
    shape = GroupShape(num_groups=3, prompts_per_group=2, shared_tokens=600, own_tokens=120, output_tokens=4)
    turns = [session.turns[0] for session in group_sessions(shape, 12, 5.0, seed=0)]
    assert {turn.prompt_tokens for turn in turns} == {720}
    assert len({turn.pieces for turn in turns[:6]}) == 6  # each prompt once, then again
    assert {turn.pieces for turn in turns[:6]} == {turn.pieces for turn in turns[6:]}
    assert len({turn.pieces[0] for turn in turns}) == 3
