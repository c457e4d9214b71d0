"""Embedding: rows of a table, which may be the output head's weight."""

import torch
from torch import Tensor

from quire.kernels.interface import QuantizedWeight
from quire.layers.linear import Linear


class Embedding:
    """table [N, H] in any float type, kept as it is stored: rows are widened after they were gathered, so a table that
    is a view of a mapped file costs no memory that the system could not take back."""

    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H] float32, a fresh tensor."""
        return torch.index_select(self.table, 0, ids).float()


class TiedEmbedding:
    """The rows of an output head's packed weight, so that a tied table is held once, as the head holds it: rounded to
    its dtype, or quantised."""

    __slots__ = ("head",)

    def __init__(self, head: Linear) -> None:
        self.head = head

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H] float32, a fresh tensor."""
        kernels, packed = self.head.kernels, self.head.packed
        if isinstance(packed, QuantizedWeight):
            return kernels.gather_rows_quantized(packed, ids, self.head.num_inputs)
        return kernels.gather_rows(packed, ids)
