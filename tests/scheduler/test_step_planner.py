"""StepPlanner, through the scheduler: the budget, the order, room for decoding sequences, drafts."""

import pytest

from quire.scheduler.step_planner import equal_shares
from tests.scheduler.checked_engine import Engine, Guesses, counts_by_request, embed_request, new_request

# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "wants", "shares"),
    [
        (100, [1000, 10, 40], [50, 10, 40]),
        (100, [], []),
        (0, [3, 4], [0, 0]),
        (10, [3, 4], [3, 4]),
        (10, [9, 9, 9], [4, 3, 3]),
        (1, [5, 3, 3], [0, 1, 0]),
        (7, [1, 100], [1, 6]),
    ],
)
def test_equal_shares(budget: int, wants: list[int], shares: list[int]) -> None:
    assert equal_shares(budget, wants) == shares


def test_a_long_prompt_is_computed_in_chunks() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(new_request("a", 20, max_tokens=2))
    plans = [engine.step() for _ in range(4)]
    assert [(plan.num_computed_tokens, plan.num_scheduled_tokens, plan.sample_indices) for plan in plans] == [
        ([0], [8], []),
        ([8], [8], []),
        ([16], [4], [0]),
        ([20], [1], [0]),
    ]


def test_running_sequences_decode_first_and_prompts_get_the_rest() -> None:
    engine = Engine(max_num_batched_tokens=16)
    for name in "abc":
        engine.add(new_request(name, 4, max_tokens=20))
    engine.step()
    engine.add(new_request("long", 40, max_tokens=2))
    plan = engine.step()
    assert plan.num_scheduled_tokens == [1, 1, 1, 13]


def test_a_long_prompt_does_not_starve_short_ones() -> None:
    engine = Engine(max_num_batched_tokens=32)
    engine.add(new_request("long", 200, max_tokens=1))
    engine.step()
    for name in "abc":
        engine.add(new_request(name, 6, max_tokens=1))
    plan = engine.step()
    assert sorted(plan.num_scheduled_tokens) == [6, 6, 6, 14]
    assert engine.clients.keys() == {"long"}


def test_as_many_prompts_share_a_step_as_are_allowed() -> None:
    engine = Engine(max_num_batched_tokens=32, max_num_partial_prefills=2)
    for name in "abcd":
        engine.add(new_request(name, 40, max_tokens=1))
    assert counts_by_request(engine, engine.step()) == {"a": 16, "b": 16}


def test_a_budget_of_one_token_a_step_serves_everybody() -> None:
    engine = Engine(max_num_seqs=1, max_num_batched_tokens=1)
    clients = [engine.add(new_request(name, 5, max_tokens=3)) for name in "abc"]
    engine.run(max_steps=3 * (5 + 3))
    assert [client.finish_reasons for client in clients] == [{0: "length"}] * 3


# -- who comes first --------------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    engine = Engine(max_num_seqs=1)
    for name in "abc":
        engine.add(new_request(name, 4, max_tokens=2))
    order = []
    while engine.scheduler.has_work:
        order += counts_by_request(engine, engine.step())
    assert order == ["a", "a", "b", "b", "c", "c"]


def test_priority_goes_before_arrival() -> None:
    engine = Engine(max_num_seqs=1)
    for name, priority in (("later", 1), ("normal", 0), ("first", -1), ("normal too", 0)):
        engine.add(new_request(name, 4, max_tokens=1, priority=priority))
    order = []
    while engine.scheduler.has_work:
        order += counts_by_request(engine, engine.step())
    assert order == ["first", "normal", "normal too", "later"]


def test_the_latest_yields_when_memory_runs_short_and_resumes_first() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    for name in "ab":
        engine.add(new_request(name, 8, max_tokens=12))
    engine.add(new_request("c", 4, max_tokens=1))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    assert [group.request.request_id for group in engine.scheduler._queues.running] == ["a"]
    preempted = engine.scheduler._queues.by_id["b"]
    assert (preempted.num_preemptions, preempted.leader.num_computed_tokens) == (1, 0)
    engine.run()


def test_the_least_important_yields_even_if_it_came_first() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    engine.add(new_request("batch", 8, max_tokens=12, priority=1))
    engine.step()
    engine.add(new_request("urgent", 8, max_tokens=12))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    assert [group.request.request_id for group in engine.scheduler._queues.running] == ["urgent"]
    engine.run()


def test_what_was_preempted_resumes_from_the_prefix_cache() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    for name in "ab":
        engine.add(new_request(name, 8, max_tokens=12))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    engine.abort("a")
    plan = engine.step()
    assert plan.num_computed_tokens[0] >= 8
    engine.run()


def test_admission_waits_for_room_for_the_whole_prompt_and_a_watermark() -> None:
    engine = Engine(num_blocks=200, block_size=4, max_num_batched_tokens=256)
    engine.add(new_request("a", 250, max_tokens=2))
    engine.add(new_request("b", 250, max_tokens=2))
    engine.add(new_request("c", 250, max_tokens=2))
    engine.add(new_request("d", 37, max_tokens=2))
    engine.step()
    assert engine.scheduler.stats().num_running == 3
    assert engine.scheduler.stats().num_waiting == 1, "63 + 63 + 63 + 10 of 200 blocks leave less than two"


def test_a_group_that_yields_in_the_middle_of_its_turn_is_not_in_the_plan() -> None:
    """One of its samples has its copy already when there is no block for the next."""
    engine = Engine(num_blocks=5, block_size=4)
    engine.add(new_request("a", 4, max_tokens=4))
    engine.add(new_request("b", 6, max_tokens=2, n=3))
    engine.step()
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.block_copies, len(plan.new_blocks)) == ([1], [], 3), (
        "2 forks of b, 1 block of a"
    )
    assert engine.scheduler._queues.by_id["b"].num_preemptions == 1
    engine.run()


def test_prompts_that_hold_all_blocks_make_room_for_the_first() -> None:
    """A step that could compute nothing would be a standstill."""
    engine = Engine(num_blocks=6, block_size=4, max_num_batched_tokens=8)
    first = engine.add(new_request("a", 4, max_tokens=20))
    for _ in range(4):
        engine.step()
    second = engine.add(new_request("b", 16, max_tokens=1))
    engine.run()
    assert (first.finish_reasons, second.finish_reasons) == ({0: "length"}, {0: "length"})


# -- drafts -----------------------------------------------------------------------------------------------------------


class AllRight(Guesses):
    """The longest drafts, all of them what comes next."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(0, max_tokens)
        self._random.randrange = lambda *_: max_tokens  # type: ignore[method-assign,assignment]
        self._random.random = lambda: 0.0  # type: ignore[method-assign]


def test_drafts_that_hold_save_steps() -> None:
    engine = Engine(guesses=AllRight(3))
    engine.add(new_request("a", 6, max_tokens=14))
    plans = [engine.step() for _ in range(5)]
    assert [plan.num_scheduled_tokens for plan in plans] == [[6], [4], [4], [4], [1]], (
        "the last token is drawn and not computed"
    )
    assert not engine.scheduler.has_work
    stats = engine.scheduler.stats()
    assert (stats.total_drafts, stats.total_draft_tokens, stats.total_accepted_tokens) == (3, 9, 9)


def test_a_draft_ends_before_a_sample_that_fails() -> None:
    engine = Engine(guesses=AllRight(9))
    client = engine.add(new_request("a", 3, max_tokens=100, seed=-3))
    engine.run()
    assert (client.finish_reasons, len(client.token_ids[0]), engine.num_steps) == ({0: "error"}, 4, 3)
    assert engine.scheduler.stats().total_preemptions == 0


def test_drafts_take_no_memory_that_others_may_need() -> None:
    engine = Engine(num_blocks=6, block_size=4, guesses=AllRight(9))
    engine.add(new_request("a", 8, max_tokens=4))
    engine.add(new_request("b", 8, max_tokens=4))
    engine.step()
    assert engine.step().drafts == {}, "of two free blocks each may need one"
    engine.run()
    assert engine.scheduler.stats().total_preemptions == 0


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_a_vector_is_read_where_its_prompt_ends_and_nothing_is_sampled_there() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(embed_request("vector", 20))
    engine.add(new_request("tokens", 3, max_tokens=2))
    plans = []
    while engine.scheduler.has_work:
        plans.append(engine.step())
    assert [plan.num_scheduled_tokens for plan in plans] == [[5, 3], [1, 7], [8]]
    assert [plan.pool_rows for plan in plans] == [[], [], [0]]
    assert [len(plan.sample_rows) for plan in plans] == [1, 1, 0]
    stats = engine.scheduler.stats()
    assert (stats.total_prompt_tokens, stats.total_generated_tokens) == (23, 2)


def test_a_prompt_found_whole_in_the_cache_computes_its_last_token() -> None:
    engine = Engine()
    prompt = list(range(100, 116))
    engine.add(embed_request("first", prompt))
    engine.run()
    engine.add(embed_request("again", prompt))
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.pool_rows) == ([1], [0])
    assert not engine.scheduler.has_work


def test_many_vectors_in_one_step_take_a_row_each() -> None:
    engine = Engine(max_num_seqs=4)
    for number in range(6):
        engine.add(embed_request(f"{number}", 3))
    assert engine.step().pool_rows == [0, 1, 2, 3]
    assert engine.step().pool_rows == [0, 1]
    assert not engine.scheduler.has_work


def test_a_preempted_prompt_gets_its_vector_when_it_resumes() -> None:
    engine = Engine(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=2)
    engine.add(new_request("tokens", 2, max_tokens=28))
    engine.step()
    client = engine.add(embed_request("vector", 16))
    num_preemptions = 0
    while engine.scheduler.has_work:
        engine.step()
        if group := engine.scheduler._queues.by_id.get("vector"):
            num_preemptions = group.num_preemptions
    assert client.finish_reasons == {0: "stop"}
    assert num_preemptions == 1
