"""Tiers below the pool, against a runner that stores and reads as planned, late, and sometimes loses a block.

As in `test_scheduler`, the content of a block is a chain of hashes of tokens. A block that is stored too late, loaded
too early, or loaded into a block that another sequence holds by now shows in the next token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import DISK, HOST, MIN_STAGED_BLOCKS, Tier, TierIndex
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.result_processor import StepInFlight
from quire.scheduler.scheduler import Scheduler
from quire.step import OffloadResult, StepPlan, StepResult
from tests.scheduler.checked_engine import Engine, Guesses, counts_by_request, new_request
from tests.scheduler.fake_runner import NOTHING, FakeRunner, is_faulty, kv_of_all
from tests.scheduler.scheduler_machine import WINDOWS, SchedulerMachine

MIXES = [(windows, 200 + place) for place, windows in enumerate(2 * WINDOWS) if windows != (0,)]

BLOCK_BYTES = 2**30
"""So large that no more than MIN_STAGED_BLOCKS are on their way at once."""


STATE_BLOCKS = 2
"""The space of a recurrent state."""

Content = list[int] | tuple[int]
"""The KV of a block, or a recurrent state."""


def size_of(content: Content | None) -> int:
    return 0 if content is None else STATE_BLOCKS if isinstance(content, tuple) else 1


@dataclass
class FakeDisk:
    """A disk that outlives the engines of a test."""

    blocks: dict[bytes, "Content"] = field(default_factory=dict)
    broken: set[bytes] = field(default_factory=set)
    full: bool = False


class TieredRunner(FakeRunner):
    """Reads and writes end some steps later, in their order; `patience` is the chance that one ends in a step."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        disk: FakeDisk,
        patience: float,
        seed: int,
        windows: Sequence[int],
        num_states: int = 0,
    ) -> None:
        super().__init__(num_blocks, block_size, num_states, windows)
        self.host: dict[bytes, Content] = {}
        self.disk = disk
        self.writing: list[tuple[bytes, Content | None]] = []
        self.reading: list[bytes] = []
        self.arrived: dict[bytes, Content] = {}
        self.patience = patience
        self.rng = random.Random(seed)

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.offload is not None:
            offload = plan.offload
            for tier, name in offload.evicted:
                if tier == HOST:
                    del self.host[name]
                else:
                    self.writing.append((name, None))
            for tier, name, block in offload.stores:
                content = self.content(block)
                assert NOTHING not in content
                if tier == HOST:
                    assert name not in self.host
                    self.host[name] = content
                else:
                    self.writing.append((name, content))
            for name in offload.cancelled:
                del self.arrived[name]
            self.reading += offload.reads
        assert sum(size_of(content) for _, content in self.writing) <= MIN_STAGED_BLOCKS
        result = super().execute(plan)
        on_their_way = [*self.arrived.values(), *(self.disk.blocks.get(name) for name in self.reading)]
        assert sum(map(size_of, on_their_way)) <= MIN_STAGED_BLOCKS
        result.offload = self.finished(wait=plan.offload is not None and plan.offload.wait)
        return result

    def content(self, block: int) -> Content:
        if block < len(self.memory):
            return self.memory[block].copy()
        return (self.states[block - len(self.memory)],)

    def load(self, plan: StepPlan) -> None:
        for tier, name, block in plan.offload.loads if plan.offload is not None else ():
            content = self.host[name] if tier == HOST else self.arrived.pop(name)
            if isinstance(content, tuple):
                (self.states[block - len(self.memory)],) = content
            else:
                self.memory[block] = content.copy()

    def finished(self, *, wait: bool) -> OffloadResult:
        result = OffloadResult(load_seconds=0.001)
        while self.writing and self.rng.random() < self.patience:
            name, content = self.writing.pop(0)
            if content is None:
                self.disk.blocks.pop(name, None)
            elif self.disk.full:
                result.failed_stores.append(name)
                result.stopped = True
            else:
                self.disk.blocks[name] = content
                result.stored.append(name)
        while self.reading and (wait or self.rng.random() < self.patience):
            wait = False
            name = self.reading.pop(0)
            if name not in self.disk.blocks:
                result.failed_reads.append((name, "missing"))
            elif name in self.disk.broken:
                result.failed_reads.append((name, "corrupt"))
                self.disk.broken.discard(name)
                del self.disk.blocks[name]
            else:
                self.arrived[name] = self.disk.blocks[name]
                result.read.append((name, 0.001))
        return result


class TieredEngine(Engine):
    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        num_host_blocks: int = 0,
        num_disk_blocks: int = 0,
        disk: FakeDisk | None = None,
        patience: float = 1.0,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_num_partial_prefills: int = 4,
        seed: int = 0,
        windows: Sequence[int] = (0,),
        num_snapshots: int | None = None,
        guesses: Guesses | None = None,
    ) -> None:
        super().__init__(
            num_blocks, block_size, max_num_seqs=max_num_seqs, windows=windows, num_snapshots=num_snapshots
        )
        self.disk = FakeDisk() if disk is None else disk
        stored = [(name, size_of(content) * BLOCK_BYTES) for name, content in self.disk.blocks.items()]
        state_bytes = STATE_BLOCKS * BLOCK_BYTES
        self.index = TierIndex(
            lambda: 1.0,
            host=Tier(num_host_blocks * BLOCK_BYTES, BLOCK_BYTES, state_bytes=state_bytes) if num_host_blocks else None,
            disk=Tier(num_disk_blocks * BLOCK_BYTES, BLOCK_BYTES, stored, state_bytes=state_bytes)
            if num_disk_blocks
            else None,
        )
        self.num_host_blocks = num_host_blocks
        self.num_disk_blocks = num_disk_blocks
        self.pool = BlockPool(num_blocks, block_size, windows=windows)
        num_states = 0 if self.states is None else self.states.stats.num_slots
        self.runner: TieredRunner = TieredRunner(num_blocks, block_size, self.disk, patience, seed, windows, num_states)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=256,
                max_num_partial_prefills=max_num_partial_prefills,
            ),
            tiers=self.index,
            states=self.states,
            speculation=guesses,
            clock=lambda: 1.0,
        )
        if guesses is not None:
            guesses.groups = self.scheduler._queues.by_id

    def run(self, max_steps: int = 1_000) -> None:
        super().run(4 * max_steps + 1_000)

    def finish_stores(self) -> None:
        """Run steps without requests until everything is stored."""
        for _ in range(2_000):
            if not self.scheduler.has_idle_work:
                return
            self.step()
        raise AssertionError("storing does not end")

    def push_down(self) -> None:
        """Take all free blocks and give them back, while no request runs: every cached block is evicted."""
        scheduler, offload = self.scheduler, self.scheduler._offload
        assert offload is not None
        taken: list[int] = []
        while self.pool.num_free or offload.has_idle_work:
            if self.pool.num_free and len(offload._storing._storing) < MIN_STAGED_BLOCKS:
                taken.append(self.pool.allocate())
            plan = StepPlan(offload=offload.finish(computes=False))
            scheduler._in_flight.append(StepInFlight(plan, scheduler._queues.rows.copy()))
            scheduler.update(plan, self.runner.execute(plan))
        for block in taken:
            self.pool.release(block)
        assert self.pool.num_cached_free == 0

    def step(self) -> StepPlan:
        plan = super().step()
        offload = self.scheduler._offload
        assert offload is not None
        assert sum(map(size_of, self.runner.host.values())) <= self.num_host_blocks
        if DISK in self.index.tiers:
            removed = {name for name, content in self.runner.writing if content is None}
            written = {name: content for name, content in self.runner.writing if content is not None}
            kept = {name: content for name, content in self.disk.blocks.items() if name not in removed}
            assert sum(map(size_of, {**kept, **written}.values())) <= self.num_disk_blocks
        if not (offload._storing.plan.evicted or offload._storing.plan.stores):  # states may fork between steps
            if HOST in self.index.tiers:
                assert set(self.index.tiers[HOST].hashes()) == self.runner.host.keys()
            if DISK in self.index.tiers and not self.runner.writing:
                assert set(self.index.tiers[DISK].hashes()) == self.disk.blocks.keys()
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert scheduler._offload is not None
        waiting = scheduler._offload.waiting
        if not plan.rows and scheduler.has_work:
            assert plan.offload is not None
            assert plan.offload.wait or plan.offload.loads, "a step that computes nothing waits or loads"
        assert 0 <= plan.num_tokens <= scheduler.limits.max_num_batched_tokens
        assert not {sequence.row for sequence in waiting} & set(plan.rows)
        for tier in self.index.tiers.values():
            assert tier.stats.num_bytes <= tier.stats.capacity_bytes


def stats_of(engine: TieredEngine, tier: str) -> dict[str, int]:
    stats = engine.scheduler.stats().tiers[tier]
    names = ("hits", "saved", "loaded", "dropped", "evicted", "corrupt", "recomputed")
    return {name: value for name in names if (value := getattr(stats, f"total_{name}"))}


PROMPT = list(range(100, 112))
"""Three blocks."""


def with_stored_prompt(**options: int) -> TieredEngine:
    """A new engine on a disk where an earlier one has stored PROMPT and one more block."""
    engine = TieredEngine(num_disk_blocks=20)
    engine.add(new_request("a", PROMPT, max_tokens=6))
    engine.run()
    engine.finish_stores()
    assert len(engine.disk.blocks) == 4
    return TieredEngine(num_disk_blocks=20, disk=engine.disk, **options)


def test_what_is_evicted_moves_to_host_memory_and_comes_back_in_the_same_step() -> None:
    engine = TieredEngine(num_blocks=8, num_host_blocks=20)
    engine.add(new_request("a", PROMPT, max_tokens=2))
    engine.run()
    engine.add(new_request("b", 28, max_tokens=2))
    engine.run()
    assert engine.pool.find(next(iter(engine.runner.host))) is None
    engine.add(new_request("again", [*PROMPT, 1], max_tokens=2))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12], [1])
    assert engine.scheduler._queues.by_id["again"].num_cached_tokens == 12
    assert stats_of(engine, HOST)["hits"] == 12
    engine.run()


def test_a_host_tier_evicts_the_least_recently_used() -> None:
    engine = TieredEngine(num_blocks=8, num_host_blocks=6)
    for number in range(4):
        engine.add(new_request(f"{number}", 24, max_tokens=2))
        engine.run()
    stats = stats_of(engine, HOST)
    saved = engine.pool.total_evictions
    assert (stats["saved"], stats["evicted"], len(engine.runner.host)) == (saved, saved - 6, 6)


def test_the_disk_tier_survives_a_restart_though_nothing_was_evicted() -> None:
    engine = with_stored_prompt()
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3))
    assert engine.step().rows == []
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12], [1])
    assert engine.scheduler._queues.by_id["b"].num_cached_tokens == 12
    assert engine.scheduler.stats().total_prefix_hits == 12
    engine.run()
    assert stats_of(engine, DISK) == {"hits": 12, "loaded": 3}


def test_another_salt_finds_nothing() -> None:
    engine = with_stored_prompt()
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3, salt="other"))
    assert engine.step().num_scheduled_tokens == [13]


def test_others_run_while_one_waits_for_its_blocks() -> None:
    engine = with_stored_prompt()
    engine.runner.patience = 0.0
    engine.add(new_request("stored", [*PROMPT, 7], max_tokens=3))
    engine.add(new_request("new", 8, max_tokens=9))
    for _ in range(5):
        assert set(counts_by_request(engine, engine.step())) == {"new"}
    engine.runner.patience = 1.0
    engine.step()
    assert set(counts_by_request(engine, engine.step())) == {"stored", "new"}
    engine.run()


def test_two_requests_for_one_stored_prefix_load_it_once() -> None:
    engine = with_stored_prompt()
    for name in "bc":
        engine.add(new_request(name, [*PROMPT, ord(name)], max_tokens=3))
    engine.run()
    assert stats_of(engine, DISK)["loaded"] == 3
    assert engine.scheduler.stats().total_prompt_tokens == 2


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_cannot_be_read_is_computed_from_there_on(broken: int) -> None:
    engine = with_stored_prompt()
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3))
    table = engine.scheduler._queues.by_id["b"].leader.table
    engine.disk.broken.add(table.block_hash(broken, PROMPT))
    engine.step()
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([4 * broken], [13 - 4 * broken])
    assert stats_of(engine, DISK)["corrupt"] == 1
    assert engine.scheduler.stats().total_prefix_hits == 4 * broken
    engine.run()
    engine.finish_stores()
    assert len(engine.disk.blocks) == 4, "the block is stored anew"


def test_abort_while_blocks_are_on_their_way() -> None:
    engine = with_stored_prompt()
    engine.runner.patience = 0.0
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3))
    engine.step()
    engine.abort("b")
    assert engine.pool.num_free == 64
    engine.add(new_request("c", [*PROMPT, 8], max_tokens=3))
    engine.run()
    assert engine.runner.arrived == {}
    assert engine.scheduler.stats().total_prompt_tokens == 1


def test_a_full_disk_stops_the_tier_and_nothing_else() -> None:
    engine = with_stored_prompt()
    engine.disk.full = True
    engine.add(new_request("b", 40, max_tokens=3))
    engine.run()
    engine.finish_stores()
    stats = engine.scheduler.stats().tiers[DISK]
    assert stats.stopped
    assert stats.total_dropped > 0
    engine.add(new_request("c", [*PROMPT, 7], max_tokens=3))
    engine.run()
    assert stats_of(engine, DISK)["hits"] == 12, "what is there is still found"
    assert not engine.scheduler.has_idle_work


def test_a_writer_that_is_behind_loses_blocks_and_delays_nobody() -> None:
    engine = TieredEngine(num_blocks=8, num_disk_blocks=50, patience=0.0)
    for number in range(4):
        engine.add(new_request(f"{number}", 24, max_tokens=2))
        engine.run()
    stats = stats_of(engine, DISK)
    assert len(engine.runner.writing) == MIN_STAGED_BLOCKS
    assert stats["dropped"] == engine.pool.total_evictions - MIN_STAGED_BLOCKS


def test_the_beginnings_of_prompts_are_written_first() -> None:
    engine = TieredEngine(num_disk_blocks=50, patience=0.0)
    engine.add(new_request("a", 24, max_tokens=1))
    engine.run()
    first = engine.step()
    assert first.offload is not None
    assert [engine.runner.memory[block][0] for _, _, block in first.offload.stores] == [
        kv_of_all(new_request("a", 24).prompt_token_ids)[0]
    ]


def test_a_smaller_size_after_a_restart_is_kept_at_once() -> None:
    disk = with_stored_prompt().disk
    engine = TieredEngine(num_disk_blocks=2, disk=disk)
    engine.add(new_request("b", 3, max_tokens=1))
    engine.run()
    assert len(disk.blocks) == 2


def test_resetting_the_prefix_cache_empties_the_tiers() -> None:
    engine = with_stored_prompt(num_host_blocks=8)
    engine.scheduler.reset_prefix_cache()
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=1))
    assert engine.step().num_scheduled_tokens == [13]
    assert engine.disk.blocks == {}


def test_the_blocks_of_a_failed_sample_leave_the_tiers_too() -> None:
    prompts = ([number] * 9 for number in range(100, 200))
    prompt = next(prompt for prompt in prompts if is_faulty(kv_of_all(prompt)[-1], seed=-1))
    engine = TieredEngine(num_disk_blocks=20)
    engine.add(new_request("healthy", prompt, max_tokens=1))
    engine.run()
    engine.finish_stores()
    assert len(engine.disk.blocks) == 2
    engine.add(new_request("faulty", prompt, seed=-1))
    engine.run()
    engine.step()
    assert engine.disk.blocks == {}


@pytest.mark.parametrize("tiers", [(0, 0), (12, 0), (0, 60), (6, 60)])
def test_preempted_requests_resume_from_wherever_their_blocks_are(tiers: tuple[int, int]) -> None:
    engine = TieredEngine(num_blocks=24, num_host_blocks=tiers[0], num_disk_blocks=tiers[1], patience=0.5)
    for number in range(24):
        engine.add(new_request(f"{number}", 12, max_tokens=18))
    engine.run()
    assert engine.scheduler.stats().total_preemptions > 5
    if any(tiers):
        loaded = sum(tier.stats.total_loaded for tier in engine.index.tiers.values())
        assert loaded > 0


@pytest.mark.parametrize("tiers", [(0, 0), (60, 0), (0, 60), (60, 60)])
@pytest.mark.parametrize("prompt", [8, 9, 11])
@pytest.mark.parametrize(("width", "beams"), [(3, False), (2, True), (4, True)])
def test_every_sequence_of_a_group_resumes_from_its_own_output(
    tiers: tuple[int, int], prompt: int, width: int, beams: bool
) -> None:
    """Each computes at most its last, partly filled block again; blocks that beams share are loaded once.

    If the pool still has that block, the first sequence continues in it.
    """
    engine = TieredEngine(num_host_blocks=tiers[0], num_disk_blocks=tiers[1], patience=0.5)
    engine.add(new_request("a", prompt, max_tokens=40, **({"beam_width": width} if beams else {"n": width})))
    group = engine.scheduler._queues.by_id["a"]
    for _ in range(18):
        engine.step()
    assert len(group.sequences) == width
    engine.scheduler._queues.preempt(group)
    lengths = {sequence: len(sequence.token_ids) for sequence in group.sequences}
    names = {
        sequence.table.block_hash(index, sequence.token_ids)
        for sequence, length in lengths.items()
        for index in range((length - 1) // 4)
    }
    engine.check()
    if any(tiers):
        engine.push_down()
    before = engine.scheduler.stats()
    offload = engine.scheduler._offload
    assert offload is not None
    num_repeated = 0
    while offload.waiting or any(sequence.num_missing_tokens > 1 for sequence in lengths):
        plan = engine.step()
        stored = {sequence.row: length - 1 for sequence, length in lengths.items()}
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            num_repeated += max(0, min(start + count, stored[row]) - start)
        engine.scheduler.update_fill()
    left = [(length - 1) % 4 for length in lengths.values()]
    assert num_repeated == sum(left if any(tiers) else left[1:])
    stats = engine.scheduler.stats()
    loaded = sum(tier.total_loaded for tier in stats.tiers.values())
    loaded -= sum(tier.total_loaded for tier in before.tiers.values())
    assert loaded == (len(names) if any(tiers) else 0)
    engine.run()


CROWDS = [(windows, seed, None) for windows, seed in [*(((0,), seed) for seed in range(20)), *MIXES]]
RECURRENT = [(WINDOWS[seed % len(WINDOWS)], seed, (1, 4, 30)[seed % 3]) for seed in range(13)]


@pytest.mark.parametrize(("windows", "seed", "num_snapshots"), CROWDS + RECURRENT)
def test_crowds_with_little_memory_at_every_level(
    windows: tuple[int, ...], seed: int, num_snapshots: int | None
) -> None:
    rng = random.Random(seed)
    disk = FakeDisk()
    for _ in range(2):
        engine = TieredEngine(
            rng.choice([12, 16, 30]) * len(windows),
            4,
            num_host_blocks=rng.choice([0, 1, 5, 40]),
            num_disk_blocks=rng.choice([0, 3, 10, 60]),
            disk=disk,
            patience=rng.choice([0.1, 0.5, 1.0]),
            max_num_batched_tokens=rng.choice([8, 20, 64]),
            seed=seed,
            windows=windows,
            num_snapshots=num_snapshots,
            guesses=None if num_snapshots is None or seed % 2 else Guesses(seed, 3),
        )
        for number in range(20):
            prompt = [0] * rng.randrange(12) + [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            engine.add(new_request(f"{number}", prompt, rng.randrange(1, 10), n=rng.choice([1, 1, 2]), seed=number % 3))
            disk.broken |= {name for name in disk.blocks if rng.random() < 0.1}
        engine.run()
        engine.finish_stores()
        assert engine.runner.arrived == {}


# -- recurrent states -------------------------------------------------------------------------------------------------


def with_stored_state(**options: int) -> TieredEngine:
    """A new engine of a recurrent model, on a disk where an earlier one has stored PROMPT and the state after it."""
    engine = TieredEngine(num_disk_blocks=20, num_snapshots=2)
    engine.add(new_request("a", [*PROMPT, 5], max_tokens=2))
    engine.run()
    engine.finish_stores()
    assert sorted(map(size_of, engine.disk.blocks.values())) == [1, 1, 1, STATE_BLOCKS]
    return TieredEngine(num_disk_blocks=20, disk=engine.disk, num_snapshots=2, **options)


def state_of_prompt(engine: TieredEngine) -> bytes:
    return next(name for name, content in engine.disk.blocks.items() if isinstance(content, tuple))


def test_an_evicted_state_moves_to_host_memory_and_comes_back() -> None:
    engine = TieredEngine(num_blocks=8, num_host_blocks=20, num_snapshots=1, max_num_seqs=1)
    engine.add(new_request("a", [*PROMPT, 1], max_tokens=2))
    engine.run()
    for name in "bc":
        engine.add(new_request(name, 28, max_tokens=2))
        engine.run()
    engine.add(new_request("again", [*PROMPT, 2], max_tokens=2))
    plan = engine.step()
    assert (plan.num_computed_tokens, plan.num_scheduled_tokens) == ([12], [1])
    assert plan.offload is not None
    assert sorted(size_of(engine.runner.content(block)) for _, _, block in plan.offload.loads) == [1, 1, 1, 2]
    assert stats_of(engine, HOST)["hits"] == 12
    engine.run()


def test_states_survive_a_restart() -> None:
    engine = with_stored_state()
    for name in "bcd":  # each loads the state, once the one before has
        engine.add(new_request(name, [*PROMPT, ord(name)], max_tokens=3))
    engine.run()
    assert engine.scheduler.stats().total_prefix_hits == 36
    assert stats_of(engine, DISK)["loaded"] == 3 + 3


@pytest.mark.parametrize("loses", ["state", "block"])
def test_a_sequence_whose_state_or_block_cannot_be_read_begins_anew(loses: str) -> None:
    engine = with_stored_state()
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3))
    state = state_of_prompt(engine)
    engine.disk.broken.add(state if loses == "state" else next(name for name in engine.disk.blocks if name != state))
    engine.run()
    assert stats_of(engine, DISK)["corrupt"] == 1
    assert engine.scheduler.stats().total_prompt_tokens == 13
    assert engine.scheduler.stats().states.num_running == 0


def test_a_sequence_that_leaves_while_its_state_comes_leaves_no_snapshot() -> None:
    engine = with_stored_state()
    engine.runner.patience = 0.0
    engine.add(new_request("b", [*PROMPT, 7], max_tokens=3))
    engine.step()
    engine.abort("b")
    assert engine.scheduler.stats().states.num_snapshots == 0
    engine.runner.patience = 1.0
    engine.add(new_request("c", [*PROMPT, 8], max_tokens=3))
    engine.run()
    assert engine.scheduler.stats().total_prefix_hits == 12


def test_a_failed_sample_takes_its_states_from_the_tiers() -> None:
    prompts = ([number] * 9 for number in range(100, 200))
    prompt = next(prompt for prompt in prompts if is_faulty(kv_of_all(prompt)[-1], seed=-1))
    engine = TieredEngine(num_disk_blocks=20, num_snapshots=4)
    engine.add(new_request("healthy", prompt, max_tokens=1))
    engine.run()
    engine.finish_stores()
    assert sorted(map(size_of, engine.disk.blocks.values())) == [1, 1, STATE_BLOCKS]
    engine.add(new_request("faulty", prompt, seed=-1))
    engine.run()
    engine.step()
    assert engine.disk.blocks == {}


class TieredMachine(SchedulerMachine):
    """All that befalls a scheduler, with tiers that are slow and lose things; and restarts."""

    @initialize(
        num_blocks=st.integers(1, 48),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 8),
        more_budget=st.sampled_from([0, 3, 40]),
        num_host_blocks=st.sampled_from([0, 1, 4, 30]),
        num_disk_blocks=st.sampled_from([0, 2, 10, 80]),
        patience=st.sampled_from([0.2, 0.6, 1.0]),
        windows=st.sampled_from(WINDOWS),
        num_snapshots=st.sampled_from([None, 0, 2, 10]),
    )
    def start(  # type: ignore[override]
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        more_budget: int,
        num_host_blocks: int,
        num_disk_blocks: int,
        patience: float,
        windows: tuple[int, ...],
        num_snapshots: int | None,
    ) -> None:
        self.options = {
            "num_snapshots": num_snapshots,
            "windows": windows,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + more_budget,
            "num_host_blocks": num_host_blocks,
            "num_disk_blocks": num_disk_blocks,
            "patience": patience,
            "disk": FakeDisk(),
        }
        self.engine: TieredEngine = TieredEngine(**self.options)
        self.num_requests = 0

    @precondition(lambda self: not self.engine.clients)
    @rule(flush=st.booleans())
    def restart(self, flush: bool) -> None:
        if flush:
            self.engine.finish_stores()
        self.engine = TieredEngine(**self.options)

    @precondition(lambda self: self.engine.disk.blocks)
    @rule(data=st.data())
    def break_a_block(self, data: st.DataObject) -> None:
        self.engine.disk.broken.add(data.draw(st.sampled_from(sorted(self.engine.disk.blocks))))

    @rule(full=st.booleans())
    def fill_the_disk(self, full: bool) -> None:
        self.engine.disk.full = full

    @rule()
    def reset(self) -> None:
        self.engine.scheduler.reset_prefix_cache()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            self.engine.finish_stores()
            self.engine.step()
            assert self.engine.runner.arrived == {}


TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(max_examples=40, stateful_step_count=25)
