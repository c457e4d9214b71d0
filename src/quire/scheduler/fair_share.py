"""FairShare: tenants get equal shares of the service while they ask for more than there is.

Virtual token counters (Sheng et al., OSDI 2024): each tenant has a counter of the service it was given. The tenant with
the lowest counter has its request admitted next; a tenant's own requests keep their order. A tenant that had nothing
waiting and comes back starts no lower than the lowest waiting tenant: absence earns no credit. While two tenants both
have requests waiting, the service given to them differs by no more than twice the larger of two amounts, one prompt and
a full KV pool of output, however many requests either sends.

A tenant that holds more than its equal share of the rows leaves `KEPT_SHARE` of them free while others ask as well: a
request of a tenant that asks little then starts in the next step instead of waiting for the end of another. A tenant
with `HEAVY_FACTOR` times the requests of the others computes its prompts in small chunks beside them (`tenant_pace`).

Tokens that a preempted request computes again are not counted twice. Tokens from the prefix cache are not counted.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice

from quire.scheduler.sequence import SequenceGroup
from quire.scheduler.waiting_queue import WaitingQueue

MAX_TENANTS = 4096
"""Counters kept. Beyond that, the tenant served longest ago among those with nothing waiting loses its counter."""

KEPT_SHARE = 8
"""One row of so many stays free, and at least one."""
HEAVY_FACTOR = 4
"""A tenant is heavy that has so many times the requests in flight that the other tenants have on average, and was given
more service than one of them."""
HEAVY_UNTIL = 4096.0
"""A heavy tenant is heavy until it was given so much less service than one of the others: that one's counter begins
near that of the heavy tenant, so its next short prompt would be ahead."""
RECENT_SERVICE = 50_000.0
"""A tenant is present until others were given so much service since it was seen."""
_TURN = 0.5
"""Less than a token: a tenant that comes back is first among equals."""


class FairShare(WaitingQueue):
    """A queue per tenant and priority class, and a counter per tenant."""

    counts_service = True

    def __init__(self) -> None:
        super().__init__()
        self._queues: dict[tuple[int, str], WaitingQueue] = {}
        """(priority, tenant) → its queue, which is never empty."""
        self._counters: OrderedDict[str, float] = OrderedDict()
        self._total_service = 0.0
        self._seen_at: dict[str, float] = {}
        """Tenant with a counter → the total service when it last asked for or was given some."""
        self._last_served = 0.0
        """The counter of the tenant whose request left the queue last."""
        self._heavy: frozenset[str] = frozenset()
        """The tenants that were heavy when it was asked last."""
        self._num_groups = 0

    def __len__(self) -> int:
        return self._num_groups

    def peek(self, count: int) -> Iterator[SequenceGroup]:
        return islice(chain.from_iterable(queue.peek(count) for queue in self._queues.values()), count)

    def enter(self, group: SequenceGroup) -> None:
        tenant, counters = group.request.tenant, self._counters
        waiting = {other for _, other in self._queues}
        if tenant not in waiting:
            floor = min(counters.get(other, 0.0) for other in waiting) if waiting else self._last_served
            self._set_counter(tenant, max(counters.get(tenant, 0.0), floor - _TURN))
        self.push(group)

    def push(self, group: SequenceGroup) -> None:
        key = (group.order[0], group.request.tenant)
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = queue = WaitingQueue()
        queue.push(group)
        self._num_groups += 1

    def pop(self, passed_over: Collection[str] = ()) -> SequenceGroup | None:
        keys = [key for key in self._queues if key[1] not in passed_over] if passed_over else self._queues
        if not keys:
            return None
        counters = self._counters
        key = min(keys, key=lambda key: (key[0], counters.get(key[1], 0.0)))
        group = self._queues[key].pop()
        assert group is not None
        self._num_groups -= 1
        self._delete_if_empty(key)
        self._last_served = counters.get(key[1], 0.0)
        return group

    def remove(self, group: SequenceGroup) -> None:
        key = (group.order[0], group.request.tenant)
        queue = self._queues.get(key)
        if queue is not None:
            self._num_groups -= len(queue)
            queue.remove(group)
            self._num_groups += len(queue)
            self._delete_if_empty(key)

    def rows_kept(self, group: SequenceGroup, running: Sequence[SequenceGroup], num_rows: int) -> int:
        tenant = group.request.tenant
        num_others = sum(1 for _ in self._others_present(tenant))
        if not num_others:
            return 0
        held = sum(other.num_rows for other in running if other.request.tenant == tenant)
        if not held or held + group.num_rows <= num_rows // (1 + num_others):
            return 0
        return max(1, num_rows // KEPT_SHARE)

    def heavy_tenants(self, running: Sequence[SequenceGroup]) -> frozenset[str]:
        self._heavy = self._find_heavy(running) if len(self._counters) > 1 else frozenset()
        return self._heavy

    def _find_heavy(self, running: Sequence[SequenceGroup]) -> frozenset[str]:
        counts = Counter(group.request.tenant for group in running)
        for (_, tenant), queue in self._queues.items():
            counts[tenant] += len(queue)
        num_requests = counts.total()
        return frozenset(
            tenant for tenant, count in counts.items() if self._is_heavy(tenant, count, num_requests - count)
        )

    def _is_heavy(self, tenant: str, count: int, num_others: int) -> bool:
        """Whether a tenant with `count` requests in flight, beside `num_others` of others, is heavy."""
        if count < HEAVY_FACTOR:
            return False
        served = [self._counters.get(other, 0.0) for other in self._others_present(tenant)]
        ahead = HEAVY_UNTIL if tenant in self._heavy else 0.0
        if not served or self._counters.get(tenant, 0.0) + ahead <= min(served):
            return False
        return count >= HEAVY_FACTOR * max(1.0, num_others / len(served))

    def _others_present(self, tenant: str) -> Iterator[str]:
        """The other tenants that were seen lately."""
        for other in reversed(self._counters):  # the one seen last comes first
            if self._seen_at[other] < self._total_service - RECENT_SERVICE:
                return
            if other != tenant:
                yield other

    def serve(self, tenant: str, service: float) -> None:
        self._total_service += service
        self._set_counter(tenant, self._counters.get(tenant, 0.0) + service)

    def _set_counter(self, tenant: str, service: float) -> None:
        self._counters[tenant] = service
        self._counters.move_to_end(tenant)
        self._seen_at[tenant] = self._total_service
        if len(self._counters) > MAX_TENANTS:
            waiting = {other for _, other in self._queues}
            idle = next((other for other in self._counters if other not in waiting and other != tenant), None)
            if idle is not None:
                del self._counters[idle], self._seen_at[idle]

    def _delete_if_empty(self, key: tuple[int, str]) -> None:
        if not len(self._queues[key]):
            del self._queues[key]
