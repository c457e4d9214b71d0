"""ResultProcessor, through the scheduler: sequences that leave, samples of one request, beams, resumed requests."""

import pytest

from quire.errors import RequestError
from quire.outputs import SequenceDelta
from tests.scheduler.checked_engine import Engine, embed_request, new_request
from tests.scheduler.fake_runner import EOS, STOP_TOKEN, alone, is_faulty, kv_of_all

# -- leaving ----------------------------------------------------------------------------------------------------------


def test_abort_frees_in_the_same_call_wherever_the_request_is() -> None:
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=8, enable_prefix_caching=False)
    for name in ("decoding", "half computed", "queued"):
        engine.add(new_request(name, 4 if name == "decoding" else 30, n=2))
        engine.step()
    for name in ("half computed", "queued", "decoding", "decoding", "unknown"):
        engine.abort(name)
    assert (engine.pool.num_free, engine.scheduler.has_work) == (64, False)


def test_stop_ends_one_sample_and_the_others_go_on() -> None:
    engine = Engine()
    client = engine.add(new_request("a", 6, n=3))
    engine.step()
    engine.step()
    used = engine.pool.num_used
    engine.stop("a", 1)
    assert engine.pool.num_used == used - 1
    engine.stop("a", 1)
    engine.stop("unknown", 0)
    engine.run()
    assert sorted(client.finish_reasons) == [0, 1, 2]


def test_end_tokens_and_stop_tokens() -> None:
    reasons = set()
    for seed in range(40):
        engine = Engine()
        client = engine.add(new_request("a", 3, max_tokens=12, seed=seed, can_stop=True))
        deltas: list[SequenceDelta] = []
        while engine.scheduler.has_work:
            plan = engine.scheduler.schedule()
            deltas = list(engine.scheduler.update(plan, engine.runner.execute(plan)))
            engine.receive(deltas)
        last = client.token_ids[0][-1]
        assert deltas[0].stop_reason == (STOP_TOKEN if last == STOP_TOKEN else None)
        reasons.add((last if last in (EOS, STOP_TOKEN) else 0, deltas[0].finish_reason))
    assert reasons == {(EOS, "stop"), (STOP_TOKEN, "stop"), (0, "length")}


def test_a_sample_that_fails_ends_alone_and_leaves_nothing_to_find() -> None:
    engine = Engine()
    prompts = ([number] * 9 for number in range(100, 200))
    prompt = next(prompt for prompt in prompts if is_faulty(kv_of_all(prompt)[-1], seed=-1))
    client = engine.add(new_request("faulty", prompt, seed=-1))
    engine.add(new_request("healthy", 9))
    engine.step()
    assert client.finish_reasons == {0: "error"}
    assert engine.clients.keys() == {"healthy"}
    engine.add(new_request("same prefix", [*prompt, 5]))
    engine.step()
    assert engine.scheduler._queues.by_id["same prefix"].num_cached_tokens == 0
    engine.run()


def test_a_vector_ends_its_request_and_leaves_its_blocks_to_be_found() -> None:
    engine = Engine()
    prompt = [7] * 12
    client = engine.add(embed_request("vector", prompt))
    engine.step()
    assert client.finish_reasons == {0: "stop"}
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.add(new_request("tokens", [*prompt, 5]))
    engine.step()
    assert engine.scheduler._queues.by_id["tokens"].num_cached_tokens == 12
    engine.run()


def test_a_vector_that_fails_leaves_nothing_to_find() -> None:
    engine = Engine()
    prompts = ([number] * 9 for number in range(100, 200))
    prompt = next(prompt for prompt in prompts if is_faulty(kv_of_all(prompt)[-1], seed=-1))
    client = engine.add(embed_request("faulty", prompt, seed=-1))
    engine.step()
    assert client.finish_reasons == {0: "error"}
    engine.add(new_request("same prefix", [*prompt, 5]))
    engine.step()
    assert engine.scheduler._queues.by_id["same prefix"].num_cached_tokens == 0
    engine.run()


def test_a_vector_is_aborted_wherever_its_prompt_is() -> None:
    engine = Engine(max_num_batched_tokens=8, enable_prefix_caching=False, overlaps=True)
    for name in ("half computed", "queued"):
        engine.add(embed_request(name, 30))
        engine.step()
    for name in ("half computed", "queued"):
        engine.abort(name)
    assert (engine.pool.num_free, engine.scheduler.has_work) == (64, False)


# -- samples of one request -------------------------------------------------------------------------------------------


def test_the_prompt_of_a_group_is_computed_and_stored_once() -> None:
    engine = Engine()
    engine.add(new_request("a", 10, n=4))
    plan = engine.step()
    assert (plan.num_scheduled_tokens, plan.sample_indices) == ([10], [0, 0, 0, 0])
    assert len(set(plan.sample_rows)) == 4
    assert (engine.pool.num_used, engine.pool.num_references) == (3, 12)
    plan = engine.step()
    assert plan.num_scheduled_tokens == [1] * 4
    assert len(plan.block_copies) == 3, "the last holder writes in place"
    assert engine.pool.num_used == 2 + 4
    while engine.scheduler.has_work:
        assert engine.step().block_copies == []


def test_samples_part_without_a_copy_where_a_block_is_full() -> None:
    engine = Engine()
    engine.add(new_request("a", 8, n=3))
    engine.run()
    assert engine.pool.total_block_copies == 0


def test_a_group_waits_until_all_its_samples_have_a_row() -> None:
    engine = Engine(max_num_seqs=4)
    engine.add(new_request("a", 4, max_tokens=3, n=2))
    engine.add(new_request("b", 4, max_tokens=3, n=3))
    engine.add(new_request("c", 4, max_tokens=3, n=1))
    engine.step()
    assert engine.scheduler.stats().num_running == 1
    engine.run()


def preempted_group(prompt: int, n: int, *, enable_prefix_caching: bool = True) -> Engine:
    """An engine in which group b was just preempted for the sake of a, and a is gone."""
    shared = prompt // 4
    num_blocks = max(10, shared + n * (-(-(prompt + 29) // 4) - shared))
    engine = Engine(num_blocks, 4, enable_prefix_caching=enable_prefix_caching)
    engine.add(new_request("a", 8, max_tokens=30))
    engine.add(new_request("b", prompt, max_tokens=30, n=n))
    for _ in range(40):
        if engine.scheduler.stats().total_preemptions == 0:
            engine.step()
    assert engine.scheduler._queues.by_id["b"].num_preemptions == 1
    engine.abort("a")
    return engine


@pytest.mark.parametrize("prompt", [1, 6, 8, 9])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_preempted_group_is_resumed_as_one_from_what_is_cached(prompt: int, n: int) -> None:
    engine = preempted_group(prompt, n)
    group = engine.scheduler._queues.by_id["b"]
    missing = sum(sequence.num_output_tokens for sequence in group.sequences) + prompt
    computed = engine.step().num_tokens
    if n > 1:
        computed += engine.step().num_tokens
    engine.scheduler.update_fill()
    assert all(sequence.num_missing_tokens == 1 for sequence in group.sequences)
    assert computed <= min(missing, prompt + n * 6), "full blocks are found again"
    assert len({sequence.table.blocks[0] for sequence in group.sequences}) == (1 if prompt >= 4 else n)
    assert engine.step().num_scheduled_tokens == [1] * n
    engine.run()


def test_a_preempted_group_is_resumed_without_a_cache() -> None:
    engine = preempted_group(9, 3, enable_prefix_caching=False)
    group = engine.scheduler._queues.by_id["b"]
    missing = sum(sequence.num_output_tokens for sequence in group.sequences) + 9
    computed = [engine.step().num_tokens for _ in range(2)]
    engine.scheduler.update_fill()
    assert all(sequence.num_missing_tokens == 1 for sequence in group.sequences)
    assert sum(computed) == missing, "the prompt is computed once then, too"
    engine.run()


# -- beam search ------------------------------------------------------------------------------------------------------


def test_beams_fork_and_free_and_copy_one_block_at_most() -> None:
    engine = Engine(num_blocks=64, block_size=4)
    engine.add(new_request("a", 9, max_tokens=24, n=2, beam_width=4, early_stopping="never"))
    group = engine.scheduler._queues.by_id["a"]
    assert engine.step().num_scheduled_tokens == [9], "the prompt is computed once"
    assert (len(group.sequences), len(group.idle_beams)) == (4, 0)
    assert engine.pool.num_used == 3, "and stored once"
    while engine.scheduler.has_work:
        plan = engine.step()
        assert plan.num_scheduled_tokens == [1] * 4
        assert len(plan.block_copies) <= 3
        solo = sum(len(sequence.table.blocks) for sequence in group.sequences)
        if group.sequences:
            assert engine.pool.num_used <= solo - 3 * 2, "at least the prompt's full blocks are shared by all"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("prompt", "width"), [(1, 3), (6, 2), (8, 3), (9, 4)])
@pytest.mark.parametrize("budget", [8, 64])
def test_preempted_beams_catch_up_before_any_of_them_goes_on(
    prompt: int, width: int, caching: bool, budget: int
) -> None:
    engine = Engine(enable_prefix_caching=caching, max_num_batched_tokens=budget)
    engine.add(new_request("a", prompt, max_tokens=30, beam_width=width, early_stopping="never"))
    group = engine.scheduler._queues.by_id["a"]
    for num_steps in (14, 4, 3):
        for _ in range(num_steps):
            engine.step()
        engine.scheduler._queues.preempt(group)
        engine.check()
        lengths = [len(sequence.token_ids) for sequence in group.sequences]
        assert len(set(lengths)) == 1
        while not (sampled := engine.step().sample_rows):
            assert [len(sequence.token_ids) for sequence in group.sequences] == lengths
        assert len(sampled) == width
    engine.run()


def test_samples_whose_own_blocks_are_gone_resume_behind_their_leader() -> None:
    """It goes on from its output at once; the others compute the end of the prompt again, each by itself."""
    engine = Engine(num_blocks=40, block_size=4)
    engine.add(new_request("a", 10, max_tokens=30, n=3))
    for _ in range(12):
        engine.step()
    group = engine.scheduler._queues.by_id["a"]
    leader = group.leader
    engine.scheduler._queues.preempt(group)
    kept = leader.table.find_prefix(leader.token_ids)[0]
    assert len(kept) == 5
    for block in kept:
        engine.pool.share(block)
    for block in [engine.pool.allocate() for _ in range(engine.pool.num_free)]:
        engine.pool.release(block)
    for block in reversed(kept):
        engine.pool.release(block)
    assert engine.step().num_computed_tokens == [20]
    assert engine.step().num_computed_tokens == [22, 8, 8]
    engine.run()


def test_a_lone_beam_that_resumes_with_one_token_missing_goes_on_at_once() -> None:
    engine = Engine(block_size=4)
    engine.add(new_request("a", 9, max_tokens=12, beam_width=1))
    for _ in range(4):
        engine.step()
    engine.scheduler._queues.preempt(engine.scheduler._queues.by_id["a"])
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens, len(plan.sample_rows)) == ([12], [1], 1)
    engine.run()


@pytest.mark.parametrize("index", [0, 1, 5])
def test_aborted_beams_free_everything_at_once(index: int) -> None:
    engine = Engine(num_blocks=64, block_size=4)
    engine.add(new_request("a", 9, max_tokens=24, beam_width=4))
    for _ in range(index):
        engine.step()
    engine.abort("a")
    assert engine.pool.num_free == 64
    assert len(engine.scheduler._queues.free_rows) == 8


def test_more_beams_than_rows_are_refused() -> None:
    with pytest.raises(RequestError, match="beam_width is 9, but at most 8 sequences run at once"):
        Engine().add(new_request("a", 4, beam_width=9))


@pytest.mark.parametrize("prompt", [1, 4, 6])
@pytest.mark.parametrize("lengths", [(2, 0, 3), (0, 0, 5), (5, 1, 1), (0, 4, 0)])
def test_requests_go_on_from_what_an_earlier_process_generated(prompt: int, lengths: tuple[int, ...]) -> None:
    request = new_request("a", prompt, n=3)
    resumed = {index: alone(request, index).token_ids[:length] for index, length in enumerate(lengths)}
    engine = Engine()
    client = engine.add(new_request("a", prompt, n=3, resumed=resumed))
    plan = engine.step()
    assert plan.num_scheduled_tokens == [prompt]
    assert len(plan.sample_rows) == lengths.count(0), "all that have no token part where the prompt ends"
    engine.run(max_steps=10)
    assert sorted(client.finish_reasons) == [0, 1, 2]


def test_only_unfinished_samples_are_resumed() -> None:
    request = new_request("a", 6, n=3)
    engine = Engine()
    client = engine.add(new_request("a", 6, n=3, resumed={2: alone(request, 2).token_ids[:3]}))
    engine.run()
    assert client.finish_reasons == {2: "length"}


def test_a_group_whose_leader_leaves_before_the_others_forked() -> None:
    request = new_request("a", 6, n=3)
    resumed = {index: alone(request, index).token_ids[:5] for index in range(3)}
    engine = Engine(max_num_batched_tokens=8, max_num_seqs=4)
    engine.add(new_request("b", 4))
    engine.step()
    client = engine.add(new_request("a", 6, n=3, resumed=resumed))
    engine.step()
    engine.stop("a", 0)
    engine.run(max_steps=20)
    assert {index: client.finish_reasons[index] for index in (1, 2)} == {1: "length", 2: "length"}
