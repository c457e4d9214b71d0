from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.fair_share import MAX_TENANTS, RECENT_SERVICE, FairShare
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN, PROMPT_TOKEN
from tests.scheduler.checked_engine import Engine, new_request

POOL = BlockPool(1, 1)


def new_group(number: int, tenant: str, priority: int = 0) -> SequenceGroup:
    request = replace(new_request(f"{number}", 4, priority=priority), tenant=tenant)
    return SequenceGroup(request, POOL, b"", number)


def pop_all(queue: FairShare, service: float = 1.0) -> list[str]:
    """Whose requests are admitted, if each is given `service`."""
    tenants = []
    while (group := queue.pop()) is not None:
        tenants.append(group.request.tenant)
        queue.serve(group.request.tenant, service)
    return tenants


def test_tenants_take_turns_however_many_requests_they_send() -> None:
    queue = FairShare()
    for number in range(6):
        queue.enter(new_group(number, "many"))
    for number in range(6, 9):
        queue.enter(new_group(number, "few"))
    assert pop_all(queue) == ["many", "few"] * 3 + ["many"] * 3


def test_priority_comes_first_and_a_tenant_s_own_requests_keep_their_order() -> None:
    queue = FairShare()
    for number, (tenant, priority) in enumerate([("a", 1), ("a", 0), ("b", 1), ("a", 0)]):
        queue.enter(new_group(number, tenant, priority))
    order = []
    while (group := queue.pop()) is not None:
        order.append(group.order)
    assert order == [(0, 1), (0, 3), (1, 0), (1, 2)]


def test_having_been_away_earns_no_credit() -> None:
    queue = FairShare()
    for number in range(8):
        queue.enter(new_group(number, "busy"))
    for _ in range(4):
        group = queue.pop()
        assert group is not None
        queue.serve("busy", 100.0)
    for number in range(8, 12):
        queue.enter(new_group(number, "new"))
    assert pop_all(queue, 100.0) == ["new", "busy"] * 4


@pytest.mark.parametrize("length", [5, 30])
def test_a_light_tenant_starts_in_the_next_step_beside_a_heavy_one(length: int) -> None:
    """Its first token comes as soon as alone, however long the answers of the heavy one are."""
    engine = Engine(400, max_num_seqs=4, max_num_batched_tokens=256, policy="fair")
    groups = engine.scheduler.groups
    for number in range(20):
        engine.add(replace(new_request(f"heavy {number}", 9, length), tenant="heavy"))
    engine.add(replace(new_request("first", 9, 2), tenant="light"))
    while "first" in groups:  # from now on the heavy one leaves a row free
        engine.step()
    for number in range(3):
        for _ in range(7):
            engine.step()
        engine.add(replace(new_request(f"light {number}", 9, 2), tenant="light"))
        engine.step()
        assert not groups[f"light {number}"].awaits_first_token
    while engine.scheduler.has_work:
        engine.step()
    assert engine.pool.num_free == 400


def test_rows_are_kept_only_beside_others_that_were_seen_lately() -> None:
    queue = FairShare()
    heavy = [new_group(number, "heavy") for number in range(9)]
    assert queue.rows_kept(heavy[0], heavy[1:], 16) == 0
    queue.serve("light", 1.0)
    assert queue.rows_kept(heavy[0], heavy[1:8], 16) == 0, "it holds no more than its share"
    assert queue.rows_kept(heavy[0], heavy[1:], 16) == 2
    assert queue.rows_kept(new_group(10, "light"), heavy, 16) == 0
    queue.serve("heavy", RECENT_SERVICE + 2)
    assert queue.rows_kept(heavy[0], heavy[1:], 16) == 0


def test_who_leaves_while_it_waits_is_gone() -> None:
    queue = FairShare()
    groups = [new_group(number, tenant) for number, tenant in enumerate("aab")]
    for group in groups:
        queue.enter(group)
    queue.remove(groups[2])
    queue.remove(groups[2])
    queue.remove(groups[0])
    assert (len(queue), list(queue.peek(9))) == (1, [groups[1]])
    assert queue.pop() is groups[1]
    assert (len(queue), queue.pop(), queue._queues) == (0, None, {})


def test_counters_are_bounded_and_those_who_wait_keep_theirs() -> None:
    queue = FairShare()
    queue.enter(new_group(0, "waits"))
    queue.serve("waits", 7.0)
    for number in range(2 * MAX_TENANTS):
        queue.serve(f"{number}", 1.0)
    assert len(queue._counters) == MAX_TENANTS
    assert queue._counters["waits"] == 7.0


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(1, 10)), min_size=40, max_size=80),
    st.integers(8, 20),
)
def test_backlogged_tenants_get_the_same_within_the_bound(
    requests: list[tuple[str, int, int]], num_blocks: int
) -> None:
    """While two tenants wait without a break, their service differs by at most the bound of the paper's theorem."""
    engine = Engine(
        num_blocks, 4, max_num_seqs=4, max_num_batched_tokens=16, policy="fair", enable_prefix_caching=False
    )
    queue = engine.scheduler._queues.waiting
    assert isinstance(queue, FairShare)
    served: dict[str, float] = {}
    serve = queue.serve

    def count(tenant: str, service: float) -> None:
        served[tenant] = served.get(tenant, 0.0) + service
        serve(tenant, service)

    queue.serve = count  # type: ignore[method-assign]  # what the scheduler reports
    for number, (tenant, num_prompt, max_tokens) in enumerate(requests):
        engine.add(replace(new_request(f"{number}", num_prompt, max_tokens), tenant=tenant))
    bound = 2 * max(PROMPT_TOKEN * 12, OUTPUT_TOKEN * num_blocks * 4)
    waited = set("abc")
    while engine.scheduler.has_work:
        engine.step()
        waited &= {tenant for _, tenant in queue._queues}
        amounts = [served.get(tenant, 0.0) for tenant in waited]
        if amounts:
            assert max(amounts) - min(amounts) <= bound
    assert sum(served.values()) >= sum(OUTPUT_TOKEN * max_tokens for _, _, max_tokens in requests)
