"""StepPlanner: decides what a step computes. It hands out the token budget, and blocks by way of the block tables.

The rules, in their order:
1. Sequences that lack only their last token (decoding) come first, oldest group first. If the pool has too few blocks
   for all of them, the group that is last by (priority, arrival) gives back its memory and waits; it resumes from what
   the prefix cache still holds of it. This happens before anything is planned.
2. The rest of the budget goes to sequences that lack more (prompts, chunks, resumed groups) in equal shares. What a
   short prompt does not need goes to the longer ones, so a long prompt delays no other by more than its share. Beams of
   one request take their tokens together: a beam that lacks one token waits for beams that lack more. Prompts of heavy
   tenants come last and in small chunks while others are about (`tenant_pace`).
3. Waiting groups are admitted in order while rows and blocks last (`admission`).
   A prompt whose next image exceeds what a step encodes is computed up to it (`image_encoding`).
4. Requests of the background run while no client waits for a first token, in short steps (`background_pace`).
5. A step that only decodes may take draft tokens where they pay (`draft_planner`). They come last: no group is
   preempted for them, and rejected drafts are rolled back when the step ends.
"""

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.admission import Admission
from quire.scheduler.background_pace import BackgroundPace
from quire.scheduler.block_offload import BlockOffload
from quire.scheduler.decode_batch import DecodeStep
from quire.scheduler.drafting import Drafting
from quire.scheduler.image_encoding import ImageEncoding
from quire.scheduler.limits import SchedulerLimits
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import Sequence, SequenceGroup
from quire.scheduler.tenant_pace import PromptBudget, TenantPace
from quire.step import StepPlan


class StepPlanner:
    """Owned by the scheduler."""

    def __init__(
        self,
        pool: BlockPool,
        queues: RequestQueues,
        admission: Admission,
        offload: BlockOffload | None,
        drafting: Drafting | None,
        images: ImageEncoding,
        pace: BackgroundPace,
        tenant_pace: TenantPace,
        *,
        limits: SchedulerLimits,
    ) -> None:
        self._max_step_tokens = limits.max_num_batched_tokens
        self._pace = pace
        self._tenant_pace = tenant_pace
        self._whole_prompts = limits.whole_prompts
        self._pool = pool
        self._queues = queues
        self._admission = admission
        self._offload = offload
        self._drafting = drafting
        self._images = images
        self._batch_ids = _BatchIds()

    def decide(
        self, plan: StepPlan, max_tokens: int, ending: Collection[Sequence] = (), *, may_preempt: bool = True
    ) -> DecodeStep | None:
        """Fill in a plan of at most `max_tokens` tokens. Returns what the decode batch computes in it.

        Sequences in `ending` get their last token from the step in flight and take no more.
        """
        queues, offload = self._queues, self._offload
        if self._drafting is not None:
            self._drafting.prepare()
        # Sequences that wait for a tier, or that are ending; never both.
        excluded = offload.waiting if offload is not None else ending
        clients_wait = queues.clients_wait
        paced = bool(queues.num_background) and not (clients_wait or self._whole_prompts)
        background_rows = 0 if clients_wait else len(queues.rows)
        if may_preempt:
            self._stop_background(self._pace.most_rows(background_rows) if paced else background_rows)
        if paced:
            background_rows = self._pace.num_rows(background_rows)
        limit = max_tokens
        while True:
            preempted = self._make_room(excluded) if may_preempt else False
            decode_step, prefilling = self._plan_decoding(plan, excluded)
            num_decoding = len(plan.rows)
            num_rows = 0
            if paced:
                num_rows = queues.num_background_rows - sum(sequence.group.is_background for sequence in prefilling)
                limit = num_decoding + self._pace.num_prompt_tokens(max_tokens - num_decoding, num_rows)
            resuming = [sequence for sequence in prefilling if sequence.group.looks_for_blocks(sequence)]
            if resuming:
                prefilling = [sequence for sequence in prefilling if not sequence.group.looks_for_blocks(sequence)]
            started = False
            if not preempted and resuming:
                started = self._admission.resume(plan, resuming, prefilling)
            if prefilling or len(queues.waiting):
                most = None if preempted else background_rows
                started = self._plan_prompts(plan, prefilling, limit - plan.num_tokens, most) or started
            if self._drafting is not None and num_decoding and num_decoding == len(plan.rows):
                self._drafting.extend(plan)
            if plan.rows or not queues.running or (offload is not None and offload.has_loads) or not may_preempt:
                break
            if not started:
                # Prompts hold all blocks and none can go on: the last one makes room for the others.
                queues.preempt(queues.running[-1])
        if paced:
            self._pace.begin(plan.num_tokens - num_decoding, num_rows)
        plan.batch_id = self._batch_ids.of(plan, decode_step, num_decoding)
        self._images.finish(plan)
        return decode_step

    def _stop_background(self, most_rows: int) -> None:
        """Preempt requests of the background that have more rows than `most_rows`. They resume from the cache; without
        one they would begin again and again, and perhaps never end."""
        queues = self._queues
        if not (queues.num_background and self._pool.enable_prefix_caching):
            return
        num_groups, num_rows = 0, 0
        for group in reversed(queues.running):
            if not group.is_background:
                break
            num_groups, num_rows = num_groups + 1, num_rows + group.num_rows
        while num_groups and num_rows > most_rows and (num_groups > 1 or not most_rows):
            num_groups, num_rows = num_groups - 1, num_rows - queues.running[-1].num_rows
            queues.preempt(queues.running[-1])

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _make_room(self, excluded: Collection[Sequence]) -> bool:
        """Preempt groups, the last first, until every decoding sequence can have a block for its next token.

        Returns whether any group was preempted.
        """
        queues, pool, preempted = self._queues, self._pool, False
        # No sequence takes more than one block of a KV group. Nearly always there are as many: nothing more is counted.
        num_sequences = len(queues.decode_batch) + sum(len(group.sequences) for group in queues.not_in_decode_batch)
        if num_sequences * pool.num_groups <= pool.num_free:
            return False
        while queues.running and self._num_blocks_needed(excluded) > pool.num_free:
            queues.preempt(queues.running[-1])
            preempted = True
        return preempted

    def _num_blocks_needed(self, excluded: Collection[Sequence]) -> int:
        """Blocks that the next tokens of all decoding sequences take, copies on write included."""
        pool, queues = self._pool, self._queues
        needed, size = queues.decode_batch.num_blocks_needed, pool.block_size
        writers: dict[int, int] = {}
        for sequence in _decoding(queues.not_in_decode_batch, excluded, []):
            table = sequence.table
            if table.num_tokens % size == 0:
                needed += pool.num_groups
            elif table.num_copies_to_come:
                for block in table.blocks_to_copy:
                    writers[block] = writers.get(block, 0) + 1
        for block, count in writers.items():
            # The last holder of a block without a hash writes in place.
            needed += count if pool.hashes[block] is not None else min(count, pool.ref_counts[block] - 1)
        return needed

    def _plan_decoding(
        self, plan: StepPlan, excluded: Collection[Sequence]
    ) -> tuple[DecodeStep | None, list[Sequence]]:
        """Plan the decode batch, then the other decoding sequences in the order of `running`.

        The pool has the blocks for it. Returns what the batch computes, and the sequences that lack more than a token.
        """
        queues, copies = self._queues, plan.block_copies
        decode_step = queues.decode_batch.plan(plan) if len(queues.decode_batch) else None
        prefilling: list[Sequence] = []
        for sequence in _decoding(queues.not_in_decode_batch, excluded, prefilling):
            table, token_ids = sequence.table, sequence.token_ids
            num_copies = len(copies)
            changed = table.append(1, copies)
            plan.new_blocks += table.entries(sequence.row, changed)
            sequence.group.num_copied_blocks += len(copies) - num_copies
            plan.rows.append(sequence.row)
            plan.num_computed_tokens.append(len(token_ids) - 1)
            plan.token_ids.append(token_ids[-1])
        num_rows = len(plan.rows)
        plan.num_scheduled_tokens, plan.sample_indices = [1] * num_rows, list(range(num_rows))
        plan.sample_rows = plan.rows.copy()
        return decode_step, prefilling

    # -- prefilling ---------------------------------------------------------------------------------------------------

    def _plan_prompts(
        self, plan: StepPlan, prefilling: list[Sequence], num_tokens: int, background_rows: int | None
    ) -> bool:
        """Plan up to `num_tokens` tokens of prompts, after waiting groups were admitted. Returns whether any was.

        The background may have so many rows; None: nothing is admitted.
        """
        queues, started = self._queues, False
        budget = PromptBudget(num_tokens)
        if not self._whole_prompts:
            budget = self._tenant_pace.budget(queues.running, num_tokens)
        for sequence in prefilling:
            budget.add(sequence)
        if background_rows is not None and len(queues.waiting):
            started = self._admission.admit(plan, prefilling, budget, background_rows)
        others, heavy = budget.parts(prefilling)
        self._plan_prefilling(plan, *others)
        num_before = plan.num_tokens
        self._plan_prefilling(plan, *heavy)
        self._tenant_pace.begin(plan.num_tokens - num_before)
        return started

    def _plan_prefilling(self, plan: StepPlan, prefilling: list[Sequence], budget: int) -> None:
        """Share the rest of the budget among sequences that lack more than their last token."""
        wants = [sequence.num_missing_tokens for sequence in prefilling]
        shares = whole_shares(budget, wants) if self._whole_prompts else equal_shares(budget, wants)
        num_before = plan.num_tokens
        for sequence, share in zip(prefilling, shares, strict=True):
            count = min(share, _num_computable(sequence))
            if self._images.keeps_whole:
                # The first may exceed the budget for its image, since budgets may be smaller than any image.
                is_first = plan.num_tokens == num_before
                most = (self._max_step_tokens if is_first else num_before + budget) - plan.num_tokens
                most, start = min(most, _num_computable(sequence)), sequence.num_computed_tokens
                count = self._images.whole(sequence.group.request, start, min(count, max(most, 0)), most)
            if count > 0 and (count == sequence.num_missing_tokens or not self._whole_prompts):
                count = self._images.reach(plan, sequence.group.request, sequence.num_computed_tokens, count)
            if count > 0 and (count == sequence.num_missing_tokens or not self._whole_prompts):
                self._plan_chunk(plan, sequence, count)

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        """Plan the next `count` tokens of a sequence, and its sample or its vector if they are all it has."""
        table, group, start = sequence.table, sequence.group, sequence.num_computed_tokens
        num_copies = len(plan.block_copies)
        changed = table.append(count, plan.block_copies)
        group.num_copied_blocks += len(plan.block_copies) - num_copies
        plan.new_blocks += table.entries(sequence.row, changed)
        index = len(plan.rows)
        if self._queues.states is not None:
            self._queues.states.plan_saves(plan, index, sequence, start, count)
        plan.rows.append(sequence.row)
        plan.num_computed_tokens.append(start)
        plan.num_scheduled_tokens.append(count)
        plan.token_ids += sequence.token_ids[start : start + count]
        if count == sequence.num_missing_tokens and group.wants_vector:
            plan.pool_rows.append(index)
        elif count == sequence.num_missing_tokens:
            for other in group.sequences:
                # At the end of the prompt every sequence without output samples its first token.
                if other is sequence or (other.num_output_tokens == 0 and group.waits_for_leader(other)):
                    plan.sample_indices.append(index)
                    plan.sample_rows.append(other.row)
        num_logprobs = group.request.params.prompt_logprobs
        if num_logprobs is not None and group.lacks_prompt_logprobs and start + 1 < group.num_prompt_tokens:
            targets = sequence.token_ids[start + 1 : min(start + 1 + count, group.num_prompt_tokens)]
            plan.prompt_logprobs[index] = (num_logprobs, targets)


class _BatchIds:
    """Tells a step that repeats the last one, and numbers runs of such steps (`StepPlan.batch_id`)."""

    def __init__(self) -> None:
        self._num_ids = 0
        self._repeats = False
        """Whether the next step may go on with the last id."""
        self._version: int | None = None
        """Version of the decode batch, if it was all of the last step."""
        self._rows: list[int] = []
        self._next_positions: list[int] = []

    def of(self, plan: StepPlan, decode_step: DecodeStep | None, num_decoding: int) -> int:
        """The id for a plan: the last id if it repeats the last plan, else a new one; 0 if it does more than decode."""
        num_rows = len(plan.rows)
        only_decodes = 0 < num_rows == num_decoding == len(plan.token_ids)
        changes_rows = plan.new_rows or plan.row_forks or plan.block_copies
        if not only_decodes or changes_rows or any(not first for _, _, first, _ in plan.new_blocks):
            self._repeats = False
            return 0
        if decode_step is not None and len(decode_step.sequences) == num_rows:
            same, self._version = decode_step.version == self._version, decode_step.version
        else:
            same = plan.rows == self._rows and plan.num_computed_tokens == self._next_positions
            same, self._version = same and self._version is None, None
            self._rows, self._next_positions = plan.rows, [position + 1 for position in plan.num_computed_tokens]
        if not (same and self._repeats):
            self._num_ids += 1
        self._repeats = True
        return self._num_ids


def _decoding(
    groups: list[SequenceGroup], excluded: Collection[Sequence], prefilling: list[Sequence]
) -> list[Sequence]:
    """The sequences that take one token now. Sequences that lack more are added to `prefilling`."""
    decoding: list[Sequence] = []
    for group in groups:
        num_before, num_prompt_tokens = len(decoding), group.num_prompt_tokens
        for sequence in group.sequences:
            if sequence.in_decode_batch or (excluded and sequence in excluded):
                continue
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed_tokens == 1 and num_tokens != num_prompt_tokens:
                decoding.append(sequence)
            elif not group.waits_for_leader(sequence):
                prefilling.append(sequence)
        if group.beam_search is not None and len(decoding) - num_before < len(group.sequences):
            del decoding[num_before:]  # a beam that lacks one token waits for the others
    return decoding


def _num_computable(sequence: Sequence) -> int:
    """The most tokens of a prefilling sequence that its table and its group allow to compute now."""
    group, count = sequence.group, sequence.table.num_appendable()
    if any(group.waits_for_leader(other) for other in group.sequences):
        # The others fork where the prompt ends, so that block must hold nothing past it yet.
        count = min(count, group.num_prompt_tokens - sequence.num_computed_tokens)
    if group.advances_together and len(group.sequences) > 1 and sequence.num_output_tokens:
        # The last token is computed when all beams have come as far.
        count = min(count, sequence.num_missing_tokens - 1)
    return count


def whole_shares(budget: int, wants: SequenceOf[int]) -> list[int]:
    """All or nothing for each entry of `wants`, in their order; the first gets all in any case.

    >>> whole_shares(100, [60, 50, 40])
    [60, 0, 40]
    """
    shares = []
    for index, want in enumerate(wants):
        shares.append(want if want <= budget or index == 0 else 0)
        budget -= shares[-1]
    return shares


def equal_shares(budget: int, wants: SequenceOf[int]) -> list[int]:
    """Split `budget` equally; what one entry of `wants` does not need is split among the others.

    Where it does not divide, the smallest wants get one more.

    >>> equal_shares(100, [1000, 10, 40])
    [50, 10, 40]
    """
    shares = [0] * len(wants)
    left = budget
    for place, index in enumerate(sorted(range(len(wants)), key=wants.__getitem__)):
        shares[index] = min(wants[index], -(-left // (len(wants) - place)))
        left -= shares[index]
    return shares
