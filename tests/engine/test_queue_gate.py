"""QueueGate: the length of the queue, and the places that a tenant with more than its share leaves free."""

from collections import Counter

import pytest

from quire.engine.queue_gate import MAX_TENANTS, PRESENT_SECONDS, QueueGate
from quire.engine.throughput import Throughput

SEATS = 8


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def gate_of(limit: int, clock: Clock) -> QueueGate:
    return QueueGate(Throughput(None), limit, clock)


def may_wait(gate: QueueGate, tenant: str | None, **live: int) -> bool:
    return gate.refusal(Counter(live), SEATS, tenant) is None


@pytest.mark.parametrize(("num_live", "found"), [(0, True), (8, True), (23, True), (24, False), (90, False)])
def test_as_many_wait_as_the_limit_says(clock: Clock, num_live: int, found: bool) -> None:
    for tenant in ("a", None):
        assert may_wait(gate_of(16, clock), tenant, a=num_live) is found
    assert may_wait(gate_of(0, clock), "a", a=num_live), "no limit"


@pytest.mark.parametrize(("limit", "heavy_fills"), [(1, 1), (2, 1), (16, 14), (1024, 896)])
def test_a_heavy_tenant_leaves_places_for_others(clock: Clock, limit: int, heavy_fills: int) -> None:
    gate = gate_of(limit, clock)
    may_wait(gate, "light", heavy=1)
    filled = next(number for number in range(limit + 1) if not may_wait(gate, "heavy", heavy=SEATS + number))
    assert filled == heavy_fills
    places = 0
    while may_wait(gate, "light", heavy=SEATS + filled, light=places):
        places += 1
    assert filled + places == limit, "all places are used, and none more"


def test_places_are_kept_only_while_others_ask(clock: Clock) -> None:
    gate = gate_of(16, clock)
    may_wait(gate, "light", heavy=1)
    assert not may_wait(gate, "heavy", heavy=SEATS + 15)
    clock.now += PRESENT_SECONDS + 1
    assert may_wait(gate, "heavy", heavy=SEATS + 15)
    assert not may_wait(gate, "heavy", heavy=SEATS + 16)


def test_equal_tenants_fill_the_queue(clock: Clock) -> None:
    gate = gate_of(16, clock)
    for tenant in ("a", "b"):
        may_wait(gate, tenant)
    assert may_wait(gate, "a", a=11, b=12)
    assert may_wait(gate, "b", a=11, b=11)


def test_the_refusal_names_the_places_kept(clock: Clock) -> None:
    gate = gate_of(16, clock)
    may_wait(gate, "light")
    refusal = gate.refusal(Counter(heavy=SEATS + 14), SEATS, "heavy")
    assert refusal is not None
    assert str(refusal) == (
        "14 requests are waiting, the limit is 16 (max_queue_size), and 2 of them are kept for clients that ask less"
    )
    assert refusal.retry_after >= 1


def test_tenants_are_forgotten(clock: Clock) -> None:
    gate = gate_of(16, clock)
    for number in range(MAX_TENANTS + 9):
        may_wait(gate, str(number))
    assert len(gate._asked) == MAX_TENANTS
    clock.now += PRESENT_SECONDS + 1
    may_wait(gate, "a")
    assert list(gate._asked) == ["a"]
