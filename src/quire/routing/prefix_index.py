"""PrefixIndex: which replica holds which blocks, as far as the router knows.

It learns from KV events, or guesses: a replica that was sent a prompt will hold its blocks. What it knows may be old or
wrong. A wrong entry costs time on the replica, never a wrong answer, because the replica looks for itself.

A block's holders are one integer with a bit per replica, so a prompt is compared with all replicas at once. Replicas
evict the ends of prompts first, so the holders of a block nearly always hold all blocks before it: how much of a prompt
a replica holds is found by bisection.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

BlockKey = int
"""The last 64 bits of a block hash, as KV events send them."""

DEVICE, HOST, DISK = range(3)
"""Where a replica holds a block: the tiers, fastest first."""

ANY_REPLICA = -1
"""The bits of all replicas."""
_TIER_BITS = 64
"""An entry is block + tier << 64, a plain integer: tuples would keep the garbage collector busy."""


class PrefixIndex:
    """Holders of blocks in each tier; at most `max_blocks` entries per replica, the least recently used go first."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._holders: tuple[dict[BlockKey, int], ...] = ({}, {}, {})
        """For each tier: block → a bit for each replica that holds it there."""
        self._held: dict[int, OrderedDict[int, None]] = {}
        """Replica → its entries, the least recently used first."""

    @property
    def has_lower_tiers(self) -> bool:
        """Whether any replica holds blocks below its device."""
        return bool(self._holders[HOST] or self._holders[DISK])

    def num_blocks(self, replica: int) -> int:
        """Entries of a replica."""
        return len(self._held.get(replica, ()))

    def add(self, replica: int, blocks: Iterable[BlockKey], tier: int = DEVICE) -> None:
        """A replica holds these blocks, or will soon. They are now its most recently used."""
        held = self._held.setdefault(replica, OrderedDict())
        holders, bit, offset = self._holders[tier], 1 << replica, tier << _TIER_BITS
        use_again = held.move_to_end
        for block in blocks:
            entry = block + offset if offset else block
            if entry in held:
                use_again(entry)
            else:
                held[entry] = None
                holders[block] = holders.get(block, 0) | bit
        while len(held) > self.max_blocks:
            entry, _ = held.popitem(last=False)
            self._drop(entry, bit)

    def remove(self, replica: int, blocks: Iterable[BlockKey], tier: int = DEVICE) -> None:
        """A replica no longer holds these blocks in a tier. Unknown ones are ignored."""
        held = self._held.get(replica)
        if held is None:
            return
        for block in blocks:
            entry = block + (tier << _TIER_BITS)
            if held.pop(entry, False) is None:
                self._drop(entry, 1 << replica)

    def clear(self, replica: int) -> None:
        """Forget a replica: it has restarted, or is gone."""
        for entry in self._held.pop(replica, ()):
            self._drop(entry, 1 << replica)

    def prefix_lengths(self, blocks: Sequence[BlockKey], tier: int | None = None) -> dict[int, int]:
        """Replica → how many of the first `blocks` it holds in `tier`, or in any; replicas that hold none are left out.

        Takes a few look-ups per different length, not one per block. A replica with gaps may seem to hold more.
        """
        if not blocks:
            return {}
        find = self.finder(tier)
        first, end = find(blocks[0]) or 0, len(blocks)
        last = (find(blocks[-1]) or 0) & first
        lengths = dict.fromkeys(_bits(last), end)
        # Spans of blocks: the index of a block and its holders, and of a later one and its holders. A replica that
        # holds the first and not the second holds a length in between.
        spans = [(0, first, end - 1, last)]
        while spans:
            low, before, high, after = spans.pop()
            while before != after:
                if high - low == 1:
                    for replica in _bits(before ^ after):
                        lengths[replica] = high
                    break
                middle = (low + high) >> 1
                between = (find(blocks[middle]) or 0) & before | after
                if between != before:
                    spans.append((low, before, middle, between))
                low, before = middle, between
        return lengths

    def prefix_length(
        self,
        replicas: int,
        blocks: Sequence[BlockKey],
        tier: int | None = None,
        *,
        least: int = 0,
        most: int | None = None,
    ) -> int:
        """How many of the first `blocks` any of `replicas`, a bit for each, holds in `tier`, or in any tier.

        The answer is known to be from `least` to `most`. Takes one look-up per halving of that range.
        """
        find, low, high = self.finder(tier), least, len(blocks) if most is None else most
        while low < high:
            middle = (low + high) >> 1
            if (find(blocks[middle]) or 0) & replicas:
                low = middle + 1
            else:
                high = middle
        return low

    def finder(self, tier: int | None = None) -> Callable[[BlockKey], int | None]:
        """The function from a block to its holders in a tier, or in any: a bit for each, or None."""
        layers = [layer for layer in self._holders if layer] if tier is None else [self._holders[tier]]
        if len(layers) == 1:
            return layers[0].get

        def find(block: BlockKey) -> int:
            found = 0
            for layer in layers:
                found |= layer.get(block, 0)
            return found

        return find

    def _drop(self, entry: int, bit: int) -> None:
        tier = entry >> _TIER_BITS
        holders, block = self._holders[tier], entry - (tier << _TIER_BITS)
        left = holders.get(block, 0) & ~bit
        if left:
            holders[block] = left
        else:
            holders.pop(block, None)


def _bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
