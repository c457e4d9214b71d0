"""LookAhead: whether the step after one in flight can be planned, and what its sequences look like then.

The tokens of the step in flight are not known. Each sequence it samples for gets ~row in place of its token: a negative
number that stands for "the token sampled last for this row". `ResultProcessor` puts the token in its place.
"""

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.decode_batch import DecodeStep
from quire.scheduler.request_queues import RequestQueues
from quire.scheduler.sequence import Sequence
from quire.step import StepPlan


class LookAhead:
    """Owned by the scheduler."""

    def __init__(self, pool: BlockPool, queues: RequestQueues) -> None:
        self._pool = pool
        self._queues = queues

    def is_possible(self, plan: StepPlan, decode_step: DecodeStep | None) -> bool:
        """Whether the step after `plan` can be planned before its result is known."""
        rows = self._queues.rows
        if len(self._queues.waiting) and plan.num_tokens > len(plan.rows):
            return False  # a waiting request may find what this step computes
        first = 0 if decode_step is None else len(decode_step.sequences)
        for place in range(first, len(plan.rows)):
            sequence, start = rows[plan.rows[place]], plan.num_computed_tokens[place]
            if sequence is not None:
                group, end = sequence.group, start + plan.num_scheduled_tokens[place]
                if len(group.sequences) > 1 and start < group.num_prompt_tokens <= end:
                    return False  # the others will fork from it
        served = {sequence for index in plan.pool_rows if (sequence := rows[plan.rows[index]]) is not None}
        for row in plan.sample_rows[first:]:
            sequence = rows[row]
            if sequence is not None:
                params = sequence.group.request.params
                if params.beam_width is not None or params.structured_outputs is not None:
                    return False
                served.add(sequence)
        num_blocks = self._num_blocks_needed(served)
        return num_blocks is not None and num_blocks <= self._pool.num_free

    def _num_blocks_needed(self, served: set[Sequence]) -> int | None:
        """Blocks that one more token of each running sequence takes; None if no sequence goes on.

        `served` are those outside the decode batch that get a token or their vector from the step in flight.
        """
        of_batch = self._queues.decode_batch.num_blocks_needed_ahead
        goes_on, num_blocks, size = of_batch is not None, of_batch or 0, self._pool.block_size
        for group in self._queues.not_in_decode_batch:
            for sequence in group.sequences:
                if sequence.in_decode_batch:
                    continue
                if sequence.num_output_tokens + (sequence in served) < group.max_results:
                    goes_on = True
                    table = sequence.table
                    num_blocks += (table.num_tokens % size == 0) * self._pool.num_groups + table.num_copies_to_come
        return num_blocks if goes_on else None

    def assume_result(self, plan: StepPlan, decode_step: DecodeStep | None) -> set[Sequence]:
        """Advance every sequence to where `plan` leaves it, its token unknown. Returns those that it ends."""
        queues = self._queues
        first = 0 if decode_step is None else len(decode_step.sequences)
        others = [
            (sequence, start + count)
            for row, start, count in zip(
                plan.rows[first:], plan.num_computed_tokens[first:], plan.num_scheduled_tokens[first:], strict=True
            )
            if (sequence := queues.rows[row]) is not None and not sequence.in_decode_batch
        ]
        for sequence, end in others:
            sequence.advance(end)
        ending = set(queues.decode_batch.append_unknown_tokens())
        for sequence in ending:
            queues.remove_from_decode_batch(sequence)
        for row in plan.sample_rows[first:]:
            other = queues.rows[row]
            if other is not None and not other.in_decode_batch and other not in ending:
                other.token_ids.append(~row)
                if other.num_output_tokens == other.group.max_results:
                    ending.add(other)
        ending |= {sequence for index in plan.pool_rows if (sequence := queues.rows[plan.rows[index]]) is not None}
        return ending
