"""Forecast: how much of the pool the running groups will need at their worst, and whether another one fits beside them.

The future peak of Past-Future scheduling (Gong et al., arXiv 2507.10150), with quantiles where that draws samples. Each
running sequence grows by a token a step until its predicted end, where it gives its blocks back; so use is highest at
one of the ends. Sorted by tokens to come r(1) <= r(2) <= ..., just before the i-th ends

    used(i) = used now + (n - i + 1) r(i) / block size - blocks of those that ended before.

A group is admitted if the peak of that with it stays within the pool. Beside admission by the memory that is free now,
it waits where all that run are young, and is preempted less; where many end soon it waits for nothing.

The quantile by which lengths are predicted is not a setting: each preemption says that it was too low and raises it,
each answer that ends lowers it a little. It is well below the middle most of the time: a preempted group loses little,
as most of what it had is still found, while memory kept free for what does not come is lost.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.sequence import SequenceGroup

FIRST_QUANTILE = 0.5
QUANTILES = (0.15, 0.95)
"""The lowest and the highest."""
RAISED_BY = 0.05
"""For a preemption."""
PREEMPTIONS = 0.4
"""Preemptions per answer at which the quantile stays where it is."""
_SEQUENCES_PER_STEP = 64
"""A group that did not fit is looked at again after one step for every so many that run: much does not change sooner,
and a step's cost stays the same however many there are."""


class Outlook(NamedTuple):
    """What is to come of one running sequence."""

    num_tokens_to_come: int
    num_blocks: int
    """It will give back, besides those it takes for these tokens."""


def peak_blocks(num_used: float, outlooks: Iterable[Outlook], block_size: int) -> float:
    """The most blocks in use at any time if `num_used` are now and nobody else comes."""
    ordered = sorted(outlooks)
    peak, num_alive = num_used, len(ordered)
    for num_tokens, num_blocks in ordered:
        used = num_used + num_alive * num_tokens / block_size
        if used > peak:
            peak = used
        num_used -= num_blocks
        num_alive -= 1
    return peak


class Forecast:
    """Owned by the scheduler, which reports preemptions and ends."""

    def __init__(self, pool: BlockPool) -> None:
        self.quantile = FIRST_QUANTILE
        self._pool = pool
        self._refused: SequenceGroup | None = None
        """Who did not fit."""
        self._num_skipped = 0
        """How many times more that is taken for granted."""

    def fits(self, group: SequenceGroup, num_needed: int, running: Sequence[SequenceGroup], promised: int) -> bool:
        """Whether the predicted peak stays within the pool with a group that needs so many blocks now.

        `promised` blocks are still to be taken by running groups for tokens that they have.
        """
        if self._refused is group and self._num_skipped:
            self._num_skipped -= 1
            return False
        peak = self.peak([*running, group], self._pool.num_used + promised + num_needed)
        fits = peak is None or peak <= self._pool.num_blocks
        self._refused, self._num_skipped = None if fits else group, len(running) // _SEQUENCES_PER_STEP
        return fits

    def peak(self, groups: Iterable[SequenceGroup], num_used: float) -> float | None:
        """The most blocks that `groups` will use, if they use `num_used` when all their tokens are computed; None while
        too little is known of answers."""
        outlooks: list[Outlook] = []
        block_size, quantile = self._pool.block_size, self.quantile
        for group in groups:
            curve, limit, num_prompt = group.length_curve, group.request.max_tokens, group.num_prompt_tokens
            if curve is None:
                return None
            num_shared = group.num_shared_blocks
            for sequence in group.sequences:
                num_tokens = len(sequence.token_ids)
                num_output = num_tokens - num_prompt
                num_to_come = curve.quantile(quantile, num_output, limit) - num_output
                outlooks.append(Outlook(num_to_come, -(-num_tokens // block_size) - num_shared))
                num_shared = num_prompt // block_size  # the others share the leader's
        return peak_blocks(num_used, outlooks, block_size)

    def note_preemption(self) -> None:
        """Too much was admitted."""
        self.quantile = min(QUANTILES[1], self.quantile + RAISED_BY)

    def note_end(self) -> None:
        """A sequence has ended."""
        self.quantile = max(QUANTILES[0], self.quantile - RAISED_BY * PREEMPTIONS)
