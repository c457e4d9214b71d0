"""The tables of policies: what `scheduling_policy` and `admission` of the config stand for.

Another order of waiting groups is a subclass of `WaitingQueue` in a file of its own, and a row here and in the config;
so is another rule of admission.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.fair_share import FairShare
from quire.scheduler.forecast import Forecast
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.shortest_first import ShortestFirst
from quire.scheduler.step_totals import StepTotals
from quire.scheduler.waiting_queue import WaitingQueue


class AdmissionRule(Protocol):
    """What a group must meet besides having the rows and blocks that it needs at once."""

    def fits(self, group: SequenceGroup, num_needed: int, running: Sequence[SequenceGroup], promised: int) -> bool:
        """Whether to admit a group that needs `num_needed` blocks now beside those that run, to which blocks are
        `promised` for tokens that they have. Never asked where nothing runs."""
        ...

    def note_preemption(self) -> None:
        """A group was preempted."""
        ...

    def note_end(self) -> None:
        """A sequence has ended, whether it ran or not."""
        ...


MakeQueue = Callable[[StepTotals], WaitingQueue]
MakeRule = Callable[[Forecast, BlockPool, StepTotals], AdmissionRule | None]

SCHEDULING_POLICIES: dict[str, MakeQueue] = {
    "fcfs": lambda totals: WaitingQueue(),
    "shortest": ShortestFirst,
    "fair": lambda totals: FairShare(),
}
ADMISSIONS: dict[str, MakeRule] = {
    "current": lambda forecast, pool, totals: None,
    "predicted": lambda forecast, pool, totals: forecast,
}
