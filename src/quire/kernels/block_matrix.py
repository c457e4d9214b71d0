"""Matrices in the blocks of GGUF, as a file stores them; `quire.kernels.blocks` decodes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quire.gguf.block_types import BLOCK_TYPES_BY_NAME

INTERLEAVED_ROWS, WORD_BYTES = 8, 4
LARGE_BLOCK = 256
"""Numbers of a block of the types with scales of scales."""


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
    interleaved: bool = False
    """The bytes of every `INTERLEAVED_ROWS` rows are in the order of `interleaved_rows`."""

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.rows.nbytes for part in self.parts)

    def matrices(self) -> Iterator[BlockMatrix]:
        """The parts as a file stores them."""
        for part in self.parts:
            yield BlockMatrix(stored_rows(part), part.type_name) if self.interleaved else part


def interleaved_rows(matrix: BlockMatrix) -> Tensor:
    """The rows [N, bytes] in the order of the fastest products: of every eight, block after block; of a block, word
    after word of four bytes, each of all eight rows. Bytes that are no whole word lie before the words, or behind them
    if a block has 256 numbers."""
    units = _units(matrix.type_name)
    num_bytes = sum(size for size, _ in units)
    blocks = matrix.rows.view(-1, INTERLEAVED_ROWS, matrix.rows.shape[-1] // num_bytes, num_bytes)
    pieces = blocks.transpose(1, 2).split([size for size, _ in units], dim=-1)  # [runs, blocks, 8, bytes]
    mixed = [
        piece.unflatten(-1, (-1, width)).transpose(2, 3).flatten(2)
        for piece, (_, width) in zip(pieces, units, strict=True)
    ]
    return torch.cat(mixed, dim=-1).view(matrix.rows.shape)


def stored_rows(matrix: BlockMatrix) -> Tensor:
    """What `interleaved_rows` was made of."""
    units = _units(matrix.type_name)
    sizes = [size * INTERLEAVED_ROWS for size, _ in units]
    runs = matrix.rows.view(-1, matrix.rows.shape[-1] * INTERLEAVED_ROWS // sum(sizes), sum(sizes))
    pieces = [
        piece.unflatten(-1, (-1, INTERLEAVED_ROWS, width)).transpose(2, 3).flatten(3)
        for piece, (_, width) in zip(runs.split(sizes, dim=-1), units, strict=True)
    ]
    return torch.cat(pieces, dim=-1).transpose(1, 2).reshape(matrix.rows.shape)


def _units(type_name: str) -> list[tuple[int, int]]:
    """The two parts of a block that are interleaved: the bytes of each, and how many of a row lie together."""
    block = BLOCK_TYPES_BY_NAME[type_name]
    rest = block.num_bytes % WORD_BYTES
    units = [(rest, rest), (block.num_bytes - rest, WORD_BYTES)]
    if block.num_values == LARGE_BLOCK:
        units.reverse()
    return [unit for unit in units if unit[0]]
