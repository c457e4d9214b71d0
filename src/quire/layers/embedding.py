"""Embedding: rows of a table, which may be the output head's weight."""

from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.interface import QuantizedWeight
from quire.layers.linear import Linear


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


class TiedEmbedding:
    """Rows of an output head's packed weight: a tied table is held once, rounded or quantised as the head holds it."""

    __slots__ = ("head",)

    def __init__(self, head: Linear) -> None:
        self.head = head

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H], a fresh tensor."""
        kernels, packed, num_inputs = self.head.kernels, self.head.packed, self.head.num_inputs
        if isinstance(packed, QuantizedWeight):
            return kernels.gather_rows_quantized(packed, ids, num_inputs)
        return kernels.gather_rows(packed, ids, num_inputs)
