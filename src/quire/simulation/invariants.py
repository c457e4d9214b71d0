"""Invariants of the memory that hold after every step, even a failed one. A check walks over all of the memory."""

from collections.abc import Iterable

from quire.errors import QuireError
from quire.kv_cache.block_pool import BlockPool
from quire.simulation.buddy import BuddyAllocator


class InvariantError(QuireError):
    """The pool contradicts itself. Always a bug of Quire, never the fault of a request."""


def check_pool(pool: BlockPool, *, idle: bool = False) -> None:
    """Raise `InvariantError` if the pool contradicts itself. `idle`: all requests have ended."""
    free = list(pool.free_order())
    used = [block for block in range(pool.num_blocks) if pool.ref_counts[block] > 0]
    _equal("free blocks", len(set(free)), pool.num_free)
    _equal("length of the free list", len(free), pool.num_free)
    _equal("free and used blocks", len(free) + len(used), pool.num_blocks)
    _equal("references to free blocks", sum(pool.ref_counts[block] for block in free), 0)
    _equal("sum of reference counts", sum(pool.ref_counts), pool.num_references)
    _equal("filled slots of used blocks", sum(pool.fill[block] for block in used), pool.num_filled_slots)
    _equal("free blocks with a hash", sum(1 for block in free if pool.hashes[block] is not None), pool.num_cached_free)
    for block, block_hash in enumerate(pool.hashes):
        if block_hash is not None:
            _equal(f"block that the hash of block {block} finds", pool.find(block_hash), block)
            _equal(f"fill of block {block}, which has a hash", pool.fill[block], pool.block_size)
    if idle:
        _equal("blocks in use after the last request", len(used), 0)


def check_buddy(memory: BuddyAllocator, held: Iterable[tuple[int, int]]) -> None:
    """Raise `InvariantError` unless the free and the held chunks cover every slot exactly once."""
    chunks = sorted([*memory.free_chunks(), *held])
    end = 0
    for offset, order in chunks:
        _equal("first slot of a chunk", offset, end)
        _equal("alignment of a chunk", offset % (1 << order), 0)
        end = offset + (1 << order)
    _equal("slots in chunks", end, memory.num_slots)


def _equal(what: str, found: int | None, expected: int) -> None:
    if found != expected:
        raise InvariantError(f"{what}: {found}, expected {expected}")
