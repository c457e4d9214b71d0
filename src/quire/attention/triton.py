"""The planner for a GPU: a step's ragged sequences become work lists, once, for every layer to run.

An item is a run of new tokens of one sequence and a range of its keys; a program of the kernel takes an item for one KV
head, whose query heads share each key that is read. Long ranges are cut so that the whole GPU has work however ragged
the batch is, and the parts are merged by a second kernel. Keys that many sequences begin with become items of their
own, read once for all of them, where that pays (cascade attention; `shared_prefixes`): another part to merge.

All that a step's kernels read travels to the device as one array of int32, in one copy, into memory that never moves.
So a CUDA graph captured with one plan can be replayed with the next, as long as both were planned with the same
`captured_tokens` and are of one `variant`: these bound the number of programs, and surplus programs return at once.
Variants differ in the rows of the programs, of which those for shared keys may be none.

Nothing here imports Triton.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention.plan import enumerate_runs
from quire.attention.shared_prefixes import find_shared_prefixes
from quire.backends import MAX_CAPTURED_TOKENS, MAX_NARROW_TOKENS
from quire.errors import ConfigError
from quire.kernels.gpu_plan import (
    NUM_ITEM_COLUMNS,
    GatheredColumn,
    GpuAttentionPlan,
    ItemColumn,
    MergeColumn,
    WorkList,
)
from quire.kernels.interface import Variant
from quire.kernels.transfer import staged

__all__ = ["GpuAttentionPlan", "PlanBuffers", "plan_attention"]

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]

_MIN_ROWS = 16
# Programs per multiprocessor that run at once, times how often each place is filled: fewer leave some idle at the end,
# more read too little each to reach full speed.
_PROGRAMS_PER_SM = 12
# Less than this many tiles of keys are not worth a part of their own.
_MIN_TILES = 4
# An item of a shared prefix holds many rows, for which a multiprocessor has room once: fewer programs fill it.
_SHARED_PROGRAMS_PER_SM = 4
# What sharing must save: so many bytes of a layer's KV that need not be read again, beyond those of the parts that it
# writes and reads instead. They stand for one launch more and two tails where there was one, at the rate of a cache,
# where sharers find what one of them has just read. Not measured: calculated in `tests/attention/test_sharing_cost.py`.
_MIN_SHARED_BYTES = 150e6
_MIN_SHARERS = 8
# In a captured step programs of shared keys hold at least so many rows, so that few variants serve all batches.
_MIN_CAPTURED_SHARED_ROWS = 64
_MAX_TILE = 64
_MAX_HEAD_DIM = 256
_MAX_VIEWS = 1024
_ALIGNMENT = 32  # int32s: sections begin at multiples of 128 bytes, as vector loads want it
# int32s from one count to the next. Triton compiles a kernel for addresses that are multiples of 16 bytes, and again
# for one that is not.
_COUNT_STRIDE = 4


class PlanBuffers:
    """The memory of plans: fixed on the device, written by one copy a step."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks: int,
        device: torch.device,
        num_sms: int | None = None,
        kv_element_size: int = 2,
        min_shared_bytes: float = _MIN_SHARED_BYTES,
    ) -> None:
        """`max_blocks` is of one sequence. `num_sms` is asked of the device if not given.

        Prefixes are shared where that saves more than `min_shared_bytes` of a layer, in whose KV a number takes
        `kv_element_size` bytes."""
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.group = num_heads // num_kv_heads
        self.max_rows = 128 if head_dim <= 128 else 64
        """Of a program: larger heads leave room for fewer."""
        if head_dim > _MAX_HEAD_DIM:
            raise ConfigError(
                f"the model's heads have {head_dim} dimensions; attention_backend triton takes {_MAX_HEAD_DIM} at "
                "most: choose sdpa"
            )
        if self.group > self.max_rows:
            raise ConfigError(
                f"{self.group} query heads share a KV head; attention_backend triton takes {self.max_rows} at most: "
                "choose sdpa"
            )
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.max_blocks = max_blocks
        self.device = device
        self.tile = tile_of(block_size)
        if num_sms is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.target_items = max(1, num_sms * _PROGRAMS_PER_SM // num_kv_heads)
        """Items that keep the device busy."""
        max_tiles = max_num_seqs + max_num_tokens // self.tokens_per_tile(max(64, self.rows_for(self.group)))
        self.max_items = max(max_tiles, min(max_num_tokens, MAX_CAPTURED_TOKENS)) + self.target_items
        """Of one list."""
        self.target_shared_items = max(1, self.target_items * _SHARED_PROGRAMS_PER_SM // _PROGRAMS_PER_SM)
        self.key_bytes = 2 * num_kv_heads * head_dim * kv_element_size
        """Of one position in one layer: its keys and values."""
        self.part_bytes = 2 * num_heads * (head_dim + 1) * 4
        """Of one token's part, written and read."""
        self.min_shared_bytes = min_shared_bytes
        self.max_shared_places = 2 * (max_num_seqs + num_sms * self.max_rows // num_heads)
        """Tokens' parts that sharing may make: enough for its full programs to fill the device."""
        self.max_places = max(1024, 2 * self.target_items) + self.max_shared_places
        """Tokens' parts that `partials` holds."""
        sizes = {
            "counts": 4 * _COUNT_STRIDE,
            "slots": max_num_tokens,
            "query_start_loc": max_num_seqs + 1,
            "seq_lens": max_num_seqs,
            "narrow": self.max_items * NUM_ITEM_COLUMNS,
            "wide": self.max_items * NUM_ITEM_COLUMNS,
            "shared": self.max_items * NUM_ITEM_COLUMNS,
            "gathered": self.max_places * len(GatheredColumn),
            "merges": self.max_places * len(MergeColumn),
            "block_tables": max_num_seqs * max_blocks,  # last: a step sends no more of it than it has
        }
        self.sections: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.sections[name] = slice(end, end + size)
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        self.on_device = torch.zeros(end, dtype=torch.int32, device=device)
        self._views: dict[tuple[str | int, ...], torch.Tensor] = {}
        """Of the device's memory, made once: steps that follow each other have many in common."""
        self.on_host: Int32Array = np.zeros(end, dtype=np.int32)
        """Where a plan is written before `send`."""
        self.partials = torch.empty(self.max_places, num_heads, head_dim, device=device)
        self.partial_lse = torch.empty(self.max_places, num_heads, device=device)

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self.on_device.nbytes + self.partials.nbytes + self.partial_lse.nbytes

    def rows_for(self, num_rows: int) -> int:
        """The smallest tile of rows that holds so many, or the largest there is."""
        return min(self.max_rows, max(_MIN_ROWS, 1 << (num_rows - 1).bit_length()))

    def tokens_per_tile(self, num_rows: int) -> int:
        """New tokens of one sequence that a program of `num_rows` rows takes."""
        return num_rows // self.group

    def captured_shared_items(self, num_rows: int, num_tokens: int) -> int:
        """Items of shared keys that a graph of so many tokens has programs of `num_rows` rows for."""
        return min(self.max_items, self.target_shared_items + -(-num_tokens // self.tokens_per_tile(num_rows)))

    def send(self, end: int) -> None:
        """Copy `on_host` up to `end` to the device, in the order of its current stream."""
        self.on_device[:end].copy_(staged(self.on_host[:end], self.device), non_blocking=True)

    def view(self, section: str, *shape: int) -> torch.Tensor:
        """The beginning of a section on the device."""
        key: tuple[str | int, ...] = (section, *shape)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            begin = self.sections[section].start
            view = self._views[key] = self.on_device[begin : begin + math.prod(shape)].view(shape)
        return view


def tile_of(block_size: int) -> int:
    """Keys a program takes at a time: never from two blocks, so that one block number serves a whole tile."""
    if not 16 <= block_size <= 256 or block_size % 16:
        raise ValueError(f"block_size: a GPU takes multiples of 16 from 16 to 256, found {block_size}")
    return min(_MAX_TILE, block_size & -block_size)


def plan_attention(
    query_start_loc: Int32Array,
    seq_lens: Int32Array,
    block_tables: Int32Array,
    slots: Int32Array,
    *,
    buffers: PlanBuffers,
    window: int = 0,
    captured_tokens: int = 0,
    variant: Variant = (),
) -> GpuAttentionPlan:
    """Plan one step of B sequences with T new tokens and send the plan to the device; arguments as for a CPU.

    The new tokens are the last of each sequence, and their keys are written before the plan runs. A plan made for a
    window serves the layers that have this window or a smaller one.

    `captured_tokens` > 0 plans for a CUDA graph with room for so many tokens, of sequences of up to MAX_NARROW_TOKENS
    new ones each: the plan has a slot for every token of the graph, -1 beyond T, and launches that depend on its
    variant alone. A `variant` is asked for where such a plan is made without sequences.
    """
    num_seqs, num_tokens = len(seq_lens), len(slots)
    if block_tables.shape[1] * buffers.block_size < seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {block_tables.shape[1]} blocks of {buffers.block_size}, "
            f"too few for a sequence of {seq_lens.max()} tokens"
        )
    query_lens = np.diff(query_start_loc)
    narrow = query_lens <= MAX_NARROW_TOKENS
    if captured_tokens and (num_tokens > captured_tokens or not narrow.all()):
        raise ValueError(
            f"{num_tokens} new tokens, up to {query_lens.max(initial=0)} of one sequence, do not fit a graph of "
            f"{captured_tokens} tokens, up to {MAX_NARROW_TOKENS} of one"
        )
    narrow_rows = buffers.rows_for(int(query_lens[narrow].max(initial=1)) * buffers.group)
    shared_rows = 0
    if variant:
        narrow_rows, shared_rows = variant
    wide_rows = buffers.rows_for(max(64, int(query_lens.max(initial=0)) * buffers.group))

    geometry = _Geometry(query_start_loc, seq_lens, block_tables.shape[1], window, buffers)
    splitter = _Splitter(buffers)
    narrow_tiles = geometry.tiles(np.flatnonzero(narrow), buffers.tokens_per_tile(narrow_rows))
    sharers = _share_prefixes(narrow_tiles, block_tables, buffers, captured_tokens)
    # Most steps are decode that shares nothing, and a step of few sequences takes a GPU as long as planning takes.
    shares = sharers is not _NO_SHARERS
    parts_of_sharers = sharers.parts_of(narrow_tiles) if shares else None
    narrow_items, first_place, num_parts = splitter.split(narrow_tiles, parts_of_sharers)
    wide_items = _NO_ITEMS
    if not narrow.all():
        wide_tiles = geometry.tiles(np.flatnonzero(~narrow), buffers.tokens_per_tile(wide_rows))
        wide_items, _, _ = splitter.split(wide_tiles)
    merges = splitter.merges()
    shared_items, gathered = _NO_ITEMS, _NOTHING_GATHERED
    if shares:
        shared_items, gathered = sharers.lay_out(narrow_tiles, first_place, num_parts, buffers.tile)

    host, sections = buffers.on_host, buffers.sections
    counts_on_host = host[sections["counts"]].reshape(4, _COUNT_STRIDE)
    counts_on_host[:, 0] = len(narrow_items), len(wide_items), len(shared_items), len(merges)
    num_slots = max(num_tokens, captured_tokens)
    _put(host, sections["slots"], slots, fill_to=num_slots)
    _put(host, sections["query_start_loc"], query_start_loc)
    _put(host, sections["seq_lens"], seq_lens)
    _put(host, sections["narrow"], narrow_items)
    _put(host, sections["wide"], wide_items)
    _put(host, sections["shared"], shared_items)
    _put(host, sections["gathered"], gathered)
    _put(host, sections["merges"], merges)
    _put(host, sections["block_tables"], block_tables)
    buffers.send(sections["block_tables"].start + block_tables.size)

    counts = buffers.view("counts", 4, _COUNT_STRIDE)

    def work_list(index: int, name: str, num_programs: int, num_rows: int) -> WorkList:
        return WorkList(buffers.view(name, num_programs, NUM_ITEM_COLUMNS), counts[index, :1], num_programs, num_rows)

    # As many tiles as tokens at most, and the parts that are added.
    bound = captured_tokens + buffers.target_items if captured_tokens else len(narrow_items)
    num_merge_programs = min(buffers.max_places, captured_tokens) or len(merges)
    num_shared_programs = len(shared_items)
    if num_shared_programs:
        shared_rows = sharers.num_rows
    if captured_tokens and shared_rows:
        num_shared_programs = buffers.captured_shared_items(shared_rows, captured_tokens)
    return GpuAttentionPlan(
        query_start_loc=buffers.view("query_start_loc", num_seqs + 1),
        seq_lens=buffers.view("seq_lens", num_seqs),
        # A tensor of nothing has no address, and a graph keeps the one it was captured with.
        block_tables=buffers.view("block_tables", max(1, num_seqs), max(1, block_tables.shape[1])),
        slots=buffers.view("slots", num_slots),
        window=window,
        narrow=work_list(0, "narrow", bound, narrow_rows),
        wide=work_list(1, "wide", len(wide_items), wide_rows),
        shared=work_list(2, "shared", num_shared_programs, shared_rows),
        gathered=buffers.view("gathered", buffers.max_places, len(GatheredColumn)),
        merges=buffers.view("merges", num_merge_programs, len(MergeColumn)),
        num_merges=counts[3, :1],
        num_merge_programs=num_merge_programs,
        partials=buffers.partials,
        partial_lse=buffers.partial_lse,
        tile=buffers.tile,
    )


@dataclass(frozen=True, slots=True)
class _Geometry:
    """The step's sequences, and how they are cut into tiles of tokens."""

    query_start_loc: Int32Array
    seq_lens: Int32Array
    table_width: int
    window: int
    buffers: PlanBuffers

    def tiles(self, sequences: Int64Array, tile_tokens: int) -> Int32Array:
        """Items [tiles, columns] of these sequences: up to `tile_tokens` tokens each and all the keys they see."""
        begin, end = self.query_start_loc[sequences], self.query_start_loc[sequences + 1]
        run, tile = enumerate_runs(-(-(end - begin) // tile_tokens))
        sequence, end = sequences[run], end[run]
        token = begin[run] + tile * tile_tokens
        position = self.seq_lens[sequence] - (end - token)
        items = np.zeros((len(run), NUM_ITEM_COLUMNS), dtype=np.int32)
        items[:, ItemColumn.TOKEN] = token
        items[:, ItemColumn.NUM_TOKENS] = np.minimum(tile_tokens, end - token)
        items[:, ItemColumn.POSITION] = position
        if self.window > 0:
            first_key = np.maximum(0, position - self.window + 1)
            items[:, ItemColumn.KEY_BEGIN] = first_key // self.buffers.tile * self.buffers.tile
        items[:, ItemColumn.KEY_END] = position + items[:, ItemColumn.NUM_TOKENS]
        items[:, ItemColumn.TABLE] = sequence * self.table_width
        items[:, ItemColumn.PARTIAL] = -1
        return items


class _Splitter:
    """Cuts items along their keys and gives the parts places in `partials`."""

    def __init__(self, buffers: PlanBuffers) -> None:
        self._buffers = buffers
        self._num_places = 0
        self._merges: list[Int32Array] = []

    def split(self, items: Int32Array, others: Int64Array | None = None) -> tuple[Int32Array, Int64Array, Int64Array]:
        """The items, with those of many keys in parts of about equal length, costliest first.

        No more than `target_items` items are added. `others` counts, of each item, parts that are not its own: they
        get places behind its own. Returned beside the items are each one's first place, where it has one, and how many
        parts it became.
        """
        if others is None:
            others = np.zeros(len(items), dtype=np.int64)
        tile = self._buffers.tile
        first_tile = items[:, ItemColumn.KEY_BEGIN] // tile
        num_tiles = -(-items[:, ItemColumn.KEY_END] // tile) - first_tile
        num_tokens = items[:, ItemColumn.NUM_TOKENS].astype(np.int64)
        share = max(_MIN_TILES, -(-int(num_tiles.sum()) // self._buffers.target_items))
        while True:
            num_parts = -(-num_tiles // share)
            all_parts = num_parts + others
            places = np.where(all_parts > 1, all_parts * num_tokens, 0)
            if self._num_places + places.sum() <= self._buffers.max_places:
                break
            share *= 2
        first_place = self._num_places + np.cumsum(places) - places
        own_parts = num_parts
        if places.any():
            self._num_places += int(places.sum())
            (cut,) = np.nonzero(all_parts > 1)
            run, token = enumerate_runs(num_tokens[cut])
            merges = np.empty((len(run), len(MergeColumn)), dtype=np.int32)
            merges[:, MergeColumn.TOKEN] = items[cut[run], ItemColumn.TOKEN] + token
            merges[:, MergeColumn.PARTIAL] = first_place[cut[run]] + token
            merges[:, MergeColumn.NUM_PARTS] = all_parts[cut[run]]
            merges[:, MergeColumn.STRIDE] = num_tokens[cut[run]]
            self._merges.append(merges)

            run, part = enumerate_runs(num_parts)
            items, num_parts, first_tile, all_parts = items[run], num_parts[run], first_tile[run], all_parts[run]
            begin = first_tile + num_tiles[run] * part // num_parts
            end = first_tile + num_tiles[run] * (part + 1) // num_parts
            items[:, ItemColumn.KEY_BEGIN] = begin * tile
            items[:, ItemColumn.KEY_END] = np.minimum(items[:, ItemColumn.KEY_END], end * tile)
            place = first_place[run] + part * num_tokens[run]
            items[:, ItemColumn.PARTIAL] = np.where(all_parts > 1, place, -1)
        num_keys = items[:, ItemColumn.KEY_END] - items[:, ItemColumn.KEY_BEGIN]
        return items[np.argsort(-num_keys, kind="stable")], first_place, own_parts

    def merges(self) -> Int32Array:
        """What is left to put together after all items ran."""
        return np.concatenate(self._merges) if self._merges else np.empty((0, len(MergeColumn)), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class _Sharers:
    """Items of shared prefixes, before they are cut along their keys, and who takes part in each."""

    items: Int32Array
    """[S, columns]; TOKEN counts in `token`."""
    num_parts: Int64Array
    """[S]"""
    item: Int64Array
    """[N]: one for each pair of an item and a token of it, ordered by item."""
    tile: Int64Array
    """[N]: the tile that the token is of."""
    token: Int64Array
    """[N]: its place in the tile."""
    num_rows: int

    def parts_of(self, tiles: Int32Array) -> Int64Array:
        """Of each tile, its parts of all shared items."""
        first = self.token == 0
        counts = np.bincount(self.tile[first], self.num_parts[self.item[first]], len(tiles))
        parts: Int64Array = counts.astype(np.int64)
        return parts

    def lay_out(
        self, tiles: Int32Array, first_place: Int64Array, own_parts: Int64Array, key_tile: int
    ) -> tuple[Int32Array, Int32Array]:
        """The items, cut, and `gathered`. A tile's places are those of its own parts, then of its items' in order."""
        # Of each pair, the parts that its tile has before this item's.
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


_NO_ITEMS = np.empty((0, NUM_ITEM_COLUMNS), dtype=np.int32)
_NOTHING_GATHERED = np.empty((0, len(GatheredColumn)), dtype=np.int32)
_NO_PAIRS = np.empty(0, dtype=np.int64)
_NO_SHARERS = _Sharers(_NO_ITEMS, _NO_PAIRS, _NO_PAIRS, _NO_PAIRS, _NO_PAIRS, _MIN_ROWS)


def _share_prefixes(
    tiles: Int32Array, block_tables: Int32Array, buffers: PlanBuffers, captured_tokens: int
) -> _Sharers:
    """Makes items of the prefixes that are worth it, and takes their keys from the tiles. `captured_tokens` is 0, or
    what a graph has room for."""
    (whole,) = np.nonzero(tiles[:, ItemColumn.KEY_BEGIN] == 0)  # where a window cuts, each row sees another part
    if len(whole) < _MIN_SHARERS:
        return _NO_SHARERS
    num_tokens = tiles[whole, ItemColumn.NUM_TOKENS].astype(np.int64)
    prefixes = find_shared_prefixes(
        block_tables[tiles[whole, ItemColumn.TABLE] // block_tables.shape[1]],
        tiles[whole, ItemColumn.POSITION].astype(np.int64) // buffers.block_size,
        num_tokens * buffers.group,
        block_size=buffers.block_size,
        read_rows=buffers.max_rows,
        min_saved=buffers.min_shared_bytes / buffers.key_bytes * buffers.max_rows,
        min_members=_MIN_SHARERS,
    )
    if not prefixes:
        return _NO_SHARERS
    sizes = [int(num_tokens[prefix.members].sum()) for prefix in prefixes]
    num_rows = buffers.rows_for(max(sizes) * buffers.group)
    max_items = buffers.max_items
    if captured_tokens:
        num_rows = max(num_rows, _MIN_CAPTURED_SHARED_ROWS)
        max_items = buffers.captured_shared_items(num_rows, captured_tokens)
    item_tokens = buffers.tokens_per_tile(num_rows)

    tile_runs, token_runs, item_runs = [], [], []
    ranges: list[tuple[int, int]] = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        run, token = enumerate_runs(num_tokens[prefix.members])
        tile_runs.append(whole[prefix.members][run])
        token_runs.append(token)
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

    key_tiles = (items[:, ItemColumn.KEY_END] - items[:, ItemColumn.KEY_BEGIN]) // buffers.tile
    share = max(_MIN_TILES, -(-int(key_tiles.sum()) // buffers.target_shared_items))
    while True:
        num_parts = -(-key_tiles.astype(np.int64) // share)
        sharers = _Sharers(items, num_parts, item, tile, token, num_rows)
        # Each sharing tile has a part of its own, too.
        parts = sharers.parts_of(tiles)
        num_places = int((np.where(parts > 0, parts + 1, 0) * tiles[:, ItemColumn.NUM_TOKENS]).sum())
        if num_places <= buffers.max_shared_places and num_parts.sum() <= max_items:
            break
        if num_parts.max() == 1:
            return _NO_SHARERS
        share *= 2
    saved = sum((prefix.key_end - prefix.key_begin) * len(prefix.members) for prefix in prefixes)
    saved -= int(key_tiles.sum()) * buffers.tile
    if saved * buffers.key_bytes <= num_places * buffers.part_bytes + buffers.min_shared_bytes:
        return _NO_SHARERS
    for prefix in prefixes:
        tiles[whole[prefix.members], ItemColumn.KEY_BEGIN] = prefix.key_end
    return sharers


def _put(host: Int32Array, section: slice, values: Int32Array | Sequence[int], fill_to: int = 0) -> None:
    flat = np.ravel(values)
    end = section.start + len(flat)
    assert end <= section.stop, "the plan outgrew its buffers"
    if len(flat):
        host[section.start : end] = flat
    if fill_to > len(flat):
        host[end : section.start + fill_to] = -1
