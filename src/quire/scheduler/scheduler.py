"""Scheduler: owns all requests, plans steps, and applies their results.

`schedule()` makes a StepPlan; `update()` applies its StepResult and says what each sample gained. Between the two
calls `schedule_ahead()` may plan the next step before the tokens of this one are known, and requests may come and go.
Nothing here knows of models, tensors, text or time; the clock comes in as a function. What a step computes is decided
in `step_planner`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockHash, root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.states import StatePool
from quire.kv_cache.tiers import TierIndex
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.request import Request
from quire.scheduler.decode_batch import PlainSteps
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.length_curve import Ending
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.memory_report import report_memory
from quire.scheduler.parts import make_parts
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES, MakeQueue, MakeRule
from quire.scheduler.result_processor import StepInFlight
from quire.scheduler.sequence import NO_ROW, SequenceGroup
from quire.step import StepPlan, StepResult


class Scheduler:
    """Owns all requests. No one else writes to the pool."""

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        *,
        tiers: TierIndex | None = None,
        speculation: DraftPlanner | None = None,
        states: StatePool | None = None,
        make_queue: MakeQueue = SCHEDULING_POLICIES["fcfs"],
        make_rule: MakeRule = ADMISSIONS["current"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`states`: the slots of recurrent states, for a model that has them."""
        self.pool = pool
        self.limits = limits
        parts = make_parts(
            pool,
            limits,
            clock,
            tiers=tiers,
            speculation=speculation,
            state_pool=states,
            make_queue=make_queue,
            make_rule=make_rule,
        )
        self.prefixes = parts.prefixes
        self._parts = parts
        self._queues = parts.queues
        self._planner = parts.planner
        self._results = parts.results
        self._offload = parts.offload
        self._drafting = parts.drafting
        self._states = parts.states
        self._tiers = tiers
        self._clock = clock
        self._num_arrivals = 0
        self._planned_at = 0.0
        self._updated_at = 0.0
        """When the last result was processed."""
        self._in_flight: deque[StepInFlight] = deque()
        """Steps planned whose result is not processed, the oldest first."""
        self._max_step_tokens = limits.max_num_batched_tokens
        """Less than the limit for a while after a device had no memory for a step."""

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, block_hashes: SequenceOf[BlockHash] = ()) -> None:
        """Queue a request. Raises `RequestError` for one that can never run.

        `block_hashes` are those of the prompt's leading blocks, where the caller has computed them.
        """
        if request.request_id in self._queues.by_id:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        self._parts.check.check_lengths(request)
        root = root_hash(request.cache_salt, self.pool.block_size, request.adapter)
        group = SequenceGroup(request, self.pool, root, self._num_arrivals)
        group.leader.table.know_hashes(block_hashes)
        self._parts.check.check_memory(group)
        self._num_arrivals += 1
        if not self._queues.by_id:
            self._parts.demand.begin(self._clock())
        self._queues.enter(group)
        if request.prefilled and self._parts.offload is not None:
            self._parts.offload.expect(group.leader)

    def abort(self, request_id: str) -> None:
        """End a request, wherever it is; its blocks are free at once. Unknown ids (already ended) are ignored."""
        group = self._queues.by_id.get(request_id)
        if group is not None:
            self._queues.drop_all(group)

    def stop(self, request_id: str, index: int) -> None:
        """End one sample whose text reached a stop string. The other samples of its request go on."""
        group = self._queues.by_id.get(request_id)
        if group is not None:
            for sequence in tuple(group.sequences):
                if sequence.index == index:
                    self._queues.drop(sequence, Ending.NATURAL)

    def register_prefix(self, request: Request, salts: SequenceOf[str]) -> None:
        """Compute the request's prompt and hold its full blocks, findable under all `salts`, until `prefixes.remove`.

        The request asks for one token and has the first of the salts. Raises `RequestError` with the numbers for a
        prefix that cannot be held, or that would leave too little for a request in flight.
        """
        prefix = self.prefixes.check(request, salts)
        self._parts.check.check_room_beside(list(self._queues.by_id.values()), prefix.num_new_blocks)
        self.add(prefix.request)
        self.prefixes.reserve(prefix)

    @property
    def has_work(self) -> bool:
        return bool(self._queues.by_id)

    @property
    def request_ids(self) -> list[str]:
        """Ids of all unfinished requests."""
        return list(self._queues.by_id)

    @property
    def adapters_in_use(self) -> set[str]:
        """Adapters of all unfinished requests."""
        return {group.request.adapter for group in self._queues.by_id.values()}

    @property
    def groups(self) -> Mapping[str, SequenceGroup]:
        """All unfinished requests by id, to read."""
        return self._queues.by_id

    @property
    def has_idle_work(self) -> bool:
        """Whether steps without requests would still store blocks in the tiers."""
        return self._offload is not None and self._offload.has_idle_work

    def reset_prefix_cache(self) -> None:
        """Make every cached prefix unfindable, in the pool and in the tiers."""
        self.pool.clear_hashes()
        if self._offload is not None:
            self._offload.evict_all()
        if self._states is not None:
            self._states.pool.clear()

    def stats(self) -> EngineStats:
        """The present counts; predictions are at most half a second old."""
        pool, parts = self.pool, self._parts
        totals, prefixes, demand = parts.totals, parts.lookup.counts, parts.demand.forecast(self._clock())
        stats = EngineStats(
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting),
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_free_blocks=pool.num_cached_free,
            num_pinned_blocks=len(pool.pinned),
            block_size=pool.block_size,
            num_filled_slots=pool.num_filled_slots,
            num_allocated_slots=pool.num_allocated_slots,
            num_shared_slots=pool.num_shared_slots,
            total_steps=totals.total_steps,
            total_prompt_tokens=totals.total_prompt_tokens,
            total_generated_tokens=totals.total_generated_tokens,
            total_preemptions=self._queues.num_preemptions,
            total_prefix_queries=parts.admission.num_queried_tokens,
            total_prefix_hits=prefixes.num_hits,
            total_evictions=pool.total_evictions,
            total_given_back=pool.total_given_back,
            total_block_copies=pool.total_block_copies,
            prefix_hits=prefixes.hits.copy(),
            prefix_misses=prefixes.misses.copy(),
            predicted_output_tokens=demand.output_tokens,
            predicted_kv_cache_usage=demand.kv_cache_usage,
            predicted_queue_seconds=demand.queue_seconds,
        )
        if self._drafting is not None:
            stats.total_drafts = self._drafting.num_drafts
            stats.total_draft_tokens = self._drafting.num_draft_tokens
            stats.total_accepted_tokens = self._drafting.num_accepted_tokens
        if self._offload is not None:
            stats.tiers = self._offload.stats()
        if self._states is not None:
            stats.states = self._states.pool.report()
        return stats

    def update_fill(self) -> None:
        """Bring the fill of the decode batch's last blocks up to date, before the pool is read."""
        self._queues.decode_batch.update_fill()

    def memory_report(self) -> MemoryReport:
        """What each request holds, how old blocks are, and why prompts were not found in the cache."""
        self.update_fill()
        return report_memory(self.pool, self._queues.by_id.values(), self.stats(), self._clock())

    # -- deciding -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step; it computes nothing only when no request is left, or all that could run wait for blocks."""
        self._in_flight.clear()
        plan = self._begin_plan()
        if self._offload is not None:
            for sequence in self._offload.take_failed():
                self._queues.preempt(sequence.group)
            for sequence, loaded in self._offload.begin():
                self._parts.lookup.count_hits(sequence, loaded)
        decode_step = self._planner.decide(plan, self._max_step_tokens)
        if self._offload is not None:
            plan.offload = self._offload.finish(computes=bool(plan.rows))
            self._planned_at = self._clock()
        if self._states is not None:
            self._states.finish(plan, self._queues.rows)
        self._in_flight.append(StepInFlight(plan, self._queues.rows_now(), decode_step))
        return plan

    @property
    def batch_in_flight(self) -> int:
        """The `batch_id` of the steps that are planned and not processed; 0 if they have several."""
        batch_ids = {step.plan.batch_id for step in self._in_flight}
        return batch_ids.pop() if len(batch_ids) == 1 else 0

    def ids_in_flight(self) -> Iterator[str]:
        """Ids of the requests that these steps compute, once per sequence and step."""
        for step in self._in_flight:
            for row in step.plan.rows:
                sequence = step.rows[row]
                if sequence is not None:
                    yield sequence.sample[0]

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, whose result is not known yet; None where the result is needed.

        A sequence that `plan` samples for goes on with ~row in place of its token. If it turns out to have ended, its
        part of the step is wasted. Whatever needs the tokens of `plan` is left to a normal step: preemption, forks,
        drafts, beams, grammars, tiers and recurrent states.
        """
        decode_step = self._in_flight[-1].decode_step
        if self._offload is not None or self._drafting is not None or self._states is not None:
            return None
        if not self._parts.look_ahead.is_possible(plan, decode_step):
            return None
        ending = self._parts.look_ahead.assume_result(plan, decode_step)
        ahead = self._begin_plan()
        decode_step = self._planner.decide(ahead, self._max_step_tokens, ending, may_preempt=False)
        self._in_flight.append(StepInFlight(ahead, self._queues.rows_now(), decode_step))
        return ahead

    def plain_steps(self) -> PlainSteps:
        """The steps from here that would do nothing but give each running sequence a token."""
        queues = self._queues
        does_more = len(queues.waiting) or queues.not_in_decode_batch or queues.num_background or self._in_flight
        notes_more = self._offload or self._drafting or self._states or queues.waiting.counts_service
        return PlainSteps(0) if does_more or notes_more else queues.decode_batch.plain_steps

    def repeat_plain_steps(self, num_steps: int, token_id: int) -> None:
        """Do what so many of `plain_steps` would if each sampled `token_id`, which must end no sequence. A simulation
        knows its tokens beforehand, and requests may have arrived meanwhile."""
        batch, totals = self._queues.decode_batch, self._parts.totals
        batch.repeat(num_steps, token_id)
        totals.total_steps += num_steps
        totals.total_generated_tokens += num_steps * len(batch)

    def _begin_plan(self) -> StepPlan:
        self.pool.copies_are_done()
        self.pool.set_time(self._clock())
        forked, row_forks = self._results.take_forks()
        return StepPlan(new_blocks=forked, row_forks=row_forks)

    def roll_back(self, plan: StepPlan) -> None:
        """Take back the step planned last, for which a device had no memory.

        Its groups wait and start over from what stays cached, the first of them first. Steps are half as large until
        many have succeeded.
        """
        self.pool.copies_are_done()
        rows = self._in_flight.pop().rows
        groups = {sequence.group.order: sequence.group for row in plan.rows if (sequence := rows[row]) is not None}
        for group in groups.values():
            if any(sequence.row != NO_ROW for sequence in group.sequences):
                self._queues.preempt(group)
        self._parts.images.roll_back(plan)
        if self._states is not None:
            self._states.roll_back()
        self._max_step_tokens = max(1, plan.num_tokens // 2)

    # -- applying results ---------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> StepDeltas:
        """Advance every sequence of the plan, append samples, fork, finish. Returns what each sample gained.

        Results come in the order in which their steps were planned. A sequence that left meanwhile is passed over.
        """
        self.pool.copies_are_done()
        step = self._in_flight.popleft()
        now = self._clock()
        # A step that was launched ahead began when the step before it ended.
        self._parts.images.measure(plan, now - (self._updated_at if self._in_flight else self.pool.now))
        self._updated_at = now
        self._parts.pace.end()
        self._parts.tenant_pace.end()
        if self._states is not None:
            self._states.commit()
        self._max_step_tokens = min(
            self.limits.max_num_batched_tokens, self._max_step_tokens + 1 + self._max_step_tokens // 64
        )
        if self._tiers is not None and self._offload is not None and result.offload is not None:
            self._tiers.measure_step(plan, now - self._planned_at)
            self._offload.update(plan.offload, result.offload)
        num_kept = (
            plan.num_scheduled_tokens if self._drafting is None else self._drafting.roll_back_rejected(plan, result)
        )
        fills_decode_batch = self._drafting is None or self._drafting.allows_decode_batch
        self._note_first_tokens(plan, step, now)
        return self._results.process(
            plan, result, step, num_kept, len(self._in_flight), fills_decode_batch=fills_decode_batch
        )

    def _note_first_tokens(self, plan: StepPlan, step: StepInFlight, now: float) -> None:
        first = 0 if step.decode_step is None else len(step.decode_step.sequences)
        for index, row in zip(plan.sample_indices[first:], plan.sample_rows[first:], strict=True):
            sequence = step.rows[row]
            if sequence is not None and not sequence.group.is_background:
                end = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index]
                if end == sequence.group.num_prompt_tokens:
                    seconds = now - sequence.group.first_scheduled_time
                    self._parts.pace.note_first_token(seconds)
                    self._parts.tenant_pace.note_first_token(sequence.group, seconds)
