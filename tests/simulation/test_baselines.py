"""The baselines against a plain simulation that keeps every request's state, and against closed forms."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.simulation.arrivals import arrivals_of
from quire.simulation.buddy import BuddyAllocator
from quire.simulation.invariants import InvariantError, check_buddy
from quire.simulation.orca import reserved_slots
from quire.simulation.settings import SimulationSettings
from quire.simulation.simulate import run_simulation
from quire.simulation.step_time import StepTime
from quire.simulation.trace import Trace, TraceRow
from tests.simulation.traces import SLOW, TINY, lengths

NUM_SLOTS = 1000


def figures_of(trace: Trace, policy: str, **options: Any) -> dict[str, Any]:
    asked = SimulationSettings(trace="made", policy=policy, kv_slots=NUM_SLOTS, **options)
    return run_simulation(trace, TINY, SLOW, asked)


def plain_orca(trace: Trace, policy: str, **options: Any) -> dict[str, float]:
    """Section 8's words, one request at a time, nothing kept that could be summed anew."""
    waiting = list(arrivals_of(trace, SimulationSettings(trace="made", policy=policy, **options)))
    memory, step_time, now = BuddyAllocator(NUM_SLOTS), StepTime(TINY, SLOW), 0.0
    running: list[dict[str, Any]] = []
    sums = dict.fromkeys(("seconds", "batch", "tokens", "reserved", "internal", "allocated"), 0.0)
    normalized, first = [], []
    while waiting or running:
        while waiting and waiting[0].time <= now:
            row = waiting[0].row
            reserved = reserved_slots(policy, row.prompt_tokens, row.output_tokens, TINY.context_length)
            chunk = memory.allocate(memory.order_for(reserved))
            if chunk is None:
                break
            running.append({"row": row, "done": 0, "reserved": reserved, "chunk": chunk, "time": waiting.pop(0).time})
        if not running:
            now = waiting[0].time
            continue
        tokens = [each["row"].prompt_tokens + each["done"] for each in running]
        computed = [1 if each["done"] else each["row"].prompt_tokens for each in running]
        pairs = sum(held if each["done"] else held * (held + 1) / 2 for each, held in zip(running, tokens, strict=True))
        seconds = step_time.seconds(len(running), sum(computed), sum(tokens), pairs, len(running))
        now += seconds
        finals = [each["row"].prompt_tokens + each["row"].output_tokens for each in running]
        for name, value in (
            ("seconds", 1),
            ("batch", len(running)),
            ("tokens", sum(tokens)),
            ("reserved", sum(finals) - sum(tokens)),
            ("internal", sum(each["reserved"] for each in running) - sum(finals)),
            ("allocated", sum(each["reserved"] for each in running)),
        ):
            sums[name] += value * seconds
        for each in running:
            each["done"] += 1
            if each["done"] == 1:
                first.append(now - each["time"])
            if each["done"] == each["row"].output_tokens:
                memory.free(each["chunk"])
                normalized.append((now - each["time"]) / each["done"])
        running = [each for each in running if each["done"] < each["row"].output_tokens]
    whole = sums["seconds"] * NUM_SLOTS / 100
    return {
        "mean_batch": sums["batch"] / sums["seconds"],
        "token_states_pct": sums["tokens"] / whole,
        "reservation_pct": sums["reserved"] / whole,
        "internal_pct": sums["internal"] / whole,
        "external_pct": 100 - sums["allocated"] / whole,
        "normalized_latency_mean": sum(normalized) / len(normalized),
        "ttft_mean": sum(first) / len(first),
        "duration_s": now,
        "finished": len(normalized),
    }


@pytest.mark.parametrize("policy", ["orca-max", "orca-pow2", "orca-oracle"])
@pytest.mark.parametrize("rate", [0.5, 20.0, 500.0])
def test_orca_is_what_a_plain_simulation_says(policy: str, rate: float) -> None:
    trace = lengths(300, seed=3)
    figures = figures_of(trace, policy, rate=rate)
    expected = plain_orca(trace, policy, rate=rate)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("policy", ["orca-max", "orca-pow2", "orca-oracle", "fastertransformer", "paged"])
def test_shares_add_up(policy: str) -> None:
    figures = figures_of(lengths(60), policy, saturate=True)
    shares = ("token_states_pct", "reservation_pct", "internal_pct", "external_pct")
    assert sum(figures[share] for share in shares) == pytest.approx(100)
    assert (figures["finished"], figures["requests"]) == (60, 60)


def test_orca_max_under_load_is_a_closed_form() -> None:
    """Always as many as fit; each is seen at every length from p to p + o − 1, for one iteration each."""
    trace = lengths(4000, seed=5)
    even = {"memory": 1e9, "bandwidth": 1e30, "matrix_rate": 1e30, "step_overhead": 1.0}
    settings = SimulationSettings(trace="made", policy="orca-max", kv_slots=NUM_SLOTS, saturate=True)
    figures = run_simulation(trace, TINY, SLOW.__class__(name="even", **even), settings)
    steps = sum(row.output_tokens for row in trace.rows)
    tokens = sum(row.output_tokens * (row.prompt_tokens + (row.output_tokens - 1) / 2) for row in trace.rows) / steps
    to_come = sum(row.output_tokens * (row.output_tokens + 1) / 2 for row in trace.rows) / steps
    assert figures["mean_batch"] == 3
    assert figures["token_states_pct"] == pytest.approx(100 * 3 * tokens / NUM_SLOTS, rel=0.01)
    assert figures["reservation_pct"] == pytest.approx(100 * 3 * to_come / NUM_SLOTS, rel=0.01)
    assert figures["external_pct"] == pytest.approx(100 * (NUM_SLOTS - 3 * 256) / NUM_SLOTS)


@pytest.mark.parametrize(
    ("policy", "prompt", "output", "slots"),
    [
        ("orca-max", 3, 25, 256),
        ("fastertransformer", 3, 25, 256),
        ("orca-oracle", 3, 25, 28),
        ("orca-pow2", 3, 25, 35),
        ("orca-pow2", 3, 32, 35),
        ("orca-pow2", 3, 33, 67),
        ("orca-pow2", 3, 1, 4),
        ("orca-pow2", 100, 150, 256),
    ],
)
def test_reservations(policy: str, prompt: int, output: int, slots: int) -> None:
    assert reserved_slots(policy, prompt, output, 256) == slots


def test_the_first_in_line_blocks_those_behind_it() -> None:
    """Three hold all the memory; the fourth needs a large chunk, and the small fifth may not pass it."""
    rows = [TraceRow(100, 100, 0.0), TraceRow(100, 50, 0.0), TraceRow(200, 50, 0.0), TraceRow(200, 10, 0.0)]
    rows.append(TraceRow(1, 1, 0.0))
    blocked = figures_of(Trace("t", rows), "orca-oracle")
    assert blocked["peak_batch"] == 3
    assert blocked["ttft_p99"] > 0.05


def test_samples_reserve_each_for_itself() -> None:
    figures = figures_of(lengths(40), "orca-max", saturate=True, n=2)
    assert figures["mean_batch"] == 2  # three fit, a second request of two does not
    assert figures_of(lengths(40), "orca-max", saturate=True, n=4)["refused"] == 40


def test_fastertransformer_keeps_a_batch_until_its_longest_ends() -> None:
    rows = [TraceRow(10, 5, 0.0), TraceRow(20, 30, 0.0), TraceRow(5, 1, 0.0), TraceRow(7, 4, 0.0)]
    figures = figures_of(Trace("t", rows), "fastertransformer")
    step = StepTime(TINY, SLOW)
    # Three fit. One prompt step padded to 20, then 29 steps of three places, whoever still runs.
    now = step.seconds(3, 60, 35, 3 * 20 * 21 / 2, 3)
    held = {10: 5, 20: 30, 5: 1}
    for iteration in range(1, 30):
        read = sum(prompt + iteration for prompt, output in held.items() if output > iteration)
        now += step.seconds(3, 3, read, read, 3)
    assert figures["steps"] == 30 + 4
    assert figures["latency_p50"] == pytest.approx(now)
    assert figures["finished"] == 4


def test_what_never_fits_is_refused() -> None:
    rows = [TraceRow(200, 57, 0.0), TraceRow(200, 56, 0.0), TraceRow(5, 5, 0.0)]
    for policy in ("orca-oracle", "orca-pow2", "fastertransformer", "paged"):
        figures = figures_of(Trace("t", rows), policy)
        assert (figures["finished"], figures["refused"]) == (2, 1)
    all_too_long = figures_of(Trace("t", [TraceRow(200, 200)]), "orca-max", saturate=True)
    assert (all_too_long["finished"], all_too_long["refused"]) == (0, 1)
    all_too_long = figures_of(Trace("t", [TraceRow(200, 200)]), "paged", saturate=True)
    assert (all_too_long["finished"], all_too_long["refused"]) == (0, 1)


PROBABILITIES = st.sampled_from([0.0, 0.01, 0.2])


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(["orca-max", "orca-pow2", "orca-oracle", "fastertransformer"]),
    trace=st.builds(lengths, st.integers(1, 60), st.integers(0, 9)),
    queue=st.sampled_from([{"rate": 1.0}, {"rate": 1000.0}, {"saturate": True}]),
    n=st.integers(1, 3),
    step_failures=PROBABILITIES,
    slow_steps=PROBABILITIES,
    cancellations=st.sampled_from([0.0, 0.3, 1.0]),
    engine_deaths=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 99),
)
def test_whatever_goes_wrong_every_request_ends_and_the_memory_adds_up(
    policy: str, trace: Trace, queue: dict[str, Any], **options: Any
) -> None:
    figures = figures_of(trace, policy, patience=0.2, restart_time=0.1, check_every=1, **queue, **options)
    assert figures["requests"] == len(trace.rows)
    assert all(figures[ending] >= 0 for ending in ("finished", "failed", "cancelled", "refused"))
    if not options["step_failures"]:
        assert figures["failed"] == 0
    if not options["cancellations"]:
        assert figures["cancelled"] == 0


@pytest.mark.parametrize("policy", ["orca-oracle", "fastertransformer"])
def test_deaths_cost_time_and_no_request(policy: str) -> None:
    calm = figures_of(lengths(60), policy, rate=30.0)
    deadly = figures_of(lengths(60), policy, rate=30.0, engine_deaths=0.005, restart_time=3.0)
    assert deadly["engine_deaths"] > 2
    assert deadly["finished"] == calm["finished"] == 60
    # Orca's clients keep what they have; FasterTransformer has given them nothing, so a batch is computed again.
    extra = deadly["generated_tokens"] - calm["generated_tokens"]
    assert extra == 0 if policy == "orca-oracle" else extra > 0
    assert deadly["duration_s"] > calm["duration_s"]


def test_a_failure_ends_one_request_and_gives_its_memory_to_the_next() -> None:
    trace = Trace("t", [TraceRow(10, 200, 0.0)] * 8)
    assert figures_of(trace, "orca-max")["failed"] == 0
    failing = figures_of(trace, "orca-max", step_failures=1.0)
    assert (failing["failed"], failing["finished"], failing["steps"]) == (8, 0, 8)


def test_the_check_sees_slots_that_are_nobody_s_or_two_owners() -> None:
    memory = BuddyAllocator(100)
    held = [memory.allocate(3), memory.allocate(5)]
    check_buddy(memory, [chunk for chunk in held if chunk])
    with pytest.raises(InvariantError, match="expected"):
        check_buddy(memory, held[:1])  # type: ignore[arg-type]
    with pytest.raises(InvariantError, match="expected"):
        check_buddy(memory, [*held, held[0]])  # type: ignore[list-item]
