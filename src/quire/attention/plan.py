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

from quire.kernels.interface import CpuAttentionPlan

__all__ = ["CpuAttentionPlan", "MergeColumn", "WorkColumn", "plan_attention"]

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
# Of a batch-invariant plan: keys are split at every multiple of this, whatever the load.
_INVARIANT_PART_KEYS = 1024
# And they begin at a multiple of this, the keys that csrc/attention.h takes at a time, so that a window's keys are
# summed in the same groups wherever the step began.
_INVARIANT_ALIGNMENT = 256


class WorkColumn(IntEnum):
    """Columns of `CpuAttentionPlan.work`."""

    SEQUENCE = 0
    TOKEN_BEGIN = 1  # row of q and out
    NUM_TOKENS = 2
    HEAD_BEGIN = 3  # KV heads
    NUM_HEADS = 4
    KEY_BEGIN = 5  # positions in the sequence
    KEY_END = 6
    PARTIAL_ROW = 7  # first of its rows in `partials`; -1: the item writes `out` itself


class MergeColumn(IntEnum):
    """Columns of `CpuAttentionPlan.merges`."""

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
    batch_invariant: bool = False,
) -> CpuAttentionPlan:
    """Plan one step of B sequences with T new tokens; `CpuAttentionPlan` says what the arrays hold.

    The new tokens are the last of each sequence, and their keys are written before the plan runs. A plan made for a
    window serves the layers that have this window or a smaller one. Where a plan is `batch_invariant`, the order in
    which a token's keys are summed depends on its position alone: no other sequence, no chunk and no number of threads
    changes a bit of its result.
    """
    group = num_heads // num_kv_heads
    if block_tables.shape[1] * block_size < seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {block_tables.shape[1]} blocks of {block_size}, "
            f"too few for a sequence of {seq_lens.max()} tokens"
        )
    work = _cut_into_tiles(query_start_loc, seq_lens, group, num_kv_heads, window)
    if batch_invariant:
        work[:, WorkColumn.KEY_BEGIN] -= work[:, WorkColumn.KEY_BEGIN] % _INVARIANT_ALIGNMENT
    keys = work[:, WorkColumn.KEY_END] - work[:, WorkColumn.KEY_BEGIN]
    rows = work[:, WorkColumn.NUM_TOKENS] * group
    cost = keys.astype(np.int64) * np.maximum(rows, _MIN_COST_ROWS)  # of one head

    part_keys = _INVARIANT_PART_KEYS if batch_invariant else None
    num_items = num_threads * _ITEMS_PER_THREAD if num_threads > 1 else 1
    share = max(int(cost.sum()) * num_kv_heads // num_items, _MIN_ITEM_KEYS * _MIN_COST_ROWS)
    heads = np.minimum(share // np.maximum(cost, 1), _TILE_ROWS // np.maximum(rows, 1))
    num_groups = -(-num_kv_heads // np.minimum(np.maximum(heads, 1), num_kv_heads))
    if part_keys is not None:
        num_splits = -(-work[:, WorkColumn.KEY_END] // part_keys) - work[:, WorkColumn.KEY_BEGIN] // part_keys
    else:
        num_splits = np.maximum(1, np.minimum(-(-cost // share), keys // _MIN_ITEM_KEYS))

    work, tile = _share_out_heads(work, num_groups, num_kv_heads)
    work, merges, num_partial_rows = _split_keys(work, num_splits[tile], group, part_keys)
    cost = work[:, WorkColumn.KEY_END].astype(np.int64) - work[:, WorkColumn.KEY_BEGIN]
    cost *= np.maximum(work[:, WorkColumn.NUM_TOKENS] * group, _MIN_COST_ROWS) * work[:, WorkColumn.NUM_HEADS]
    return CpuAttentionPlan(
        query_start_loc=_tensor(query_start_loc),
        seq_lens=_tensor(seq_lens),
        block_tables=_tensor(block_tables),
        slots=_tensor(slots),
        work=_tensor(work[np.argsort(-cost, kind="stable")]),
        merges=_tensor(merges),
        partials=torch.empty(num_partial_rows, head_dim + 2),
        window=window,
        num_threads=num_threads,
    )


def _cut_into_tiles(
    query_start_loc: NDArray[np.int32], seq_lens: NDArray[np.int32], group: int, num_kv_heads: int, window: int
) -> NDArray[np.int32]:
    """Runs of new tokens of one sequence, with all heads and the keys they see."""
    tile_tokens = max(1, _TILE_ROWS // group)
    sequence, tile = enumerate_runs(-(-np.diff(query_start_loc) // tile_tokens))
    end = query_start_loc[sequence + 1]
    token_begin = query_start_loc[sequence] + tile * tile_tokens
    tokens = np.minimum(tile_tokens, end - token_begin)
    first_position = token_begin - end + seq_lens[sequence]

    work = np.empty((len(sequence), len(WorkColumn)), dtype=np.int32)
    work[:, WorkColumn.SEQUENCE] = sequence
    work[:, WorkColumn.TOKEN_BEGIN] = token_begin
    work[:, WorkColumn.NUM_TOKENS] = tokens
    work[:, WorkColumn.HEAD_BEGIN] = 0
    work[:, WorkColumn.NUM_HEADS] = num_kv_heads
    work[:, WorkColumn.KEY_BEGIN] = np.maximum(0, first_position - window + 1) if window > 0 else 0
    work[:, WorkColumn.KEY_END] = first_position + tokens
    work[:, WorkColumn.PARTIAL_ROW] = -1
    return work


def _share_out_heads(
    work: NDArray[np.int32], num_groups: NDArray[np.int64], num_kv_heads: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Each item becomes `num_groups` items of about as many heads; also says which item each came from."""
    item, group = enumerate_runs(num_groups)
    if len(item) > len(work):
        work = work[item]
        head_begin = group * num_kv_heads // num_groups[item]
        work[:, WorkColumn.HEAD_BEGIN] = head_begin
        work[:, WorkColumn.NUM_HEADS] = (group + 1) * num_kv_heads // num_groups[item] - head_begin
    return work, item


def _split_keys(
    work: NDArray[np.int32], num_splits: NDArray[np.int64], group: int, part_keys: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Each item becomes `num_splits` items; also returns the merges and the partial rows.

    The items get about as many keys each, or where `part_keys` is given begin at its multiples.
    """
    split = np.flatnonzero(num_splits > 1)
    merges = np.empty((len(split), len(MergeColumn)), dtype=np.int32)
    if len(split) == 0:
        return work, merges, 0
    rows = work[:, WorkColumn.NUM_TOKENS] * work[:, WorkColumn.NUM_HEADS].astype(np.int64) * group
    partial_rows = np.where(num_splits > 1, rows * num_splits, 0)
    partial_end = np.cumsum(partial_rows)
    partial_begin = partial_end - partial_rows
    merges[:, : MergeColumn.PARTIAL_ROW] = work[split, WorkColumn.TOKEN_BEGIN : WorkColumn.NUM_HEADS + 1]
    merges[:, MergeColumn.PARTIAL_ROW] = partial_begin[split]
    merges[:, MergeColumn.NUM_SPLITS] = num_splits[split]

    item, part = enumerate_runs(num_splits)
    work, count = work[item], num_splits[item]
    begin = work[:, WorkColumn.KEY_BEGIN].astype(np.int64)
    end = work[:, WorkColumn.KEY_END].astype(np.int64)
    if part_keys is not None:
        part_begin = (begin // part_keys + part) * part_keys
        part_end = part_begin + part_keys
    else:
        part_begin = _align(begin + (end - begin) * part // count)
        part_end = _align(begin + (end - begin) * (part + 1) // count)
    work[:, WorkColumn.KEY_BEGIN] = np.where(part == 0, begin, part_begin)
    work[:, WorkColumn.KEY_END] = np.where(part + 1 == count, end, part_end)
    work[:, WorkColumn.PARTIAL_ROW] = np.where(count > 1, partial_begin[item] + part * rows[item], -1)
    return work, merges, int(partial_end[-1])


def enumerate_runs(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths [2, 0, 3] -> runs [0, 0, 2, 2, 2] and places in them [0, 1, 0, 1, 2]."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]


def _align(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return (keys + _SPLIT_ALIGNMENT // 2) // _SPLIT_ALIGNMENT * _SPLIT_ALIGNMENT


def _tensor(array: NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
