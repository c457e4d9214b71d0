"""GpuAttentionPlan: one step's attention as work lists in device memory. `quire.attention.triton` makes it, and the
GPU's kernels read it. Nothing here needs Triton."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from quire.kernels.interface import AttentionPlan, Variant


class ItemColumn(IntEnum):
    """Columns of `WorkList.items`. An item is a run of new tokens and a range of keys, for every KV head."""

    TOKEN = 0  # first row of q and out; in `shared`, first row of `GpuAttentionPlan.gathered`
    NUM_TOKENS = 1
    POSITION = 2  # position of the first token, before the others; in `shared`, the lowest position of its tokens
    KEY_BEGIN = 3  # positions in the sequence, a multiple of the tile
    KEY_END = 4
    TABLE = 5  # where the sequence's blocks begin in the flattened `block_tables`
    PARTIAL = 6  # the first token's place in `partials`, before the others; -1: the item writes `out` itself


class GatheredColumn(IntEnum):
    """Columns of `GpuAttentionPlan.gathered`: tokens of shared items, which are scattered over the batch."""

    TOKEN = 0
    PARTIAL = 1
    POSITION = 2
    _UNUSED = 3  # a row is 16 bytes


class MergeColumn(IntEnum):
    """Columns of `GpuAttentionPlan.merges`. The parts of one token are `STRIDE` places apart in `partials`."""

    TOKEN = 0
    PARTIAL = 1
    NUM_PARTS = 2
    STRIDE = 3


NUM_ITEM_COLUMNS = 8
"""A power of two: an item is 32 bytes, one sector of memory."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """Items of one launch, costliest first."""

    items: Tensor
    """[capacity, 8]; columns in `ItemColumn`."""
    count: Tensor
    """[1]: number of items in this step; surplus programs return at once."""
    num_programs: int
    """Programs to launch: a bound for every step that replays a CUDA graph, or the number of items. 0: no launch."""
    num_rows: int
    """Rows (tokens x query heads of one KV head) of a program: 16, 32, 64 or 128."""


@dataclass(frozen=True, slots=True)
class GpuAttentionPlan(AttentionPlan):
    """The tensors are views of one buffer at fixed addresses, which the next plan overwrites.

    Sequences with few new tokens (decode, verified drafts) are in `narrow`, the others (prefill, chunks of it) in
    `wide`; `shared` holds the keys that many sequences have in common, once for all of them.
    """

    narrow: WorkList
    wide: WorkList
    shared: WorkList
    gathered: Tensor
    """[capacity, 4]: the tokens of `shared`; columns in `GatheredColumn`."""
    merges: Tensor
    """[capacity, 4]: tokens whose keys were split; columns in `MergeColumn`."""
    num_merges: Tensor
    """[1]: number of merges in this step."""
    num_merge_programs: int
    """Like `WorkList.num_programs`."""
    partials: Tensor
    """[places, num_heads, head_dim] float32: results of parts of the keys."""
    partial_lse: Tensor
    """[places, num_heads] float32: the base-2 logarithm of the sum each part's softmax divided by."""
    tile: int
    """Keys that a program takes at a time. Items begin at multiples of it, and it divides the block size."""

    @property
    def variant(self) -> Variant:
        """Rows of a program in `narrow`, and of one in `shared`; 0 if there are no shared programs."""
        return self.narrow.num_rows, self.shared.num_rows if self.shared.num_programs else 0
