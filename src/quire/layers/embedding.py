"""Embedding: rows of a table, which may be the output head's weight."""

from typing import Protocol

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.interface import PackedWeight
from quire.layers.linear import Linear, gather
from quire.layers.ranks import Ranks


class TokenEmbedding(Protocol):
    """What makes vectors of token ids."""

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H], a fresh tensor."""
        ...


class Embedding:
    """Rows of a table [N, H] in any float type.

    The table stays as it is stored, and gathered rows are converted to `dtype`. So a table that is a view of a mapped
    file costs no memory that the system could not take back.
    """

    __slots__ = ("dtype", "table")

    def __init__(self, table: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.table = table
        self.dtype = dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H], a fresh tensor."""
        return torch.index_select(self.table, 0, ids).to(self.dtype)


class PackedEmbedding:
    """Rows of a packed weight, for instance of a table in blocks of few bits."""

    __slots__ = ("kernels", "num_inputs", "packed")

    def __init__(self, kernels: Kernels, packed: PackedWeight, num_inputs: int) -> None:
        self.kernels = kernels
        self.packed = packed
        self.num_inputs = num_inputs

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H], a fresh tensor."""
        return gather(self.kernels, self.packed, ids, self.num_inputs)


class TiedEmbedding(PackedEmbedding):
    """Rows of an output head's packed weight: a tied table is held once, rounded or quantised as the head holds it."""

    __slots__ = ("head",)

    def __init__(self, head: Linear) -> None:
        super().__init__(head.kernels, head.packed, head.num_inputs)
        self.head = head


class DividedEmbedding:
    """Rows of a table that ranks hold a part of each."""

    __slots__ = ("first", "own", "ranks", "stop")

    def __init__(self, own: TokenEmbedding, ids: slice, ranks: Ranks) -> None:
        """`own` are the rows of `ids`."""
        self.own = own
        self.first, self.stop = ids.start, ids.stop
        self.ranks = ranks

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H], a fresh tensor."""
        others = (ids < self.first) | (ids >= self.stop)
        rows = self.own((ids - self.first).masked_fill_(others, 0))
        return self.ranks.sum(rows.masked_fill_(others.unsqueeze(1), 0))
