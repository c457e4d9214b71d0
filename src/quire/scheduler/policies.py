"""The tables of policies: what `scheduling_policy` and `admission` of the config stand for.

Another order of waiting groups is a subclass of `WaitingQueue` in a file of its own, and a row here and in the config.
So is another rule of admission.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.fair_share import FairShare
from quire.scheduler.forecast import Forecast
from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import Progress
from quire.scheduler.shortest_first import ShortestFirst
from quire.scheduler.waiting_queue import WaitingQueue


class AdmissionRule(Protocol):
    """A condition for admission besides the rows and blocks that a group needs at once."""

    def fits(self, group: SequenceGroup, num_needed: int, running: Sequence[SequenceGroup], promised: int) -> bool:
        """Whether to admit a group that needs `num_needed` blocks now, beside the `running` groups.

        `promised` blocks are reserved for tokens that the running groups already have. Never called if nothing runs.
        """
        ...

    def note_preemption(self) -> None:
        """A group was preempted."""
        ...

    def note_end(self) -> None:
        """A sequence has ended, whether it ran or not."""
        ...


MakeQueue = Callable[[Progress], WaitingQueue]
MakeRule = Callable[[Forecast, BlockPool, Progress], AdmissionRule | None]

SCHEDULING_POLICIES: dict[str, MakeQueue] = {
    "fcfs": lambda progress: WaitingQueue(),
    "shortest": ShortestFirst,
    "fair": lambda progress: FairShare(),
}
ADMISSIONS: dict[str, MakeRule] = {
    "current": lambda forecast, pool, progress: None,
    "predicted": lambda forecast, pool, progress: forecast,
}
