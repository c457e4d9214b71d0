"""The planner for a GPU: a step's ragged sequences become work lists, once, for every layer to run.

An item is a run of new tokens of one sequence and a range of its keys; a program of the kernel takes an item for one KV
head, whose query heads share each key that is read. Long ranges are cut so that the whole GPU has work however ragged
the batch is, and the parts are merged by a second kernel.

All that a step's kernels read travels to the device as one array of int32, in one copy, into memory that never moves.
So a CUDA graph captured with one plan can be replayed with the next, as long as both were planned with the same
`captured_seqs` and `captured_query_len`: they bound the number of programs, and surplus programs return at once.

Nothing here imports Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quire.attention.plan import enumerate_runs
from quire.kernels.gpu_plan import (
    NUM_ITEM_COLUMNS,
    GatheredColumn,
    GpuAttentionPlan,
    ItemColumn,
    MergeColumn,
    WorkList,
)

__all__ = ["MAX_NARROW_TOKENS", "GpuAttentionPlan", "PlanBuffers", "plan_attention"]

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]

MAX_NARROW_TOKENS = 8
"""New tokens up to which a sequence is planned as decode: its rows fill less than one tile of prefill."""
_MIN_ROWS = 16
# Programs per multiprocessor that run at once, times how often each place is filled: fewer leave some idle at the end,
# more read too little each to reach full speed.
_PROGRAMS_PER_SM = 12
# Less than this many tiles of keys are not worth a part of their own.
_MIN_TILES = 4
_MAX_TILE = 64
_ALIGNMENT = 32  # int32s: sections begin at multiples of 128 bytes, as vector loads want it


class PlanBuffers:
    """The memory of plans: fixed on the device, written from one of two pinned host buffers in turn."""

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
    ) -> None:
        """`max_blocks` is of one sequence. `num_sms` is asked of the device if not given."""
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.group = num_heads // num_kv_heads
        self.max_rows = 128 if head_dim <= 128 else 64
        """Of a program: larger heads leave room for fewer."""
        if self.group > self.max_rows:
            raise ValueError(f"{self.group} query heads share a KV head; the GPU kernels take at most {self.max_rows}")
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
        max_items = max_tiles + self.target_items
        self.max_places = max(1024, 2 * self.target_items)
        """Tokens' parts that `partials` holds."""
        sizes = {
            "counts": 4,
            "slots": max_num_tokens,
            "query_start_loc": max_num_seqs + 1,
            "seq_lens": max_num_seqs,
            "narrow": max_items * NUM_ITEM_COLUMNS,
            "wide": max_items * NUM_ITEM_COLUMNS,
            "shared": self.target_items * NUM_ITEM_COLUMNS,
            "gathered": self.max_places * len(GatheredColumn),
            "merges": self.max_places * len(MergeColumn),
            "block_tables": max_num_seqs * max_blocks,  # last: a step sends no more of it than it has
        }
        self.sections: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.sections[name] = slice(end, end + size)
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        on_cuda = device.type == "cuda"
        self.on_device = torch.zeros(end, dtype=torch.int32, device=device)
        self._on_host = [torch.zeros(end, dtype=torch.int32, pin_memory=on_cuda) for _ in range(2)]
        self._sent = [torch.cuda.Event() if on_cuda else None for _ in range(2)]
        self._turn = 0
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

    def host(self) -> Int32Array:
        """The next host buffer to write a plan to, once the device has read what it last held."""
        self._turn = 1 - self._turn
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        array: Int32Array = self._on_host[self._turn].numpy()
        return array

    def send(self, end: int) -> None:
        """Copy the buffer last given by `host` up to `end` to the device, in the order of its current stream."""
        self.on_device[:end].copy_(self._on_host[self._turn][:end], non_blocking=True)
        event = self._sent[self._turn]
        if event is not None:
            event.record()

    def view(self, section: str, *shape: int) -> torch.Tensor:
        """The beginning of a section on the device."""
        begin = self.sections[section].start
        return self.on_device[begin : begin + int(np.prod(shape))].view(shape)


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
    captured_seqs: int = 0,
    captured_query_len: int = 1,
) -> GpuAttentionPlan:
    """Plan one step of B sequences with T new tokens and send the plan to the device; arguments as for a CPU.

    The new tokens are the last of each sequence, and their keys are written before the plan runs. A plan made for a
    window serves the layers that have this window or a smaller one.

    `captured_seqs` > 0 plans for a CUDA graph of so many sequences of up to `captured_query_len` new tokens each: the
    plan has a slot for every token the graph has room for, -1 beyond T, and launches that do not depend on the step.
    """
    num_seqs, num_tokens = len(seq_lens), len(slots)
    if block_tables.shape[1] * buffers.block_size < seq_lens.max(initial=0):
        raise ValueError(
            f"block_tables has room for {block_tables.shape[1]} blocks of {buffers.block_size}, "
            f"too few for a sequence of {seq_lens.max()} tokens"
        )
    query_lens = np.diff(query_start_loc)
    if captured_seqs and (num_seqs > captured_seqs or query_lens.max(initial=0) > captured_query_len):
        raise ValueError(
            f"{num_seqs} sequences of up to {query_lens.max(initial=0)} new tokens do not fit a graph of "
            f"{captured_seqs} sequences of up to {captured_query_len}"
        )
    longest = captured_query_len if captured_seqs else int(query_lens[query_lens <= MAX_NARROW_TOKENS].max(initial=1))
    narrow_rows = buffers.rows_for(longest * buffers.group)
    narrow = query_lens <= (captured_query_len if captured_seqs else MAX_NARROW_TOKENS)
    wide_rows = buffers.rows_for(max(64, int(query_lens.max(initial=0)) * buffers.group))

    geometry = _Geometry(query_start_loc, seq_lens, block_tables.shape[1], window, buffers)
    splitter = _Splitter(buffers)
    narrow_items = splitter.split(geometry.tiles(np.flatnonzero(narrow), buffers.tokens_per_tile(narrow_rows)))
    wide_items = splitter.split(geometry.tiles(np.flatnonzero(~narrow), buffers.tokens_per_tile(wide_rows)))
    merges = splitter.merges()

    host, sections = buffers.host(), buffers.sections
    host[sections["counts"]] = len(narrow_items), len(wide_items), 0, len(merges)
    num_slots = max(num_tokens, captured_seqs * captured_query_len)
    _put(host, sections["slots"], slots, fill_to=num_slots)
    _put(host, sections["query_start_loc"], query_start_loc)
    _put(host, sections["seq_lens"], seq_lens)
    _put(host, sections["narrow"], narrow_items)
    _put(host, sections["wide"], wide_items)
    _put(host, sections["merges"], merges)
    _put(host, sections["block_tables"], block_tables)
    buffers.send(sections["block_tables"].start + block_tables.size)

    counts = buffers.view("counts", 4)

    def work_list(index: int, name: str, num_programs: int, num_rows: int) -> WorkList:
        return WorkList(
            buffers.view(name, num_programs, NUM_ITEM_COLUMNS), counts[index : index + 1], num_programs, num_rows
        )

    bound = captured_seqs * -(-captured_query_len // buffers.tokens_per_tile(narrow_rows))
    bound += buffers.target_items if captured_seqs else 0
    num_merge_programs = min(buffers.max_places, captured_seqs * captured_query_len) or len(merges)
    return GpuAttentionPlan(
        query_start_loc=buffers.view("query_start_loc", num_seqs + 1),
        seq_lens=buffers.view("seq_lens", num_seqs),
        block_tables=buffers.view("block_tables", *block_tables.shape),
        slots=buffers.view("slots", num_slots),
        window=window,
        narrow=work_list(0, "narrow", bound or len(narrow_items), narrow_rows),
        wide=work_list(1, "wide", 0 if captured_seqs else len(wide_items), wide_rows),
        shared=work_list(2, "shared", 0, 16),
        gathered=buffers.view("gathered", 0, len(GatheredColumn)),
        merges=buffers.view("merges", num_merge_programs, len(MergeColumn)),
        num_merges=counts[3:4],
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

    def split(self, items: Int32Array) -> Int32Array:
        """The items, with those of many keys in parts of about equal length, costliest first.

        No more than `target_items` items are added.
        """
        tile = self._buffers.tile
        first_tile = items[:, ItemColumn.KEY_BEGIN] // tile
        num_tiles = -(-items[:, ItemColumn.KEY_END] // tile) - first_tile
        num_tokens = items[:, ItemColumn.NUM_TOKENS].astype(np.int64)
        share = max(_MIN_TILES, -(-int(num_tiles.sum()) // self._buffers.target_items))
        while True:
            num_parts = -(-num_tiles // share)
            places = np.where(num_parts > 1, num_parts * num_tokens, 0)
            if self._num_places + places.sum() <= self._buffers.max_places:
                break
            share *= 2
        first_place = self._num_places + np.cumsum(places) - places
        if places.any():
            self._num_places += int(places.sum())
            (cut,) = np.nonzero(num_parts > 1)
            run, token = enumerate_runs(num_tokens[cut])
            merges = np.empty((len(run), len(MergeColumn)), dtype=np.int32)
            merges[:, MergeColumn.TOKEN] = items[cut[run], ItemColumn.TOKEN] + token
            merges[:, MergeColumn.PARTIAL] = first_place[cut[run]] + token
            merges[:, MergeColumn.NUM_PARTS] = num_parts[cut[run]]
            merges[:, MergeColumn.STRIDE] = num_tokens[cut[run]]
            self._merges.append(merges)

            run, part = enumerate_runs(num_parts)
            items, num_parts, first_tile = items[run], num_parts[run], first_tile[run]
            begin = first_tile + num_tiles[run] * part // num_parts
            end = first_tile + num_tiles[run] * (part + 1) // num_parts
            items[:, ItemColumn.KEY_BEGIN] = begin * tile
            items[:, ItemColumn.KEY_END] = np.minimum(items[:, ItemColumn.KEY_END], end * tile)
            place = first_place[run] + part * num_tokens[run]
            items[:, ItemColumn.PARTIAL] = np.where(num_parts > 1, place, -1)
        num_keys = items[:, ItemColumn.KEY_END] - items[:, ItemColumn.KEY_BEGIN]
        return items[np.argsort(-num_keys, kind="stable")]

    def merges(self) -> Int32Array:
        """What is left to put together after all items ran."""
        return np.concatenate([np.empty((0, len(MergeColumn)), dtype=np.int32), *self._merges])


def _put(host: Int32Array, section: slice, values: Int32Array | Sequence[int], fill_to: int = 0) -> None:
    flat = np.ravel(values)
    end = section.start + len(flat)
    assert end <= section.stop, "the plan outgrew its buffers"
    host[section.start : end] = flat
    if fill_to > len(flat):
        host[end : section.start + fill_to] = -1
