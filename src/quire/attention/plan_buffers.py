"""PlanBuffers: the device memory of a GPU's attention plans, and how much work a plan may hold.

The memory never moves, so that a CUDA graph captured with one plan can be replayed with the next.
"""

import math

import numpy as np
import torch

from quire.attention.inputs import AttentionShape, Int32Array
from quire.backends import MAX_CAPTURED_TOKENS
from quire.errors import ConfigError
from quire.kernels.gpu_plan import NUM_ITEM_COLUMNS, GatheredColumn, MergeColumn
from quire.kernels.transfer import staged

MIN_ROWS = 16
# Programs per multiprocessor that run at once, times the number of waves. With fewer, some are idle at the end; with
# more, each reads too little to reach full speed.
_PROGRAMS_PER_SM = 12
# An item of a shared prefix has many rows, and a multiprocessor has room for one such item: fewer programs fill it.
_SHARED_PROGRAMS_PER_SM = 4
# Bytes of a layer's KV that sharing must save, beyond the bytes of the parts that it writes and reads. They pay for one
# more launch and one more tail, at the bandwidth of the second-level cache, where sequences without sharing find what
# the first of them has read. Calculated in `tests/attention/test_sharing_cost.py`, not measured.
MIN_SHARED_BYTES = 150e6
_MAX_TILE = 64
_MAX_HEAD_DIM = 256
_MAX_VIEWS = 1024
_ALIGNMENT = 32  # int32s: sections begin at multiples of 128 bytes, for vector loads
# int32s from one count to the next. Triton compiles a kernel once for addresses that are multiples of 16 bytes, and
# again for one that is not.
COUNT_STRIDE = 4


class PlanBuffers:
    """The memory of plans: fixed on the device, written by one copy a step."""

    def __init__(
        self, shape: AttentionShape, *, num_sms: int | None = None, min_shared_bytes: float = MIN_SHARED_BYTES
    ) -> None:
        """`num_sms` is read from the device if not given. Prefixes are shared where that saves more than
        `min_shared_bytes` of one layer's KV."""
        self.shape = shape
        self.device = shape.device
        self.group = shape.group
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        max_num_seqs, max_num_tokens = shape.max_num_seqs, shape.max_num_tokens
        self.max_rows = 128 if head_dim <= 128 else 64
        """Most rows of a program: larger heads leave room for fewer."""
        self._check()
        self.tile = tile_of(shape.block_size)
        if num_sms is None:
            num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.target_items = max(1, num_sms * _PROGRAMS_PER_SM // num_kv_heads)
        """Items that keep the device busy."""
        max_tiles = max_num_seqs + max_num_tokens // self.tokens_per_tile(max(64, self.rows_for(self.group)))
        self.max_items = max(max_tiles, min(max_num_tokens, MAX_CAPTURED_TOKENS)) + self.target_items
        """Most items of one list."""
        self.target_shared_items = max(1, self.target_items * _SHARED_PROGRAMS_PER_SM // _PROGRAMS_PER_SM)
        self.key_bytes = 2 * num_kv_heads * head_dim * shape.kv_element_size
        """Bytes of the keys and values of one position in one layer."""
        self.part_bytes = 2 * num_heads * (head_dim + 1) * 4
        """Bytes that one token's part takes to write and read."""
        self.min_shared_bytes = min_shared_bytes
        self.max_shared_places = 2 * (max_num_seqs + num_sms * self.max_rows // num_heads)
        """Most parts of tokens that sharing may make: enough for its full programs to fill the device."""
        self.max_places = max(1024, 2 * self.target_items) + self.max_shared_places
        """Parts of tokens that `partials` has room for."""
        self.sections, end = self._lay_out()
        self.on_device = torch.zeros(end, dtype=torch.int32, device=self.device)
        self._views: dict[tuple[str | int, ...], torch.Tensor] = {}
        """Views of device memory, kept because successive steps need many of the same."""
        self.on_host: Int32Array = np.zeros(end, dtype=np.int32)
        """Where a plan is written before `send`."""
        self.partials = torch.empty(self.max_places, num_heads, head_dim, device=self.device)
        self.partial_lse = torch.empty(self.max_places, num_heads, device=self.device)

    def _check(self) -> None:
        """Refuse heads that the kernels cannot take."""
        if self.shape.head_dim > _MAX_HEAD_DIM:
            raise ConfigError(
                f"the model's heads have {self.shape.head_dim} dimensions; attention_backend triton takes "
                f"{_MAX_HEAD_DIM} at most: choose sdpa"
            )
        if self.group > self.max_rows:
            raise ConfigError(
                f"{self.group} query heads share a KV head; attention_backend triton takes {self.max_rows} at most: "
                "choose sdpa"
            )

    def _lay_out(self) -> tuple[dict[str, slice], int]:
        """The sections of the memory, and where the last one ends."""
        max_num_seqs, max_num_tokens = self.shape.max_num_seqs, self.shape.max_num_tokens
        sizes = {
            "counts": 4 * COUNT_STRIDE,
            "slots": max_num_tokens,
            "query_start_loc": max_num_seqs + 1,
            "seq_lens": max_num_seqs,
            "narrow": self.max_items * NUM_ITEM_COLUMNS,
            "wide": self.max_items * NUM_ITEM_COLUMNS,
            "shared": self.max_items * NUM_ITEM_COLUMNS,
            "gathered": self.max_places * len(GatheredColumn),
            "merges": self.max_places * len(MergeColumn),
            "block_tables": max_num_seqs * self.shape.max_blocks,  # last: a step sends no more of it than it has
        }
        sections: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            sections[name] = slice(end, end + size)
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        return sections, end

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.on_device.nbytes + self.partials.nbytes + self.partial_lse.nbytes

    def rows_for(self, num_rows: int) -> int:
        """The smallest tile with at least `num_rows` rows, or the largest tile."""
        return min(self.max_rows, max(MIN_ROWS, 1 << (num_rows - 1).bit_length()))

    def tokens_per_tile(self, num_rows: int) -> int:
        """New tokens of one sequence that a program of `num_rows` rows takes."""
        return num_rows // self.group

    def captured_shared_items(self, num_rows: int, num_tokens: int) -> int:
        """Items of shared keys, of `num_rows` rows, for which a graph of `num_tokens` tokens has programs."""
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
    """Keys that a program takes at a time. A tile lies in one block, so one block number is its address."""
    if not 16 <= block_size <= 256 or block_size % 16:
        raise ValueError(f"block_size: a GPU takes multiples of 16 from 16 to 256, found {block_size}")
    return min(_MAX_TILE, block_size & -block_size)
