"""Engine: a scheduler, its pool and a fake runner in a loop, with every promise checked in every step."""

import random
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Literal

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import BlockTable
from quire.kv_cache.states import StatePool
from quire.outputs import SampleId, SequenceDelta
from quire.request import Request, Task
from quire.sampling_params import SamplingParams
from quire.scheduler.draft_planner import Candidate, DraftPlanner
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence, SequenceGroup
from quire.speculative_config import SpeculativeConfig
from quire.step import StepPlan, StepResult, TokenLogprobs
from quire.structured_outputs import StructuredOutputsParams
from tests.scheduler.fake_runner import EOS, NOTHING, STOP_TOKEN, FakeRunner, alone, kv_of_all, next_token


class Guesses(DraftPlanner):
    """Drafts of any length in most steps, some of which are right: what comes next, with a wrong token now and then.
    Sequences may go in decode_batch from any step to the next."""

    def __init__(self, seed: int, max_tokens: int) -> None:
        super().__init__(SpeculativeConfig(num_speculative_tokens=max_tokens))
        self._random = random.Random(seed)
        self._looks_next = True
        self.groups: dict[str, SequenceGroup] = {}

    @property
    def pauses(self) -> bool:
        return self._random.random() < 0.5

    @property
    def looks_next(self) -> bool:
        return self._looks_next

    def begin_step(self) -> bool:
        looks, self._looks_next = self._looks_next, self._random.random() < 0.7
        return looks

    def choose(
        self, candidates: SequenceOf[Candidate], num_tokens: int, max_drafted: int, now: float
    ) -> list[list[int]]:
        sequences = {id(s.token_ids): s for group in self.groups.values() for s in group.sequences}
        drafts = []
        for _, token_ids, most in candidates:
            assert most >= 0
            sequence, draft = sequences[id(token_ids)], list[int]()
            length = max(0, min(most, max_drafted, self._random.randrange(self.max_tokens + 1)))
            for _ in range(length):
                token = next_token(kv_of_all([*token_ids, *draft])[-1], sequence.group.request.seed, sequence.index)
                draft.append(token if self._random.random() < 0.8 else 3)
            max_drafted -= length
            drafts.append(draft)
        return drafts


@dataclass
class Client:
    """What the sender of a request has received so far."""

    request: Request
    token_ids: dict[int, list[int]]
    finish_reasons: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class CheckedStates(StatePool):
    """Remembers what every snapshot was named for."""

    def __init__(self, num_slots: int, num_owners: int) -> None:
        super().__init__(num_slots, num_owners)
        self.expected: dict[bytes, int] = {}

    def _add(self, slot: int, table: BlockTable, token_ids: SequenceOf[int], num_tokens: int) -> None:
        super()._add(slot, table, token_ids, num_tokens)
        self.expected[table.prefix_hash(token_ids, num_tokens)] = kv_of_all(list(token_ids[:num_tokens]))[-1]


class Engine:
    """Scheduler, pool and fake runner in a loop, with every promise checked in every step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_num_partial_prefills: int = 4,
        enable_prefix_caching: bool = True,
        guesses: DraftPlanner | None = None,
        overlaps: bool = False,
        num_failures: int = 0,
        policy: str = "fcfs",
        admission: str = "current",
        windows: SequenceOf[int] = (0,),
        num_snapshots: int | None = None,
        background_delay: float = 0.15,
    ) -> None:
        """With `overlaps` a step's result is late: it comes when the next step is planned, where that can be. A device
        has `num_failures` times no memory for a step of more than one token. With `num_snapshots` the model is
        recurrent, and has so many slots for states besides those of running sequences."""
        self.now = 1.0
        self.seconds_per_token = 0.0
        """What a step takes on the scheduler's clock."""
        self.overlaps = overlaps
        self.num_failures = num_failures
        self.random = random.Random(num_failures)
        self.in_flight: tuple[StepPlan, StepResult] | None = None
        self.num_ahead = 0
        self.pool = BlockPool(num_blocks, block_size, windows=windows, enable_prefix_caching=enable_prefix_caching)
        self.states: CheckedStates | None = None
        if num_snapshots is not None:
            self.states = CheckedStates(max_num_seqs + num_snapshots, max_num_seqs)
        num_states = 0 if self.states is None else self.states.stats.num_slots
        self.runner = FakeRunner(num_blocks, block_size, num_states, windows)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=256,
                max_num_partial_prefills=max_num_partial_prefills,
                background_delay=background_delay,
            ),
            speculation=guesses,
            states=self.states,
            make_queue=SCHEDULING_POLICIES[policy],
            make_rule=ADMISSIONS[admission],
            clock=lambda: self.now,
        )
        if isinstance(guesses, Guesses):
            guesses.groups = self.scheduler._queues.by_id
        self.clients: dict[str, Client] = {}
        self.request_ids: dict[int, str] = {}
        """Identity of a prompt's list → its request."""
        self.num_steps = 0
        self.last_plans: dict[int, StepPlan] = {}
        """The newest batch id → the last plan that had it."""
        self.num_repeated = 0
        """Plans that repeated the one before."""
        self.last_samples: dict[int, list[SampleId]] = {}
        """Batch id → the samples of the last deltas that had it."""

    def add(self, request: Request) -> Client:
        self.scheduler.add(request)
        resumed = request.output_token_ids or {index: [] for index in range(request.params.n)}
        client = Client(request, {index: list(token_ids) for index, token_ids in resumed.items()})
        self.clients[request.request_id] = client
        self.request_ids[id(request.prompt_token_ids)] = request.request_id
        return client

    def step(self) -> StepPlan:
        if self.in_flight is None:
            running = [sequence for group in self.scheduler._queues.running for sequence in group.sequences]
            self.rows_without_kv = {sequence.row for sequence in running if sequence.num_computed_tokens == 0}
            plan = self.scheduler.schedule()
            self.check_plan(plan)
            result = self.launch(plan)
            if result is None:
                self.scheduler.roll_back(plan)
                self.check()
                return plan
            self.in_flight = plan, result
        (plan, result), self.in_flight = self.in_flight, None
        ahead, failed = self.scheduler.schedule_ahead(plan) if self.overlaps else None, False
        if ahead is not None:
            next_result = self.launch(ahead)
            failed = next_result is None
            if next_result is not None:
                self.in_flight = ahead, next_result
                self.num_ahead += 1
        self.update(plan, result)
        if failed and ahead is not None:
            self.scheduler.roll_back(ahead)
        self.num_steps += 1
        self.check()
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> None:
        self.now += self.seconds_per_token * plan.num_tokens
        deltas = self.scheduler.update(plan, result)
        if deltas.batch_id:
            assert deltas.batch_id == plan.batch_id
            assert not deltas.others
            known = self.last_samples.setdefault(deltas.batch_id, deltas.samples)
            assert deltas.samples is known, "the samples of one batch are one list"
        self.receive(deltas)

    def check_repetition(self, plan: StepPlan) -> None:
        """A step with a batch id decodes and does nothing else, and goes on where the last one of this id ended."""
        num_rows = len(plan.rows)
        assert plan.batch_id >= 0
        if not plan.batch_id:
            return
        assert plan.sample_rows == plan.rows
        assert plan.sample_indices == list(range(num_rows))
        assert plan.num_scheduled_tokens == [1] * num_rows
        assert len(plan.token_ids) == num_rows > 0
        assert plan.new_rows == plan.row_forks == plan.block_copies == []
        assert plan.drafts == plan.prompt_logprobs == {}
        assert plan.pool_rows == []
        assert all(first > 0 for _, _, first, _ in plan.new_blocks)
        last = self.last_plans.get(plan.batch_id)
        if last is not None:
            assert plan.rows == last.rows
            assert plan.num_computed_tokens == [position + 1 for position in last.num_computed_tokens]
            self.num_repeated += 1
        else:
            assert plan.batch_id > max(self.last_plans, default=0), "an id never comes back"
        self.last_plans = {plan.batch_id: plan}

    def launch(self, plan: StepPlan) -> StepResult | None:
        """What a device makes of a plan; None where it has no memory. It knows the tokens that it has drawn."""
        self.check_repetition(plan)
        if plan.num_tokens > 1 and self.num_failures and self.random.random() < 0.2:
            self.num_failures -= 1
            self.runner.execute(
                StepPlan(
                    new_rows=plan.new_rows,
                    row_forks=plan.row_forks,
                    new_blocks=plan.new_blocks,
                    block_copies=self.random.choice([plan.block_copies, []]),
                    state_copies=plan.state_copies,
                )
            )
            for slot in (*plan.state_slots, *(save[2] for save in plan.state_saves)):
                self.runner.states[slot] = NOTHING  # some layers may have computed
            return None
        known = [self.runner.rows[~token].token_ids[-1] if token < 0 else token for token in plan.token_ids]
        return self.runner.execute(replace(plan, token_ids=known))

    def run(self, max_steps: int = 1_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "no end in sight"
        assert self.pool.num_free == self.pool.num_blocks

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self.clients.pop(request_id, None)
        assert request_id not in self.scheduler._queues.by_id
        self.check()

    def stop(self, request_id: str, index: int) -> None:
        self.scheduler.stop(request_id, index)
        if request_id in self.clients:
            self.clients[request_id].finish_reasons[index] = "stopped by its text"
            self.forget_finished()
        self.check()

    def receive(self, deltas: Iterable[SequenceDelta]) -> None:
        for delta in deltas:
            client = self.clients[delta.request_id]
            assert delta.index not in client.finish_reasons, "a sample that ended goes on"
            token_ids = client.token_ids[delta.index]
            token_ids += delta.token_ids
            client.prompt_logprobs += delta.prompt_logprobs or []
            ending = alone(client.request, delta.index)
            assert token_ids == ending.token_ids[: len(token_ids)]
            if delta.finish_reason is not None:
                assert (token_ids, delta.finish_reason) == (ending.token_ids, ending.finish_reason)
                assert delta.vector == ending.vector
                assert (delta.error is None) == (delta.finish_reason != "error")
                client.finish_reasons[delta.index] = delta.finish_reason
            if client.request.params.prompt_logprobs is None:
                assert client.prompt_logprobs == []
            elif delta.token_ids:
                prompt = client.request.prompt_token_ids
                expected = [([token], [-float(start)]) for start, token in enumerate(prompt[1:])]
                assert [(entry.token_ids, entry.logprobs) for entry in client.prompt_logprobs] == expected
        self.forget_finished()

    def forget_finished(self) -> None:
        for request_id, client in list(self.clients.items()):
            if client.finish_reasons.keys() >= client.token_ids.keys():
                assert request_id not in self.scheduler._queues.by_id
                del self.clients[request_id]

    def check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert bool(plan.rows) == scheduler.has_work
        assert 0 <= plan.num_tokens <= scheduler.limits.max_num_batched_tokens
        new_rows = {new_row.row for new_row in plan.new_rows}
        assert len(new_rows) == len(plan.new_rows)
        starting = new_rows | self.rows_without_kv
        decoding = {
            sequence.row
            for group in scheduler._queues.running
            if not (
                group.advances_together
                and any(other.num_missing_tokens != 1 or other.row in starting for other in group.sequences)
            )
            for sequence in group.sequences
            if sequence.in_decode_batch
            or (sequence.num_missing_tokens == 1 and sequence.num_output_tokens and sequence.row not in starting)
        }
        assert set(plan.rows[: len(decoding)]) == decoding, "a decoding sequence is in every step, and comes first"

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        assert scheduler._queues.by_id.keys() == self.clients.keys()
        sequences = [s for group in scheduler._queues.by_id.values() for s in (*group.sequences, *group.idle_beams)]
        running = [s for group in scheduler._queues.running for s in (*group.sequences, *group.idle_beams)]
        assert [group.order for group in scheduler._queues.running] == sorted(
            {g.order for g in scheduler._queues.running}
        )
        assert len(scheduler._queues.running) + len(scheduler._queues.waiting) == len(scheduler._queues.by_id)
        assert pool.num_references == sum(len(sequence.table.held_blocks) for sequence in sequences)
        assert pool.num_free == len(list(pool.free_order())) == pool.ref_counts.count(0)
        assert {sequence.row for sequence in running} == {
            row for row, sequence in enumerate(scheduler._queues.rows) if sequence is not None
        }
        assert len(running) + len(scheduler._queues.free_rows) == scheduler.limits.max_num_seqs
        for sequence in sequences:
            assert len(sequence.table.blocks) * pool.block_size - sequence.table.num_tokens < pool.block_size
            if self.in_flight is None:
                assert sequence.in_decode_batch or sequence.table.num_tokens == sequence.num_computed_tokens
                assert all(token >= 0 for token in sequence.token_ids)
            if sequence not in running:
                assert (sequence.table.blocks, sequence.row) == ([], -1)
        self.check_decode_batch()
        for group in scheduler._queues.running:
            held = {block for sequence in group.sequences for block in sequence.table.held_blocks}
            # A window group also holds what a step computes, and the step before it where its result is late.
            chunk = 2 * scheduler.limits.max_num_batched_tokens // pool.block_size + 2
            num_windowed = pool.num_groups - pool.windows.count(0)
            assert len(held) <= group.max_blocks(pool) + num_windowed * chunk
        if not scheduler._queues.by_id:
            assert pool.num_free == pool.num_blocks
        stats = scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (
            len(scheduler._queues.running),
            len(scheduler._queues.waiting),
        )
        assert stats.num_used_blocks == pool.num_blocks - pool.num_free
        if self.states is not None and self.in_flight is None:
            self.check_states(self.states, [sequence for sequence in sequences if sequence.state >= 0])

    def check_states(self, states: CheckedStates, owners: list[Sequence]) -> None:
        """Every slot is free, a sequence's own, or a snapshot; and what they hold is what they should hold."""
        contents = self.runner.states.copy()
        for source, destination in states.copies:
            contents[destination] = 0 if source < 0 else contents[source]
        snapshots = dict(states.snapshots())
        slots = [*(owner.state for owner in owners), *(each.slot for each in snapshots.values()), *states._free]
        assert sorted(slots) == list(range(states.stats.num_slots))
        assert (states.stats.num_running, states._num_held) == (len(owners), 0)
        for name, snapshot in snapshots.items():
            assert contents[snapshot.slot] == states.expected[name]
        for owner in owners:
            assert owner.row >= 0
            if self.scheduler._offload is not None and self.scheduler._offload.is_loading(owner):
                continue
            computed = kv_of_all(owner.token_ids[: owner.num_computed_tokens])
            assert contents[owner.state] == (computed[-1] if computed else 0)
        for group in self.scheduler._queues.running:
            assert all(each.state >= 0 for each in group.sequences if each.num_computed_tokens)

    def check_decode_batch(self) -> None:
        """The block tables of members lag within a block, their counts and the pool's sum do not; nobody else's do."""
        groups, pool = self.scheduler._queues, self.pool
        num_filled = sum(fill for fill, count in zip(pool.fill, pool.ref_counts, strict=True) if count)
        for sequence in groups.decode_batch.sequences:
            assert sequence.num_missing_tokens == 1
            assert all(token >= 0 for token in sequence.token_ids)
            num_unseen = len(sequence.token_ids) - 1 + (self.in_flight is not None) - sequence.table.num_tokens
            assert 0 <= num_unseen < pool.block_size
            num_filled += num_unseen * pool.num_groups
        assert pool.num_filled_slots == num_filled
        not_in_decode_batch = [group for group in groups.running if not all(s.in_decode_batch for s in group.sequences)]
        assert [group for group in groups.not_in_decode_batch if group in not_in_decode_batch] == not_in_decode_batch
        members = {s for group in groups.by_id.values() for s in group.sequences if s.in_decode_batch}
        assert members == set(groups.decode_batch.sequences)
        assert len(members) == len(groups.decode_batch.sequences)


def new_request(
    request_id: str,
    prompt: int | list[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    seed: int = 1,
    priority: int = 0,
    salt: str = "",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    resumed: dict[int, list[int]] | None = None,
    can_stop: bool = False,
    beam_width: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    structured: bool = False,
) -> Request:
    """A request with a prompt of its own of a given length, or with a given one. It ends by length unless told.

    A `structured` one follows a grammar: tokens may be forced on it, and it ends where its text is whole.
    """
    if isinstance(prompt, int):
        rng = random.Random(request_id)
        prompt = [rng.randrange(100, 1_000) for _ in range(prompt)]
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(
            n=n,
            prompt_logprobs=prompt_logprobs,
            logprobs=None if structured else logprobs,
            structured_outputs=StructuredOutputsParams(regex="any") if structured else None,
            stop_token_ids=(STOP_TOKEN,) if can_stop else (),
            beam_width=beam_width,
            length_penalty=1.0 if beam_width is None else length_penalty,
            early_stopping=False if beam_width is None else early_stopping,
        ),
        seed=seed,
        eos_token_ids=(EOS,) if can_stop else (),
        max_tokens=max_tokens,
        priority=priority,
        cache_salt=salt,
        tenant=salt,
        output_token_ids=resumed or {},
    )


def embed_request(
    request_id: str, prompt: int | list[int], *, seed: int = 1, priority: int = 0, salt: str = ""
) -> Request:
    """A request for the vector of a prompt, as `new_request` takes it. With a negative seed some prompts fail."""
    request = new_request(request_id, prompt, seed=seed, priority=priority, salt=salt)
    return replace(request, task=Task.EMBED, max_tokens=0)


def counts_by_request(engine: Engine, plan: StepPlan) -> dict[str, int]:
    """Tokens computed in a step that was just executed."""
    counts: dict[str, int] = {}
    for row, count in zip(plan.rows, plan.num_scheduled_tokens, strict=True):
        request_id = engine.request_ids[id(engine.runner.rows[row].new_row.prompt_token_ids)]
        counts[request_id] = counts.get(request_id, 0) + count
    return counts
