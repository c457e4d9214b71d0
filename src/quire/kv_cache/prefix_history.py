"""PrefixHistory: why a prompt was not in the prefix cache. Names and times, within bounds; no memory depends on it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from quire.kv_cache.block_hash import BlockHash, hash_block, root_hash
from quire.outputs import PrefixMiss

T = TypeVar("T")

CAPACITY = 16_384
"""Evicted blocks remembered, and as many beginnings of prompts."""


class PrefixHistory:
    """What was evicted when, and under which salts prompts began."""

    def __init__(self, block_size: int, clock: Callable[[], float], *, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._capacity = capacity
        self._block_size = block_size
        self._common_root = root_hash("", block_size)
        self._evicted: OrderedDict[BlockHash, float] = OrderedDict()
        self._beginnings: OrderedDict[BlockHash, BlockHash] = OrderedDict()
        """First block of a prompt as it would be named without salt → its name with it, the latest."""

    def note_eviction(self, name: BlockHash) -> None:
        """A named block's space was taken."""
        _remember(self._evicted, name, self._clock(), self._capacity)

    def explain(self, token_ids: Sequence[int], first_missing: int, name: BlockHash) -> PrefixMiss:
        """Why logical block `first_missing` of a prompt, of this name, was not found; notes how the prompt begins."""
        beginning = hash_block(self._common_root, token_ids[: self._block_size])
        before = self._beginnings.get(beginning)
        if first_missing == 0:
            _remember(self._beginnings, beginning, name, self._capacity)
        evicted_at = self._evicted.pop(name, None)
        if evicted_at is not None:
            return PrefixMiss(first_missing, "evicted", self._clock() - evicted_at)
        if first_missing > 0:
            return PrefixMiss(first_missing, "differs", None)
        if before is not None and before != name:
            return PrefixMiss(0, "salt", None)
        return PrefixMiss(0, "new", None)


def _remember(record: OrderedDict[BlockHash, T], name: BlockHash, value: T, capacity: int) -> None:
    """Enter as the newest; past the capacity the oldest is forgotten."""
    record[name] = value
    record.move_to_end(name)
    if len(record) > capacity:
        record.popitem(last=False)
