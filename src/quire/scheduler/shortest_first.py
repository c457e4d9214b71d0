"""ShortestFirst: requests that are expected to need little service go first, and no request waits for ever.

A request i arrives when the engine has given V(i) units of service in all, and is expected to need s(i). It gets the
rank V(i) + PATIENCE s(i), which never changes; the lowest rank is admitted first. The effect is as if it had arrived
later by PATIENCE times its own size, with time measured in service.

The bound. A request j that precedes i in its priority class has V(j) + PATIENCE s(j) < V(i) + PATIENCE s(i). As
s(j) > 0, V(j) < V(i) + PATIENCE s(i): j arrived before the engine had given PATIENCE s(i) more than at i's arrival. V
only grows, and ranks are fixed, so a later arrival never precedes i, preempted or not. The expectation is at most what
the client asked for, so s(i) <= S(i) = prompt + 2 max_tokens, however wrong it was. Hence:

    i is admitted no later than under first come, first served, had it arrived when the engine had given PATIENCE S(i)
    more.

So long requests wait longer, in proportion to their own size, and no stream of short ones can keep them out. (Admission
blocks at the head of the queue: a request behind the head is admitted before it only if the head waits for it, because
it computes the head's prefix.)
"""

from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN, PROMPT_TOKEN, Progress, total_service
from quire.scheduler.waiting_queue import WaitingQueue

PATIENCE = 256.0
"""How much service to others, in multiples of its own, makes up for a request's size."""


class ShortestFirst(WaitingQueue):
    """The waiting queue of the policy `shortest`."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def enter(self, group: SequenceGroup) -> None:
        priority, arrival_number = group.order
        group.rank = (priority, total_service(self._progress) + PATIENCE * self.size(group), arrival_number)
        self.push(group)

    def size(self, group: SequenceGroup) -> float:
        """The service that a group is expected to need; all that it may take if nothing is known."""
        curve, limit = group.length_curve, group.request.max_tokens
        size = PROMPT_TOKEN * group.num_prompt_tokens
        for sequence in group.sequences:
            num_output = sequence.num_output_tokens
            length = limit if curve is None else curve.mean(num_output, limit)
            size += OUTPUT_TOKEN * (length - num_output)
        return size
