"""OutputLengths: how long answers turn out to be, by the kind of request.

Requests are classed by what makes answers alike: tenant, workload (route and system prompt), and max_tokens to the next
power of two. Of a class that has not shown enough yet the tenant's answers are taken, and then everybody's. So a client
whose limits mean nothing spoils no prediction but those of its own tenant.
"""

from collections import OrderedDict

from quire.scheduler.length_curve import Answer, Ending, LengthClass
from quire.scheduler.sequence import Sequence, SequenceGroup

MAX_CLASSES = 1024
"""Classes remembered; beyond that the one that has not been asked for longest is forgotten."""


class OutputLengths:
    """Written by the scheduler as sequences start and end; whoever predicts asks a group's `length_curve`."""

    def __init__(self) -> None:
        self._classes: OrderedDict[tuple[str, ...], LengthClass] = OrderedDict()

    def enter(self, group: SequenceGroup) -> None:
        """A request came: note its classes, the closest first."""
        request = group.request
        bucket = str((request.max_tokens - 1).bit_length())
        group.length_classes = (
            self._class(("class", request.tenant, request.workload, bucket)),
            self._class(("tenant", request.tenant)),
            self._class(("all",)),
        )

    def start(self, group: SequenceGroup) -> None:
        """A group runs: its answers are seen as longer than they are so far until they end."""
        if group.beam_search is None:
            for length_class in group.length_classes:
                length_class.live.update(dict.fromkeys(group.sequences))

    def end(self, sequence: Sequence, ending: Ending) -> None:
        """A sequence has ended, whether it ever ran or not."""
        answer = Answer(sequence.num_output_tokens, ending)
        says_something = sequence.group.beam_search is None and (answer.length or ending is not Ending.GIVEN_UP)
        for length_class in sequence.group.length_classes:
            length_class.live.pop(sequence, None)
            if says_something:
                length_class.note(answer)

    def _class(self, key: tuple[str, ...]) -> LengthClass:
        known = self._classes.get(key)
        if known is None:
            self._classes[key] = known = LengthClass()
            if len(self._classes) > MAX_CLASSES:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(key)
        return known
