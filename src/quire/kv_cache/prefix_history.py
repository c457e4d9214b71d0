"""PrefixHistory: why a prompt was not in the prefix cache. It keeps hashes and times, within bounds, and no blocks."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from quire.kv_cache.block_hash import BlockHash, find_extras, hash_block, root_hash
from quire.outputs import PrefixMiss
from quire.request import InputSpan

T = TypeVar("T")

MAX_CAPACITY = 16_384
"""Most evicted blocks that are remembered, and as many beginnings of prompts."""
POOLS = 2
"""As many blocks are remembered as this number of pools has: memory does not grow long after the pool is full."""


class PrefixHistory:
    """When which block was evicted, and under which salt each prompt began."""

    def __init__(self, block_size: int, clock: Callable[[], float], num_blocks: int) -> None:
        """`num_blocks`: blocks of the pool."""
        self._clock = clock
        self._capacity = min(MAX_CAPACITY, POOLS * num_blocks)
        self._block_size = block_size
        self._evicted: OrderedDict[BlockHash, float] = OrderedDict()
        self._beginnings: OrderedDict[BlockHash, BlockHash] = OrderedDict()
        """A prompt's first block: its hash without a salt → its latest hash with one."""

    def note_eviction(self, block_hash: BlockHash) -> None:
        """A block with a hash was evicted."""
        _remember(self._evicted, block_hash, self._clock(), self._capacity)

    def seconds_since_eviction(self, block_hash: BlockHash) -> float | None:
        """How long ago a block was evicted, if that is remembered."""
        evicted_at = self._evicted.get(block_hash)
        return None if evicted_at is None else self._clock() - evicted_at

    def explain(
        self,
        token_ids: Sequence[int],
        first_missing: int,
        block_hash: BlockHash,
        *,
        adapter: str = "",
        inputs: Sequence[InputSpan] = (),
    ) -> PrefixMiss:
        """Why logical block `first_missing` of a prompt, with this hash, was not found. Notes how the prompt begins."""
        size = self._block_size
        beginning = hash_block(root_hash("", size, adapter), token_ids[:size], find_extras(inputs, 0, size))
        before = self._beginnings.get(beginning)
        if first_missing == 0:
            _remember(self._beginnings, beginning, block_hash, self._capacity)
        evicted_at = self._evicted.pop(block_hash, None)
        if evicted_at is not None:
            return PrefixMiss(first_missing, "evicted", self._clock() - evicted_at)
        if first_missing > 0:
            return PrefixMiss(first_missing, "differs", None)
        if before is not None and before != block_hash:
            return PrefixMiss(0, "salt", None)
        return PrefixMiss(0, "new", None)


def _remember(record: OrderedDict[BlockHash, T], block_hash: BlockHash, value: T, capacity: int) -> None:
    """Enter as the newest; past the capacity the oldest entry is removed."""
    record[block_hash] = value
    record.move_to_end(block_hash)
    if len(record) > capacity:
        record.popitem(last=False)
