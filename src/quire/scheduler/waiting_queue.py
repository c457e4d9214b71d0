"""WaitingQueue: groups without memory, in the order of admission: priority class, then arrival.

A preempted group keeps its place in that order, ahead of everything that arrived after it. Other policies are other
queues: they give groups another `rank`, or choose among several queues (see `policies`).
"""

import heapq
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from quire.scheduler.sequence import SequenceGroup

Rank = tuple[int, float, int]


class WaitingQueue:
    """A heap by `SequenceGroup.rank`. Entries of removed groups stay in it until they surface or are the majority."""

    counts_service = False
    """Whether the policy wants `serve` to be called."""

    def __init__(self) -> None:
        self._groups: dict[Rank, SequenceGroup] = {}
        self._heap: list[Rank] = []

    def __len__(self) -> int:
        return len(self._groups)

    def peek(self, count: int) -> Iterator[SequenceGroup]:
        """Up to `count` of the groups, in no order: enough to estimate the others by."""
        return islice(self._groups.values(), count)

    def enter(self, group: SequenceGroup) -> None:
        """Add a new request."""
        self.push(group)

    def push(self, group: SequenceGroup) -> None:
        """Add a group that was in the queue before, at its old place."""
        self._groups[group.rank] = group
        heapq.heappush(self._heap, group.rank)

    def pop(self, passed_over: Collection[str] = ()) -> SequenceGroup | None:
        """Remove and return the first group, or None. Policies that know tenants leave those in `passed_over` out."""
        while self._heap:
            group = self._groups.pop(heapq.heappop(self._heap), None)
            if group is not None:
                return group
        return None

    def remove(self, group: SequenceGroup) -> None:
        """Remove a group for good, if it is in the queue."""
        self._groups.pop(group.rank, None)
        if len(self._heap) > 2 * len(self._groups) + 64:
            # Clients that leave while the head of the queue waits must not fill the heap.
            self._heap = sorted(self._groups)

    def rows_kept(self, group: SequenceGroup, running: Sequence[SequenceGroup], num_rows: int) -> int:
        """Rows, of `num_rows` in all, that must stay free if the group starts beside the `running` ones."""
        return 0

    def heavy_tenants(self, running: Sequence[SequenceGroup]) -> frozenset[str]:
        """Tenants that ask so much, beside the `running` groups, that their prompts stand back behind others'."""
        return frozenset()

    def serve(self, tenant: str, service: float) -> None:
        """A tenant's requests were given so much service. This policy ignores it."""
