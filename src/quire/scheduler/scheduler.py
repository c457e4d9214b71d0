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
3. Groups are admitted in order while rows, blocks for the whole prompt and a watermark of free blocks allow it.
   One whose next block is being computed by another group right now waits for that block instead of computing it
   twice.
4. A step that only decodes may take drafted tokens too, where they pay (`speculation`). They come last: they yield
   nobody's memory, and what of them does not hold is taken back when the step ends.
"""

import bisect
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from quire.errors import RequestError
from quire.kv_cache.block_hash import BlockName, root_name
from quire.kv_cache.block_pool import BlockPool, OutOfBlocksError
from quire.kv_cache.prefix_history import PrefixHistory
from quire.kv_cache.tiers import TierIndex
from quire.outputs import EngineStats, MemoryReport, SequenceDelta
from quire.request import FinishReason, Request
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.block_moves import BlockTransfers
from quire.scheduler.memory_report import report_memory
from quire.scheduler.registered_prefixes import RegisteredPrefixes
from quire.scheduler.sequence import NO_ROW, Sequence, SequenceGroup
from quire.scheduler.speculation import Speculation, num_equal
from quire.scheduler.waiting_queue import WaitingQueue
from quire.step import BeamCandidates, NewRow, RowFork, StepPlan, StepResult, TokenLogprobs

WATERMARK = 0.01
"""Share of the pool that admission leaves free, so that running sequences can grow before any is preempted."""
MAX_POSTPONED = 64
"""Waiting groups passed over in one step because another group computes their prefix."""


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
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_num_partial_prefills = max_num_partial_prefills
        self._clock = clock
        self.prefixes = RegisteredPrefixes(pool, int(pool.num_blocks * max_pinned_share))
        self._watermark = int(pool.num_blocks * WATERMARK)
        self._groups: dict[str, SequenceGroup] = {}
        self._waiting = WaitingQueue()
        self._running: list[SequenceGroup] = []
        """Groups with memory, sorted by `order`: the last one yields first."""
        self._rows: list[Sequence | None] = [None] * max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._forked: list[tuple[int, int, list[int]]] = []
        """Tables that forked since the last plan, as in `StepPlan.new_blocks`."""
        self._row_forks: list[RowFork] = []
        """Beams that went on since the last plan."""
        self._num_arrivals = 0
        self._stats = EngineStats(num_blocks=pool.num_blocks, block_size=pool.block_size)
        self._tiers = tiers
        self._transfers = None if tiers is None else BlockTransfers(tiers, pool)
        self._history = PrefixHistory(pool.block_size, clock)
        self._save_evicted, pool.on_evict = pool.on_evict, self._note_eviction
        self._planned_at = 0.0
        self._in_flight: deque[list[Sequence | None]] = deque()
        """Of each step planned and not taken in, who has which row."""
        self._ending: set[Sequence] = set()
        """Sequences whose last token is being drawn."""
        self._max_step_tokens = max_num_batched_tokens
        """Less than `max_num_batched_tokens` for a while after a device had no memory for a step."""
        self._speculation = speculation

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` for one that can never run."""
        if request.request_id in self._groups:
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
        root = root_name(request.cache_salt, block_size)
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
        self._groups[request.request_id] = group
        self._waiting.push(group)

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it is; its blocks are free at once. Unknown ids (already ended) are ignored."""
        group = self._groups.get(request_id)
        if group is not None:
            self._drop_all(group)

    def stop(self, request_id: str, index: int) -> None:
        """End one sample whose text reached a stop string; the others of its request go on."""
        group = self._groups.get(request_id)
        if group is not None:
            for sequence in tuple(group.sequences):
                if sequence.index == index:
                    self._drop(sequence)

    def register_prefix(self, request: Request, salts: SequenceOf[str]) -> None:
        """Compute the request's prompt and hold its full blocks, findable under all `salts`, until `prefixes.remove`.

        The request asks for one token and has the first of the salts. Raises `RequestError` with the numbers for a
        prefix that cannot be held, or that would leave too little for a request in flight.
        """
        prefix = self.prefixes.check(request.request_id, request.prompt_token_ids, salts)
        left = self.pool.num_blocks - self.prefixes.num_blocks - prefix.num_new_blocks
        most = max((group.max_blocks(self.pool.block_size) for group in self._groups.values()), default=0)
        if most > left:
            raise RequestError(
                f"a request in flight can need {most} KV blocks, and the prefix would leave {left}; register it later",
                param="prefix",
            )
        self.add(replace(request, prompt_token_ids=prefix.token_ids))
        self.prefixes.reserve(request.request_id, prefix)

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    @property
    def request_ids(self) -> list[str]:
        """Of all requests that have not ended."""
        return list(self._groups)

    @property
    def has_idle_work(self) -> bool:
        """Whether steps without requests would still save blocks to the tiers below."""
        return self._transfers is not None and self._transfers.has_idle_work

    def reset_prefix_cache(self) -> None:
        """Make every stored prefix unfindable, in the pool and below it."""
        self.pool.forget_names()
        if self._transfers is not None:
            self._transfers.forget_all()

    def stats(self) -> EngineStats:
        """The present counts."""
        stats, pool = replace(self._stats), self.pool
        stats.prefix_hits, stats.prefix_misses = stats.prefix_hits.copy(), stats.prefix_misses.copy()
        stats.num_running = len(self._running)
        stats.num_waiting = len(self._waiting)
        stats.num_used_blocks = pool.num_used
        stats.num_named_free_blocks = pool.num_named_free
        stats.num_pinned_blocks = len(pool.pinned)
        stats.num_filled_slots = pool.num_filled_slots
        stats.num_allocated_slots = pool.num_allocated_slots
        stats.num_shared_slots = pool.num_shared_slots
        stats.total_evictions = pool.total_evictions
        stats.total_block_copies = pool.total_block_copies
        if self._transfers is not None:
            stats.tiers = self._transfers.stats()
        return stats

    def memory_report(self) -> MemoryReport:
        """Who holds what, how old it is, and why prompts were not found."""
        return report_memory(self.pool, self._groups.values(), self.stats(), self._clock())

    # -- deciding -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step; it computes nothing only when no request is left, or all that could run wait for blocks."""
        self._in_flight.clear()
        self._ending.clear()
        plan = self._begin_plan()
        if self._transfers is not None:
            for sequence, loaded in self._transfers.begin():
                self._count_hits(sequence, loaded)
        self._decide(plan)
        if self._transfers is not None:
            plan.moves = self._transfers.finish(computes=bool(plan.rows))
            self._planned_at = self._clock()
        self._in_flight.append(self._rows.copy())
        return plan

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, whose result is not known yet; None where it has to be.

        A sequence that `plan` draws a token for goes on with the number ~row in its place: the token last drawn for
        that row. One that turns out to have ended was computed in vain. What only a step with all known can decide is
        left to it: nothing is preempted, forked or drafted, no search or grammar goes on, and no tier is used.
        """
        if not self._can_plan_ahead(plan):
            return None
        self._ending.clear()
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            sequence = self._rows[row]
            if sequence is not None:
                sequence.num_computed_tokens = start + count
        for row in plan.sample_rows:
            sequence = self._rows[row]
            if sequence is not None:
                sequence.token_ids.append(~row)
                if sequence.num_output_tokens == sequence.group.request.max_tokens:
                    self._ending.add(sequence)
        ahead = self._begin_plan()
        self._decide(ahead, may_preempt=False)
        self._in_flight.append(self._rows.copy())
        return ahead

    def _can_plan_ahead(self, plan: StepPlan) -> bool:
        if self._transfers is not None or self._speculation is not None:
            return False
        if len(self._waiting) and plan.num_tokens > len(plan.rows):
            return False  # who waits may find what this step computes
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            sequence = self._rows[row]
            if sequence is not None:
                group, end = sequence.group, start + count
                if len(group.sequences) > 1 and start < group.num_prompt_tokens <= end:
                    return False  # the others will fork from it
        num_drawn: dict[Sequence, int] = {}
        for row in plan.sample_rows:
            sequence = self._rows[row]
            if sequence is not None:
                params = sequence.group.request.params
                if params.beam_width is not None or params.structured_outputs is not None:
                    return False
                num_drawn[sequence] = 1
        goes_on, num_blocks = False, 0
        for group in self._running:
            for sequence in group.sequences:
                if sequence.num_output_tokens + num_drawn.get(sequence, 0) < group.request.max_tokens:
                    goes_on = True
                    table = sequence.table
                    num_blocks += (table.num_tokens % self.pool.block_size == 0) + table.num_copies_to_come
        return goes_on and num_blocks <= self.pool.num_free

    def _begin_plan(self) -> StepPlan:
        self.pool.copies_are_done()
        self.pool.now = self._clock()
        plan = StepPlan(new_blocks=self._forked, row_forks=self._row_forks)
        self._forked, self._row_forks = [], []
        return plan

    def _decide(self, plan: StepPlan, *, may_preempt: bool = True) -> None:
        while True:
            behind, preempted = self._plan_decoding(plan)
            num_decoding = len(plan.rows)
            resuming = [sequence for sequence in behind if sequence.group.looks_for_blocks(sequence)]
            if resuming:
                behind = [sequence for sequence in behind if not sequence.group.looks_for_blocks(sequence)]
            budget = self._max_step_tokens - plan.num_tokens
            started = False
            if not preempted:
                started = self._resume(plan, resuming, behind)
                started = self._admit(plan, behind, budget) or started
            self._plan_behind(plan, behind, budget)
            if self._speculation is not None and num_decoding and num_decoding == len(plan.rows):
                self._plan_drafts(plan, self._speculation)
            if plan.rows or not self._running or (self._transfers is not None and self._transfers.brings_blocks):
                return
            if not may_preempt:
                return
            if not started:
                # Prompts hold all blocks and none can go on: the last one makes room for the others.
                self._preempt(self._running[-1])

    def _plan_decoding(self, plan: StepPlan) -> tuple[list[Sequence], bool]:
        """Plan every running sequence that lacks just its last output token, in the order of `_running`.

        Returns the sequences that lack more, and whether any group had to yield.
        """
        behind: list[Sequence] = []
        preempted = False
        running, index = self._running, 0
        rows, starts, counts, token_ids = plan.rows, plan.starts, plan.counts, plan.token_ids
        sample_after, sample_rows, copies = plan.sample_after, plan.sample_rows, plan.block_copies
        # Neither those who wait for a tier nor those whose last token is being drawn; never both.
        waiting = self._transfers.waiting if self._transfers is not None else self._ending
        while index < len(running):
            group = running[index]
            first_row, first_new_blocks, first_copy = len(rows), len(plan.new_blocks), len(copies)
            uneven = group.advances_together and any(
                other.num_missing_tokens != 1 or (waiting and other in waiting) for other in group.sequences
            )
            for sequence in group.sequences:
                if waiting and sequence in waiting:
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
                        self._preempt(running[-1])
                        if sequence.row == NO_ROW:
                            break
                if sequence.row == NO_ROW:
                    # The group itself was the last one. All or nothing: what was planned of it is taken back.
                    for planned in (rows, starts, counts, token_ids, sample_after, sample_rows):
                        del planned[first_row:]
                    del plan.new_blocks[first_new_blocks:], copies[first_copy:]
                    behind = [other for other in behind if other.group is not group]
                    break
                if changed < len(table.blocks):
                    plan.new_blocks.append((sequence.row, changed, table.blocks[changed:]))
                sample_after.append(len(rows))
                rows.append(sequence.row)
                sample_rows.append(sequence.row)
                starts.append(start)
                counts.append(1)
                token_ids.append(sequence.token_ids[start])
            group.num_copied_blocks += len(copies) - first_copy
            index += 1
        return behind, preempted

    def _resume(self, plan: StepPlan, resuming: list[Sequence], behind: list[Sequence]) -> bool:
        """Let sequences of running groups start from what is found of their output; whether any has.

        They join those `behind`, unless somebody else computes or loads their next block just now: then they wait, and
        share it.
        """
        started = False
        for sequence in resuming:
            looked_up = self._look_up(sequence, behind)
            if looked_up is None:
                continue
            found, stored = looked_up
            leader = sequence.group.leader
            if sequence is not leader:
                num_shared = sequence.group.num_prompt_tokens // self.pool.block_size * self.pool.block_size
                sequence.table = leader.table.fork(num_shared)
            sequence.table.adopt(found)
            sequence.num_computed_tokens = sequence.table.num_tokens
            if self._transfers is not None:
                self._transfers.start(sequence, stored[: self.pool.num_free])
            if sequence.table.blocks:
                plan.new_blocks.append((sequence.row, 0, sequence.table.blocks.copy()))
                started = True
            if self._transfers is None or sequence not in self._transfers.waiting:
                behind.append(sequence)
        return started

    def _look_up(
        self, sequence: Sequence, behind: list[Sequence]
    ) -> tuple[list[int], list[tuple[str, BlockName]]] | None:
        """What is found of a resumed sequence, past the full blocks of the prompt where it shares those of its leader.

        First blocks of the pool, then (tier, name) below it. None while somebody computes or loads the next block.
        """
        if not self.pool.enable_prefix_caching:
            return [], []
        group, loading = sequence.group, list(self._transfers.waiting) if self._transfers is not None else []
        if group.leader in loading and sequence is not group.leader:
            return None
        num_shared = 0 if sequence is group.leader else group.num_prompt_tokens // self.pool.block_size
        found = sequence.table.find_prefix(sequence.token_ids)[num_shared:]
        first = num_shared + len(found)
        awaited = _next_full_block(sequence, sequence.token_ids, first, self.pool.block_size)
        if awaited is not None and self._is_on_its_way(awaited, behind, loading):
            return None
        return found, [] if self._transfers is None else self._transfers.find(sequence, sequence.token_ids, first)

    def _admit(self, plan: StepPlan, behind: list[Sequence], budget: int) -> bool:
        """Give rows and prefix hits to waiting groups, while they would get a share of the budget worth having.

        Returns whether any group started.
        """
        started = False
        block_size = self.pool.block_size
        prefix_caching = self.pool.enable_prefix_caching
        transfers = self._transfers
        loading = list(transfers.waiting) if transfers is not None else []
        promised = sum(_num_blocks_to_come(sequence, block_size) for sequence in (*behind, *loading))
        wanted = sum(sequence.num_missing_tokens for sequence in behind)
        postponed: list[SequenceGroup] = []
        while len(behind) < budget and len(postponed) < MAX_POSTPONED:
            if wanted >= budget and len(behind) >= self.max_num_partial_prefills:
                break
            group = self._waiting.pop()
            if group is None:
                break
            leader = group.leader
            found: list[int] = []
            stored: list[tuple[str, BlockName]] = []
            inside = None
            if prefix_caching and not group.lacks_prompt_logprobs:
                if group.awaited is None or not self._is_on_its_way(group.awaited, behind, loading):
                    # Where others get their first token with the leader, it computes the last token of the prompt.
                    alone = len(group.sequences) == 1 or leader.num_output_tokens > 0
                    token_ids = leader.token_ids if alone else group.request.prompt_token_ids
                    found = leader.table.find_prefix(token_ids)
                    inside = leader.table.find_inside(token_ids, len(found))
                    group.awaited = _next_full_block(leader, token_ids, len(found), block_size)
                    if transfers is not None:
                        stored = transfers.find(leader, token_ids, len(found))
                if group.awaited is not None and self._is_on_its_way(group.awaited, behind, loading):
                    postponed.append(group)
                    continue
            if not self._fits(group, found, promised):
                self._waiting.push(group)
                break
            if inside is not None and (stored or not self._can_copy(group, found, inside[0], promised)):
                inside = None
            self._start(plan, group, found, stored, inside)
            started = True
            for sequence in group.sequences:
                if not group.waits_for_leader(sequence):
                    promised += _num_blocks_to_come(sequence, block_size)
            if transfers is not None and leader in transfers.waiting:
                loading.append(leader)
                continue
            behind.append(leader)
            wanted += leader.num_missing_tokens
        for group in postponed:
            self._waiting.push(group)
        return started

    def _fits(self, group: SequenceGroup, found: SequenceOf[int], promised: int) -> bool:
        """Whether there are rows, and blocks for all tokens the group has besides those promised to others."""
        if not self._running:
            # Every block is free but for registered prefixes', and a group that passed the door fits.
            return group.num_rows <= len(self._free_rows)
        # Every sequence needs a token a step, of which there may be few for a while.
        if group.num_rows > len(self._free_rows) - max(0, self.max_num_seqs - self._max_step_tokens):
            return False
        needed = _num_blocks_to_come(group.leader, self.pool.block_size)
        needed -= sum(1 for block in found if self.pool.ref_counts[block])
        return needed + promised <= self.pool.num_free - self._watermark

    def _is_on_its_way(self, block: tuple[int, BlockName], behind: list[Sequence], loading: list[Sequence]) -> bool:
        """Whether somebody computes a block or loads it."""
        if self._transfers is not None and self._transfers.is_coming(block[1]):
            return True
        return _is_being_computed(block, [*behind, *loading] if loading else behind, self.pool.block_size)

    def _can_copy(self, group: SequenceGroup, found: SequenceOf[int], source: int, promised: int) -> bool:
        """Whether there are blocks for all tokens of the group while it also holds a block that it will copy."""
        needed = _num_blocks_to_come(group.leader, self.pool.block_size)
        needed -= sum(1 for block in found if self.pool.ref_counts[block])
        return needed + (self.pool.ref_counts[source] == 0) + promised <= self.pool.num_free

    def _start(
        self,
        plan: StepPlan,
        group: SequenceGroup,
        found: list[int],
        stored: list[tuple[str, BlockName]],
        inside: tuple[int, int] | None,
    ) -> None:
        for sequence in (*group.sequences, *group.spares):
            sequence.row = self._free_rows.pop()
            self._rows[sequence.row] = sequence
        plan.new_rows += [_new_row(sequence) for sequence in group.sequences]
        leader = group.leader
        leader.table.adopt(found, inside)
        leader.num_computed_tokens = leader.table.num_tokens
        hits = {"device": leader.table.num_tokens}
        if stored and self._transfers is not None:
            hits |= self._transfers.start(leader, stored)
        if leader.table.blocks:
            plan.new_blocks.append((leader.row, 0, leader.table.blocks.copy()))
        if group.num_cached_tokens < 0:
            group.first_scheduled_time = self._clock()
            group.num_cached_tokens = 0
            self._explain(group)
            self._stats.total_prefix_queries += group.num_prompt_tokens
            self._count_hits(leader, hits)
        bisect.insort(self._running, group, key=_order)

    def _explain(self, group: SequenceGroup) -> None:
        """Note why the first block that a group must compute was not found."""
        leader, prompt = group.leader, group.request.prompt_token_ids
        covered = leader.num_computed_tokens // self.pool.block_size
        if covered >= (len(prompt) - 1) // self.pool.block_size or not self.pool.enable_prefix_caching:
            return
        group.miss = self._history.explain(prompt, covered, leader.table.name_of(covered, prompt))
        misses = self._stats.prefix_misses
        misses[group.miss.reason] = misses.get(group.miss.reason, 0) + 1

    def _note_eviction(self, block: int, name: BlockName) -> None:
        self._history.note_eviction(name)
        if self._save_evicted is not None:
            self._save_evicted(block, name)

    def _count_hits(self, sequence: Sequence, hits: dict[str, int]) -> None:
        """Prompt tokens by where their KV was found, if this is how the group begins and not how it resumes."""
        group = sequence.group
        if group.num_preemptions or sequence is not group.leader:
            return
        for origin, found in hits.items():
            # After a restart of the engine, tokens that were output before may be found, too.
            num_tokens = min(found, group.num_prompt_tokens - group.num_cached_tokens)
            if num_tokens > 0:
                group.num_cached_tokens += num_tokens
                self._stats.total_prefix_hits += num_tokens
                for counts in (group.cached_tokens, self._stats.prefix_hits):
                    counts[origin] = counts.get(origin, 0) + num_tokens

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
            plan.starts.append(start)
            plan.counts.append(count)
            plan.token_ids += sequence.token_ids[start : start + count]
            if count == sequence.num_missing_tokens:
                for other in group.sequences:
                    # Where the prompt ends, all samples that have no token yet part from the leader.
                    if other is sequence or (other.num_output_tokens == 0 and group.waits_for_leader(other)):
                        plan.sample_after.append(index)
                        plan.sample_rows.append(other.row)
            num_logprobs = group.request.params.prompt_logprobs
            if num_logprobs is not None and group.lacks_prompt_logprobs and start + 1 < group.num_prompt_tokens:
                targets = sequence.token_ids[start + 1 : min(start + 1 + count, group.num_prompt_tokens)]
                plan.prompt_logprobs[index] = (num_logprobs, targets)

    def _plan_drafts(self, plan: StepPlan, speculation: Speculation) -> None:
        """Let sequences that decode compute drafted tokens behind their last one, in a step that does nothing else."""
        decoding = [sequence for row in plan.rows if (sequence := self._rows[row]) is not None]
        sequences = [sequence for sequence in decoding if sequence.group.takes_drafts]
        # Drafts take no block that a running sequence may need next, and need no more logits than are planned for.
        num_slots = (self.pool.num_free - max(self._watermark, len(plan.rows))) * self.pool.block_size
        num_rows = self.max_num_seqs + speculation.max_tokens - len(plan.rows)
        candidates = []
        for sequence in sequences:
            if sequence.drafts is None:
                sequence.drafts = speculation.new_drafts()
            # The last token that a request may have is drawn and not computed.
            most = sequence.group.request.max_tokens - sequence.num_output_tokens - 1
            candidates.append((sequence.drafts, sequence.token_ids, most))
        max_drafted = min(num_slots, num_rows, self.max_num_batched_tokens - plan.num_tokens)
        drafts = speculation.choose(candidates, plan.num_tokens, max_drafted, self.pool.now)
        chosen = {sequence.row: draft for sequence, draft in zip(sequences, drafts, strict=True) if draft}
        if not chosen:
            return
        plan.token_ids.clear()
        for index, sequence in enumerate(decoding):
            draft = chosen.get(sequence.row, [])
            plan.token_ids += [sequence.token_ids[plan.starts[index]], *draft]
            if draft:
                plan.drafts[index] = draft
                plan.counts[index] += len(draft)
                changed = sequence.table.append(len(draft), plan.block_copies)
                if changed < len(sequence.table.blocks):
                    plan.new_blocks.append((sequence.row, changed, sequence.table.blocks[changed:]))

    def _preempt(self, group: SequenceGroup) -> None:
        """Take all blocks and rows of a running group; it waits at the place its arrival gives it."""
        self._stop_running(group)
        for sequence in (*group.sequences, *group.spares):
            self._release(sequence)
            sequence.num_computed_tokens = 0
        group.awaited = None
        group.num_preemptions += 1
        self._stats.total_preemptions += 1
        self._waiting.push(group)

    def retreat(self, plan: StepPlan) -> None:
        """Take back the step planned last, for which a device had no memory: its groups wait and start over from what
        stays cached, the first of them first, and steps are half as large until many have succeeded."""
        rows = self._in_flight.pop()
        groups = {sequence.group.order: sequence.group for row in plan.rows if (sequence := rows[row]) is not None}
        for group in groups.values():
            if any(sequence.row != NO_ROW for sequence in group.sequences):
                self._preempt(group)
        self._max_step_tokens = max(1, plan.num_tokens // 2)

    # -- taking in ----------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceDelta]:
        """Advance every sequence of the plan, append samples, fork, finish. Returns what each sample gained.

        Plans are taken in in the order in which they were made. A sequence that left meanwhile is passed over.
        """
        self.pool.copies_are_done()
        rows, block_size = self._in_flight.popleft(), self.pool.block_size
        self._max_step_tokens = min(
            self.max_num_batched_tokens, self._max_step_tokens + 1 + self._max_step_tokens // 64
        )
        if self._tiers is not None and self._transfers is not None and result.moved is not None:
            self._tiers.measure_step(plan, self._clock() - self._planned_at)
            self._transfers.take_in(plan.moves, result.moved)
        counts = plan.counts if self._speculation is None else self._settle_drafts(plan, result, self._speculation)
        for row, start, count in zip(plan.rows, plan.starts, counts, strict=True):
            sequence = rows[row]
            if sequence is None or sequence.row == NO_ROW:
                continue
            end = start + count
            sequence.num_computed_tokens = end
            if end % block_size < count:  # a block was filled
                sequence.table.name_full_blocks(sequence.token_ids, end)
            group = sequence.group
            if start < group.num_prompt_tokens:
                self._stats.total_prompt_tokens += min(end, group.num_prompt_tokens) - start
                if len(group.sequences) > 1 and end >= group.num_prompt_tokens and sequence is group.leader:
                    self._share_prompt(group)
        deltas: list[SequenceDelta] = []
        for index, entries in result.prompt_logprobs.items():
            sequence = rows[plan.rows[index]]
            if sequence is not None and sequence.row != NO_ROW:
                delta = self._prompt_delta(sequence, entries)
                if delta is not None:
                    deltas.append(delta)
        place, complete = 0, set(result.complete)
        while place < len(plan.sample_rows):
            sequence = rows[plan.sample_rows[place]]
            if sequence is None or sequence.row == NO_ROW:
                place += 1
                continue
            group, first = sequence.group, place
            if group.beam_search is None:
                place += 1
                if sequence.token_ids[-1] < 0:
                    sequence.token_ids.pop()  # the token was named before it was known
                token_ids = [result.token_ids[first], *result.following.get(first, ())]
                own, error = result.logprobs[first], result.errors[first]
                logprobs = None if own is None else [own, *result.following_logprobs.get(first, ())]
                deltas.append(self._extend(sequence, token_ids, logprobs, error, complete=first in complete))
            else:
                place += len(group.sequences)  # its beams stand side by side
                error = next((error for error in result.errors[first:place] if error is not None), None)
                if error is not None:
                    deltas += self._fail(group, error)
                else:
                    deltas += self._advance(
                        group, group.beam_search, [result.candidates[i] for i in range(first, place)]
                    )
        self._stats.total_steps += bool(plan.rows)
        return deltas

    def _settle_drafts(self, plan: StepPlan, result: StepResult, speculation: Speculation) -> list[int]:
        """Take back drafted tokens that did not come. Returns how many of each row's computed tokens stay."""
        now = self._clock()
        if plan.num_tokens == len(plan.sample_rows) + sum(map(len, plan.drafts.values())):
            speculation.times.measure(plan.num_tokens, now - self.pool.now, now)
        counts = plan.counts.copy() if plan.drafts else plan.counts
        for index, draft in plan.drafts.items():
            sequence, block_size = self._rows[plan.rows[index]], self.pool.block_size
            assert sequence is not None
            came = [result.token_ids[index], *result.following.get(index, ())]
            num_held = num_equal(draft, came) if result.errors[index] is None else 0
            # The last token is computed in the next step, which needs what the model makes of it.
            num_kept = min(num_held, len(came) - 1)
            counts[index] -= len(draft) - num_kept
            end = plan.starts[index] + counts[index]
            sequence.table.truncate(end)
            if end % block_size < counts[index]:
                sequence.table.name_full_blocks([*sequence.token_ids, *draft[:num_kept]], end)
            group = sequence.group
            group.num_draft_tokens += len(draft)
            group.num_accepted_tokens += num_held
            self._stats.total_drafts += 1
            self._stats.total_draft_tokens += len(draft)
            self._stats.total_accepted_tokens += num_held
        return counts

    def _share_prompt(self, group: SequenceGroup) -> None:
        """The leader has the prompt's KV: the others share it, but for those that more is found of (`_resume`)."""
        forked = [group.leader]
        for sequence in group.sequences[1:]:
            if sequence.num_computed_tokens:
                continue  # it started with another leader
            if sequence.num_output_tokens and self._look_up(sequence, forked) != ([], []):
                continue
            sequence.table = group.leader.table.fork()
            sequence.num_computed_tokens = sequence.table.num_tokens
            self._forked.append((sequence.row, 0, sequence.table.blocks.copy()))
            forked.append(sequence)

    def _prompt_delta(self, leader: Sequence, entries: list[TokenLogprobs]) -> SequenceDelta | None:
        """The prompt log-probabilities that this step added; those computed again after a preemption are dropped."""
        group = leader.group
        end = min(leader.num_computed_tokens, group.num_prompt_tokens - 1)
        fresh = end - group.num_prompt_logprobs
        if fresh <= 0:
            return None
        group.num_prompt_logprobs = end
        delta = _delta(group, leader.index)
        delta.prompt_logprobs = entries[-fresh:]
        return delta

    def _extend(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        error: str | None,
        *,
        complete: bool = False,
    ) -> SequenceDelta:
        """Append a sample and what follows it, up to where the sequence ends."""
        request = sequence.group.request
        delta = _delta(sequence.group, sequence.index)
        if error is not None:
            delta.error = error
            delta.finish_reason = FinishReason.ERROR
            # What made the sample fail may sit in the KV, where the next request of this prefix would find it.
            sequence.table.forget_names()
            if self._transfers is not None:
                self._transfers.forget(sequence)
        else:
            for place, token_id in enumerate(token_ids, start=1):
                delta.token_ids.append(token_id)
                sequence.token_ids.append(token_id)
                self._stats.total_generated_tokens += 1
                if token_id in request.eos_token_ids:
                    delta.finish_reason = FinishReason.STOP
                elif token_id in request.params.stop_token_ids:
                    delta.finish_reason = FinishReason.STOP
                    delta.stop_reason = token_id
                elif complete and place == len(token_ids):
                    delta.finish_reason = FinishReason.STOP
                    delta.ends_with_text = True
                elif sequence.num_output_tokens >= request.max_tokens:
                    delta.finish_reason = FinishReason.LENGTH
                if delta.finish_reason is not None:
                    break
            if logprobs is not None:
                delta.logprobs = logprobs[: len(delta.token_ids)]
        if delta.finish_reason is not None:
            if error is None:
                self.prefixes.complete(request.request_id, sequence.table)
            self._drop(sequence)
        return delta

    def _advance(
        self, group: SequenceGroup, search: BeamSearch, candidates: SequenceOf[BeamCandidates]
    ) -> list[SequenceDelta]:
        """One step of a beam search: survivors fork from their parents, the others' blocks are free (paper, 4.4)."""
        survivors = search.advance(candidates)
        if search.done:
            return self._conclude(group, search)
        parents, chosen = group.sequences, {survivor.parent for survivor in survivors}
        for place, parent in enumerate(parents):
            if place not in chosen:
                parent.table.free()
                parent.num_computed_tokens, parent.token_ids = 0, []
                group.spares.append(parent)
        beams: list[Sequence] = []
        for place, token_id in survivors:
            beam = parent = parents[place]
            if place in chosen:
                chosen.remove(place)  # the best child goes on in its parent's place
            else:
                beam = group.spares.pop()
                beam.table = parent.table.fork()
                beam.num_computed_tokens = parent.num_computed_tokens
                beam.token_ids = parent.token_ids.copy()
                self._forked.append((beam.row, 0, beam.table.blocks.copy()))
            beams.append(beam)
            self._row_forks.append(RowFork(beam.row, parent.row, token_id))
        for beam, (_, token_id) in zip(beams, survivors, strict=True):
            beam.token_ids.append(token_id)
        group.sequences = beams
        return []

    def _conclude(self, group: SequenceGroup, search: BeamSearch) -> list[SequenceDelta]:
        """The search is over: its best hypotheses are the samples, each in one piece."""
        found = search.hypotheses(group.request.params.n)
        deltas = [_delta(group, index) for index in range(group.request.params.n)]
        for delta, hypothesis in zip(deltas, found, strict=False):
            delta.token_ids = hypothesis.token_ids
            delta.cumulative_logprob = hypothesis.cumulative_logprob
            delta.logprobs = hypothesis.logprobs
            delta.finish_reason = hypothesis.finish_reason
            delta.stop_reason = hypothesis.stop_reason
            self._stats.total_generated_tokens += len(hypothesis.token_ids)
        for delta in deltas[len(found) :]:
            delta.error = f"the beam search found {len(found)} sequences: the tokens allowed leave no more"
            delta.finish_reason = FinishReason.ERROR
        self._drop_all(group)
        return deltas

    def _fail(self, group: SequenceGroup, error: str) -> list[SequenceDelta]:
        """A beam cannot go on, and the search means nothing without it."""
        for sequence in group.sequences:
            sequence.table.forget_names()
            if self._transfers is not None:
                self._transfers.forget(sequence)
        deltas = [_delta(group, index) for index in range(group.request.params.n)]
        for delta in deltas:
            delta.error, delta.finish_reason = error, FinishReason.ERROR
        self._drop_all(group)
        return deltas

    # -- letting go ---------------------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks and row."""
        if self._transfers is not None:
            self._transfers.cancel(sequence)
        sequence.table.free()
        sequence.drafts = None
        if sequence.row != NO_ROW:
            self._rows[sequence.row] = None
            self._free_rows.append(sequence.row)
            sequence.row = NO_ROW

    def _drop(self, sequence: Sequence) -> None:
        """A sequence has ended; with its last one the group has."""
        group = sequence.group
        self._release(sequence)
        group.sequences.remove(sequence)
        if not group.sequences:
            for spare in group.spares:
                self._release(spare)
            del self._groups[group.request.request_id]
            self.prefixes.cancel(group.request.request_id)
            self._waiting.remove(group)
            self._stop_running(group)

    def _drop_all(self, group: SequenceGroup) -> None:
        """The whole group has ended."""
        for sequence in tuple(group.sequences):
            self._drop(sequence)

    def _stop_running(self, group: SequenceGroup) -> None:
        """Take a group out of those that run, if it is one."""
        place = bisect.bisect_left(self._running, group.order, key=_order)
        if place < len(self._running) and self._running[place] is group:
            del self._running[place]


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


def _order(group: SequenceGroup) -> tuple[int, int]:
    return group.order


def _num_blocks_to_come(sequence: Sequence, block_size: int) -> int:
    """Blocks that a sequence will take until all tokens it has are computed, and those who wait to fork from it."""
    group = sequence.group
    blocks = -(-len(sequence.token_ids) // block_size) - len(sequence.table.blocks) + sequence.table.num_copies_to_come
    shared = group.num_prompt_tokens // block_size
    if sequence is not group.leader and not sequence.table.blocks:
        blocks -= shared
    for other in group.sequences:
        if other is not sequence and group.waits_for_leader(other):
            blocks += -(-len(other.token_ids) // block_size) - shared
    return blocks


def _next_full_block(
    sequence: Sequence, token_ids: list[int], index: int, block_size: int
) -> tuple[int, BlockName] | None:
    """Logical block `index` of a sequence and its name, if `token_ids` could have it from the cache."""
    if index >= (len(token_ids) - 1) // block_size:
        return None
    return index, sequence.table.name_of(index, token_ids)


def _is_being_computed(block: tuple[int, BlockName], behind: list[Sequence], block_size: int) -> bool:
    """Whether one of the sequences will compute a block of this name in this step or a later one."""
    index, name = block
    return any(
        other.num_computed_tokens // block_size <= index < len(other.token_ids) // block_size
        and other.table.name_of(index, other.token_ids) == name
        for other in behind
    )


def _num_sequences(request: Request) -> tuple[str, int]:
    """How many sequences a request runs at once, and the parameter that says so."""
    params = request.params
    return ("n", params.n) if params.beam_width is None else ("beam_width", params.beam_width)


def _delta(group: SequenceGroup, index: int) -> SequenceDelta:
    """What is true of every delta, no token yet."""
    return SequenceDelta(
        group.request.request_id,
        index,
        [],
        num_cached_tokens=group.num_cached_tokens,
        first_scheduled_time=group.first_scheduled_time,
        num_preemptions=group.num_preemptions,
        num_draft_tokens=group.num_draft_tokens,
        num_accepted_tokens=group.num_accepted_tokens,
    )


def _new_row(sequence: Sequence) -> NewRow:
    group = sequence.group
    request = group.request
    return NewRow(
        row=sequence.row,
        params=request.params,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=sequence.token_ids[group.num_prompt_tokens :],
        seed=request.seed,
        sample_index=sequence.index,
        stop_token_ids=(*request.eos_token_ids, *request.params.stop_token_ids),
    )
