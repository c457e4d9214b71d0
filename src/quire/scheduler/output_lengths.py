"""OutputLengths: how long answers turn out to be, by the kind of request.

Requests are classed by what makes their answers alike: tenant, workload (route and system prompt), and max_tokens
rounded up to a power of two. While a class has too few answers, all answers of the tenant are used, and while those are
too few, the answers of all tenants. So a client whose limits mean nothing spoils only its own tenant's forecasts.
"""

from collections import OrderedDict

from quire.scheduler.length_curve import Answer, Ending, LengthClass
from quire.scheduler.sequence import Sequence, SequenceGroup

MAX_CLASSES = 1024
"""Classes kept. Beyond that, the class of the least recent request is removed."""


class OutputLengths:
    """Written by the scheduler as sequences start and end. Policies read `SequenceGroup.length_curve`."""

    def __init__(self) -> None:
        self._classes: OrderedDict[tuple[str, ...], LengthClass] = OrderedDict()

    def enter(self, group: SequenceGroup) -> None:
        """A request came: give it its classes, the closest first. A vector has no length, so it has none."""
        request = group.request
        if group.wants_vector:
            return
        bucket = str((request.max_tokens - 1).bit_length())
        group.length_classes = (
            self._class(("class", request.tenant, request.workload, bucket)),
            self._class(("tenant", request.tenant)),
            self._class(("all",)),
        )

    def start(self, group: SequenceGroup) -> None:
        """A group runs: until its answers end, they count as longer than they are so far."""
        if group.beam_search is None:
            for length_class in group.length_classes:
                length_class.running.update(dict.fromkeys(group.sequences))

    def end(self, sequence: Sequence, ending: Ending) -> None:
        """A sequence has ended, whether it ever ran or not."""
        answer = Answer(sequence.num_output_tokens, ending)
        is_informative = sequence.group.beam_search is None and (answer.length or ending is not Ending.ABORTED)
        for length_class in sequence.group.length_classes:
            length_class.running.pop(sequence, None)
            if is_informative:
                length_class.add(answer)

    def _class(self, key: tuple[str, ...]) -> LengthClass:
        found = self._classes.get(key)
        if found is None:
            self._classes[key] = found = LengthClass()
            if len(self._classes) > MAX_CLASSES:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(key)
        return found
