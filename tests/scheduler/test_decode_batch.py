"""DecodeBatch, through the scheduler. That every promise holds with it is for the state machine of `test_scheduler`."""

import random
from collections.abc import Sequence

import pytest

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.speculative_config import SpeculativeConfig
from quire.step import StepPlan, StepResult
from tests.scheduler.checked_engine import Engine, new_request
from tests.scheduler.fake_runner import EOS, STOP_TOKEN


def decode_batch_of(engine: Engine) -> list[str]:
    return [sequence.group.request.request_id for sequence in engine.scheduler._queues.decode_batch.sequences]


def test_a_decoding_sequence_joins_unless_more_than_tokens_is_asked() -> None:
    engine = Engine()
    engine.add(new_request("plain", 5, max_tokens=20))
    engine.add(new_request("two samples", 6, max_tokens=20, n=2))
    engine.add(new_request("log-probabilities", 5, max_tokens=20, logprobs=1))
    engine.add(new_request("grammar", 5, max_tokens=20, structured=True))
    engine.add(new_request("beams", 5, max_tokens=20, beam_width=2))
    for _ in range(3):
        engine.step()
    assert sorted(decode_batch_of(engine)) == ["plain", "two samples", "two samples"]
    not_in_decode_batch = [group.request.request_id for group in engine.scheduler._queues.not_in_decode_batch]
    assert sorted(not_in_decode_batch) == ["beams", "grammar", "log-probabilities"]
    engine.run()


class FindsNothing(DraftPlanner):
    def choose(self, candidates: Sequence[object], *_: float) -> list[list[int]]:
        return [[] for _ in candidates]


def test_while_drafts_are_looked_for_now_and_then_the_batch_fills_between() -> None:
    speculation = FindsNothing(SpeculativeConfig())
    engine = Engine(guesses=speculation)
    engine.add(new_request("a", 5, max_tokens=70))
    engine.add(new_request("b", 7, max_tokens=70))
    engine.step()
    assert speculation._num_unused == 0, "a step that computes a prompt could take no draft"
    in_decode_batch = []
    for _ in range(65):
        engine.step()
        in_decode_batch.append(len(decode_batch_of(engine)))
    assert in_decode_batch[:32] == [0] * 32
    assert in_decode_batch[33:47] == [2] * 14
    assert in_decode_batch[50:62] == [2] * 12
    engine.run()


def test_the_table_of_a_member_is_touched_where_its_block_is_full() -> None:
    engine = Engine(block_size=4)
    engine.add(new_request("a", 5, max_tokens=20))
    counts, in_table = [], []
    for _ in range(8):
        engine.step()
        (group,) = engine.scheduler._queues.running
        counts.append((group.leader.num_computed_tokens, group.leader.num_output_tokens))
        in_table.append(group.leader.table.num_tokens)
    assert counts == [(5, 1), (6, 2), (7, 3), (8, 4), (9, 5), (10, 6), (11, 7), (12, 8)], "counts never lag"
    # The prompt's five tokens, then three without a look; the ninth and the thirteenth begin a block.
    assert in_table == [5, 5, 5, 5, 9, 9, 9, 9]
    engine.scheduler.memory_report()
    assert group.leader.table.num_tokens == group.leader.num_computed_tokens == 12
    engine.run()


def test_overlapped_steps_use_the_batch_too() -> None:
    engine = Engine(block_size=4, overlaps=True)
    for name in "ab":
        engine.add(new_request(name, 5, max_tokens=20))
    members = []
    for _ in range(15):
        engine.step()
        members.append(len(decode_batch_of(engine)))
    assert members == [2] * 15
    # Of 16 plans, one of them in flight, the first computes prompts, the second decodes before there is a batch, and
    # the third is the first of the batch.
    assert engine.num_repeated == 13
    engine.run()


def test_a_step_repeats_until_anything_else_happens() -> None:
    engine = Engine(block_size=4)
    for name in "ab":
        engine.add(new_request(name, 5, max_tokens=20))
    ids = [engine.step().batch_id for _ in range(4)]
    engine.add(new_request("c", 5, max_tokens=3))
    ids += [engine.step().batch_id for _ in range(4)]
    engine.abort("a")
    ids += [engine.step().batch_id for _ in range(2)]
    # Prompts; a and b; c's prompt; all three; a and b again; b alone.
    assert ids == [0, 1, 1, 1, 0, 2, 2, 3, 4, 4]
    engine.run()


def test_steps_outside_the_batch_repeat_too() -> None:
    engine = Engine()
    engine.add(new_request("log-probabilities", 5, max_tokens=20, logprobs=1))
    assert [engine.step().batch_id for _ in range(5)] == [0, 1, 1, 1, 1]
    engine.run()


def test_samples_are_one_list_while_they_are_the_same() -> None:
    engine = Engine(block_size=4)
    engine.add(new_request("a", 5, max_tokens=8))
    engine.add(new_request("b", 7, max_tokens=20))
    samples = []
    while engine.scheduler.has_work:
        plan = engine.scheduler.schedule()
        deltas = engine.scheduler.update(plan, engine.runner.execute(plan))
        samples.append(deltas.samples)
        assert len(deltas.token_ids) == len(deltas.samples)
    both, alone = [("a", 0), ("b", 0)], [("b", 0)]
    assert [each for each in samples if each == both][2:] == [both] * 4
    assert len({id(each) for each in samples[3:7]}) == 1
    assert all(each == alone for each in samples[7:-1])
    assert len({id(each) for each in samples[8:-1]}) == 1


def test_where_the_pool_may_be_short_the_last_group_yields_as_ever() -> None:
    engine = Engine(num_blocks=6, block_size=4)
    engine.add(new_request("a", 7, max_tokens=12))
    engine.add(new_request("b", 7, max_tokens=12))
    while engine.scheduler.stats().total_preemptions == 0:
        engine.step()
    assert [group.request.request_id for group in engine.scheduler._queues.running] == ["a"]
    assert engine.scheduler._queues.by_id["b"].num_preemptions == 1
    engine.run()


@pytest.mark.parametrize("num_steps", range(2, 8))
def test_an_abort_between_a_plan_and_its_result(num_steps: int) -> None:
    engine = Engine(block_size=4)
    for name in "abc":
        engine.add(new_request(name, 5, max_tokens=20))
    for _ in range(num_steps):
        engine.step()
    plan: StepPlan = engine.scheduler.schedule()
    result: StepResult = engine.runner.execute(plan)
    engine.scheduler.abort("b")
    del engine.clients["b"]
    engine.receive(engine.scheduler.update(plan, result))
    engine.check()
    engine.run()


def test_a_failed_sample_ends_alone() -> None:
    engine = Engine(block_size=4)
    sound = engine.add(new_request("sound", 6, max_tokens=20))
    faulty = engine.add(new_request("faulty", 5, max_tokens=40, seed=-1))
    engine.run()
    assert (sound.finish_reasons, faulty.finish_reasons) == ({0: "length"}, {0: "error"})
    assert 1 < len(faulty.token_ids[0]) < 20, "it was in decode_batch with the other"


def test_whose_stop_token_ends_whom() -> None:
    """What ends one sequence does not end its neighbour."""
    engine = Engine(block_size=4)
    stopping, others = [], []
    for seed in range(4):
        stopping.append(engine.add(new_request(f"stops {seed}", 5, max_tokens=60, seed=seed, can_stop=True)))
        others.append(engine.add(new_request(f"goes on {seed}", 5, max_tokens=60, seed=seed)))
    engine.run()
    assert [client.finish_reasons for client in others] == 4 * [{0: "length"}]
    assert any(STOP_TOKEN in client.token_ids[0] or EOS in client.token_ids[0] for client in others)
    assert {0: "stop"} in [client.finish_reasons for client in stopping]


def advance(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    num_samples = len(plan.sample_rows)
    scheduler.update(plan, StepResult([9] * num_samples, [None] * num_samples, [None] * num_samples))


def state_of(scheduler: Scheduler) -> object:
    scheduler.update_fill()
    sequences = [sequence for group in scheduler.groups.values() for sequence in group.sequences]
    tables = [(sequence.sample, sequence.token_ids, sequence.table.groups) for sequence in sequences]
    return tables, scheduler.stats(), scheduler.pool.hashes, list(scheduler.pool.free_order())


@pytest.mark.parametrize("num_blocks", [40, 14])
@pytest.mark.parametrize("seed", range(6))
def test_plain_steps_at_once_leave_what_they_leave_one_by_one(seed: int, num_blocks: int) -> None:
    """With 14 blocks groups are preempted and wait."""
    draw, limits = random.Random(seed), SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=200)
    slow, fast = (Scheduler(BlockPool(num_blocks, 8), limits, clock=lambda: 0.0) for _ in range(2))
    num_at_once = 0
    for number in range(6):
        request = new_request(f"{number}", draw.randint(1, 30), draw.randint(1, 40), n=draw.choice([1, 1, 2]))
        for scheduler in (slow, fast):
            scheduler.add(request)
        for _ in range(draw.randint(1, 25) if number < 5 else 1000):
            if not fast.has_work:
                break
            plain = fast.plain_steps()
            if plain.num_steps:
                num_steps = draw.randint(1, plain.num_steps)
                num_at_once += num_steps
                fast.repeat_plain_steps(num_steps, 9)
            else:
                advance(fast)
            while slow.stats().total_steps < fast.stats().total_steps:
                advance(slow)
            assert state_of(slow) == state_of(fast)
    assert num_at_once > 20
    assert not slow.has_work
    assert not fast.has_work
