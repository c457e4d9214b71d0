"""DeadlyRequests: contents of requests that servers died of, refused for a while so that they kill no more."""

from collections import OrderedDict
from collections.abc import Callable

from quire.errors import QuarantinedError

REFUSED_SECONDS = 600.0
_MAX_ENTRIES = 1024


class DeadlyRequests:
    """Bounded: the oldest entries go first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, digest: bytes) -> None:
        """Refuse requests of this content from now on."""
        self._until[digest] = self._clock() + REFUSED_SECONDS
        self._until.move_to_end(digest)
        while len(self._until) > _MAX_ENTRIES:
            self._until.popitem(last=False)

    def check(self, digest: bytes) -> None:
        """Raise `QuarantinedError` for the content of a refused request."""
        left = self._until.get(digest, 0.0) - self._clock()
        if left > 0:
            raise QuarantinedError(
                f"servers died whenever they computed a request like this one; it is refused for {left:.0f} s more"
            )
        self._until.pop(digest, None)
