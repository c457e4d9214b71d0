"""PoolWords: a word per block (see `pool_view`), compared with what was sent before. Imported when somebody looks."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quire import pool_view
from quire.kv_cache.block_pool import BlockPool
from quire.scheduler.sequence import SequenceGroup

Words = NDArray[np.uint64]


class PoolWords:
    """The words of a pool as they were last seen; before that, all 0."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._seen: Words = np.zeros(pool.num_blocks, np.uint64)

    def compare(self, groups: Sequence[SequenceGroup], slots: Mapping[str, int]) -> tuple[bytes, bytes]:
        """Blocks whose word is another than at the last call, as uint32, and their words, as uint64."""
        words = block_words(self._pool, groups, slots)
        changed = np.flatnonzero(words != self._seen)
        self._seen = words
        return changed.astype(np.uint32).tobytes(), words[changed].tobytes()


def block_words(pool: BlockPool, groups: Sequence[SequenceGroup], slots: Mapping[str, int]) -> Words:
    """The word of every block [num_blocks]. `slots` has the owner's number of each request; others are `OTHERS`."""
    owners = np.zeros(pool.num_blocks, np.uint64)
    for group in reversed(groups):  # the first holder is written last
        slot = slots.get(group.request.request_id, pool_view.OTHERS)
        for sequence in group.sequences:
            held = sequence.table.held_blocks
            if held:
                owners[np.fromiter(held, np.int64, len(held))] = slot
    words = owners
    words |= _small_numbers(pool.ref_counts, 2**pool_view.REFS_BITS - 1) << np.uint64(pool_view.REFS_AT)
    words |= _small_numbers(pool.fill, 2**pool_view.FILL_BITS - 1) << np.uint64(pool_view.FILL_AT)
    cached = np.frombuffer(bytes(map(bool, pool.hashes)), np.uint8).astype(np.uint64)
    cached[np.fromiter(pool.children, np.int64, len(pool.children))] = pool_view.CACHED
    if pool.pinned:
        cached[list(pool.pinned)] |= np.uint64(pool_view.PINNED)
    words |= cached << np.uint64(pool_view.FLAGS_AT)
    if pool.num_groups > 1:
        words |= np.frombuffer(bytes(pool.group_of), np.uint8).astype(np.uint64) << np.uint64(pool_view.GROUP_AT)
    return words


def _small_numbers(numbers: list[int], most: int) -> Words:
    """`numbers` up to `most`. Python makes bytes of them several times faster than numpy an array."""
    try:
        return np.frombuffer(bytes(numbers), np.uint8).astype(np.uint64)
    except ValueError:
        return np.minimum(np.fromiter(numbers, np.int64, len(numbers)), most).astype(np.uint64)
