"""Finds sequences of a step that begin with the same blocks, where reading these blocks once for all of them pays.

Block tables with common beginnings form a tree: a system prompt at the root, prompts that continue it, samples of a
prompt at the leaves. Each edge with enough keys becomes a `SharedPrefix`; the keys of other edges go to their children.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Costs of one more part of a row, and of one more item, in keys that a row is scored against in the same time. Measured
# by `benchmarks.kernels --tables sharing`.
_PART_KEYS = 90
_ITEM_KEYS = 400


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Keys that all members see, stored in the same blocks."""

    members: NDArray[np.int64]
    """Rows of the block tables."""
    key_begin: int
    key_end: int


def find_shared_prefixes(
    block_tables: NDArray[np.int32],
    num_blocks: NDArray[np.int64],
    num_rows: NDArray[np.int64],
    *,
    block_size: int,
    read_rows: float,
    min_saved: float = 0.0,
    min_members: int = 2,
) -> list[SharedPrefix]:
    """block_tables [M, any]; num_blocks [M]: leading blocks of each table that may be shared; num_rows [M]: query rows
    of one KV head.

    The cost of an item is its keys times the larger of its rows and `read_rows`: reading a key takes as long as scoring
    it against `read_rows` rows. The key ranges of a sequence's prefixes are contiguous from key 0. A prefix has at
    least `min_members` members and saves more than `min_saved`, in keys times rows.
    """
    first = np.where(num_blocks > 0, block_tables[:, 0], -1 - np.arange(len(block_tables)))
    _, group, size = np.unique(first, return_inverse=True, return_counts=True)
    member = np.flatnonzero(size[group] > 1)
    if len(member) == 0:
        return []
    order, depths = _sort(block_tables[member], num_blocks[member])
    member = member[order]
    rows = num_rows[member]
    cost = np.concatenate(([0], np.cumsum(np.maximum(rows, read_rows))))
    total = np.concatenate(([0], np.cumsum(rows)))
    begin = np.zeros(len(member), dtype=np.int64)  # blocks already in a prefix
    found = []
    for left, right, depth in _branches(depths.tolist()):
        num_keys = (depth - int(begin[left])) * block_size
        together = int(total[right] - total[left])
        saved = num_keys * (cost[right] - cost[left] - max(together, read_rows))
        if right - left >= min_members and saved > max(min_saved, together * _PART_KEYS + _ITEM_KEYS):
            found.append(SharedPrefix(member[left:right], int(begin[left]) * block_size, depth * block_size))
            begin[left:right] = depth
    return found


def _sort(
    block_tables: NDArray[np.int32], num_blocks: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order [M] in which tables with common beginnings are neighbours, and how many blocks neighbours share
    [M - 1]."""
    width = max(1, int(num_blocks.max()))
    # Blocks that may not be shared get numbers that no other table has.
    unlike = -1 - np.arange(len(block_tables), dtype=np.int32)[:, None]
    tables = np.where(np.arange(width) < num_blocks[:, None], block_tables[:, :width], unlike)
    order = np.ascontiguousarray(tables).view(np.dtype((np.void, tables.itemsize * width))).ravel().argsort()
    tables = tables[order]
    differs = np.concatenate((tables[1:] != tables[:-1], np.ones((len(tables) - 1, 1), dtype=bool)), axis=1)
    return order, differs.argmax(axis=1)


def _branches(depths: list[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbours that share more blocks than the run around them: (first, end, blocks), the widest first."""
    found, open_runs = [], [(0, 0)]
    for index, depth in enumerate([*depths, 0]):
        left = index
        while depth < open_runs[-1][0]:
            blocks, left = open_runs.pop()
            found.append((left, index + 1, blocks))
        if depth > open_runs[-1][0]:
            open_runs.append((depth, left))
    return found[::-1]
