"""WaitingQueue: groups without memory, in the order in which they are admitted: priority class, then arrival.

A preempted group keeps its place in that order, which puts it before everything that arrived after it.
"""

import heapq

from quire.scheduler.sequence import SequenceGroup

Order = tuple[int, int]


class WaitingQueue:
    """A heap by `SequenceGroup.order`. What is removed leaves its entry behind, until it surfaces or most are such."""

    def __init__(self) -> None:
        self._groups: dict[Order, SequenceGroup] = {}
        self._heap: list[Order] = []

    def __len__(self) -> int:
        return len(self._groups)

    def push(self, group: SequenceGroup) -> None:
        self._groups[group.order] = group
        heapq.heappush(self._heap, group.order)

    def pop(self) -> SequenceGroup | None:
        """The first group, or None."""
        while self._heap:
            group = self._groups.pop(heapq.heappop(self._heap), None)
            if group is not None:
                return group
        return None

    def remove(self, group: SequenceGroup) -> None:
        """Take a group out for good, if it is in."""
        self._groups.pop(group.order, None)
        if len(self._heap) > 2 * len(self._groups) + 64:
            # Clients that give up while the head of the queue waits must not fill the heap.
            self._heap = sorted(self._groups)
