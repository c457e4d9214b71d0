"""Drafting: adds draft tokens to a step's plan, and rolls back the rejected ones.

`DraftPlanner` chooses the tokens and decides whether they pay. This file keeps blocks, rows and counts right.
"""

from collections.abc import Callable

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.acceptance import num_equal
from quire.scheduler.draft_planner import DraftPlanner
from quire.scheduler.request_queues import RequestQueues
from quire.step import StepPlan, StepResult


class Drafting:
    """Owned by the scheduler; exists only if speculation is on."""

    def __init__(
        self,
        speculation: DraftPlanner,
        pool: BlockPool,
        queues: RequestQueues,
        clock: Callable[[], float],
        *,
        watermark: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Drafts leave `watermark` free blocks to other sequences."""
        self._speculation = speculation
        self._pool = pool
        self._queues = queues
        self.num_drafts = 0
        """Runs of draft tokens since the start, one sequence's in one step."""
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._clock = clock
        self._watermark = watermark
        self._max_num_batched_tokens = max_num_batched_tokens

    def prepare(self) -> None:
        """Dissolve the decode batch before a step that may take drafts."""
        if self._speculation.looks_next:
            self._queues.dissolve_decode_batch()

    @property
    def allows_decode_batch(self) -> bool:
        """Whether drafts are looked for so seldom that the decode batch pays in between."""
        return self._speculation.pauses

    def extend(self, plan: StepPlan) -> None:
        """Add draft tokens after the last token of decoding sequences, in a step that only decodes."""
        pool, speculation, rows = self._pool, self._speculation, self._queues.rows
        if not speculation.begin_step():
            return
        decoding = [sequence for row in plan.rows if (sequence := rows[row]) is not None]
        sequences = [sequence for sequence in decoding if sequence.group.takes_drafts]
        # Drafts leave the blocks that running sequences may need next, and need no more logits than are planned for.
        num_kept = max(self._watermark, len(plan.rows) * pool.num_groups)
        num_slots = (pool.num_free - num_kept) // pool.num_groups * pool.block_size
        num_states = num_slots if self._queues.states is None else self._queues.states.num_for_drafts
        num_rows = len(rows) + speculation.max_tokens - len(plan.rows)
        candidates = []
        for sequence in sequences:
            if sequence.drafts is None:
                sequence.drafts = speculation.new_drafts()
            # The last token of a request is sampled and not computed.
            most = sequence.group.request.max_tokens - sequence.num_output_tokens - 1
            candidates.append((sequence.drafts, sequence.token_ids, most))
        max_drafted = min(num_slots, num_states, num_rows, self._max_num_batched_tokens - plan.num_tokens)
        drafts = speculation.choose(candidates, plan.num_tokens, max_drafted, pool.now)
        chosen = {sequence.row: draft for sequence, draft in zip(sequences, drafts, strict=True) if draft}
        if not chosen:
            return
        plan.token_ids.clear()
        for index, sequence in enumerate(decoding):
            draft = chosen.get(sequence.row, [])
            plan.token_ids += [sequence.token_ids[plan.num_computed_tokens[index]], *draft]
            if draft:
                plan.drafts[index] = draft
                plan.num_scheduled_tokens[index] += len(draft)
                changed = sequence.table.append(len(draft), plan.block_copies)
                plan.new_blocks += sequence.table.entries(sequence.row, changed)
                if self._queues.states is not None:
                    self._queues.states.plan_draft(plan, index, sequence, len(draft))

    def roll_back_rejected(self, plan: StepPlan, result: StepResult) -> list[int]:
        """Remove rejected draft tokens from the block tables. Returns how many computed tokens of each row stay."""
        if self._speculation.measures:
            now = self._clock()
            if plan.num_tokens == len(plan.sample_rows) + sum(map(len, plan.drafts.values())):
                self._speculation.times.measure(plan.num_tokens, now - self._pool.now, now, drafted=bool(plan.drafts))
        if not plan.drafts:
            return plan.num_scheduled_tokens
        counts, block_size = plan.num_scheduled_tokens.copy(), self._pool.block_size
        for index, draft in plan.drafts.items():
            sequence = self._queues.rows[plan.rows[index]]
            if sequence is None:
                continue  # it left while the step ran
            came = [result.token_ids[index], *result.extra_token_ids.get(index, ())]
            num_accepted = num_equal(draft, came) if result.errors[index] is None else 0
            # The next step computes the last token, because it needs its logits.
            num_kept = min(num_accepted, len(came) - 1)
            counts[index] -= len(draft) - num_kept
            if self._queues.states is not None:
                self._queues.states.accept(sequence, counts[index])
            end = plan.num_computed_tokens[index] + counts[index]
            sequence.table.truncate(end)
            if end % block_size < counts[index]:
                sequence.table.hash_full_blocks([*sequence.token_ids, *draft[:num_kept]], end)
            group = sequence.group
            group.num_draft_tokens += len(draft)
            group.num_accepted_tokens += num_accepted
            self.num_drafts += 1
            self.num_draft_tokens += len(draft)
            self.num_accepted_tokens += num_accepted
        return counts
