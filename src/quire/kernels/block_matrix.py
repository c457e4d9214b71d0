"""Matrices in the blocks of GGUF, as a file stores them; `quire.kernels.blocks` decodes them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quire.gguf.block_types import BLOCK_TYPES_BY_NAME


class BlockMatrix(NamedTuple):
    """A matrix [N, K] as a GGUF file stores it."""

    rows: Tensor
    """[N, bytes of a row] uint8; it may be a view of a mapped file."""
    type_name: str
    """ggml's name of the type of block."""

    @property
    def shape(self) -> tuple[int, int]:
        block = BLOCK_TYPES_BY_NAME[self.type_name]
        return self.rows.shape[0], self.rows.shape[1] // block.num_bytes * block.num_values

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def select_rows(self, rows: Tensor) -> "BlockMatrix":
        return BlockMatrix(self.rows[rows], self.type_name)


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """Matrices whose outputs lie side by side, with the bits of their file. The rows of experts are [E, N, bytes]."""

    parts: tuple[BlockMatrix, ...]
    both_digits: bool = False
    """Every group of a row that it is multiplied with gets both digits (`quire.kernels.block_products`)."""

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.rows.nbytes for part in self.parts)
