"""Admission: which waiting groups get rows and memory, and which cached KV they start from.

Groups are admitted in the order of the waiting queue while there are rows, blocks for the whole prompt and a watermark
of free blocks besides, and while the rule of admission, if there is one, allows it. A group whose next block is being
computed by another group waits for that block instead of computing it twice.
"""

from collections import Counter
from collections.abc import Callable

from quire.kv_cache.block_pool import BlockPool
from quire.kv_cache.block_table import HOLE
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.found import Found
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.policies import AdmissionRule
from quire.scheduler.prefix_lookup import PrefixLookup
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import Sequence, SequenceGroup
from quire.scheduler.service import PROMPT_TOKEN
from quire.scheduler.stored_prefix import DEVICE
from quire.scheduler.tenant_pace import PromptBudget
from quire.step import NewRow, StepPlan

MAX_POSTPONED = 64
"""Waiting groups that one step passes over because another group computes their prefix."""


class Admission:
    """Owned by the scheduler."""

    def __init__(
        self,
        pool: BlockPool,
        queues: RequestQueues,
        lookup: PrefixLookup,
        rule: AdmissionRule | None,
        offload: BlockOffload | None,
        clock: Callable[[], float],
        limits: SchedulerLimits,
        *,
        watermark: int,
    ) -> None:
        """`watermark` blocks stay free, so that running sequences can grow before any is preempted. `rule` may ask for
        more room than that."""
        self._pool = pool
        self._queues = queues
        self._lookup = lookup
        self._rule = rule
        self._offload = offload
        self.num_queried_tokens = 0
        """Prompt tokens that were looked up in the prefix cache, since the start."""
        self._clock = clock
        self._watermark = watermark
        self._max_num_partial_prefills = limits.max_num_partial_prefills
        self._max_step_tokens = limits.max_num_batched_tokens
        self._whole_prompts = limits.whole_prompts

    def admit(self, plan: StepPlan, prefilling: list[Sequence], budget: PromptBudget, max_background_rows: int) -> bool:
        """Start waiting groups while their share of the budget is worth having. They get rows and prefix hits.

        The budget is what `plan` leaves of the step. The background gets at most so many rows in all, or one request
        where none of it runs and it may have any. The leaders of the groups are added to `prefilling` and the budget,
        except leaders that wait for a tier. Returns whether any group started.
        """
        started, offload, waiting = False, self._offload, self._queues.waiting
        # Every sequence needs a token per step, and a step may be small for a while.
        num_rows_kept = max(0, len(self._queues.rows) - budget.num_tokens - plan.num_tokens)
        loading = list(offload.waiting) if offload is not None else []
        promised = sum(self._num_blocks_to_come(sequence) for sequence in (*prefilling, *loading))
        postponed: list[SequenceGroup] = []
        passed_over: set[str] = set()
        while len(postponed) < MAX_POSTPONED:
            group = waiting.pop(passed_over)
            if group is None:
                break
            if self._stands_back(group, budget, num_rows_kept):
                passed_over.add(group.request.tenant)
                waiting.push(group)
                continue
            if not self._may_start(group, budget, max_background_rows):
                waiting.push(group)
                break
            found = self._lookup.find(group, prefilling, loading)
            if found is None:
                postponed.append(group)
                continue
            group.num_shared_blocks = self._num_shared(found)
            if not self._fits(group, promised, num_rows_kept):
                waiting.push(group)
                break
            if found.inside is not None and (found.stored or not self._can_copy(group, found, promised)):
                num_blocks = found.num_blocks
                found = self._lookup.find_whole_blocks(group, found)
                if found.num_blocks < num_blocks:
                    group.num_shared_blocks = self._num_shared(found)
                    if not self._fits(group, promised, num_rows_kept):
                        waiting.push(group)
                        break
            self._start(plan, group, found)
            started = True
            for sequence in group.sequences:
                if not group.waits_for_leader(sequence):
                    promised += self._num_blocks_to_come(sequence)
            leader = group.leader
            if offload is not None and leader in offload.waiting:
                loading.append(leader)
                continue
            prefilling.append(leader)
            budget.add(leader)
        for group in postponed:
            waiting.push(group)
        return started

    def _may_start(self, group: SequenceGroup, budget: PromptBudget, max_background_rows: int) -> bool:
        if not budget.has_room(group, self._max_num_partial_prefills):
            return False
        if (
            self._whole_prompts
            and budget.num_wanted
            and budget.num_wanted + group.num_prompt_tokens > budget.num_tokens
        ):
            return False
        if not group.is_background:
            return True
        num_rows = self._queues.num_background_rows
        return num_rows + group.num_rows <= max_background_rows or (max_background_rows > 0 and not num_rows)

    def _stands_back(self, group: SequenceGroup, budget: PromptBudget, num_rows_kept: int) -> bool:
        """Whether a group leaves rows or tokens to tenants that ask for less: theirs may start before it."""
        if budget.is_heavy(group) and not budget.has_room(group, self._max_num_partial_prefills):
            return True
        for_others = self._queues.waiting.rows_kept(group, self._queues.running, len(self._queues.rows))
        return for_others > num_rows_kept and group.num_rows > len(self._queues.free_rows) - for_others

    def resume(self, plan: StepPlan, resuming: list[Sequence], prefilling: list[Sequence]) -> bool:
        """Let preempted sequences of running groups start from the cached part of their output.

        They are added to `prefilling`, unless another sequence computes or loads their next block: then they wait and
        share it. Returns whether any sequence started from a block.
        """
        started = False
        for sequence in resuming:
            found = self._lookup.find_output(sequence, prefilling)
            if found is None:
                continue
            states = self._queues.states
            if found.stored is not None and self._offload is not None:
                self._offload.pin(found.stored)
            if states is not None:
                states.begin(sequence, found.state, found.num_known_tokens)
            sequence.table.adopt(found.blocks)
            sequence.start_from_table()
            if found.stored is not None and self._offload is not None:
                self._offload.start(sequence, found.stored)
            if sequence.table.blocks:
                plan.new_blocks += sequence.table.entries(sequence.row, 0)
                started = True
            if self._offload is None or sequence not in self._offload.waiting:
                prefilling.append(sequence)
        return started

    def _fits(self, group: SequenceGroup, promised: int, num_rows_kept: int) -> bool:
        """Whether there are rows, and blocks for all tokens of the group besides the blocks promised to others."""
        num_free_rows = len(self._queues.free_rows)
        if not self._queues.running:
            # Only registered prefixes hold blocks, and `RequestCheck` let the group in: it fits.
            return group.num_rows <= num_free_rows
        for_others = self._queues.waiting.rows_kept(group, self._queues.running, len(self._queues.rows))
        if group.num_rows > num_free_rows - max(num_rows_kept, for_others):
            return False
        needed = self._num_needed(group)
        if needed + promised > self._pool.num_free - self._watermark:
            return False
        return self._rule is None or self._rule.fits(group, needed, self._queues.running, promised)

    def _can_copy(self, group: SequenceGroup, found: Found, promised: int) -> bool:
        """Whether there are blocks for all tokens of the group while it also holds a block that it will copy."""
        assert found.inside is not None
        pool = self._pool
        # A block without a hash was retained partly filled: it is not copied, and is one of the needed blocks.
        held = sum(pool.ref_counts[block] == 0 and pool.hashes[block] is not None for block in found.inside[0])
        return self._num_needed(group) + held + promised <= pool.num_free

    def _num_shared(self, found: Found) -> int:
        """How many of the found blocks running sequences already hold."""
        ref_counts = self._pool.ref_counts
        return sum(1 for blocks in found.blocks for block in blocks if block != HOLE and ref_counts[block])

    def _num_needed(self, group: SequenceGroup) -> int:
        """Blocks that are free now and will be used when all tokens of the group are computed."""
        return self._num_blocks_to_come(group.leader) - group.num_shared_blocks

    def _num_blocks_to_come(self, sequence: Sequence) -> int:
        """Blocks that a sequence and its future forks will take until all their tokens are computed."""
        group, pool, table = sequence.group, self._pool, sequence.table
        chunk = min(self._max_step_tokens, sequence.num_missing_tokens)
        blocks = pool.peak_blocks(len(sequence.token_ids), chunk) - len(table.held_blocks) + table.num_copies_to_come
        shared = pool.most_blocks(group.num_prompt_tokens // pool.block_size * pool.block_size)
        if sequence is not group.leader and not table.blocks:
            blocks -= shared
        for other in group.sequences:
            if other is not sequence and group.waits_for_leader(other):
                blocks += pool.most_blocks(len(other.token_ids)) - shared
        return max(0, blocks)

    def _start(self, plan: StepPlan, group: SequenceGroup, found: Found) -> None:
        self._queues.start(group)
        plan.new_rows += [_new_row(sequence) for sequence in group.sequences]
        leader = group.leader
        if found.stored is not None and self._offload is not None:
            self._offload.pin(found.stored)
        leader.table.adopt(found.blocks, found.inside)
        leader.start_from_table()
        if self._queues.states is not None:
            self._queues.states.begin(leader, found.state, found.num_known_tokens)
        hits = Counter({DEVICE: leader.table.num_tokens})
        if found.stored is not None and self._offload is not None:
            hits.update(self._offload.start(leader, found.stored))
        plan.new_blocks += leader.table.entries(leader.row, 0)
        if group.num_cached_tokens < 0:
            group.first_scheduled_time = self._clock()
            group.num_cached_tokens = 0
            self._lookup.explain(group)
            self.num_queried_tokens += group.num_prompt_tokens
            self._lookup.count_hits(leader, hits)
            if self._queues.waiting.counts_service:
                num_computed = group.num_prompt_tokens - group.num_cached_tokens
                self._queues.waiting.serve(group.request.tenant, PROMPT_TOKEN * num_computed)


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
        images=tuple(
            (span.offset, pixels.height, pixels.width)
            for span, pixels in zip(request.inputs, request.pixels, strict=bool(request.pixels))
        ),
        adapter=request.adapter,
        second_text=request.second_text,
    )
