"""PrefixIndex: which replica holds which blocks, as far as the router knows.

It learns from KV events, or guesses: a replica that was sent a prompt will hold its blocks. What it knows may be old or
wrong. A wrong entry costs time on the replica, never a wrong answer, because the replica looks for itself.

A block's holders are one integer with a bit per replica, so a prompt is compared with all replicas at once. Replicas
evict the ends of prompts first, so the holders of a block nearly always hold all blocks before it: where two blocks of
a prompt have the same holders, those between them are not looked at.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

BlockKey = int
"""The last 64 bits of a block hash, as KV events send them."""

DEVICE, HOST, DISK = range(3)
"""Where a replica holds a block: the tiers, fastest first."""


class PrefixIndex:
    """Holders of blocks in each tier; at most `max_blocks` entries per replica, the least recently used go first."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._holders: tuple[dict[BlockKey, int], ...] = ({}, {}, {})
        """For each tier: block → a bit for each replica that holds it there."""
        self._held: dict[int, OrderedDict[tuple[BlockKey, int], None]] = {}
        """Replica → its (block, tier) entries, the least recently used first."""

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
        holders, bit = self._holders[tier], 1 << replica
        for block in blocks:
            entry = (block, tier)
            if entry in held:
                held.move_to_end(entry)
            else:
                held[entry] = None
                holders[block] = holders.get(block, 0) | bit
        while len(held) > self.max_blocks:
            (block, from_tier), _ = held.popitem(last=False)
            self._drop(block, from_tier, bit)

    def remove(self, replica: int, blocks: Iterable[BlockKey], tier: int = DEVICE) -> None:
        """A replica no longer holds these blocks in a tier. Unknown ones are ignored."""
        held = self._held.get(replica)
        if held is None:
            return
        for block in blocks:
            if held.pop((block, tier), False) is None:
                self._drop(block, tier, 1 << replica)

    def clear(self, replica: int) -> None:
        """Forget a replica: it has restarted, or is gone."""
        for block, tier in self._held.pop(replica, ()):
            self._drop(block, tier, 1 << replica)

    def prefix_lengths(self, blocks: Sequence[BlockKey], tier: int | None = None) -> dict[int, int]:
        """Replica → how many of the first `blocks` it holds in `tier`, or in any; replicas that hold none are left out.

        Takes a few look-ups per different length, not one per block. A replica with gaps may seem to hold more.
        """
        lengths: dict[int, int] = {}
        if not blocks:
            return lengths
        layers = self._layers(tier)
        first = self._find(layers, blocks[0])
        if first:
            last = self._find(layers, blocks[-1])
            self._split(layers, blocks, (0, first), (len(blocks) - 1, last & first), lengths)
            for replica in _bits(last & first):
                lengths[replica] = len(blocks)
        return lengths

    def _layers(self, tier: int | None) -> tuple[dict[BlockKey, int], ...]:
        return tuple(layer for layer in self._holders if layer) if tier is None else (self._holders[tier],)

    @staticmethod
    def _find(layers: tuple[dict[BlockKey, int], ...], block: BlockKey) -> int:
        if len(layers) == 1:
            return layers[0].get(block, 0)
        found = 0
        for layer in layers:
            found |= layer.get(block, 0)
        return found

    def _split(
        self,
        layers: tuple[dict[BlockKey, int], ...],
        blocks: Sequence[BlockKey],
        low: tuple[int, int],
        high: tuple[int, int],
        lengths: dict[int, int],
    ) -> None:
        """Note the lengths of the replicas that hold block `low` and not block `high`; both are (index, holders)."""
        stack = [(low, high)]
        while stack:
            (start, before), (end, after) = stack.pop()
            lost = before & ~after
            if not lost:
                continue
            if end - start == 1:
                for replica in _bits(lost):
                    lengths[replica] = end
                continue
            middle = (start + end) // 2
            between = self._find(layers, blocks[middle]) & before | after
            stack.append(((start, before), (middle, between)))
            stack.append(((middle, between), (end, after)))

    def _drop(self, block: BlockKey, tier: int, bit: int) -> None:
        holders = self._holders[tier]
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
