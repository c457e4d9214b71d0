"""The scheduler as a whole: a request from end to end, prefixes, steps taken back, log-probabilities of prompts."""

import pytest

from quire.errors import RequestError
from tests.scheduler.checked_engine import Engine, counts_by_request, new_request
from tests.scheduler.fake_runner import alone


def test_a_request_from_end_to_end() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 10, max_tokens=5))
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.sample_indices, plan.sample_rows) == ([10], [0], plan.rows)
    assert [engine.step().num_scheduled_tokens for _ in range(4)] == [[1]] * 4
    assert not engine.scheduler.has_work
    assert client.finish_reasons == {0: "length"}
    assert engine.step().rows == []


# -- shared prefixes --------------------------------------------------------------------------------------------------


def test_a_prefix_is_found_and_not_computed_again() -> None:
    engine = Engine()
    prompt = list(range(100, 112))
    engine.add(new_request("a", prompt, max_tokens=3))
    engine.run()
    engine.add(new_request("b", [*prompt, 7], max_tokens=3))
    engine.add(new_request("other salt", [*prompt, 7], max_tokens=3, salt="other"))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12, 0], [1, 13])
    assert engine.scheduler._queues.by_id["b"].num_cached_tokens == 12
    stats = engine.scheduler.stats()
    assert (stats.total_prefix_queries, stats.total_prefix_hits) == (12 + 13 + 13, 12)


def test_the_last_token_of_a_cached_prompt_is_computed() -> None:
    engine = Engine()
    prompt = list(range(100, 112))
    for name in "ab":
        engine.add(new_request(name, prompt, max_tokens=1))
        plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([11], [1])
    assert len(plan.block_copies) == 1


def test_a_prompt_goes_on_from_inside_a_block() -> None:
    engine = Engine()
    first = list(range(100, 112))
    engine.add(new_request("first", first, max_tokens=1))
    engine.run()
    for name, parted, start in (("a", 6, 6), ("b", 9, 9), ("c", 8, 8), ("none", 0, 0)):
        engine.add(new_request(name, [*first[:parted], 7, 8, 9, 7, 8, 9], max_tokens=3))
        plan = engine.step()
        assert plan.num_computed_tokens == [start]
        assert len(plan.block_copies) == (start % 4 > 0)
        engine.run()


def test_a_prompt_that_fills_the_pool_starts_without_a_block_to_copy() -> None:
    engine = Engine(num_blocks=2)
    engine.add(new_request("first", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1))
    engine.run()
    engine.add(new_request("second", [1, 2, 3, 4, 5, 6, 7, 9], max_tokens=1))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.block_copies) == ([4], []), "the source would take the room of the copy"


# -- registered prefixes ----------------------------------------------------------------------------------------------


def register(engine: "Engine", name: str, prompt: list[int], salts: tuple[str, ...] = ("",)) -> None:
    engine.scheduler.register_prefix(new_request(name, prompt, max_tokens=1, salt=salts[0]), salts)
    while name not in engine.scheduler.prefixes:
        plan = engine.scheduler.schedule()
        engine.scheduler.update(plan, engine.runner.execute(plan))


def test_a_registered_prefix_is_found_under_all_its_salts_until_it_is_removed() -> None:
    engine = Engine(num_blocks=16)
    prefix = list(range(100, 110))
    register(engine, "p", prefix, ("one", "two"))
    pool, scheduler = engine.pool, engine.scheduler
    assert (scheduler.stats().num_pinned_blocks, pool.num_used) == (2, 2)

    def cached(name: str, salt: str) -> int:
        scheduler.add(new_request(name, [*prefix[:8], 7, 7], max_tokens=1, salt=salt))
        plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.execute(plan))
        return plan.num_computed_tokens[0]

    assert [cached(f"a{salt}", salt) for salt in ("one", "two", "three")] == [8, 8, 0]
    pool.clear_hashes()
    assert [cached(f"b{salt}", salt) for salt in ("one", "two", "three")] == [8, 8, 0]
    register(engine, "q", prefix[:4], ("two",))
    assert scheduler.stats().num_pinned_blocks == 2, "they share the first block"
    scheduler.prefixes.remove("p")
    assert scheduler.stats().num_pinned_blocks == 1
    pool.clear_hashes()
    assert [cached(f"c{salt}", salt) for salt in ("one", "two")] == [4, 4]
    scheduler.prefixes.remove("q")
    assert (pool.num_free, pool.num_references) == (pool.num_blocks, 0)


def test_what_registered_prefixes_hold_is_no_requests() -> None:
    engine = Engine(num_blocks=8)
    register(engine, "p", list(range(100, 108)))
    scheduler = engine.scheduler
    with pytest.raises(RequestError, match=r"takes 3 more KV blocks .* hold 2 and may hold 4 of the pool's 8"):
        register(engine, "q", list(range(200, 212)))
    with pytest.raises(RequestError, match="the prefix id p is in use"):
        register(engine, "p", list(range(200, 212)))
    with pytest.raises(RequestError, match=r"can need 7 KV blocks .* has 8, of which 2 are registered prefixes'"):
        scheduler.add(new_request("long", 20, max_tokens=9))
    scheduler.add(new_request("begins with it", [*range(100, 108), *range(12)], max_tokens=9))
    with pytest.raises(RequestError, match=r"a request in flight can need 7 KV blocks, and the prefix would leave 4"):
        register(engine, "r", list(range(200, 208)))
    scheduler.add(new_request("fits", 16, max_tokens=9))
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.execute(plan))
    assert scheduler.stats().num_used_blocks == scheduler.stats().num_pinned_blocks == 2


def test_an_aborted_registration_leaves_nothing() -> None:
    engine = Engine()
    scheduler = engine.scheduler
    scheduler.register_prefix(new_request("p", 20, max_tokens=1), ("",))
    assert scheduler.prefixes.num_blocks == 5
    scheduler.schedule()
    scheduler.abort("p")
    assert scheduler.prefixes.num_blocks == 0
    assert "p" not in scheduler.prefixes


# -- steps taken back --------------------------------------------------------------------------------------------------


def test_a_step_for_which_there_is_no_memory_is_planned_again_and_smaller() -> None:
    engine = Engine(max_num_batched_tokens=64)
    for index in range(6):
        engine.add(new_request(f"request {index}", [index % 3, 1, 1], 12, can_stop=False))
    for _ in range(3):
        engine.step()
    plan = engine.scheduler.schedule()
    assert len(plan.rows) == 6
    engine.scheduler.roll_back(plan)
    engine.check()
    assert engine.scheduler.stats().num_running == 0
    smaller = engine.step()
    assert smaller.num_tokens == 3
    first = [group.request.request_id for group in engine.scheduler._queues.running]
    assert first == [f"request {index}" for index in range(len(first))]
    engine.run()
    assert engine.scheduler.stats().total_preemptions == 6


def test_a_step_taken_back_holds_no_block_for_its_copies() -> None:
    engine = Engine()
    engine.add(new_request("a", list(range(100, 108)), max_tokens=1))
    engine.run()
    engine.add(new_request("b", [*range(100, 106), 1, 1]))
    plan = engine.scheduler.schedule()
    assert len(plan.block_copies) == 1
    engine.scheduler.roll_back(plan)
    engine.check()
    engine.run()


def test_the_next_turn_goes_on_in_the_block_that_the_last_one_left() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 10, max_tokens=5))
    engine.run()
    conversation = [*client.request.prompt_token_ids, *client.token_ids[0], 1, 1]
    engine.add(new_request("b", conversation))
    plan = engine.step()
    # The last token of the answer was never computed.
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens, plan.block_copies) == ([14], [3], [])
    engine.run()


def test_a_sample_that_failed_leaves_no_block() -> None:
    engine = Engine()
    requests = [new_request(f"{number}", 10, 24, seed=-1, n=2) for number in range(20)]
    for request in requests:
        engine.add(request)
    engine.run()
    endings = [alone(request, index) for request in requests for index in range(2)]
    assert {ending.finish_reason for ending in endings} == {"error"}
    assert all(engine.pool.hashes[block] is not None for block in engine.pool.children)


def test_one_prefix_asked_for_many_times_at_once_is_computed_once() -> None:
    engine = Engine(num_blocks=128, max_num_batched_tokens=32, max_num_seqs=16)
    prefix = list(range(100, 160))
    for number in range(8):
        engine.add(new_request(f"{number}", [*prefix, number, 1, 1, 1], max_tokens=4))
    engine.add(new_request("other", 10, max_tokens=4))
    assert counts_by_request(engine, engine.step()) == {"0": 22, "other": 10}
    engine.run()
    assert engine.scheduler.stats().total_prompt_tokens == 60 + 8 * 4 + 10


def test_nobody_waits_for_a_prefix_that_will_not_be_found() -> None:
    engine = Engine(enable_prefix_caching=False)
    prompt = list(range(100, 116))
    for name in "ab":
        engine.add(new_request(name, list(prompt)))
    assert counts_by_request(engine, engine.step()) == {"a": 16, "b": 16}


def test_who_waited_for_a_prefix_goes_on_when_its_owner_leaves() -> None:
    engine = Engine(max_num_batched_tokens=8)
    prompt = list(range(100, 130))
    engine.add(new_request("a", prompt))
    engine.add(new_request("b", [*prompt, 1]))
    engine.step()
    engine.step()
    assert engine.scheduler.stats().num_waiting == 1
    engine.abort("a")
    plan = engine.step()
    assert plan.num_computed_tokens == [16]
    engine.run()


# -- log-probabilities of the prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 2, 8, 30])
@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_come_once_for_every_position(prompt: int, n: int) -> None:
    engine = Engine(max_num_batched_tokens=8)
    for name in ("one", "two"):
        client = engine.add(new_request(name, list(range(100, 100 + prompt)), n=n, prompt_logprobs=0))
        engine.run()
        assert [entry.token_ids for entry in client.prompt_logprobs] == [[100 + p] for p in range(1, prompt)]


def test_prompt_logprobs_are_neither_lost_nor_repeated_by_a_preemption() -> None:
    engine = Engine(num_blocks=8, max_num_batched_tokens=8)
    engine.add(new_request("a", 4, max_tokens=25))
    client = engine.add(new_request("b", 12, max_tokens=12, prompt_logprobs=2))
    engine.run()
    assert engine.scheduler.stats().total_preemptions > 0
    assert len(client.prompt_logprobs) == 11
    # The check of every step holds them against the prompt.


def test_prompt_logprobs_of_a_prompt_that_starts_over() -> None:
    engine = Engine(num_blocks=4, block_size=4, max_num_batched_tokens=8)
    engine.add(new_request("decoding", 4, max_tokens=9))
    client = engine.add(new_request("stuck", 12, max_tokens=2, prompt_logprobs=0))
    engine.step()
    engine.step()
    assert len(client.prompt_logprobs) == 8
    engine.scheduler._queues.preempt(engine.scheduler._queues.by_id["stuck"])
    engine.step()
    assert len(client.prompt_logprobs) == 8, "these eight positions were computed again"
    engine.run()
    assert len(client.prompt_logprobs) == 11
