"""ShortestFirst: requests that are predicted to need little service go first, and nobody waits for ever.

A request i that arrives when the engine has given V(i) units of service in all, and is predicted to need s(i), has the
rank V(i) + PATIENCE s(i), once and for all; the lowest rank is admitted first. It is as if it had come later by its own
size times PATIENCE, with time measured in service.

The bound. Whoever precedes i in its priority class has V(j) + PATIENCE s(j) < V(i) + PATIENCE s(i). As s(j) > 0,
V(j) < V(i) + PATIENCE s(i): it arrived before the engine had given PATIENCE s(i) more than when i came. V only grows,
and what arrives later never precedes i, preempted or not, since ranks are fixed. And a prediction is at most what the
client asked for, so s(i) <= S(i) = prompt + 2 max_tokens, however wrong it was. Hence:

    i is admitted no later than under first come, first served it would have been, had it arrived when the engine had
    given PATIENCE S(i) more.

So long requests wait longer, in proportion to their own size, and no stream of short ones can keep them out. (Admission
blocks at the head of the queue: who follows the head is not admitted before it, but for those it waits for itself,
because they compute its prefix.)
"""

from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.service import OUTPUT_TOKEN, PROMPT_TOKEN
from quire.scheduler.step_totals import StepTotals
from quire.scheduler.waiting_queue import WaitingQueue

PATIENCE = 256.0
"""How much service to others, in multiples of its own, makes up for a request's size."""


class ShortestFirst(WaitingQueue):
    """The queue of that policy; `totals` tells how much service was given."""

    def __init__(self, totals: StepTotals) -> None:
        super().__init__()
        self._totals = totals

    def enter(self, group: SequenceGroup) -> None:
        priority, arrival_number = group.order
        given = PROMPT_TOKEN * self._totals.total_prompt_tokens + OUTPUT_TOKEN * self._totals.total_generated_tokens
        group.rank = (priority, given + PATIENCE * self.size(group), arrival_number)
        self.push(group)

    def size(self, group: SequenceGroup) -> float:
        """The service that a group is predicted to need; all it may take where nothing is known."""
        curve, limit = group.length_curve, group.request.max_tokens
        size = PROMPT_TOKEN * group.num_prompt_tokens
        for sequence in group.sequences:
            num_output = sequence.num_output_tokens
            length = limit if curve is None else curve.mean(num_output, limit)
            size += OUTPUT_TOKEN * (length - num_output)
        return size
