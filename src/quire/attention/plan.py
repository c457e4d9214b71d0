"""The planner: turns a step's ragged sequences into balanced work items, once, for every layer to run.

An item is a run of new tokens of one sequence, a run of its KV heads, and a range of its keys. Few tokens share an item
with several heads, since a block's heads lie next to each other in memory; many tokens are cut into tiles. When one
head of one tile is still too much for a balanced load, its keys are split, and the parts are merged afterwards.

The plan says what is computed, never by whom: threads take items in order, and no result depends on who takes what.
"""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from quire.kernels.interface import AttentionPlan

__all__ = ["AttentionPlan", "MergeColumn", "WorkColumn", "plan_attention"]

# Rows (tokens x query heads of one KV head) a tile holds: enough to reuse each key many times, few enough for its
# queries, outputs and keys to stay in a core's second-level cache.
_TILE_ROWS = 128
# Below this many rows an item's time is that of reading its keys, whatever the number of rows.
_MIN_COST_ROWS = 24
# Items per thread: the last one to finish then wastes little.
_ITEMS_PER_THREAD = 8
# Less work than this many keys of one head is not worth an item of its own, nor a part of a split.
_MIN_ITEM_KEYS = 256
# Splits fall on multiples of this, so that no part begins inside a vector of keys.
_SPLIT_ALIGNMENT = 64


class WorkColumn(IntEnum):
    """Columns of `AttentionPlan.work`."""

    SEQUENCE = 0
    TOKEN_BEGIN = 1  # row of q and out
    NUM_TOKENS = 2
    HEAD_BEGIN = 3  # KV heads
    NUM_HEADS = 4
    KEY_BEGIN = 5  # positions in the sequence
    KEY_END = 6
    PARTIAL_ROW = 7  # first of its rows in `partials`; -1: the item writes `out` itself


class MergeColumn(IntEnum):
    """Columns of `AttentionPlan.merges`."""

    TOKEN_BEGIN = 0
    NUM_TOKENS = 1
    HEAD_BEGIN = 2
    NUM_HEADS = 3
    PARTIAL_ROW = 4  # first row of the first part; the parts follow each other
    NUM_SPLITS = 5


def plan_attention(
    query_start_loc: NDArray[np.int32],
    seq_lens: NDArray[np.int32],
    block_tables: NDArray[np.int32],
    slots: NDArray[np.int32],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_threads: int,
    window: int = 0,
) -> AttentionPlan:
    """Plan one step of B sequences with T new tokens; `AttentionPlan` says what the arrays hold.

    The new tokens are the last of each sequence, and their keys are written before the plan runs. A plan made for a
    window serves the layers that have this window or a smaller one.
    """
    group = num_heads // num_kv_heads
    start = query_start_loc.astype(np.int64)
    num_tokens = np.diff(start)
    if block_tables.shape[1] * block_size < seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {block_tables.shape[1]} blocks of {block_size}, "
            f"too few for a sequence of {seq_lens.max()} tokens"
        )

    # Tiles: runs of new tokens of one sequence, and the keys they see.
    tile_tokens = max(1, _TILE_ROWS // group)
    tiles_per_sequence = -(-num_tokens // tile_tokens)
    sequence, tile_index = _enumerate_runs(tiles_per_sequence)
    token_begin = start[sequence] + tile_index * tile_tokens
    tokens = np.minimum(tile_tokens, start[sequence + 1] - token_begin)
    first_position = token_begin - start[sequence + 1] + seq_lens[sequence]
    key_end = first_position + tokens
    key_begin = np.maximum(0, first_position - window + 1) if window > 0 else np.zeros_like(key_end)
    keys = key_end - key_begin

    # Heads and splits: an item should cost about `share`, the total cut into a few items per thread.
    rows = tokens * group
    cost = keys * np.maximum(rows, _MIN_COST_ROWS)
    share = int(cost.sum()) * num_kv_heads // (num_threads * _ITEMS_PER_THREAD)
    if num_threads == 1:
        share = int(cost.sum()) * num_kv_heads
    share = max(share, _MIN_ITEM_KEYS * _MIN_COST_ROWS)
    heads = np.clip(
        share // np.maximum(cost, 1), 1, np.clip(_TILE_ROWS // np.maximum(rows, 1), 1, num_kv_heads)
    )
    groups = -(-num_kv_heads // heads)
    splits = np.clip(-(-cost // share), 1, np.maximum(1, keys // _MIN_ITEM_KEYS))

    # Items, in three steps: tiles x head groups x splits.
    tile, group_index = _enumerate_runs(groups)
    head_begin = group_index * num_kv_heads // groups[tile]
    num_heads_here = (group_index + 1) * num_kv_heads // groups[tile] - head_begin
    num_splits = splits[tile]
    partial_rows = np.where(num_splits > 1, rows[tile] * num_heads_here, 0)
    partial_end = np.cumsum(partial_rows * num_splits)
    partial_begin = partial_end - partial_rows * num_splits

    unit, split_index = _enumerate_runs(num_splits)
    tile_of_item = tile[unit]
    item_begin, item_end = key_begin[tile_of_item], key_end[tile_of_item]
    split_begin = _align(item_begin + keys[tile_of_item] * split_index // num_splits[unit])
    split_end = _align(item_begin + keys[tile_of_item] * (split_index + 1) // num_splits[unit])
    last = split_index + 1 == num_splits[unit]
    work = np.empty((len(unit), len(WorkColumn)), dtype=np.int32)
    work[:, WorkColumn.SEQUENCE] = sequence[tile_of_item]
    work[:, WorkColumn.TOKEN_BEGIN] = token_begin[tile_of_item]
    work[:, WorkColumn.NUM_TOKENS] = tokens[tile_of_item]
    work[:, WorkColumn.HEAD_BEGIN] = head_begin[unit]
    work[:, WorkColumn.NUM_HEADS] = num_heads_here[unit]
    work[:, WorkColumn.KEY_BEGIN] = np.where(split_index == 0, item_begin, split_begin)
    work[:, WorkColumn.KEY_END] = np.where(last, item_end, split_end)
    work[:, WorkColumn.PARTIAL_ROW] = np.where(
        num_splits[unit] > 1, partial_begin[unit] + split_index * partial_rows[unit], -1
    )
    item_cost = cost[tile_of_item] * num_heads_here[unit] // num_splits[unit]
    work = work[np.argsort(-item_cost, kind="stable")]

    split = np.flatnonzero(num_splits > 1)
    merges = np.empty((len(split), len(MergeColumn)), dtype=np.int32)
    merges[:, MergeColumn.TOKEN_BEGIN] = token_begin[tile[split]]
    merges[:, MergeColumn.NUM_TOKENS] = tokens[tile[split]]
    merges[:, MergeColumn.HEAD_BEGIN] = head_begin[split]
    merges[:, MergeColumn.NUM_HEADS] = num_heads_here[split]
    merges[:, MergeColumn.PARTIAL_ROW] = partial_begin[split]
    merges[:, MergeColumn.NUM_SPLITS] = num_splits[split]

    return AttentionPlan(
        query_start_loc=_tensor(query_start_loc),
        seq_lens=_tensor(seq_lens),
        block_tables=_tensor(block_tables),
        slots=_tensor(slots),
        work=torch.from_numpy(work),
        merges=torch.from_numpy(merges),
        partials=torch.empty(int(partial_end[-1]) if len(partial_end) else 0, head_dim + 2),
        window=window,
        num_threads=num_threads,
    )


def _enumerate_runs(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths [2, 0, 3] -> runs [0, 0, 2, 2, 2] and places in them [0, 1, 0, 1, 2]."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]


def _align(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return (keys + _SPLIT_ALIGNMENT // 2) // _SPLIT_ALIGNMENT * _SPLIT_ALIGNMENT


def _tensor(array: NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
