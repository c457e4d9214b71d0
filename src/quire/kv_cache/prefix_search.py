"""longest_prefix: how much of a prompt is cached, where layers need different parts of it.

After a hit of n blocks the next token attends to all of them in a group of full attention, but in a window group only
to the last few. So a hit needs all blocks of the former and the last blocks of the latter. Every group can only shorten
the hit; it is found when no group does.
"""

from collections.abc import Callable

from quire.kv_cache.block_hash import BlockHash
from quire.kv_cache.block_pool import BlockPool

Stored = tuple[str, BlockHash]
"""A block in a tier: the tier's name and the block's hash."""
Source = int | Stored
"""Where a KV group's block is: a block of the pool, or one in a tier."""

Find = Callable[[int, int], Source | None]
"""Where a KV group's logical block can be had from; None: nowhere. Called as find(group, index)."""


def longest_prefix(pool: BlockPool, limit: int, find: Find) -> list[list[Source | None]]:
    """What `find` returned for each logical block of the longest hit, up to `limit` blocks, for each KV group.

    None stands for a block of a window group that the hit does not need. All lists have the same length.
    """
    found: list[dict[int, Source]] = [{} for _ in pool.windows]
    windowed = [group for group, window in enumerate(pool.windows) if window]
    end = limit
    for group, window in enumerate(pool.windows):
        if not window:
            end = _leading(end, group, find, found[group])
    while windowed:
        before = end
        for group in windowed:
            end = _last(pool, end, group, find, found[group])
        if end == before or len(windowed) == 1:
            break
    return [[blocks.get(index) for index in range(end)] for blocks in _without_unneeded(pool, found, end)]


def _leading(limit: int, group: int, find: Find, found: dict[int, Source]) -> int:
    """The number of leading blocks that a group of full attention has, up to `limit`."""
    for index in range(limit):
        block = find(group, index)
        if block is None:
            return index
        found[index] = block
    return limit


def _last(pool: BlockPool, limit: int, group: int, find: Find, found: dict[int, Source]) -> int:
    """The largest n up to `limit` such that a window group has all blocks that the token after n blocks sees, and the
    last one in any case, which shows that the prompt was here before."""
    end, index, size = limit, limit - 1, pool.block_size
    while index >= min(pool.first_kept(group, end * size), end - 1) and end:
        block = found[index] if index in found else find(group, index)
        if block is None:
            end = index
        else:
            found[index] = block
        index -= 1
    return end


def _without_unneeded(pool: BlockPool, found: list[dict[int, Source]], end: int) -> list[dict[int, Source]]:
    """The blocks that a hit of `end` blocks needs."""
    needed = []
    for group, blocks in enumerate(found):
        first = pool.first_kept(group, end * pool.block_size)
        needed.append({index: blocks[index] for index in range(first, end)} if first else blocks)
    return needed
