"""Low-rank updates of dense layers by adapters: what `Kernels.add_lora` takes, its specification, and its batched form
for devices without a kernel of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LORA_TILE = 16
"""See `Kernels.LORA_TILE`. A device multiplies whole tiles."""


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The low-rank updates of one dense layer [N, K], for every slot of adapters.

    The N outputs are P runs, and each run, a part, has matrices of its own: a layer that is packed from several stored
    ones has a part for each.
    """

    a: Tensor
    """[slots, P, R, K]"""
    b: Tensor
    """[slots, R, N]; the factor of the update is multiplied in."""
    ranks: Tensor
    """[slots, P] int32: how many of the R ranks count; 0: the adapter leaves the part as it is."""
    part_ends: Tensor
    """[P] int32: the column after each part's last."""


@dataclass(frozen=True, slots=True)
class LoraRows:
    """The rows of a layer that use adapters: M of them, one adapter's after another's."""

    rows: Tensor
    """[M] int32: rows of what the layer computes."""
    tiles: Tensor
    """[n, 3] int32 (slot, begin, end): runs of `rows` with the adapter of a slot, `LORA_TILE` rows at most."""
    groups: Sequence[tuple[int, int, int]]
    """The same without a limit of rows, on the host: one run for each adapter."""
    are_all: bool
    """`rows` are all rows of the layer, in their order."""

    def select(self, x: Tensor) -> Tensor:
        """x [T, ...] -> its M rows."""
        return x if self.are_all else x.index_select(0, self.rows)


def add_lora(out: Tensor, x: Tensor, rows: LoraRows, weights: LoraWeights) -> None:
    """out [T, N], x [M, K], the inputs of the M rows: adds x a^T b, with a and b of each row's adapter, to its row of
    `out`."""
    ends = weights.part_ends.tolist()
    for slot, begin, end in rows.tiles.tolist():
        to = rows.rows[begin:end].long()
        for part, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            rank = int(weights.ranks[slot, part])
            sums = x[begin:end] @ weights.a[slot, part, :rank].T.to(x.dtype)
            out[to, first:last] += sums @ weights.b[slot, :rank, first:last].to(x.dtype)


def add_lora_in_tiles(out: Tensor, x: Tensor, rows: LoraRows, weights: LoraWeights) -> None:
    """`add_lora` as two batched products over the tiles, on any device and without waiting for it."""
    slots, begin, end = rows.tiles.long().unbind(1)
    places = begin[:, None] + torch.arange(LORA_TILE, device=x.device)
    kept = places < end[:, None]
    places = torch.where(kept, places, begin[:, None])  # what stands for a missing row is multiplied by 0
    tiles = x[places]
    num_parts, max_rank = weights.a.shape[1:3]
    counts = torch.arange(max_rank, device=x.device) < weights.ranks[slots][:, :, None]
    sums = tiles @ weights.a[slots].flatten(1, 2).transpose(1, 2).to(x.dtype)
    sums = sums.unflatten(2, (num_parts, max_rank)) * (counts[:, None] & kept[:, :, None, None])
    to = rows.rows.long()[places].flatten()
    columns = torch.arange(out.shape[1], device=x.device)
    part_of = torch.searchsorted(weights.part_ends, columns.to(torch.int32), right=True)
    b = weights.b[slots].to(x.dtype)
    updates = torch.zeros(*tiles.shape[:2], out.shape[1], dtype=x.dtype, device=x.device)
    for part in range(num_parts):
        updates += (sums[:, :, part] @ b) * (part_of == part)
    out.index_add_(0, to, updates.flatten(0, 1))
