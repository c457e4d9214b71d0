"""Scheduler: hands out each step's token budget, blocks and rows, and takes in what the step produced.

`schedule()` makes a StepPlan; `update()` takes the StepResult and says what each sample gained. Between the two
calls `schedule_ahead()` may plan the step after, on tokens that are not known yet, and requests may come and go.
Nothing here knows of models, tensors, text or time; the clock comes in as a function.

The rules, in their order:
1. Sequences that lack one token (decoding) go first, oldest group first. If the pool is exhausted the group that
   comes last by (priority, arrival) gives everything back and waits; it resumes from what the prefix cache still
   holds of it.
2. What remains of the budget is shared by groups that lack more (prompts, chunks, resumed groups): equal shares,
   what a short prompt does not need goes to the longer ones. So a long prompt delays nobody by more than its share.
   Beams of one request take their tokens together: who lacks one waits for those who lack more.
3. RequestQueues that wait are admitted in order as far as rows and blocks go (`admission`).
4. A step that only decodes may take drafted tokens too, where they pay (`draft_planner`). They come last: they yield
   nobody's memory, and what of them does not hold is taken back when the step ends.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from quire.errors import RequestError
from quire.kv_cache.block_hash import root_hash
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.kv_cache.tiers import TierIndex
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.request import Request
from quire.scheduler.admission import Admission
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.demand import Demand
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.drafting import Drafting
from quire.scheduler.forecast import Forecast
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.result_processor import ResultProcessor
from quire.scheduler.length_curve import Ending
from quire.scheduler.memory_report import report_memory
from quire.scheduler.output_lengths import OutputLengths
from quire.scheduler.policies import ADMISSIONS, SCHEDULING_POLICIES, AdmissionRule, MakeQueue, MakeRule
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup
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
        self._transfers = transfers = None if tiers is None else BlockOffload(tiers, pool)
        lengths = OutputLengths()
        forecast = Forecast(pool)
        rule = make_rule(forecast, pool, stats)
        rules: list[AdmissionRule] = [forecast] if rule is None or rule is forecast else [forecast, rule]
        queue = make_queue(stats)
        self._queues = groups = RequestQueues(pool, max_num_seqs, queue, lengths, rules, transfers, self.prefixes, stats)
        self._demand = Demand(pool, groups, forecast, stats)
        self._lookup = lookup = PrefixLookup(pool, transfers, clock)
        self._results = ResultProcessor(pool, groups, lookup, transfers, self.prefixes, stats)
        watermark = int(pool.num_blocks * WATERMARK)
        self._admission = Admission(
            pool,
            groups,
            lookup,
            rule,
            transfers,
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
        self._in_flight: deque[list[Sequence | None]] = deque()
        """Of each step planned and not taken in, who has which row."""
        self._ending: set[Sequence] = set()
        """Sequences whose last token is being drawn."""
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
            self._demand.begin(self._clock())
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
        return self._transfers is not None and self._transfers.has_idle_work

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable, in the pool and below it."""
        self.pool.forget_hashes()
        if self._transfers is not None:
            self._transfers.evict_all()

    def stats(self) -> EngineStats:
        """The present counts; those that are predicted are at most half a second old."""
        stats, pool, demand = replace(self._stats), self.pool, self._demand.forecast(self._clock())
        stats.predicted_output_tokens = demand.output_tokens
        stats.predicted_kv_cache_usage = demand.kv_cache_usage
        stats.predicted_queue_seconds = demand.queue_seconds
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
        if self._transfers is not None:
            stats.tiers = self._transfers.stats()
        return stats

    def settle(self) -> None:
        """Bring up to date what sequences that go in decode_batch count, and how full their blocks are said to be."""
        self._queues.decode_batch.settle()

    def memory_report(self) -> MemoryReport:
        """Who holds what, how old it is, and why prompts were not found."""
        self.settle()
        return report_memory(self.pool, self._queues.by_id.values(), self.stats(), self._clock())

    # -- deciding -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step; it computes nothing only when no request is left, or all that could run wait for blocks."""
        self._in_flight.clear()
        self._ending.clear()
        plan = self._begin_plan()
        if self._transfers is not None:
            for sequence, loaded in self._transfers.begin():
                self._lookup.count_hits(sequence, loaded)
        self._decide(plan)
        if self._transfers is not None:
            plan.offload = self._transfers.finish(computes=bool(plan.rows))
            self._planned_at = self._clock()
        self._in_flight.append(self._queues.rows_now())
        return plan

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, whose result is not known yet; None where it has to be.

        A sequence that `plan` draws a token for goes on with the number ~row in its place: the token last drawn for
        that row. One that turns out to have ended was computed in vain. What only a step with all known can decide is
        left to it: nothing is preempted, forked or drafted, no search or grammar goes on, and no tier is used.
        """
        if not self._can_plan_ahead(plan):
            return None
        self._queues.disband()
        self._ending.clear()
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            sequence = self._queues.rows[row]
            if sequence is not None:
                sequence.num_computed_tokens = start + count
        for row in plan.sample_rows:
            sequence = self._queues.rows[row]
            if sequence is not None:
                sequence.token_ids.append(~row)
                if sequence.num_output_tokens == sequence.group.request.max_tokens:
                    self._ending.add(sequence)
        ahead = self._begin_plan()
        self._decide(ahead, may_preempt=False)
        self._in_flight.append(self._queues.rows_now())
        return ahead

    def _can_plan_ahead(self, plan: StepPlan) -> bool:
        if self._transfers is not None or self._drafting is not None:
            return False
        if len(self._queues.waiting) and plan.num_tokens > len(plan.rows):
            return False  # who waits may find what this step computes
        for row, start, count in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            sequence = self._queues.rows[row]
            if sequence is not None:
                group, end = sequence.group, start + count
                if len(group.sequences) > 1 and start < group.num_prompt_tokens <= end:
                    return False  # the others will fork from it
        num_drawn: dict[Sequence, int] = {}
        for row in plan.sample_rows:
            sequence = self._queues.rows[row]
            if sequence is not None:
                params = sequence.group.request.params
                if params.beam_width is not None or params.structured_outputs is not None:
                    return False
                num_drawn[sequence] = 1
        goes_on, num_blocks = False, 0
        for group in self._queues.running:
            for sequence in group.sequences:
                if sequence.num_output_tokens + num_drawn.get(sequence, 0) < group.request.max_tokens:
                    goes_on = True
                    table = sequence.table
                    num_blocks += (table.num_tokens % self.pool.block_size == 0) + table.num_copies_to_come
        return goes_on and num_blocks <= self.pool.num_free

    def _begin_plan(self) -> StepPlan:
        self.pool.copies_are_done()
        self.pool.now = self._clock()
        forked, row_forks = self._results.take_forks()
        return StepPlan(new_blocks=forked, row_forks=row_forks)

    def _decide(self, plan: StepPlan, *, may_preempt: bool = True) -> None:
        if self._drafting is not None:
            self._drafting.prepare()
        while True:
            behind, preempted = self._plan_decoding(plan)
            num_decoding = len(plan.rows)
            resuming = [sequence for sequence in behind if sequence.group.looks_for_blocks(sequence)]
            if resuming:
                behind = [sequence for sequence in behind if not sequence.group.looks_for_blocks(sequence)]
            started = False
            if not preempted:
                started = self._admission.resume(plan, resuming, behind)
                started = self._admission.admit(plan, behind, self._max_step_tokens) or started
            self._plan_behind(plan, behind, self._max_step_tokens - plan.num_tokens)
            if self._drafting is not None and num_decoding and num_decoding == len(plan.rows):
                self._drafting.extend(plan)
            if plan.rows or not self._queues.running or (self._transfers is not None and self._transfers.has_loads):
                return
            if not may_preempt:
                return
            if not started:
                # Prompts hold all blocks and none can go on: the last one makes room for the others.
                self._queues.preempt(self._queues.running[-1])

    def _plan_decoding(self, plan: StepPlan) -> tuple[list[Sequence], bool]:
        """Plan every running sequence that lacks just its last output token: those in decode_batch, then the others in the
        order of `running`.

        Returns the sequences that lack more, and whether any group had to yield.
        """
        behind: list[Sequence] = []
        preempted = False
        running, decode_batch = self._queues.running, self._queues.decode_batch
        if len(decode_batch):
            # Nobody takes more than a block, so all get theirs and nobody is preempted whom the plan has already.
            num_others = sum(len(group.sequences) for group in self._queues.not_in_decode_batch)
            if decode_batch.num_blocks_needed + num_others > self.pool.num_free:
                self._queues.disband()
            else:
                decode_batch.plan(plan)
        not_in_decode_batch, index = self._queues.not_in_decode_batch, 0
        rows, starts, token_ids, copies = plan.rows, plan.num_computed_tokens, plan.token_ids, plan.block_copies
        # Neither those who wait for a tier nor those whose last token is being drawn; never both.
        waiting = self._transfers.waiting if self._transfers is not None else self._ending
        while index < len(not_in_decode_batch):
            group = not_in_decode_batch[index]
            if all(sequence.in_decode_batch for sequence in group.sequences):
                del not_in_decode_batch[index]
                continue
            first_row, first_new_blocks, first_copy = len(rows), len(plan.new_blocks), len(copies)
            uneven = group.beam_search is not None and any(
                other.num_missing_tokens != 1 or (waiting and other in waiting) for other in group.sequences
            )
            for sequence in group.sequences:
                if sequence.in_decode_batch or (waiting and sequence in waiting):
                    continue
                start = sequence.num_computed_tokens
                num_tokens = len(sequence.token_ids)
                if num_tokens - start != 1 or num_tokens == group.num_prompt_tokens:
                    if not group.waits_for_leader(sequence):
                        behind.append(sequence)
                    continue
                if uneven:
                    continue
                table = sequence.table
                while True:
                    try:
                        changed = table.append(1, copies)
                        break
                    except OutOfBlocksError:
                        preempted = True
                        self._queues.preempt(running[-1])
                        if sequence.row == NO_ROW:
                            break
                if sequence.row == NO_ROW:
                    # The group itself was the last one. All or nothing: what was planned of it is taken back.
                    for planned in (rows, starts, token_ids):
                        del planned[first_row:]
                    del plan.new_blocks[first_new_blocks:], copies[first_copy:]
                    behind = [other for other in behind if other.group is not group]
                    break
                if changed < len(table.blocks):
                    plan.new_blocks.append((sequence.row, changed, table.blocks[changed:]))
                rows.append(sequence.row)
                starts.append(start)
                token_ids.append(sequence.token_ids[start])
            if len(copies) > first_copy:
                group.num_copied_blocks += len(copies) - first_copy
            index += 1
        plan.num_scheduled_tokens, plan.sample_rows, plan.sample_indices = [1] * len(rows), rows.copy(), list(range(len(rows)))
        return behind, preempted

    def _plan_behind(self, plan: StepPlan, behind: list[Sequence], budget: int) -> None:
        """Share the rest of the budget among sequences that lack more than their last token."""
        shares = equal_shares(budget, [sequence.num_missing_tokens for sequence in behind])
        for sequence, share in zip(behind, shares, strict=True):
            table, group, start = sequence.table, sequence.group, sequence.num_computed_tokens
            count = min(share, table.num_appendable())
            if any(group.waits_for_leader(other) for other in group.sequences):
                # The others fork where the prompt ends, so nothing past it may be in that block yet.
                count = min(count, group.num_prompt_tokens - start)
            if group.advances_together and len(group.sequences) > 1 and sequence.num_output_tokens:
                # The last token is computed when all beams are as far.
                count = min(count, sequence.num_missing_tokens - 1)
            if count <= 0:
                continue
            num_copies = len(plan.block_copies)
            changed = table.append(count, plan.block_copies)
            group.num_copied_blocks += len(plan.block_copies) - num_copies
            if changed < len(table.blocks):
                plan.new_blocks.append((sequence.row, changed, table.blocks[changed:]))
            index = len(plan.rows)
            plan.rows.append(sequence.row)
            plan.num_computed_tokens.append(start)
            plan.num_scheduled_tokens.append(count)
            plan.token_ids += sequence.token_ids[start : start + count]
            if count == sequence.num_missing_tokens:
                for other in group.sequences:
                    # Where the prompt ends, all samples that have no token yet part from the leader.
                    if other is sequence or (other.num_output_tokens == 0 and group.waits_for_leader(other)):
                        plan.sample_indices.append(index)
                        plan.sample_rows.append(other.row)
            num_logprobs = group.request.params.prompt_logprobs
            if num_logprobs is not None and group.lacks_prompt_logprobs and start + 1 < group.num_prompt_tokens:
                targets = sequence.token_ids[start + 1 : min(start + 1 + count, group.num_prompt_tokens)]
                plan.prompt_logprobs[index] = (num_logprobs, targets)

    def retreat(self, plan: StepPlan) -> None:
        """Take back the step planned last, for which a device had no memory: its groups wait and start over from what
        stays cached, the first of them first, and steps are half as large until many have succeeded."""
        self.pool.copies_are_done()
        rows = self._in_flight.pop()
        groups = {sequence.group.order: sequence.group for row in plan.rows if (sequence := rows[row]) is not None}
        for group in groups.values():
            if any(sequence.row != NO_ROW for sequence in group.sequences):
                self._queues.preempt(group)
        self._max_step_tokens = max(1, plan.num_tokens // 2)

    # -- taking in ----------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> StepDeltas:
        """Advance every sequence of the plan, append samples, fork, finish. Returns what each sample gained.

        Plans are taken in in the order in which they were made. A sequence that left meanwhile is passed over.
        """
        self.pool.copies_are_done()
        rows = self._in_flight.popleft()
        self._max_step_tokens = min(
            self.max_num_batched_tokens, self._max_step_tokens + 1 + self._max_step_tokens // 64
        )
        if self._tiers is not None and self._transfers is not None and result.offload is not None:
            self._tiers.measure_step(plan, self._clock() - self._planned_at)
            self._transfers.update(plan.offload, result.offload)
        counts = plan.num_scheduled_tokens if self._drafting is None else self._drafting.settle(plan, result)
        may_join = not self._in_flight and (self._drafting is None or self._drafting.allows_lockstep)
        return self._results.take_in(plan, result, rows, counts, may_join=may_join)


def equal_shares(budget: int, wants: SequenceOf[int]) -> list[int]:
    """Split `budget` equally; what somebody does not want is split among the others.

    Where it does not divide, those who want least get one more.

    >>> equal_shares(100, [1000, 10, 40])
    [50, 10, 40]
    """
    shares = [0] * len(wants)
    left = budget
    for place, index in enumerate(sorted(range(len(wants)), key=wants.__getitem__)):
        shares[index] = min(wants[index], -(-left // (len(wants) - place)))
        left -= shares[index]
    return shares


def _num_sequences(request: Request) -> tuple[str, int]:
    """How many sequences a request runs at once, and the parameter that says so."""
    params = request.params
    return ("n", params.n) if params.beam_width is None else ("beam_width", params.beam_width)
