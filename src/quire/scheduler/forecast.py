"""Forecast: how much of the pool the running groups will need at their peak, and whether another one fits beside them.

The future peak of Past-Future scheduling (Gong et al., arXiv 2507.10150), with quantiles instead of random samples.
Each running sequence grows by a token a step until its expected end, where it gives its blocks back. So use is highest
at one of the ends. Sorted by tokens to come r(1) <= r(2) <= ..., just before the i-th ends

    used(i) = used now + (n - i + 1) r(i) / block size - blocks of those that ended before.

A token takes a slot in each KV group of full attention. A window group grows up to its window only; what it will still
take counts as used now.

A group is admitted if the peak with it stays within the pool. Compared with admission by the memory that is free now,
it waits if all running sequences are young, so fewer are preempted; if many end soon it need not wait.

The quantile of the expected lengths is not a setting. Each preemption shows that it was too low and raises it, and each
answer that ends lowers it a little. Most of the time it is well below the median: a preempted group loses little, since
most of what it had is still found, while memory that is kept free for tokens that never come is lost.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.sequence import SequenceGroup

FIRST_QUANTILE = 0.5
QUANTILES = (0.15, 0.95)
"""The lowest and the highest."""
RAISED_BY = 0.05
"""How much a preemption raises the quantile."""
PREEMPTIONS = 0.4
"""Preemptions per answer at which the quantile stays where it is."""
_SEQUENCES_PER_STEP = 64
"""A group that did not fit is checked again after one step for every so many running sequences. Little changes sooner,
and the cost of a step stays the same however many run."""


class Outlook(NamedTuple):
    """What is to come of one running sequence."""

    num_tokens_to_come: int
    num_blocks: int
    """Blocks that it will give back, besides those for the tokens to come."""


def peak_blocks(num_used: float, outlooks: Iterable[Outlook], block_size: int, num_groups: int = 1) -> float:
    """The most blocks in use at any time, if `num_used` are used now and no other sequence starts.

    A token takes a slot in each of `num_groups` KV groups.
    """
    ordered = sorted(outlooks)
    peak, num_running = num_used, len(ordered)
    for num_tokens, num_blocks in ordered:
        used = num_used + num_running * num_tokens * num_groups / block_size
        if used > peak:
            peak = used
        num_used -= num_blocks
        num_running -= 1
    return peak


class Forecast:
    """Owned by the scheduler, which reports preemptions and ends to it. The rule of the admission `predicted`."""

    def __init__(self, pool: BlockPool) -> None:
        self.quantile = FIRST_QUANTILE
        self._pool = pool
        self._refused: SequenceGroup | None = None
        """The group that did not fit."""
        self._num_skipped = 0
        """For how many more calls it is refused without a check."""

    def fits(self, group: SequenceGroup, num_needed: int, running: Sequence[SequenceGroup], promised: int) -> bool:
        """Whether the expected peak stays within the pool with a group that needs `num_needed` blocks now.

        Running groups will still take `promised` blocks for tokens that they already have.
        """
        if self._refused is group and self._num_skipped:
            self._num_skipped -= 1
            return False
        peak = self.peak([*running, group], self._pool.num_used + promised + num_needed)
        fits = peak is None or peak <= self._pool.num_blocks
        self._refused, self._num_skipped = None if fits else group, len(running) // _SEQUENCES_PER_STEP
        return fits

    def peak(self, groups: Iterable[SequenceGroup], num_used: float) -> float | None:
        """The most blocks that `groups` will use, if they use `num_used` once all their tokens are computed.

        None while too little is known of the lengths of answers.
        """
        outlooks: list[Outlook] = []
        pool, quantile = self._pool, self.quantile
        num_full = pool.windows.count(0)
        for group in groups:
            curve, limit, num_prompt = group.length_curve, group.request.max_tokens, group.num_prompt_tokens
            if curve is None:
                return None
            num_shared = group.num_shared_blocks
            for sequence in group.sequences:
                num_tokens = len(sequence.token_ids)
                num_output = num_tokens - num_prompt
                num_to_come = curve.quantile(quantile, num_output, limit) - num_output
                num_blocks = pool.most_blocks(num_tokens) - num_shared
                if num_full < pool.num_groups:
                    growth = pool.window_blocks(num_tokens + num_to_come) - pool.window_blocks(num_tokens)
                    num_used, num_blocks = num_used + growth, num_blocks + growth
                outlooks.append(Outlook(num_to_come, num_blocks))
                num_shared = pool.most_blocks(num_prompt // pool.block_size * pool.block_size)  # the leader's
        return peak_blocks(num_used, outlooks, pool.block_size, num_full)

    def note_preemption(self) -> None:
        """Too much was admitted."""
        self.quantile = min(QUANTILES[1], self.quantile + RAISED_BY)

    def note_end(self) -> None:
        """A sequence has ended."""
        self.quantile = max(QUANTILES[0], self.quantile - RAISED_BY * PREEMPTIONS)
