"""Shared prefixes in a GPU's attention plan: keys that many sequences begin with become items of their own.

Each such item is read once for all its sequences (cascade attention). Its results are one more part to merge.
"""

from dataclasses import dataclass

import numpy as np

from quire.attention.gpu_items import MIN_TILES, NO_ITEMS
from quire.attention.inputs import Int32Array, Int64Array
from quire.attention.plan import enumerate_runs
from quire.attention.plan_buffers import MIN_ROWS, PlanBuffers
from quire.attention.shared_prefixes import SharedPrefix, find_shared_prefixes
from quire.backends import MAX_NARROW_TOKENS
from quire.kernels.gpu_plan import NUM_ITEM_COLUMNS, GatheredColumn, ItemColumn

_MIN_SHARERS = 8
# Least rows of a program of shared keys in a captured step, so that few variants serve all batches.
_MIN_CAPTURED_SHARED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Sharers:
    """Items of shared prefixes before they are cut along their keys, and the tokens of each."""

    items: Int32Array
    """[S, columns]; TOKEN is an index into `token`."""
    num_parts: Int64Array
    """[S]: parts that an item's keys are cut into."""
    item: Int64Array
    """[N]: the item of each pair of an item and a token, ascending."""
    tile: Int64Array
    """[N]: the tile of the token."""
    token: Int64Array
    """[N]: the token's place in its tile."""
    num_rows: int

    def parts_of(self, tiles: Int32Array) -> Int64Array:
        """[tiles]: the parts that each tile gets from all shared items."""
        first = self.token == 0
        counts = np.bincount(self.tile[first], self.num_parts[self.item[first]], len(tiles))
        parts: Int64Array = counts.astype(np.int64)
        return parts

    def lay_out(
        self, tiles: Int32Array, first_place: Int64Array, own_parts: Int64Array, key_tile: int
    ) -> tuple[Int32Array, Int32Array]:
        """The cut items, and `gathered`. A tile has places for its own parts, then for its items' parts in order."""
        # For each pair, the parts that its tile has before this item's.
        parts = self.num_parts[self.item]
        key = self.tile * (MAX_NARROW_TOKENS + 1) + self.token
        order = np.argsort(key, kind="stable")
        by_key, ordered = key[order], parts[order]
        before = np.cumsum(ordered) - ordered
        earlier = np.empty_like(order)
        earlier[order] = before - before[np.searchsorted(by_key, by_key)]

        item, part = enumerate_runs(self.num_parts)
        items = self.items[item]
        first = self.items[item, ItemColumn.KEY_BEGIN].astype(np.int64) // key_tile
        num_tiles = self.items[item, ItemColumn.KEY_END] // key_tile - first
        items[:, ItemColumn.KEY_BEGIN] = (first + num_tiles * part // self.num_parts[item]) * key_tile
        items[:, ItemColumn.KEY_END] = (first + num_tiles * (part + 1) // self.num_parts[item]) * key_tile
        lengths = items[:, ItemColumn.NUM_TOKENS].astype(np.int64)
        run, place = enumerate_runs(lengths)
        pair = items[run, ItemColumn.TOKEN] + place
        tile, token = self.tile[pair], self.token[pair]
        gathered = np.zeros((len(pair), len(GatheredColumn)), dtype=np.int32)
        gathered[:, GatheredColumn.TOKEN] = tiles[tile, ItemColumn.TOKEN] + token
        part_of_tile = own_parts[tile] + earlier[pair] + part[run]
        stride = tiles[tile, ItemColumn.NUM_TOKENS]
        gathered[:, GatheredColumn.PARTIAL] = first_place[tile] + part_of_tile * stride + token
        gathered[:, GatheredColumn.POSITION] = tiles[tile, ItemColumn.POSITION] + token
        items[:, ItemColumn.TOKEN] = np.cumsum(lengths) - lengths
        return items, gathered


NOTHING_GATHERED = np.empty((0, len(GatheredColumn)), dtype=np.int32)
_NO_PAIRS = np.empty(0, dtype=np.int64)
NO_SHARERS = Sharers(NO_ITEMS, _NO_PAIRS, _NO_PAIRS, _NO_PAIRS, _NO_PAIRS, MIN_ROWS)


def share_prefixes(tiles: Int32Array, block_tables: Int32Array, buffers: PlanBuffers, captured_tokens: int) -> Sharers:
    """Make items of the prefixes that are worth it, and remove their keys from the tiles. `captured_tokens` is the room
    of a graph, or 0."""
    (whole,) = np.nonzero(tiles[:, ItemColumn.KEY_BEGIN] == 0)  # with a window, each row sees another part
    if len(whole) < _MIN_SHARERS or buffers.shape.lookahead:
        return NO_SHARERS
    num_tokens = tiles[whole, ItemColumn.NUM_TOKENS].astype(np.int64)
    prefixes = find_shared_prefixes(
        block_tables[tiles[whole, ItemColumn.TABLE] // block_tables.shape[1]],
        tiles[whole, ItemColumn.POSITION].astype(np.int64) // buffers.shape.block_size,
        num_tokens * buffers.group,
        block_size=buffers.shape.block_size,
        read_rows=buffers.max_rows,
        min_saved=buffers.min_shared_bytes / buffers.key_bytes * buffers.max_rows,
        min_members=_MIN_SHARERS,
    )
    if not prefixes:
        return NO_SHARERS
    members = [num_tokens[prefix.members] for prefix in prefixes]
    num_rows = buffers.rows_for(max(int(count.sum()) for count in members) * buffers.group)
    max_items = buffers.max_items
    if captured_tokens:
        num_rows = max(num_rows, _MIN_CAPTURED_SHARED_ROWS)
        max_items = buffers.captured_shared_items(num_rows, captured_tokens)
    items, pairs = _make_items(tiles, whole, prefixes, members, buffers.tokens_per_tile(num_rows))
    key_tiles = (items[:, ItemColumn.KEY_END] - items[:, ItemColumn.KEY_BEGIN]) // buffers.tile
    share = max(MIN_TILES, -(-int(key_tiles.sum()) // buffers.target_shared_items))
    while True:
        num_parts = -(-key_tiles.astype(np.int64) // share)
        sharers = Sharers(items, num_parts, *pairs, num_rows)
        # Each sharing tile also has a part of its own.
        parts = sharers.parts_of(tiles)
        num_places = int((np.where(parts > 0, parts + 1, 0) * tiles[:, ItemColumn.NUM_TOKENS]).sum())
        if num_places <= buffers.max_shared_places and num_parts.sum() <= max_items:
            break
        if num_parts.max() == 1:
            return NO_SHARERS
        share *= 2
    saved = sum((prefix.key_end - prefix.key_begin) * len(prefix.members) for prefix in prefixes)
    saved -= int(key_tiles.sum()) * buffers.tile
    if saved * buffers.key_bytes <= num_places * buffers.part_bytes + buffers.min_shared_bytes:
        return NO_SHARERS
    for prefix in prefixes:
        tiles[whole[prefix.members], ItemColumn.KEY_BEGIN] = prefix.key_end
    return sharers


def _make_items(
    tiles: Int32Array,
    whole: Int64Array,
    prefixes: list[SharedPrefix],
    members: list[Int64Array],
    item_tokens: int,
) -> tuple[Int32Array, tuple[Int64Array, Int64Array, Int64Array]]:
    """Items of up to `item_tokens` tokens for the prefixes, and their pairs (item, tile, token). A prefix's members are
    indices into `whole`, which lists tiles; `members` has their numbers of tokens."""
    tile_runs, token_runs, item_runs = [], [], []
    ranges: list[tuple[int, int]] = []
    for prefix, num_tokens in zip(prefixes, members, strict=True):
        run, token = enumerate_runs(num_tokens)
        tile_runs.append(whole[prefix.members][run])
        token_runs.append(token)
        size = len(token)
        num_items = -(-size // item_tokens)
        item_runs.append(len(ranges) + np.arange(size) * num_items // size)
        ranges += [(prefix.key_begin, prefix.key_end)] * num_items
    tile, token, item = (np.concatenate(runs) for runs in (tile_runs, token_runs, item_runs))
    first = np.flatnonzero(np.diff(item, prepend=-1))
    position = tiles[tile, ItemColumn.POSITION] + token
    items = np.zeros((len(ranges), NUM_ITEM_COLUMNS), dtype=np.int32)
    items[:, ItemColumn.TOKEN] = first
    items[:, ItemColumn.NUM_TOKENS] = np.diff(first, append=len(item))
    items[:, ItemColumn.POSITION] = np.minimum.reduceat(position, first)
    items[:, [ItemColumn.KEY_BEGIN, ItemColumn.KEY_END]] = ranges
    items[:, ItemColumn.TABLE] = tiles[tile[first], ItemColumn.TABLE]
    return items, (item, tile, token)
