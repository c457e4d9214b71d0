"""Scheduler: owns all requests, plans steps, and applies their results.

`schedule()` makes a StepPlan; `update()` applies its StepResult and says what each sample gained. Between the two
calls `schedule_ahead()` may plan the next step before the tokens of this one are known, and requests may come and go.
Nothing here knows of models, tensors, text or time; the clock comes in as a function. What a step computes is decided
in `step_planner`.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from quire.errors import RequestError
from quire.kv_cache.block_hash import root_hash
from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.tiers import TierIndex
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.request import Request
from quire.scheduler.admission import Admission
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.drafting import Drafting
from quire.scheduler.forecast import Forecast
from quire.scheduler.length_curve import Ending
from quire.scheduler.load import Load
from quire.scheduler.lookahead import LookAhead
from quire.scheduler.memory_report import report_memory
from quire.scheduler.output_lengths import OutputLengths
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES, AdmissionRule, MakeQueue, MakeRule
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.result_processor import ResultProcessor, StepInFlight
from quire.scheduler.sequence import NO_ROW, SequenceGroup
from quire.scheduler.step_planner import StepPlanner
from quire.step import StepPlan, StepResult

WATERMARK = 0.01
"""Share of the pool that admission leaves free, so that running sequences can grow before any is preempted."""


class Scheduler:
    """Owns all groups, and the only writer of the pool.

    `max_num_batched_tokens` is at least `max_num_seqs`, so that all sequences can decode in one step.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_partial_prefills: int = 4,
        tiers: TierIndex | None = None,
        max_pinned_share: float = 0.5,
        speculation: DraftPlanner | None = None,
        make_queue: MakeQueue = SCHEDULING_POLICIES["fcfs"],
        make_rule: MakeRule = ADMISSIONS["current"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._clock = clock
        self._stats = stats = EngineStats(num_blocks=pool.num_blocks, block_size=pool.block_size)
        self.prefixes = RegisteredPrefixes(pool, int(pool.num_blocks * max_pinned_share))
        self._tiers = tiers
        self._offload = offload = None if tiers is None else BlockOffload(tiers, pool)
        lengths = OutputLengths()
        forecast = Forecast(pool)
        rule = make_rule(forecast, pool, stats)
        rules: list[AdmissionRule] = [forecast] if rule is None or rule is forecast else [forecast, rule]
        queue = make_queue(stats)
        self._queues = groups = RequestQueues(pool, max_num_seqs, queue, lengths, rules, offload, self.prefixes, stats)
        self._load = Load(pool, groups, forecast)
        self._lookup = lookup = PrefixLookup(pool, offload, clock)
        self._results = ResultProcessor(pool, groups, lookup, offload, self.prefixes, stats)
        watermark = int(pool.num_blocks * WATERMARK)
        self._admission = Admission(
            pool,
            groups,
            lookup,
            rule,
            offload,
            stats,
            clock,
            watermark=watermark,
            max_num_partial_prefills=max_num_partial_prefills,
        )
        self._drafting: Drafting | None = None
        if speculation is not None:
            self._drafting = Drafting(
                speculation,
                pool,
                groups,
                stats,
                clock,
                watermark=watermark,
                max_num_batched_tokens=max_num_batched_tokens,
            )
        self._num_arrivals = 0
        self._planned_at = 0.0
        self._planner = StepPlanner(pool, groups, self._admission, offload, self._drafting)
        self._look_ahead = LookAhead(pool, groups)
        self._in_flight: deque[StepInFlight] = deque()
        """Steps planned whose result is not processed, the oldest first."""
        self._max_step_tokens = max_num_batched_tokens
        """Less than `max_num_batched_tokens` for a while after a device had no memory for a step."""

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that can never run."""
        if request.request_id in self._queues.by_id:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        num_prompt, block_size = len(request.prompt_token_ids), self.pool.block_size
        if num_prompt == 0:
            raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
        if num_prompt + request.max_tokens > self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}; together they exceed the "
                f"context of {self.max_model_len} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        name, num_sequences = _num_sequences(request)
        if num_sequences > self.max_num_seqs:
            raise RequestError(
                f"{name} is {num_sequences}, but at most {self.max_num_seqs} sequences run at once (max_num_seqs)",
                param=name,
            )
        root = root_hash(request.cache_salt, block_size, request.adapter)
        group = SequenceGroup(request, self.pool, root, self._num_arrivals)
        needed = group.max_blocks(block_size)
        pinned = self.prefixes.num_blocks
        if pinned and needed > self.pool.num_blocks - pinned and not group.lacks_prompt_logprobs:
            needed -= self.prefixes.num_found(group.leader.table, request.prompt_token_ids)
        if needed > self.pool.num_blocks - pinned:
            held = f", of which {pinned} are registered prefixes'" if pinned else ""
            raise RequestError(
                f"{num_sequences} sequences of {num_prompt} prompt + {request.max_tokens} output tokens can need "
                f"{needed} KV blocks of {block_size} tokens, but the pool has {self.pool.num_blocks}{held}; ask for "
                "less or raise kv_cache_memory",
                param="max_tokens",
                code="context_length_exceeded",
            )
        self._num_arrivals += 1
        if not self._queues.by_id:
            self._load.begin(self._clock(), self._stats)
        self._queues.enter(group)

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it is; its blocks are free at once. Unknown ids (already ended) are ignored."""
        group = self._queues.by_id.get(request_id)
        if group is not None:
            self._queues.drop_all(group)

    def stop(self, request_id: str, index: int) -> None:
        """End one sample whose text reached a stop string; the others of its request go on."""
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
        left = self.pool.num_blocks - self.prefixes.num_blocks - prefix.num_new_blocks
        most = max((group.max_blocks(self.pool.block_size) for group in self._queues.by_id.values()), default=0)
        if most > left:
            raise RequestError(
                f"a request in flight can need {most} KV blocks, and the prefix would leave {left}; register it later",
                param="prefix",
            )
        self.add(prefix.request)
        self.prefixes.reserve(prefix)

    @property
    def has_work(self) -> bool:
        return bool(self._queues.by_id)

    @property
    def request_ids(self) -> list[str]:
        """Of all requests that have not ended."""
        return list(self._queues.by_id)

    @property
    def has_idle_work(self) -> bool:
        """Whether steps without requests would still save blocks to the tiers below."""
        return self._offload is not None and self._offload.has_idle_work

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable, in the pool and below it."""
        self.pool.forget_hashes()
        if self._offload is not None:
            self._offload.evict_all()

    def stats(self) -> EngineStats:
        """The present counts; those that are predicted are at most half a second old."""
        self._load.refresh(self._clock(), self._stats)
        stats, pool = replace(self._stats), self.pool
        prefixes = self._lookup.counts
        stats.total_prefix_hits = prefixes.num_hits
        stats.prefix_hits, stats.prefix_misses = prefixes.hits.copy(), prefixes.misses.copy()
        stats.num_running = len(self._queues.running)
        stats.num_waiting = len(self._queues.waiting)
        stats.num_used_blocks = pool.num_used
        stats.num_cached_free_blocks = pool.num_cached_free
        stats.num_pinned_blocks = len(pool.pinned)
        stats.num_filled_slots = pool.num_filled_slots
        stats.num_allocated_slots = pool.num_allocated_slots
        stats.num_shared_slots = pool.num_shared_slots
        stats.total_evictions = pool.total_evictions
        stats.total_block_copies = pool.total_block_copies
        if self._offload is not None:
            stats.tiers = self._offload.stats()
        return stats

    def update_fill(self) -> None:
        """Bring the fill counts of the last blocks of decoding sequences up to date, for whoever reads the pool."""
        self._queues.decode_batch.update_fill()

    def memory_report(self) -> MemoryReport:
        """Who holds what, how old it is, and why prompts were not found."""
        self.update_fill()
        return report_memory(self.pool, self._queues.by_id.values(), self.stats(), self._clock())

    # -- deciding -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step; it computes nothing only when no request is left, or all that could run wait for blocks."""
        self._in_flight.clear()
        plan = self._begin_plan()
        if self._offload is not None:
            for sequence, loaded in self._offload.begin():
                self._lookup.count_hits(sequence, loaded)
        decode_step = self._planner.decide(plan, self._max_step_tokens)
        if self._offload is not None:
            plan.offload = self._offload.finish(computes=bool(plan.rows))
            self._planned_at = self._clock()
        self._in_flight.append(StepInFlight(self._queues.rows_now(), decode_step))
        return plan

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, whose result is not known yet; None where the result is needed.

        A sequence that `plan` samples for goes on with ~row in place of its token. If it turns out to have ended, its
        part of the step is wasted. Whatever needs the tokens of `plan` is left to a normal step: preemption, forks,
        drafts, beams, grammars and tiers.
        """
        decode_step = self._in_flight[-1].decode_step
        if self._offload is not None or self._drafting is not None:
            return None
        if not self._look_ahead.is_possible(plan, decode_step):
            return None
        ending = self._look_ahead.assume_result(plan, decode_step)
        ahead = self._begin_plan()
        decode_step = self._planner.decide(ahead, self._max_step_tokens, ending, may_preempt=False)
        self._in_flight.append(StepInFlight(self._queues.rows_now(), decode_step))
        return ahead

    def _begin_plan(self) -> StepPlan:
        self.pool.copies_are_done()
        self.pool.now = self._clock()
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
        self._max_step_tokens = max(1, plan.num_tokens // 2)

    # -- applying results ---------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> StepDeltas:
        """Advance every sequence of the plan, append samples, fork, finish. Returns what each sample gained.

        Results come in the order in which their steps were planned. A sequence that left meanwhile is passed over.
        """
        self.pool.copies_are_done()
        step = self._in_flight.popleft()
        self._max_step_tokens = min(
            self.max_num_batched_tokens, self._max_step_tokens + 1 + self._max_step_tokens // 64
        )
        if self._tiers is not None and self._offload is not None and result.offload is not None:
            self._tiers.measure_step(plan, self._clock() - self._planned_at)
            self._offload.update(plan.offload, result.offload)
        num_kept = plan.num_scheduled_tokens if self._drafting is None else self._drafting.settle(plan, result)
        fills_decode_batch = self._drafting is None or self._drafting.allows_lockstep
        return self._results.process(
            plan, result, step, num_kept, len(self._in_flight), fills_decode_batch=fills_decode_batch
        )


def _num_sequences(request: Request) -> tuple[str, int]:
    """How many sequences a request runs at once, and the parameter that says so."""
    params = request.params
    return ("n", params.n) if params.beam_width is None else ("beam_width", params.beam_width)
