"""Policies and Fleet: what each promises, as properties."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.routing.fleet import Fleet
from quire.routing.policies import POLICIES, LeastWork, Prompt
from quire.routing.prefix_index import DEVICE, DISK, HOST, PrefixIndex
from quire.routing.replica import Load, Replica

SIZE = 16
TIERS = (DEVICE, HOST, DISK)


def prompt(seed: int, num_blocks: int = 32, session: str = "") -> Prompt:
    draw = random.Random(seed)
    return Prompt([draw.getrandbits(64) for _ in range(num_blocks)], num_blocks * SIZE + 3, SIZE, session)


def fleet(policy: str = "least-work", num_replicas: int = 4, **options: int) -> Fleet:
    made = Fleet(POLICIES[policy](), max_blocks=10_000, **options)
    for number in range(num_replicas):
        made.join(f"r{number}")
    return made


@pytest.mark.parametrize("policy", POLICIES)
@given(seeds=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_every_policy_counts_its_work_and_gives_it_back(policy: str, seeds: list[int]) -> None:
    routed = fleet(policy)
    works = []
    for seed in seeds:
        work = routed.choose(prompt(seed))
        assert work is not None
        assert 1 <= work.num_new_tokens <= work.num_tokens
        works.append(work)
    assert sum(each.load.num_requests for each in routed.replicas.values()) == len(seeds)
    for number, work in enumerate(works):
        if number % 2:
            routed.add_tokens(work, 5)
        routed.end(work)
    for replica in routed.replicas.values():
        load = replica.load
        assert (load.num_requests, load.num_waiting, load.queued_tokens, load.context_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_sent_to_a_full_replica_or_one_that_was_tried(policy: str) -> None:
    routed = fleet(policy, num_replicas=3, max_requests=2)
    works = [routed.choose(prompt(7)) for _ in range(6)]
    assert sorted(work.replica.name for work in works if work) == ["r0", "r0", "r1", "r1", "r2", "r2"]
    assert routed.choose(prompt(7)) is None
    assert works[0] is not None
    routed.end(works[0])
    assert routed.choose(prompt(7), without={works[0].replica.name}) is None


def test_least_work_follows_blocks_until_the_queue_costs_more() -> None:
    routed = fleet()
    first = routed.choose(prompt(1))
    assert first is not None
    routed.add_tokens(first, 1)
    routed.end(first)
    again = routed.choose(prompt(1))
    assert again is not None
    assert again.replica is first.replica
    assert again.num_new_tokens == 3
    first.replica.load.queued_tokens += 10_000
    other = routed.choose(prompt(1))
    assert other is not None
    assert other.replica is not first.replica


def test_a_queue_of_groups_computes_each_shared_prompt_about_once() -> None:
    routed, draw = fleet(num_replicas=8), random.Random(5)
    groups = [[draw.getrandbits(64) for _ in range(100)] for _ in range(64)]
    queue = [group for group in groups for _ in range(5)]
    draw.shuffle(queue)
    for group in queue:  # none gets its first token before all have come
        blocks = group + [draw.getrandbits(64) for _ in range(20)]
        assert routed.choose(Prompt(blocks, len(blocks) * SIZE + 1, SIZE)) is not None
    work = [replica.load.total_tokens for replica in routed.replicas.values()]
    least = SIZE * (100 * len(groups) + 20 * len(queue))
    assert sum(work) <= 1.1 * least
    assert max(work) <= 1.3 * sum(work) / len(work)


def test_least_work_prefers_the_device_to_lower_tiers() -> None:
    routed = fleet(num_replicas=2)
    asked = prompt(3)
    routed.stored("r0", asked.blocks, HOST)
    routed.stored("r1", asked.blocks)
    work = routed.choose(asked)
    assert work is not None
    assert work.replica.name == "r1"


def test_without_knowledge_least_work_spreads_evenly() -> None:
    routed = fleet(num_replicas=8)
    for _ in range(400):
        work = routed.choose(Prompt((), 1000, SIZE))
        assert work is not None
        routed.add_tokens(work, 10)
        routed.end(work)
    totals = [replica.load.total_tokens for replica in routed.replicas.values()]
    assert max(totals) <= 1.05 * sum(totals) / len(totals)


def test_one_prompt_that_everybody_sends_does_not_overload_its_holder() -> None:
    """All prompts share 90 %: without a bound on work one replica would get them all."""
    routed = fleet(num_replicas=8)
    shared = prompt(1, 90).blocks
    for seed in range(400):
        own = prompt(1000 + seed, 10).blocks
        work = routed.choose(Prompt([*shared, *own], 1600, SIZE))
        assert work is not None
        routed.add_tokens(work, 50)
        routed.end(work)
    totals = [replica.load.total_tokens for replica in routed.replicas.values()]
    assert max(totals) <= 1.3 * sum(totals) / len(totals)


def test_a_replica_that_joins_late_is_not_flooded() -> None:
    routed = fleet(num_replicas=3)
    for seed in range(100):
        work = routed.choose(prompt(seed))
        assert work is not None
        routed.end(work)
    routed.join("new")
    chosen = []
    for seed in range(200, 240):
        work = routed.choose(prompt(seed))
        assert work is not None
        chosen.append(work.replica.name)
        routed.end(work)
    assert 4 <= chosen.count("new") <= 20


def test_wrong_knowledge_changes_the_choice_and_nothing_else() -> None:
    routed = fleet()
    routed.stored("nobody", prompt(1).blocks)
    routed.removed("r0", prompt(1).blocks)
    routed.cleared("nobody")
    routed.leave("r2")
    assert {work.replica.name for seed in range(30) if (work := routed.choose(prompt(seed)))} <= {"r0", "r1", "r3"}


def test_sticky_moves_only_the_sessions_of_a_replica_that_leaves() -> None:
    routed = fleet("sticky", num_replicas=5)
    before = {}
    for number in range(50):
        work = routed.choose(prompt(number, session=f"s{number}"))
        assert work is not None
        before[number] = work.replica.name
    assert len(set(before.values())) == 5
    routed.leave("r1")
    for number, name in before.items():
        work = routed.choose(prompt(number + 500, session=f"s{number}"))
        assert work is not None
        assert work.replica.name == name or name == "r1"


def test_a_number_is_used_again_without_its_blocks() -> None:
    routed = fleet(num_replicas=2)
    routed.stored("r0", prompt(1).blocks)
    routed.leave("r0")
    assert routed.join("r9").number == 0
    assert routed.index.prefix_lengths(prompt(1).blocks) == {}


def test_context_of_running_requests_counts() -> None:
    routed = fleet(num_replicas=2)
    work = routed.choose(Prompt((), 100_000, SIZE))
    assert work is not None
    routed.add_tokens(work, 1)
    for replica in routed.replicas.values():
        replica.load.total_tokens = 0
    other = LeastWork().choose(Prompt((), 100, SIZE), list(routed.replicas.values()), routed.index)
    assert other is not work.replica


def plain_choice(policy: LeastWork, asked: Prompt, replicas: list[Replica], index: PrefixIndex) -> Replica:
    """The definition: every replica's cost, from the exact lengths that it holds."""
    held, fast = index.prefix_lengths(asked.blocks), index.prefix_lengths(asked.blocks, DEVICE)
    mean = sum(replica.load.total_tokens for replica in replicas) / len(replicas)
    num_delayed = 1 + sum(replica.load.num_waiting for replica in replicas) / len(replicas)
    costs = []
    for replica in replicas:
        load, on_device = replica.load, fast.get(replica.number, 0)
        saved = on_device + (1 - policy.lower_tier_cost) * (held.get(replica.number, 0) - on_device)
        ahead = max(0.0, load.total_tokens - policy.most_ahead * mean - policy.free_share * asked.num_tokens)
        in_hand = load.queued_tokens + policy.context_cost * load.context_tokens
        costs.append(in_hand / num_delayed + ahead - saved * asked.block_size)
    limit = min(costs) + policy.slack * asked.num_tokens
    near = [replica for replica, cost in zip(replicas, costs, strict=True) if cost <= limit]
    return min(near, key=lambda replica: replica.load.total_tokens)


@pytest.mark.parametrize("tiers", [1, 3])
@pytest.mark.parametrize("most_queued", [0, 100, 700, 3000])
def test_least_work_chooses_as_its_definition_does(most_queued: int, tiers: int) -> None:
    draw = random.Random(f"{most_queued} {tiers}")
    for seed in range(60):
        index, asked, replicas = PrefixIndex(1000), prompt(seed, 40), []
        for number in range(draw.randint(1, 12)):
            load = Load(
                0,
                draw.randint(0, 3),
                draw.randint(0, most_queued),
                draw.randint(0, 9 * most_queued),
                draw.randint(0, 4000),
            )
            replicas.append(Replica(number, f"r{number}", load))
            for tier in (DEVICE, HOST, DISK)[:tiers]:
                index.add(number, asked.blocks[: draw.choice((0, 7, 40, draw.randint(0, 40)))], tier)
        for each in (asked, Prompt((), 500, SIZE)):
            chosen = LeastWork().choose(each, replicas, index)
            assert chosen is plain_choice(LeastWork(), each, replicas, index)


def test_few_conversations_stay_where_they_are_among_many_replicas() -> None:
    routed = fleet(num_replicas=200)
    homes: dict[int, str] = {}
    for turn in range(1, 20):
        for session in range(5):
            grown = [block for part in range(turn) for block in prompt(100 * session + part, 16).blocks]
            work = routed.choose(Prompt(grown, len(grown) * SIZE + 3, SIZE))
            assert work is not None
            routed.add_tokens(work, 2)  # agents read much and write little
            routed.end(work)
            assert homes.setdefault(session, work.replica.name) == work.replica.name
    assert len(set(homes.values())) == 5


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 10_000))
def test_holes_in_what_replicas_hold_harm_nothing(policy: str, seed: int) -> None:
    """Late news, or a bounded index, leave any blocks of a prompt known in any tier."""
    draw, routed, asked = random.Random(seed), fleet(policy, num_replicas=5), prompt(7, 12)
    for replica in routed.replicas.values():
        share = draw.random()
        routed.stored(replica.name, [block for block in asked.blocks if draw.random() < share], draw.choice(TIERS))
        replica.load.queued_tokens = draw.choice([0, draw.randrange(400)])
        replica.load.total_tokens = draw.randrange(2000)
    work = routed.choose(asked)
    assert work is not None
    assert 1 <= work.num_new_tokens <= asked.num_tokens
