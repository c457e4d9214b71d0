"""QueueGate: whether a request may wait, by how many wait and whose they are.

A tenant that holds more than its equal share of the requests in flight leaves `KEPT_SHARE` of the queue free while
others ask as well. However much it sends, another tenant's request then finds a place.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from quire.engine.throughput import Throughput
from quire.errors import QueueFullError

KEPT_SHARE = 8
"""One place of so many stays free, and at least one."""
PRESENT_SECONDS = 60.0
"""A tenant is present for so long after its last request."""
MAX_TENANTS = 4096


class QueueGate:
    """Owns when each tenant asked last."""

    def __init__(self, throughput: Throughput, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `limit` requests may wait; 0: any number may."""
        self._throughput = throughput
        self._limit = limit
        self._clock = clock
        self._asked: OrderedDict[str, float] = OrderedDict()
        """Tenant → time of its last request; the latest is last."""

    def refusal(self, live: Counter[str], max_num_seqs: int, tenant: str | None) -> QueueFullError | None:
        """Why a request of `tenant` may not wait now; None: it may. `live` counts requests in flight by tenant. Where
        the tenant is not known yet, any tenant's may not."""
        if not self._limit:
            return None
        num_waiting = self._throughput.num_waiting(live.total(), max_num_seqs)
        kept = 0 if tenant is None else self._places_kept(live, tenant)
        if num_waiting < self._limit - kept:
            return None
        message = f"{num_waiting} requests are waiting, the limit is {self._limit} (max_queue_size)"
        if num_waiting < self._limit:
            message += f", and {kept} of them {'is' if kept == 1 else 'are'} kept for clients that ask less"
        return QueueFullError(message, retry_after=self._throughput.retry_after(num_waiting, self._limit - kept))

    def _places_kept(self, live: Counter[str], tenant: str) -> int:
        """The places that `tenant` may not take."""
        now = self._clock()
        self._asked[tenant] = now
        self._asked.move_to_end(tenant)
        while len(self._asked) > MAX_TENANTS or next(iter(self._asked.values())) < now - PRESENT_SECONDS:
            self._asked.popitem(last=False)
        num_present = len(self._asked)
        if self._limit < 2 or live[tenant] * num_present <= live.total():
            return 0
        return max(1, self._limit // KEPT_SHARE)
