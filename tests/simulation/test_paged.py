"""The scheduler on a simulated clock: times by hand, one seed one result, and faults that leave the pool in order."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.scheduler import Scheduler
from quire.simulation.arrivals import arrivals_of
from quire.simulation.invariants import InvariantError, check_pool
from quire.simulation.measures import Measures
from quire.simulation.modelled_executor import ModelledExecutor
from quire.simulation.paged import PagedSimulation
from quire.simulation.settings import POLICIES, SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.step_time import StepTime
from quire.simulation.trace import HASH_BLOCK_TOKENS, Trace, TraceRow, unbounded_hit_percent
from tests.simulation.traces import SLOW, TINY, lengths


def figures_of(trace: Trace, **options: Any) -> dict[str, Any]:
    return run_simulation(trace, TINY, SLOW, SimulationSettings(trace="made", **{"kv_slots": 2000, **options}))


def test_it_is_the_engine_s_own_scheduler() -> None:
    options = SimulationSettings(trace="made", rate=1.0)
    simulation = PagedSimulation(
        arrivals_of(lengths(1), options),
        ModelledExecutor(StepTime(TINY, SLOW)),
        Measures(160, of_allocated=True, ttft_limit=1.0, tbt_limit=1.0),
        options,
        num_slots=160,
        max_model_len=256,
    )
    assert type(simulation.scheduler) is Scheduler
    assert type(simulation.scheduler.pool) is BlockPool


def test_one_request_takes_the_sum_of_its_steps() -> None:
    step = StepTime(TINY, SLOW)
    first = step.seconds(1, 40, 40, 40 * 41 / 2, 1)
    rest = [step.seconds(1, 1, 40 + done, 40 + done, 1) for done in range(1, 10)]
    figures = figures_of(Trace("t", [TraceRow(40, 10, 0.0)]))
    assert figures["ttft_mean"] == pytest.approx(first)
    assert figures["latency_mean"] == pytest.approx(first + sum(rest))
    assert figures["normalized_latency_mean"] == pytest.approx((first + sum(rest)) / 10)
    assert figures["tbt_p50"] == pytest.approx(rest[4], rel=0.02)
    assert (figures["steps"], figures["generated_tokens"], figures["mean_batch"]) == (10, 10, 1.0)


def test_waste_is_the_last_block_of_each_sequence() -> None:
    """With one token per block there is none; with 16 it is what a sequence of known length leaves empty."""
    assert figures_of(lengths(100), saturate=True, block_size=1)["token_states_pct"] == 100
    figures = figures_of(Trace("t", [TraceRow(8, 1, 0.0)]))
    assert figures["token_states_pct"] == 50.0
    assert figures["token_states_of_pool_pct"] == pytest.approx(100 * 8 / 2000)


def test_more_run_at_once_than_with_reservations() -> None:
    batch = {
        policy: figures_of(lengths(400), policy=policy, saturate=True)["mean_batch"]
        for policy in ("paged", "orca-oracle", "orca-pow2", "orca-max")
    }
    assert batch["paged"] > 1.5 * batch["orca-oracle"] > 1.5 * batch["orca-pow2"] > 1.5 * batch["orca-max"] / 1.5


@pytest.mark.parametrize("policy", POLICIES)
def test_one_seed_one_result(policy: str) -> None:
    faults: dict[str, Any] = {"step_failures": 0.01, "slow_steps": 0.05, "engine_deaths": 0.003, "cancellations": 0.2}
    options = {"policy": policy, "rate": 30.0, **faults}
    first, again, other = (json.dumps(figures_of(lengths(200), seed=seed, **options)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


PROBABILITIES = st.sampled_from([0.0, 0.01, 0.2])


@settings(max_examples=30, deadline=None)
@given(
    trace=st.builds(lengths, st.integers(1, 60), st.integers(0, 9)),
    rate=st.sampled_from([1.0, 50.0, 1000.0]),
    num_blocks=st.integers(20, 60),
    sequences=st.sampled_from([{"n": 1}, {"n": 3}, {"beam_width": 1}, {"n": 2, "beam_width": 3}]),
    tiers=st.sampled_from([{}, {"swap_space": 100_000}, {"swap_space": 30_000, "disk_cache_size": 200_000}]),
    shared_prefix=st.sampled_from([0, 21]),
    step_failures=PROBABILITIES,
    slow_steps=PROBABILITIES,
    cancellations=st.sampled_from([0.0, 0.3, 1.0]),
    engine_deaths=st.sampled_from([0.0, 0.01, 0.05]),
    enable_prefix_caching=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whatever_goes_wrong_the_pool_is_in_order_and_every_request_ends(
    trace: Trace, num_blocks: int, sequences: dict[str, int], tiers: dict[str, int], **options: Any
) -> None:
    """The pool is checked after every step, and empty at the end; requests end one way each."""
    if not options["enable_prefix_caching"]:
        tiers = {}
        options["shared_prefix"] = 0
    options = {"patience": 0.2, "restart_time": 0.1, "check_every": 1, **sequences, **tiers, **options}
    options["kv_slots"] = 16 * num_blocks
    figures = figures_of(trace, **options)
    assert figures["requests"] == len(trace.rows)
    if not options["step_failures"]:
        assert figures["failed"] == 0
    if not options["cancellations"]:
        assert figures["cancelled"] == 0


def test_engine_deaths_cost_time_and_no_request() -> None:
    calm = figures_of(lengths(100), rate=30.0)
    deadly = figures_of(lengths(100), rate=30.0, engine_deaths=0.02, restart_time=3.0)
    assert deadly["engine_deaths"] > 3
    assert deadly["finished"] == 100
    # No token is generated twice: clients keep what they have.
    assert deadly["generated_tokens"] == calm["generated_tokens"] == sum(row.output_tokens for row in lengths(100).rows)
    assert deadly["duration_s"] > calm["duration_s"] + 3.0 * deadly["engine_deaths"] / 2


def test_slow_steps_and_clients_that_leave() -> None:
    calm = figures_of(lengths(100), rate=30.0)
    assert figures_of(lengths(100), rate=30.0, slow_steps=1.0, slow_factor=3.0)["tbt_p50"] > 2 * calm["tbt_p50"]
    left = figures_of(lengths(100), rate=30.0, cancellations=1.0, patience=0.01)
    assert left["cancelled"] > 50
    assert left["generated_tokens"] < calm["generated_tokens"]


def test_samples_share_their_prompt() -> None:
    rows = [TraceRow(128, 16, 0.0)]
    figures = figures_of(Trace("t", rows), n=4)
    assert figures["generated_tokens"] == 64
    assert figures["finished"] == 1
    # 8 blocks of prompt and one of each sample's own (a step before that, 8 of one sample), against 9 for each.
    assert figures["saved_by_sharing_pct"] == pytest.approx(100 * 24 / 36, abs=5)


def test_beams_share_more_than_samples() -> None:
    """Losing beams give their blocks back, so the living ones have a past in common; samples only have the prompt."""
    rows = [TraceRow(16, 64, 0.0)] * 8
    samples, beams = (
        figures_of(Trace("t", rows), block_size=4, **options) for options in ({"n": 4}, {"beam_width": 4})
    )
    assert beams["finished"] == samples["finished"] == 8
    assert beams["generated_tokens"] == 8 * 64  # the best beam of each is delivered, at its end
    assert beams["ttft_mean"] == beams["latency_mean"]
    assert beams["saved_by_sharing_pct"] > 1.5 * samples["saved_by_sharing_pct"]


def test_a_shared_prefix_is_held_and_not_computed() -> None:
    rows = lengths(50, most=80).rows
    held = figures_of(Trace("t", rows), rate=20.0, shared_prefix=64)
    # Of every prompt the prefix is found: four blocks of 16.
    assert held["prefix_hit_pct"] == pytest.approx(100 * 64 * 50 / (64 * 50 + sum(row.prompt_tokens for row in rows)))
    assert held["finished"] == 50
    computed = figures_of(Trace("t", rows), rate=20.0, shared_prefix=64, policy="orca-oracle")
    without = figures_of(Trace("t", rows), rate=20.0, policy="orca-oracle")
    assert computed["busy_s"] > without["busy_s"]
    assert computed["finished"] == 50


def test_tiers_bring_back_what_the_pool_has_evicted() -> None:
    trace = conversation(6, 8)
    options = {"block_size": 512, "max_model_len": 8192, "max_num_batched_tokens": 8192, "kv_slots": 512 * 12}
    block_bytes = 512 * TINY.kv_bytes_per_token
    alone = figures_of(trace, **options)
    host = figures_of(trace, swap_space=1000 * block_bytes, **options)
    both = figures_of(trace, swap_space=2 * block_bytes, disk_cache_size=1000 * block_bytes, **options)
    assert alone["prefix_hit_pct"] < 0.5 * host["prefix_hit_pct"]
    assert host["prefix_hit_pct"] == pytest.approx(host["unbounded_prefix_hit_pct"], abs=5)
    assert host["host_hit_pct"] > 0 == host["disk_hit_pct"]
    assert both["disk_hit_pct"] > 10
    assert alone["disk_hit_pct"] == alone["host_hit_pct"] == 0
    # A tier that takes longer than computing is left alone: the rates decide, as in the engine.
    slow = figures_of(trace, disk_cache_size=1000 * block_bytes, disk_bandwidth=1e3, **options)
    assert slow["prefix_hit_pct"] < both["prefix_hit_pct"]


def conversation(num_turns: int, num_users: int) -> Trace:
    """Each turn's prompt goes on from the one before: one more block of it."""
    rows = []
    for turn in range(1, num_turns + 1):
        for user in range(num_users):
            blocks = tuple(user * 100 + number for number in range(turn))
            rows.append(TraceRow(turn * HASH_BLOCK_TOKENS, 4, float(len(rows)), blocks))
    return Trace("chat", rows)


def test_with_room_for_all_every_known_prefix_is_found() -> None:
    trace = conversation(4, 5)
    options = {"block_size": 512, "max_model_len": 4096, "max_num_batched_tokens": 4096}
    figures = figures_of(trace, kv_slots=512 * 200, **options)
    # Of every prompt the last block is computed, as its last token's logits are wanted: here it is new anyway.
    assert figures["prefix_hit_pct"] == pytest.approx(figures["unbounded_prefix_hit_pct"])
    assert figures["unbounded_prefix_hit_pct"] == unbounded_hit_percent(trace.rows) == 60.0
    little = figures_of(trace, kv_slots=512 * 9, **options)
    assert 0 <= little["prefix_hit_pct"] < 30
    assert figures_of(trace, kv_slots=512 * 200, enable_prefix_caching=False, **options)["prefix_hit_pct"] == 0


def test_requests_beyond_the_queue_wait_outside_in_their_order() -> None:
    """Far more at once than the scheduler is given: all end, and the first come first."""
    rows = [TraceRow(4, 2, 0.0)] * 3000
    figures = figures_of(Trace("t", rows), max_num_seqs=16, max_num_batched_tokens=64)
    assert figures["finished"] == 3000
    assert figures["peak_batch"] <= 16
    assert figures["ttft_p50"] == pytest.approx(figures["duration_s"] / 2, rel=0.02)


def test_the_check_sees_books_that_do_not_add_up() -> None:
    for spoil in ("ref_counts", "fill", "names", "num_free", "next", "held"):
        pool = BlockPool(8, 4)
        block = pool.allocate()
        pool.write(block, 4)
        check_pool(pool)
        match spoil:
            case "ref_counts":
                pool.ref_counts[block] += 1
            case "fill":
                pool.fill[block] -= 1
            case "names":
                pool.hashes[block] = b"x"
            case "num_free":
                pool.num_free += 1
            case "next":
                pool.release(block)
                pool.ref_counts[block] = 1
        with pytest.raises(InvariantError, match="expected"):
            check_pool(pool, idle=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "fcfs"}, "policy is 'fcfs'; it must be one of paged"),
        ({"arrivals": "now"}, "arrivals is 'now'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"slow_steps": 1.5}, "a probability is from 0 to 1"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"attention_slowdown": 0.5}, "attention_slowdown is 0.5"),
        ({"max_num_seqs": 4096}, "less than max_num_seqs"),
        ({"saturate": True, "rate": 1.0}, "leave out rate"),
        ({"kv_slots": 5, "kv_cache_memory": "1GiB"}, "give one"),
        ({"policy": "orca-max", "swap_space": "1GiB"}, "are tiers of policy paged"),
        ({"n": 3, "beam_width": 2}, "n is 3, but 2 beams"),
        ({"restart_time": -1.0}, "restart_time is -1.0"),
        ({"scheduling_policy": "sjf"}, "scheduling_policy is 'sjf'"),
        ({"policy": "orca-max", "scheduling_policy": "fair"}, "policy orca-max is a baseline"),
    ],
)
def test_settings_at_odds_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SimulationSettings(trace="made", **options)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match="set rate in requests per second, or saturate"):
        figures_of(lengths(3))
    with pytest.raises(ConfigError, match="holds 15 tokens, less than a block of 16"):
        figures_of(lengths(3), rate=1.0, kv_slots=15)
