"""Fleet: the replicas, their load and what they hold. It chooses one for each request. No I/O."""

import heapq
from collections.abc import Collection, Iterable

from quire.routing.policies import Policy, Prompt, num_new_tokens
from quire.routing.prefix_index import DEVICE, BlockKey, PrefixIndex
from quire.routing.replica import Replica, Work


class Fleet:
    """State of the router, bounded: `max_blocks` index entries per replica, one `Work` per request in flight."""

    def __init__(self, policy: Policy, *, max_blocks: int, max_requests: int = 0) -> None:
        """`max_requests` is the most that a replica is sent at once; 0: no limit."""
        self.index = PrefixIndex(max_blocks)
        self.replicas: dict[str, Replica] = {}
        self._policy = policy
        self._max_requests = max_requests
        self._free_numbers: list[int] = []

    def join(self, name: str) -> Replica:
        """Add a replica that takes requests. It begins with the mean of the others' work, so that it is not flooded."""
        number = heapq.heappop(self._free_numbers) if self._free_numbers else len(self.replicas)
        replica = Replica(number, name, max_requests=self._max_requests)
        if self.replicas:
            total = sum(other.load.total_tokens for other in self.replicas.values())
            replica.load.total_tokens = total // len(self.replicas)
        self.replicas[name] = replica
        return replica

    def leave(self, name: str) -> None:
        """Remove a replica and what is known of its blocks. Its requests in flight may still end."""
        replica = self.replicas.pop(name)
        self.index.clear(replica.number)
        heapq.heappush(self._free_numbers, replica.number)

    def choose(self, prompt: Prompt, without: Collection[str] = ()) -> Work | None:
        """Choose a replica that is not full and not in `without`, and count the request there. None if there is none.

        `end` must follow.
        """
        usable = list(self.replicas.values())
        if self._max_requests or without:
            usable = [each for each in usable if not each.is_full and each.name not in without]
        if not usable:
            return None
        replica = self._policy.choose(prompt, usable, self.index)
        work = Work(replica, num_new_tokens(prompt, replica, self.index), prompt.num_tokens)
        replica.load.begin(work)
        self.index.add(replica.number, prompt.blocks)
        return work

    def add_tokens(self, work: Work, num_tokens: int) -> None:
        """Output tokens of a request have come."""
        work.replica.load.add_tokens(work, num_tokens)

    def end(self, work: Work) -> None:
        """A request has ended, or has left the replica."""
        work.replica.load.end(work)

    def stored(self, name: str, blocks: Iterable[BlockKey], tier: int = DEVICE) -> None:
        """A replica says that it holds blocks."""
        if replica := self.replicas.get(name):
            self.index.add(replica.number, blocks, tier)

    def removed(self, name: str, blocks: Iterable[BlockKey], tier: int = DEVICE) -> None:
        """A replica says that it no longer holds blocks."""
        if replica := self.replicas.get(name):
            self.index.remove(replica.number, blocks, tier)

    def cleared(self, name: str) -> None:
        """A replica says that it holds nothing."""
        if replica := self.replicas.get(name):
            self.index.clear(replica.number)
