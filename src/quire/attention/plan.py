"""The planner for a CPU: turns a step's ragged sequences into balanced work items, once, for every layer to run.

An item is a run of new tokens of one sequence, a run of its KV heads, and a range of its keys. An item of few tokens
has several heads, because a block's heads are adjacent in memory; many tokens are cut into tiles. If one head of one
tile is too much for a balanced load, its keys are split, and the parts are merged afterwards. Blocks that several
sequences begin with are read by one item for all of them where that pays (`shared_prefixes`); its result is another
part to merge.

The plan does not assign items to threads: threads take items in order, and no result depends on which thread takes
which.
"""

from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from quire.attention.expansion import sequences_to_expand
from quire.attention.inputs import AttentionShape, Int32Array, Int64Array, StepArrays
from quire.attention.shared_prefixes import find_shared_prefixes
from quire.kernels.interface import CpuAttentionPlan, ExpandedRun
from quire.kv_groups import INVARIANT_ALIGNMENT

__all__ = ["CpuAttentionPlan", "MergeColumn", "SharedColumn", "WorkColumn", "advance_plan", "plan_attention"]

# Rows (tokens x query heads of one KV head) of a tile: enough to reuse each key many times, few enough that its
# queries, outputs and keys stay in a core's second-level cache.
_TILE_ROWS = 128
# With fewer rows than this, an item takes as long as reading its keys takes; by bytes per number.
_MIN_COST_ROWS = {4: 24, 2: 16, 1: 12}
# The same for keys that several sequences read: all but the first find them in a cache.
_CACHED_ROWS = {4: 4.5, 2: 3.5, 1: 3.5}
# Items per thread: enough that little time is lost when the last thread finishes.
_ITEMS_PER_THREAD = 8
# Least work of an item or a part, in keys of one head.
_MIN_ITEM_KEYS = 256
# Parts begin at multiples of this, so that none begins inside a vector of keys.
_SPLIT_ALIGNMENT = 64
NO_LIMIT = 2**31 - 1
# A batch-invariant plan splits keys at every multiple of this, whatever the load.
_INVARIANT_PART_KEYS = 1024


class WorkColumn(IntEnum):
    """Columns of `CpuAttentionPlan.work`."""

    SEQUENCE = 0
    TOKEN_BEGIN = 1  # row of q and out; in a shared item, row of `CpuAttentionPlan.shared`
    NUM_TOKENS = 2
    HEAD_BEGIN = 3  # KV heads
    NUM_HEADS = 4
    KEY_BEGIN = 5  # positions in the sequence
    KEY_END = 6
    PARTIAL_ROW = 7  # row of `partials` where its first token's heads begin; -1: it writes `out`
    SHARED = 8  # 1: it serves several sequences, which all have its keys in the blocks of `SEQUENCE`


class SharedColumn(IntEnum):
    """Columns of `CpuAttentionPlan.shared`."""

    ROW = 0  # row of q and out
    POSITION = 1
    PARTIAL_ROW = 2  # row of `partials` where the token's heads begin


class MergeColumn(IntEnum):
    """Columns of `CpuAttentionPlan.merges`."""

    TOKEN_BEGIN = 0
    NUM_TOKENS = 1
    PARTIAL_ROW = 2  # first row of the first part, which has [NUM_TOKENS, num_heads] rows; the next parts follow
    NUM_PARTS = 3


def plan_attention(step: StepArrays, shape: AttentionShape, *, share_prefixes: bool = True) -> CpuAttentionPlan:
    """Plan one step. With `share_prefixes`, leading blocks of several sequences may be read once for all of them. A new
    token's keys are written before the plan runs."""
    query_start_loc, seq_lens, block_tables, slots, lookaheads = step
    num_kv_heads, block_size, group = shape.num_kv_heads, shape.block_size, shape.group
    if block_tables.shape[1] * block_size < seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {block_tables.shape[1]} blocks of {block_size}, "
            f"too few for a sequence of {seq_lens.max()} tokens"
        )
    min_cost_rows = _MIN_COST_ROWS[shape.kv_element_size]
    tiles = _cut_into_tiles(step, group, shape)
    expanded = sequences_to_expand(step, shape)
    if len(expanded):
        tiles = tiles[~np.isin(tiles[:, WorkColumn.SEQUENCE], expanded)]
    sharers = _NO_SHARERS
    if lookaheads is not None and shape.window > 0:
        sharers = _begin_windows_of_runs(tiles, step, lookaheads, shape.window)
    if shape.batch_invariant:
        for items in (tiles, sharers.items):
            items[:, WorkColumn.KEY_BEGIN] -= items[:, WorkColumn.KEY_BEGIN] % INVARIANT_ALIGNMENT
    elif lookaheads is None and share_prefixes and not shape.lookahead and len(tiles) > 1:
        read_rows = _CACHED_ROWS[shape.kv_element_size]
        sharers = _share_prefixes(tiles, step, group, block_size, read_rows)
    work = np.concatenate((tiles, sharers.items))
    keys = work[:, WorkColumn.KEY_END] - work[:, WorkColumn.KEY_BEGIN]
    rows = work[:, WorkColumn.NUM_TOKENS] * group
    cost = keys.astype(np.int64) * np.maximum(rows, min_cost_rows)  # of one head

    part_keys = _INVARIANT_PART_KEYS if shape.batch_invariant else None
    lookahead = np.int32(shape.lookahead) if shape.lookahead else lookaheads
    num_items = shape.num_threads * _ITEMS_PER_THREAD if shape.num_threads > 1 else 1
    share = max(int(cost.sum()) * num_kv_heads // num_items, _MIN_ITEM_KEYS * min_cost_rows)
    heads = np.minimum(share // np.maximum(cost, 1), _TILE_ROWS // np.maximum(rows, 1))
    num_groups = -(-num_kv_heads // np.minimum(np.maximum(heads, 1), num_kv_heads))
    if part_keys is not None:
        num_splits = -(-work[:, WorkColumn.KEY_END] // part_keys) - work[:, WorkColumn.KEY_BEGIN] // part_keys
    else:
        num_splits = np.maximum(1, np.minimum(-(-cost // share), keys // _MIN_ITEM_KEYS))

    shared, merges, num_partial_rows = _lay_out_parts(work, num_splits, sharers, step, shape.num_heads)
    work = _split_keys(work, num_splits, shape.num_heads, part_keys)
    work = _share_out_heads(work, np.repeat(num_groups, num_splits), num_kv_heads)
    cost = work[:, WorkColumn.KEY_END].astype(np.int64) - work[:, WorkColumn.KEY_BEGIN]
    cost *= np.maximum(work[:, WorkColumn.NUM_TOKENS] * group, min_cost_rows) * work[:, WorkColumn.NUM_HEADS]
    work = work[np.argsort(-cost, kind="stable")]
    return CpuAttentionPlan(
        query_start_loc=_tensor(query_start_loc),
        # Kernels count a token's position back from the length and let it see the keys up to there.
        seq_lens=_tensor(seq_lens if lookahead is None else seq_lens + lookahead),
        block_tables=_tensor(block_tables),
        slots=_tensor(slots),
        work=_tensor(work),
        growth=[] if shape.lookahead else _growth(work, shared, seq_lens, shape.window),
        shared=_tensor(shared),
        merges=_tensor(merges),
        partials=torch.empty(num_partial_rows, (shape.value_dim or shape.head_dim) + 2),
        window=shape.window,
        num_threads=shape.num_threads,
        expanded=[_plan_expanded(step, shape, int(sequence)) for sequence in expanded],
    )


def _growth(
    work: Int32Array, shared: Int32Array, seq_lens: Int32Array, window: int
) -> list[tuple[Int32Array, Int32Array]]:
    """What one more token of every sequence adds to columns of `work` and `shared`."""
    ends, lengths = work[:, WorkColumn.KEY_END], seq_lens[work[:, WorkColumn.SEQUENCE]]
    growth = [(ends, (ends == lengths).astype(np.int32))]
    if window > 0:  # the first key of a window that is full moves on as well
        begins = work[:, WorkColumn.KEY_BEGIN]
        growth.append((begins, (begins == lengths - window).astype(np.int32)))
    if len(shared):
        growth.append((shared[:, SharedColumn.POSITION], np.ones(len(shared), dtype=np.int32)))
    return growth


def _plan_expanded(step: StepArrays, shape: AttentionShape, sequence: int) -> ExpandedRun:
    """One head of a sequence whose keys and values lie one after the other."""
    begin, end = map(int, step.query_start_loc[sequence : sequence + 2])
    length = int(step.seq_lens[sequence])
    num_blocks = -(-length // shape.block_size)
    key_dim, value_dim = shape.expanded_dims
    own_step = StepArrays(
        np.array([0, end - begin], dtype=np.int32),
        np.array([length], dtype=np.int32),
        np.arange(num_blocks, dtype=np.int32)[None],
        np.arange(length, dtype=np.int32),
    )
    own_shape = replace(
        shape,
        num_heads=1,
        num_kv_heads=1,
        head_dim=key_dim,
        value_dim=value_dim,
        expanded_dims=(0, 0),
        window=0,
        kv_element_size=4,
    )
    blocks = torch.from_numpy(step.block_tables[sequence, :num_blocks].astype(np.int64))
    return ExpandedRun(slice(begin, end), blocks, plan_attention(own_step, own_shape))


def advance_plan(plan: CpuAttentionPlan, block_tables: Int32Array) -> CpuAttentionPlan:
    """Turns the plan of a decode step into that of the next one: each sequence has one more token, whose key goes to
    the item with the sequence's last keys. `plan` is not batch-invariant; it is changed in place. If it has a window,
    `num_advances` says how often this may be done.

    The arrays that it was made from already hold the next step; `block_tables` differs only if it became wider.
    """
    for numbers, more in plan.growth:
        numbers += more
    if plan.block_tables.shape != block_tables.shape:
        return replace(plan, block_tables=_tensor(block_tables))
    return plan


def num_advances(plan: CpuAttentionPlan, seq_lens: Int32Array) -> int:
    """How many times the new plan of a decode step may be advanced before the window of another sequence is full, from
    where on its first key moves."""
    if plan.window == 0:
        return NO_LIMIT
    if len(plan.shared):
        return 0
    to_come = plan.window - seq_lens
    return int(to_come[to_come > 0].min(initial=NO_LIMIT))


class _Sharers(NamedTuple):
    """Items that serve several tiles, and the tiles of each."""

    items: Int32Array
    tile: Int64Array
    item: Int64Array
    """[N]: `tile` and `item` hold one pair of a tile and an item each, ordered by item."""


_NO_SHARERS = _Sharers(
    np.empty((0, len(WorkColumn)), dtype=np.int32), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
)
_NO_SHARED, _NO_MERGES = (np.empty((0, len(columns)), dtype=np.int32) for columns in (SharedColumn, MergeColumn))


def _cut_into_tiles(step: StepArrays, group: int, shape: AttentionShape) -> Int32Array:
    """Runs of new tokens of one sequence, with all heads and all keys that they see."""
    query_start_loc, seq_lens, lookaheads = step.query_start_loc, step.seq_lens, step.lookaheads
    tile_tokens = max(1, _TILE_ROWS // group)
    sequence, tile = enumerate_runs(-(-np.diff(query_start_loc) // tile_tokens))
    end = query_start_loc[sequence + 1]
    token_begin = query_start_loc[sequence] + tile * tile_tokens
    tokens = np.minimum(tile_tokens, end - token_begin)
    last_seen = token_begin - end + seq_lens[sequence] + shape.lookahead  # the last key that the first token sees
    if lookaheads is not None:
        last_seen += lookaheads[sequence]

    work = np.empty((len(sequence), len(WorkColumn)), dtype=np.int32)
    work[:, WorkColumn.SEQUENCE] = sequence
    work[:, WorkColumn.TOKEN_BEGIN] = token_begin
    work[:, WorkColumn.NUM_TOKENS] = tokens
    work[:, WorkColumn.HEAD_BEGIN] = 0
    work[:, WorkColumn.NUM_HEADS] = shape.num_kv_heads
    work[:, WorkColumn.KEY_BEGIN] = np.maximum(0, last_seen - shape.window + 1) if shape.window > 0 else 0
    work[:, WorkColumn.KEY_END] = np.minimum(last_seen + tokens, step.key_ends[sequence])
    work[:, WorkColumn.PARTIAL_ROW] = -1
    work[:, WorkColumn.SHARED] = 0
    return work


def _begin_windows_of_runs(tiles: Int32Array, step: StepArrays, lookaheads: Int32Array, window: int) -> _Sharers:
    """Items of the keys that not all tokens of a run's tile see, since the window of each begins at another key. The
    tiles keep the keys that all see.

    A kernel hides keys by one position of a token, from which window and last key follow. In a run's tile it is too
    late by the look-ahead, which hides no key that all see; in these items it is the token's own.
    """
    sequence, tokens = tiles[:, WorkColumn.SEQUENCE], tiles[:, WorkColumn.NUM_TOKENS]
    position = tiles[:, WorkColumn.TOKEN_BEGIN] - step.query_start_loc[sequence + 1] + step.seq_lens[sequence]
    begin = np.maximum(0, position - window + 1)
    seen_by_all = np.maximum(0, position + lookaheads[sequence] + tokens - window)
    in_run = lookaheads[sequence] > 0
    tiles[in_run, WorkColumn.KEY_BEGIN] = seen_by_all[in_run]
    tile = np.flatnonzero(in_run & (begin < seen_by_all))
    items = tiles[tile]
    items[:, WorkColumn.KEY_BEGIN], items[:, WorkColumn.KEY_END] = begin[tile], seen_by_all[tile]
    items[:, WorkColumn.SHARED] = 1
    return _Sharers(items, tile, np.arange(len(tile)))


def _share_prefixes(tiles: Int32Array, step: StepArrays, group: int, block_size: int, read_rows: float) -> _Sharers:
    """Make items of the prefixes that are worth it, and remove their keys from the tiles."""
    sequence, tokens = tiles[:, WorkColumn.SEQUENCE], tiles[:, WorkColumn.NUM_TOKENS].astype(np.int64)
    # Tiles with many rows reuse keys well enough alone. With a window, each row sees another part of a prefix.
    few = np.flatnonzero((tokens * group < read_rows) & (tiles[:, WorkColumn.KEY_BEGIN] == 0))
    if len(few) < 2:
        return _NO_SHARERS
    sequence = sequence[few]
    num_blocks = (step.seq_lens - np.diff(step.query_start_loc))[sequence].astype(np.int64) // block_size
    prefixes = find_shared_prefixes(
        step.block_tables[sequence], num_blocks, tokens[few] * group, block_size=block_size, read_rows=read_rows
    )
    if not prefixes:
        return _NO_SHARERS
    tile = np.concatenate([few[prefix.members] for prefix in prefixes])
    prefix_of = np.repeat(np.arange(len(prefixes)), [len(prefix.members) for prefix in prefixes])
    for prefix in prefixes:
        tiles[few[prefix.members], WorkColumn.KEY_BEGIN] = prefix.key_end

    # A prefix with many rows becomes several items with about equally many rows.
    end = np.cumsum(tokens[tile])
    total = np.bincount(prefix_of, weights=tokens[tile]).astype(np.int64)
    before = (end - tokens[tile]) - (np.cumsum(total) - total)[prefix_of]
    num_items = -(-total * group // _TILE_ROWS)
    item = (np.cumsum(num_items) - num_items)[prefix_of] + before * num_items[prefix_of] // total[prefix_of]
    first = np.flatnonzero(np.diff(item, prepend=-1))
    items = tiles[tile[first]]
    items[:, WorkColumn.KEY_BEGIN] = np.array([prefix.key_begin for prefix in prefixes])[prefix_of[first]]
    items[:, WorkColumn.KEY_END] = np.array([prefix.key_end for prefix in prefixes])[prefix_of[first]]
    items[:, WorkColumn.NUM_TOKENS] = np.add.reduceat(tokens[tile], first)
    items[:, WorkColumn.SHARED] = 1
    return _Sharers(items, tile, np.cumsum(np.diff(item, prepend=-1) > 0) - 1)


def _lay_out_parts(
    work: Int32Array,
    num_splits: Int64Array,
    sharers: _Sharers,
    step: StepArrays,
    num_heads: int,
) -> tuple[Int32Array, Int32Array, int]:
    """Give every tile with several parts its rows of `partials`; returns `shared`, the merges and the number of rows.

    The parts of a tile's own item come first, then those of the items that it shares.
    """
    if len(sharers.items) == 0 and (num_splits == 1).all():  # as with short texts, where each call counts
        return _NO_SHARED, _NO_MERGES, 0
    num_tiles = len(work) - len(sharers.items)
    tiles, tile_splits, item_splits = work[:num_tiles], num_splits[:num_tiles], num_splits[num_tiles:]
    tokens = tiles[:, WorkColumn.NUM_TOKENS].astype(np.int64)
    num_parts = tile_splits + np.bincount(sharers.tile, item_splits[sharers.item], num_tiles).astype(np.int64)
    partial_rows = np.where(num_parts > 1, tokens * num_heads * num_parts, 0)
    partial_end = np.cumsum(partial_rows)
    partial_begin = partial_end - partial_rows
    split = np.flatnonzero(num_parts > 1)
    merges = np.empty((len(split), len(MergeColumn)), dtype=np.int32)
    merges[:, : MergeColumn.PARTIAL_ROW] = tiles[split, WorkColumn.TOKEN_BEGIN : WorkColumn.NUM_TOKENS + 1]
    merges[:, MergeColumn.PARTIAL_ROW] = partial_begin[split]
    merges[:, MergeColumn.NUM_PARTS] = num_parts[split]
    tiles[:, WorkColumn.PARTIAL_ROW] = np.where(num_parts > 1, partial_begin, -1)
    num_rows = int(partial_rows.sum())
    if len(sharers.items) == 0:
        return _NO_SHARED, merges, num_rows
    # The first part that a tile gets from each item that it shares.
    order = np.argsort(sharers.tile, kind="stable")
    by_tile, splits = sharers.tile[order], item_splits[sharers.item[order]]
    before = np.cumsum(splits) - splits
    part = np.empty_like(order)
    part[order] = tile_splits[by_tile] + before - before[np.searchsorted(by_tile, by_tile)]

    # The tokens of an item, repeated for each of its splits.
    pair, token = enumerate_runs(tokens[sharers.tile])
    item_tokens = work[num_tiles:, WorkColumn.NUM_TOKENS].astype(np.int64)
    item, split_of_item = enumerate_runs(item_splits)
    run, place = enumerate_runs(item_tokens[item])
    place += (np.cumsum(item_tokens) - item_tokens)[item[run]]
    pair, token = pair[place], token[place]
    tile = sharers.tile[pair]
    sequence = tiles[tile, WorkColumn.SEQUENCE]
    shared = np.empty((len(tile), len(SharedColumn)), dtype=np.int32)
    row = tiles[tile, WorkColumn.TOKEN_BEGIN] + token
    shared[:, SharedColumn.ROW] = row
    shared[:, SharedColumn.POSITION] = row - step.query_start_loc[sequence + 1] + step.seq_lens[sequence]
    part_of = part[pair] + split_of_item[run]
    shared[:, SharedColumn.PARTIAL_ROW] = partial_begin[tile] + (part_of * tokens[tile] + token) * num_heads
    shared_rows = item_tokens * item_splits
    work[num_tiles:, WorkColumn.TOKEN_BEGIN] = np.cumsum(shared_rows) - shared_rows
    return shared, merges, num_rows


def _split_keys(work: Int32Array, num_splits: Int64Array, num_heads: int, part_keys: int | None) -> Int32Array:
    """Each item becomes `num_splits` items with about equally many keys, or cut at multiples of `part_keys`."""
    if (num_splits == 1).all():
        return work
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
    tokens, shared = work[:, WorkColumn.NUM_TOKENS], work[:, WorkColumn.SHARED] == 1
    work[:, WorkColumn.PARTIAL_ROW] += np.where((count > 1) & ~shared, part * tokens * num_heads, 0).astype(np.int32)
    work[:, WorkColumn.TOKEN_BEGIN] += np.where(shared, part * tokens, 0).astype(np.int32)
    return work


def _share_out_heads(work: Int32Array, num_groups: Int64Array, num_kv_heads: int) -> Int32Array:
    """Each item becomes `num_groups` items with about equally many heads."""
    if (num_groups == 1).all():
        return work
    item, group = enumerate_runs(num_groups)
    work = work[item]
    head_begin = group * num_kv_heads // num_groups[item]
    work[:, WorkColumn.HEAD_BEGIN] = head_begin
    work[:, WorkColumn.NUM_HEADS] = (group + 1) * num_kv_heads // num_groups[item] - head_begin
    return work


def enumerate_runs(lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Lengths [2, 0, 3] -> runs [0, 0, 2, 2, 2] and places in them [0, 1, 0, 1, 2]."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]


def _align(keys: Int64Array) -> Int64Array:
    return (keys + _SPLIT_ALIGNMENT // 2) // _SPLIT_ALIGNMENT * _SPLIT_ALIGNMENT


def _tensor(array: Int32Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
