"""WaitingQueue: groups without memory, in the order in which they are admitted: priority class, then arrival.

A preempted group keeps its place in that order, which puts it before everything that arrived after it. Other policies
are other queues: they give groups another `rank`, or choose among several queues (see `policies`).
"""

import heapq
from collections.abc import Iterator
from itertools import islice

from quire.scheduler.sequence import SequenceGroup

Rank = tuple[int, float, int]


class WaitingQueue:
    """A heap by `SequenceGroup.rank`. What is removed leaves its entry behind, until it surfaces or most are such."""

    counts_service = False
    """Whether `serve` is to be called."""

    def __init__(self) -> None:
        self._groups: dict[Rank, SequenceGroup] = {}
        self._heap: list[Rank] = []

    def __len__(self) -> int:
        return len(self._groups)

    def first_known(self, count: int) -> Iterator[SequenceGroup]:
        """Up to `count` of the groups, in no order: enough to judge the others by."""
        return islice(self._groups.values(), count)

    def enter(self, group: SequenceGroup) -> None:
        """A new request waits."""
        self.push(group)

    def push(self, group: SequenceGroup) -> None:
        """A group waits again, at the place it had."""
        self._groups[group.rank] = group
        heapq.heappush(self._heap, group.rank)

    def pop(self) -> SequenceGroup | None:
        """The first group, or None."""
        while self._heap:
            group = self._groups.pop(heapq.heappop(self._heap), None)
            if group is not None:
                return group
        return None

    def remove(self, group: SequenceGroup) -> None:
        """Take a group out for good, if it is in."""
        self._groups.pop(group.rank, None)
        if len(self._heap) > 2 * len(self._groups) + 64:
            # Clients that give up while the head of the queue waits must not fill the heap.
            self._heap = sorted(self._groups)

    def serve(self, tenant: str, service: float) -> None:
        """A tenant's requests were given so much, in the unit of `service`; of no concern to this policy."""
