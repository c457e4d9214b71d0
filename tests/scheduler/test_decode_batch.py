"""DecodeBatch, through the scheduler. That every promise holds with it is for the state machine of `test_scheduler`."""

from collections.abc import Sequence

import pytest

from quire.config import SpeculativeConfig
from quire.outputs import EngineStats
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.drafting import Drafting
from quire.step import StepPlan, StepResult
from tests.scheduler.test_scheduler import EOS, STOP_TOKEN, Engine, new_request


def lockstep_of(engine: Engine) -> list[str]:
    return [sequence.group.request.request_id for sequence in engine.scheduler._queues.decode_batch.sequences]


def test_who_has_decoded_joins_unless_more_is_asked_than_tokens() -> None:
    engine = Engine()
    engine.add(new_request("plain", 5, max_tokens=20))
    engine.add(new_request("two samples", 6, max_tokens=20, n=2))
    engine.add(new_request("log-probabilities", 5, max_tokens=20, logprobs=1))
    engine.add(new_request("grammar", 5, max_tokens=20, structured=True))
    engine.add(new_request("beams", 5, max_tokens=20, beam_width=2))
    for _ in range(3):
        engine.step()
    assert sorted(lockstep_of(engine)) == ["plain", "two samples", "two samples"]
    not_in_decode_batch = [group.request.request_id for group in engine.scheduler._queues.not_in_decode_batch]
    assert sorted(not_in_decode_batch) == ["beams", "grammar", "log-probabilities"]
    engine.run()


class FindsNothing(DraftPlanner):
    def choose(self, candidates: Sequence[object], *_: float) -> list[list[int]]:
        return [[] for _ in candidates]


def test_while_drafts_are_looked_for_now_and_then_sequences_go_in_lockstep_between() -> None:
    engine, speculation = Engine(), FindsNothing(SpeculativeConfig())
    engine.scheduler._drafting = Drafting(
        speculation,
        engine.pool,
        engine.scheduler._queues,
        EngineStats(),
        lambda: 1.0,
        watermark=0,
        max_num_batched_tokens=64,
    )
    engine.add(new_request("a", 5, max_tokens=70))
    engine.add(new_request("b", 7, max_tokens=70))
    engine.step()
    assert speculation._num_unused == 0, "a step that computes a prompt could take no draft"
    in_decode_batch = []
    for _ in range(65):
        engine.step()
        in_decode_batch.append(len(lockstep_of(engine)))
    assert in_decode_batch[:32] == [0] * 32
    assert in_decode_batch[33:47] == [2] * 14
    assert in_decode_batch[50:62] == [2] * 12
    engine.run()


def test_a_sequence_is_touched_where_its_block_is_full() -> None:
    engine = Engine(block_size=4)
    engine.add(new_request("a", 5, max_tokens=20))
    counts = []
    for _ in range(8):
        engine.step()
        (group,) = engine.scheduler._queues.running
        counts.append((group.leader.num_computed_tokens, group.leader.num_output_tokens))
    # The prompt's five tokens, then two more without a look; the eighth fills the block, the twelfth the next.
    assert counts == [(5, 1), (5, 2), (5, 3), (8, 4), (8, 5), (8, 6), (8, 7), (12, 8)]
    engine.scheduler.memory_report()
    assert group.leader.table.num_tokens == group.leader.num_computed_tokens == 12
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
