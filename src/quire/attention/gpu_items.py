"""Items of a GPU's attention plan: runs of new tokens with ranges of keys, cut so that the whole device has work."""

from dataclasses import dataclass

import numpy as np

from quire.attention.inputs import Int32Array, Int64Array, StepArrays
from quire.attention.plan import enumerate_runs
from quire.attention.plan_buffers import PlanBuffers
from quire.kernels.gpu_plan import NUM_ITEM_COLUMNS, ItemColumn, MergeColumn

# Fewer tiles of keys than this are not worth a part of their own.
MIN_TILES = 4
NO_ITEMS = np.empty((0, NUM_ITEM_COLUMNS), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cuts the step's sequences into tiles of tokens."""

    step: StepArrays
    window: int
    buffers: PlanBuffers

    def tiles(self, sequences: Int64Array, tile_tokens: int) -> Int32Array:
        """Items [tiles, columns] of these sequences: up to `tile_tokens` tokens each and all the keys they see."""
        begin, end = self.step.query_start_loc[sequences], self.step.query_start_loc[sequences + 1]
        run, tile = enumerate_runs(-(-(end - begin) // tile_tokens))
        sequence, end = sequences[run], end[run]
        token = begin[run] + tile * tile_tokens
        lengths = self.step.seq_lens[sequence]
        position = lengths - (end - token) + self.buffers.shape.lookahead  # up to which the first token sees keys
        items = np.zeros((len(run), NUM_ITEM_COLUMNS), dtype=np.int32)
        items[:, ItemColumn.TOKEN] = token
        items[:, ItemColumn.NUM_TOKENS] = np.minimum(tile_tokens, end - token)
        items[:, ItemColumn.POSITION] = position
        if self.window > 0:
            first_key = np.maximum(0, position - self.window + 1)
            items[:, ItemColumn.KEY_BEGIN] = first_key // self.buffers.tile * self.buffers.tile
        items[:, ItemColumn.KEY_END] = np.minimum(position + items[:, ItemColumn.NUM_TOKENS], lengths)
        items[:, ItemColumn.TABLE] = sequence * self.step.block_tables.shape[1]
        items[:, ItemColumn.PARTIAL] = -1
        return items


class Splitter:
    """Cuts items along their keys and gives the parts places in `partials`."""

    def __init__(self, buffers: PlanBuffers) -> None:
        self._buffers = buffers
        self._num_places = 0
        self._merges: list[Int32Array] = []

    def split(self, items: Int32Array, others: Int64Array | None = None) -> tuple[Int32Array, Int64Array, Int64Array]:
        """Returns the items, costliest first, with long ones cut into parts of about equal length; the first place of
        each input item that has parts; and the number of parts of each input item.

        At most `target_items` items are added. `others` [items] counts the parts that an item gets from elsewhere: they
        have places after its own.
        """
        if others is None:
            others = np.zeros(len(items), dtype=np.int64)
        tile = self._buffers.tile
        first_tile = items[:, ItemColumn.KEY_BEGIN] // tile
        num_tiles = -(-items[:, ItemColumn.KEY_END] // tile) - first_tile
        num_tokens = items[:, ItemColumn.NUM_TOKENS].astype(np.int64)
        share = max(MIN_TILES, -(-int(num_tiles.sum()) // self._buffers.target_items))
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
        """The merges to run after all items."""
        return np.concatenate(self._merges) if self._merges else np.empty((0, len(MergeColumn)), dtype=np.int32)
