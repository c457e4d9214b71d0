"""Embedding: rows of a table."""

import torch
from torch import Tensor


class Embedding:
    """table [N, H] in any float type, kept as it is stored: rows are widened after they were gathered, so a table that
    is a view of a mapped file costs no memory that the system could not take back."""

    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H] float32, a fresh tensor."""
        return torch.index_select(self.table, 0, ids).float()
