"""Oracles: what one cache for all replicas would find of each prompt, to compare the hits of a router with."""

from collections import OrderedDict
from collections.abc import Sequence


class ForgetsNothing:
    """A cache without a limit."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def find(self, blocks: Sequence[int], num_output_blocks: int) -> int:
        """Blocks at the beginning of a prompt that were seen before; the others are kept from now on."""
        seen = self._seen
        for index, block in enumerate(blocks):
            if block not in seen:
                seen.update(blocks[index:])
                return index
        return len(blocks)


class EqualCapacity:
    """A cache as large as those of all replicas together, which evicts what was used longest ago, as an engine does.

    No router of replicas can be expected to find more: each block is there once, and no replica is fuller than another.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._held: OrderedDict[int, None] = OrderedDict()
        """From the block that is evicted next."""
        self._num_outputs = 0

    def find(self, blocks: Sequence[int], num_output_blocks: int) -> int:
        """Blocks at the beginning of a prompt that are held. All of them are used now, and the output's blocks come."""
        held = self._held
        found = next((index for index, block in enumerate(blocks) if block not in held), len(blocks))
        for block in reversed(blocks):  # the end of a prompt is evicted before its beginning
            held[block] = None
            held.move_to_end(block)
        for _ in range(num_output_blocks):
            self._num_outputs += 1
            held[-self._num_outputs] = None
        while len(held) > self._num_blocks:
            held.popitem(last=False)
        return found
