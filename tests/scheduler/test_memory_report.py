"""The memory report against what the tables hold, by its plain definitions."""

import itertools

from quire.kv_cache.block_pool import BlockPool
from quire.outputs import KVGroupMemory, MemoryReport, PrefixMiss
from quire.request import Request
from quire.sampling_params import SamplingParams
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.scheduler import Scheduler
from quire.step import StepPlan, StepResult

BLOCK_SIZE = 4


class Steps:
    """A scheduler whose samples are counted upwards, on a clock of one second a step."""

    def __init__(self, num_blocks: int = 32, windows: tuple[int, ...] = (0,)) -> None:
        self.seconds = 0.0
        self.scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK_SIZE, windows=windows),
            SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128),
            clock=lambda: self.seconds,
        )
        self._tokens = itertools.count(1000)

    def add(self, name: str, prompt: list[int], *, n: int = 1, max_tokens: int = 20, salt: str = "") -> None:
        params = SamplingParams(n=n)
        self.scheduler.add(
            Request(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=max_tokens, cache_salt=salt)
        )

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.seconds += 1.0
            plan = self.scheduler.schedule()
            self.scheduler.update(plan, self._result(plan))

    def _result(self, plan: StepPlan) -> StepResult:
        count = len(plan.sample_rows)
        return StepResult([next(self._tokens) for _ in range(count)], [None] * count, [None] * count)

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def report(self) -> MemoryReport:
        return self.scheduler.memory_report()


def test_an_empty_pool() -> None:
    report = Steps().report()
    assert (report.requests, report.stats.prefix_misses, report.waste) == ([], {}, 0.0)
    assert (report.used_block_ages.max, report.cached_free_block_ages.max) == (0.0, 0.0)


def test_slots_of_parallel_samples() -> None:
    steps = Steps()
    steps.add("a", list(range(10)), n=3)
    steps.step()  # the prompt: 2 full blocks and one of 2 tokens, shared by all
    (request,) = steps.report().requests
    assert (request.num_sequences, request.num_blocks) == (3, 3)
    assert (request.num_filled_slots, request.num_allocated_slots, request.num_shared_slots) == (10, 12, 24)
    assert request.waste == 1 - 10 / 12
    assert request.num_copied_slots == 0
    steps.step()  # each writes its own third block; the last to write keeps the shared one
    (request,) = steps.report().requests
    assert (request.num_blocks, request.num_filled_slots) == (5, 8 + 3 * 3)
    assert (request.num_shared_slots, request.num_copied_slots) == (16, 8)
    report = steps.report()
    assert report.waste == request.waste == report.stats.waste
    assert (report.used_block_ages.max, report.used_block_ages.p50) == (1.0, 1.0)


def test_where_prompts_were_found_and_why_not() -> None:
    steps = Steps(num_blocks=12)
    prompt = list(range(17))
    steps.add("a", prompt, max_tokens=1)
    steps.finish()
    assert steps.report().cached_free_block_ages.max == 0.0
    steps.add("again", prompt, max_tokens=2)
    steps.step()
    (request,) = steps.report().requests
    assert (request.cached_tokens, request.miss) == ({"device": 16}, None)
    steps.finish()
    steps.add("other end", [*prompt[:8], *range(50, 60)], max_tokens=2)
    steps.step()
    (request,) = steps.report().requests
    assert request.cached_tokens == {"device": 8}
    assert request.miss == PrefixMiss(2, "differs", None)
    steps.finish()
    steps.add("other salt", prompt, max_tokens=2, salt="x")
    steps.step()
    assert steps.report().requests[0].miss == PrefixMiss(0, "salt", None)
    steps.finish()
    steps.add("large", list(range(100, 146)), max_tokens=2)
    steps.finish()
    evicted_at = steps.seconds
    steps.add("late", prompt, max_tokens=2)
    steps.step(1)
    miss = steps.report().requests[0].miss
    assert miss is not None
    assert (miss.block, miss.reason) == (0, "evicted")
    assert miss.evicted_seconds_ago is not None
    assert 0.0 < miss.evicted_seconds_ago <= steps.seconds - evicted_at + 3.0
    steps.finish()
    stats = steps.report().stats
    assert stats.prefix_misses == {"new": 2, "differs": 1, "salt": 1, "evicted": 1}
    assert stats.prefix_hits == {"device": 24}
    assert stats.total_prefix_hits == 24


def test_blocks_shared_with_other_requests_are_counted_for_each() -> None:
    steps = Steps()
    prompt = list(range(13))
    steps.add("a", prompt)
    steps.step()
    steps.add("b", prompt)
    steps.step()
    first, second = steps.report().requests
    assert first.num_shared_slots == second.num_shared_slots == 12
    assert steps.report().stats.num_shared_slots == 12


def test_each_kv_group_is_reported() -> None:
    steps = Steps(num_blocks=24, windows=(0, 6))
    steps.add("a", list(range(32)), max_tokens=2)
    steps.step()
    assert steps.report().groups == [KVGroupMemory(0, 8, 0), KVGroupMemory(6, 2, 6)]
    assert "KV group 1, window of 6 tokens: 2 blocks used, 6 free and cached" in str(steps.report())
    assert steps.report().stats.total_given_back == 6
    steps.finish()
    assert steps.report().groups == [KVGroupMemory(0, 0, 8), KVGroupMemory(6, 0, 8)]


def test_a_miss_names_the_group_that_lost_its_block() -> None:
    steps = Steps(num_blocks=24, windows=(0, 6))
    prompt = list(range(32))
    steps.add("a", prompt, max_tokens=1)
    steps.finish()
    steps.add("b", list(range(100, 124)), max_tokens=1)  # takes what the window group gave back first
    steps.finish()
    steps.add("c", [*prompt[:16], *range(50, 60)], max_tokens=2)
    steps.step()
    (request,) = steps.report().requests
    assert (request.cached_tokens, request.miss) == ({}, PrefixMiss(0, "evicted", 1.0, 6))
    steps.finish()
    steps.add("d", [*range(200, 220)], max_tokens=2)
    steps.step()
    assert steps.report().requests[0].miss == PrefixMiss(0, "new", None)
