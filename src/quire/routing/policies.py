"""Policies: which replica gets a request. Pure: the router and the cluster simulation run the same code.

`LeastWork` is Quire's own. The others are what clusters run without it, to compare with.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop
from typing import Protocol

from quire.routing.prefix_index import ANY_REPLICA, DEVICE, BlockKey, PrefixIndex
from quire.routing.replica import Replica


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as policies see it."""

    blocks: Sequence[BlockKey]
    """Its full blocks; empty if they are unknown."""
    num_tokens: int
    block_size: int
    session: str = ""
    """A name of the conversation, equal for all its turns; empty if it has none."""
    content: bytes = b""
    """Equal for requests of the same tokens and parameters, whatever their seed; empty if it is unknown."""


class Policy(Protocol):
    """Chooses among the replicas that take requests. There is at least one."""

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica: ...


def num_new_tokens(prompt: Prompt, replica: Replica, index: PrefixIndex) -> int:
    """Tokens of the prompt that a replica probably has to compute: one at least, the last."""
    num_held = index.prefix_length(1 << replica.number, prompt.blocks)
    return max(1, prompt.num_tokens - num_held * prompt.block_size)


@dataclass(slots=True)
class LeastWork:
    """Sends a request to where its first token comes earliest and it delays others least.

    The cost of a replica is in tokens to compute: the prompt tokens that it lacks, the tokens that wait there, and a
    share of the tokens that its running requests read at each step. A prompt token delays this request and all that
    come while it waits; a token ahead delays this request alone. So what is in hand at a replica is divided by one more
    than the requests that wait at a replica on average: in a long queue blocks count more than a short wait. A token in
    host memory or on disk costs a part of computing it. Replicas that hold nothing of the prompt differ by load alone,
    so without knowledge this is least load. Costs within `slack` of the prompt are equal; then the replica with the
    least work so far comes first. That spreads new conversations, and their later turns follow them.
    """

    lower_tier_cost: float = 0.25
    """Cost of loading a token from a lower tier, where computing one costs 1."""
    context_cost: float = 0.02
    """Cost of a token that a running request holds."""
    slack: float = 0.05
    most_ahead: float = 1.15
    """The work of a replica beyond this many times the mean, and a share of the prompt, adds to its cost. So no replica
    stays far ahead."""
    free_share: float = 0.1
    """That share. Where there are fewer conversations than replicas, it lets each stay where its blocks are."""

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica:
        loads = [replica.load for replica in replicas]
        totals = [load.total_tokens for load in loads]
        context_cost, num_delayed = self.context_cost, 1 + sum([load.num_waiting for load in loads]) / len(loads)
        costs = [(load.queued_tokens + context_cost * load.context_tokens) / num_delayed for load in loads]
        most = self.most_ahead * sum(totals) / len(totals) + self.free_share * prompt.num_tokens
        if max(totals) > most:
            for place, total in enumerate(totals):
                if total > most:
                    costs[place] += total - most
        limit = self.slack * prompt.num_tokens
        holders = index.finder()(prompt.blocks[0]) if prompt.blocks else None
        if not holders:
            limit += min(costs)
            return replicas[min([(totals[place], place) for place, cost in enumerate(costs) if cost <= limit])[1]]
        savings = _Savings(prompt, replicas, costs, index, holders, 1 - self.lower_tier_cost)
        limit += savings.least_cost()
        near = [(totals[place], place) for place, cost in enumerate(costs) if cost <= limit]
        near += [(totals[place], place) for place in savings.holders if limit < costs[place] <= limit + savings.most]
        heapify(near)  # mostly the first will do, so sorting all would be wasted
        best = near[0][1]
        while near:
            _, place = heappop(near)
            if costs[place] <= limit or savings.bring_below(limit, place):
                return replicas[place]
        # A replica has lost blocks in the middle of the prompt: none is as good as it seemed.
        return replicas[best]


class _Savings:
    """What replicas save of a prompt, looked up only where it decides.

    A replica that holds `held` blocks of the prompt in any tier and `fast` of them on its device saves `fast` blocks
    and a share of the rest. Whether it saves enough to matter is one look-up: does it hold the block at that place? The
    exact length takes one look-up per halving of the prompt, and only replicas that seem to be best need it.
    """

    def __init__(
        self,
        prompt: Prompt,
        replicas: Sequence[Replica],
        costs: Sequence[float],
        index: PrefixIndex,
        holders: int,
        lower_tier_share: float,
    ) -> None:
        """`costs` has one for each replica, without savings; `holders` a bit for each that holds the first block."""
        self._blocks, self._size = prompt.blocks, prompt.block_size
        self._costs = costs
        self._bits = [1 << replica.number for replica in replicas]
        self.holders = [place for place, bit in enumerate(self._bits) if holders & bit]
        """Places of the replicas that save anything."""
        self._index, self._find = index, index.finder()
        self._has_lower_tiers = index.has_lower_tiers
        self._find_fast = index.finder(DEVICE) if self._has_lower_tiers else self._find
        self._lower_tier_share = lower_tier_share
        self._longest = index.prefix_length(ANY_REPLICA, self._blocks)
        """Most blocks that any replica holds."""
        self.most = self._longest * self._size
        """The most tokens that any replica saves."""

    def least_cost(self) -> float:
        """The least cost of all replicas when each has its savings taken off."""
        costs, bits, size, most = self._costs, self._bits, self._size, self.most
        find, blocks, least = self._find, self._blocks, min(costs)
        if not self._has_lower_tiers:  # one that holds the longest prefix is a good first guess
            last = find(blocks[self._longest - 1]) or 0
            firsts = [costs[place] for place in self.holders if last & bits[place]]
            least = min(least, min(firsts, default=math.inf) - most)
        rivals = [(costs[place], place) for place in self.holders if costs[place] - least < most]
        heapify(rivals)
        able = sum([bits[place] for _, place in rivals])
        while able:
            cost, place = heappop(rivals)
            bit, gap = bits[place], cost - least
            if not able & bit:
                continue
            # To cost less than the least so far it must save more than the gap, and the next ones more than that. So a
            # replica without this block is out.
            needed = int(gap / size) if gap > 0 else 0
            able &= (find(blocks[needed]) or 0) if needed < self._longest else 0
            if able & bit:
                able ^= bit
                least = min(least, cost - self._saved(bit, needed + 1))
        return least

    def bring_below(self, limit: float, place: int) -> bool:
        """Whether a replica that costs more than `limit` without savings costs at most that with them."""
        cost, bit = self._costs[place], self._bits[place]
        needed = math.ceil((cost - limit) / self._size)
        if needed > self._longest:
            return False
        block = self._blocks[needed - 1]
        if (self._find_fast(block) or 0) & bit:
            return True
        if not (self._has_lower_tiers and (self._find(block) or 0) & bit):
            return False
        return cost - self._saved(bit, needed) <= limit

    def _saved(self, bit: int, least: int) -> float:
        """Tokens that a replica saves, given as its bit; it holds at least `least` blocks."""
        length = self._index.prefix_length
        held = length(bit, self._blocks, least=least, most=self._longest)
        if not self._has_lower_tiers:
            return float(held * self._size)
        fast = length(bit, self._blocks, DEVICE, most=held)
        return self._size * (fast + self._lower_tier_share * (held - fast))


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica:
        self._next += 1
        return replicas[self._next % len(replicas)]


class LeastLoad:
    """The replica with the fewest requests, then the least work so far."""

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica:
        return min(replicas, key=lambda replica: (replica.load.num_requests, replica.load.total_tokens))


class Sticky:
    """The same replica for all turns of a session, by rendezvous hashing: a replica that leaves moves only its own
    sessions. A prompt without a session is its own."""

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica:
        name = prompt.session or str(prompt.blocks[:1])
        return max(
            replicas,
            key=lambda replica: hashlib.blake2b(f"{replica.name}\0{name}".encode(), digest_size=8).digest(),
        )


@dataclass(slots=True)
class LongestPrefix:
    """The replica that holds most of the prompt, if that is `match_rate` of it and the replicas are balanced, else
    least load: what routers with prefix trees do."""

    match_rate: float = 0.1
    imbalance: int = 32
    """Difference in requests at which load comes before prefixes."""

    def choose(self, prompt: Prompt, replicas: Sequence[Replica], index: PrefixIndex) -> Replica:
        counts = [replica.load.num_requests for replica in replicas]
        if max(counts) - min(counts) <= self.imbalance:
            held = index.prefix_lengths(prompt.blocks)
            best = max(replicas, key=lambda replica: (held.get(replica.number, 0), -replica.load.num_requests))
            if held.get(best.number, 0) >= max(1.0, self.match_rate * len(prompt.blocks)):
                return best
        return LeastLoad().choose(prompt, replicas, index)


POLICIES: dict[str, Callable[[], Policy]] = {
    "least-work": LeastWork,
    "round-robin": RoundRobin,
    "least-load": LeastLoad,
    "sticky": Sticky,
    "longest-prefix": LongestPrefix,
}
"""Name → policy."""
