"""Shards: which part of a stored layer a rank takes, where several ranks hold one model.

Attention and MLPs are divided so that ranks meet twice a layer. The layers that read the residual stream are divided by
outputs (heads, inner width), the ones that write it by inputs, whose outputs are then summed over the ranks. Where
there are fewer KV heads than ranks, several ranks hold the same one. Embedding and output head are divided by rows of
the vocabulary. A source gives whole layers as views of mapped files, so what a rank does not take is never read.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quire.gguf.block_types import BLOCK_TYPES_BY_NAME
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix
from quire.layers.linear import LinearWeight, Matrix
from quire.layers.ranks import Ranks

Division = Literal["outputs", "kv", "inputs"]
"""By outputs, by outputs that belong to KV heads, by inputs."""
Part = tuple[Division, int]
"""One of several parts of a stored layer's outputs, and how many rows of it a rank has."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shards:
    """The parts of this rank."""

    ranks: Ranks
    kv_copies: int
    """Ranks that hold the same KV heads."""
    vocab_size: int
    """Token ids of the whole model."""

    def take(
        self, take_whole: Callable[[tuple[int, int]], LinearWeight], shape: tuple[int, int], split: Sequence[Part]
    ) -> LinearWeight:
        """This rank's part, of `shape`, of the layer that `take_whole` gives for the shape of the whole."""
        num_outputs, num_inputs = shape
        if split[0][0] == "inputs":
            whole = take_whole((num_outputs, num_inputs * self.ranks.size))
            columns = slice(self.ranks.rank * num_inputs, (self.ranks.rank + 1) * num_inputs)
            # One rank adds the bias, so that the sum has it once.
            bias = whole.bias if self.ranks.rank == 0 else None
            return replace(whole, weight=_own(_inputs(whole.weight, columns)), bias=bias, ranks=self.ranks)
        whole = take_whole((self.num_rows(split), num_inputs))
        return _outputs(whole, self.rows(split))

    def num_rows(self, parts: Sequence[Part]) -> int:
        """Rows of the whole layer."""
        return sum(rows * self._num_holders(division) for division, rows in parts)

    def rows(self, parts: Sequence[Part]) -> list[slice]:
        """This rank's rows of each part."""
        found, begin = [], 0
        for division, rows in parts:
            first = begin + rows * (self.ranks.rank // (self.kv_copies if division == "kv" else 1))
            found.append(slice(first, first + rows))
            begin += rows * self._num_holders(division)
        return found

    def take_experts(
        self, take_whole: Callable[[tuple[int, int, int]], Tensor], shape: tuple[int, int, int], split: Sequence[Part]
    ) -> Tensor:
        """As `take`, of a tensor [experts, outputs, inputs] of `shape`."""
        num_experts, num_outputs, num_inputs = shape
        if split[0][0] == "inputs":
            first = self.ranks.rank * num_inputs
            return take_whole((num_experts, num_outputs, num_inputs * self.ranks.size))[
                :, :, first : first + num_inputs
            ]
        whole = take_whole((num_experts, self.num_rows(split), num_inputs))
        return torch.cat([whole[:, rows] for rows in self.rows(split)], dim=1)

    def of_vocabulary(self, whole: LinearWeight) -> LinearWeight:
        """This rank's rows of a table of all tokens."""
        return _outputs(whole, [self.vocabulary])

    @property
    def vocabulary(self) -> slice:
        """This rank's token ids; the last rank may have fewer."""
        rows = self.padded_rows
        return slice(self.ranks.rank * rows, min((self.ranks.rank + 1) * rows, self.vocab_size))

    @property
    def padded_rows(self) -> int:
        """Token ids of every rank but the last."""
        return -(-self.vocab_size // self.ranks.size)

    def kv_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """This rank's `num_heads` of a tensor with an entry for every KV head of the whole model."""
        first = self.ranks.rank // self.kv_copies * num_heads
        return x[first : first + num_heads]

    def heads(self, x: Tensor, num_heads: int) -> Tensor:
        """This rank's `num_heads` of a tensor with an entry for every query head of the whole model."""
        return x[self.ranks.rank * num_heads : (self.ranks.rank + 1) * num_heads]

    @property
    def divides_kv(self) -> bool:
        """Whether every KV head is on one rank alone."""
        return self.kv_copies == 1

    def _num_holders(self, division: Division) -> int:
        """Ranks with different rows."""
        return self.ranks.size // self.kv_copies if division == "kv" else self.ranks.size


def _outputs(whole: LinearWeight, rows: list[slice]) -> LinearWeight:
    if len(rows) > 1:
        chosen = torch.cat([torch.arange(each.start, each.stop) for each in rows])
        return whole.select_rows(chosen.to(whole.weight.device))
    (chosen_rows,) = rows
    weight = whole.weight
    if isinstance(weight, BlockMatrix):
        weight = weight._replace(rows=weight.rows[chosen_rows])
    elif isinstance(weight, CodedMatrix):
        weight = weight[torch.arange(chosen_rows.start, chosen_rows.stop, device=weight.device)]
    else:
        weight = weight[chosen_rows]
    return replace(whole, weight=_own(weight), bias=None if whole.bias is None else whole.bias[chosen_rows])


def _inputs(weight: Matrix, columns: slice) -> Matrix:
    """The inputs `columns` of a matrix; in floats where they do not end with groups of numbers that share a scale."""
    first, last = columns.start, columns.stop
    if isinstance(weight, BlockMatrix):
        block = BLOCK_TYPES_BY_NAME[weight.type_name]
        if first % block.num_values == 0 and last % block.num_values == 0:
            begin, end = (edge // block.num_values * block.num_bytes for edge in (first, last))
            return weight._replace(rows=weight.rows[:, begin:end].contiguous())
        _warn(f"blocks of {block.num_values}", last - first)
        return LinearWeight(weight).floats()[:, columns]
    if isinstance(weight, CodedMatrix):
        size = weight.group_size
        if weight.order is not None or (size < weight.shape[1] and (first % size or last % size)):
            _warn("inputs in an order of their own" if weight.order is not None else f"groups of {size}", last - first)
            return weight.dequantize()[:, columns]
        groups = slice(first // size, -(-last // size)) if size < weight.shape[1] else slice(None)
        return replace(
            weight,
            codes=weight.codes[:, columns].contiguous(),
            scales=weight.scales[:, groups].contiguous(),
            zeros=None if weight.zeros is None else weight.zeros[:, groups].contiguous(),
            shifts=None if weight.shifts is None else weight.shifts[:, groups].contiguous(),
        )
    return weight[:, columns]


def _warn(stored: str, num_inputs: int) -> None:
    logger.warning(
        "layers with %s cannot be divided into %d inputs a rank; they take more memory as floats", stored, num_inputs
    )


def _own(weight: Matrix) -> Matrix:
    """On a device a copy, so that the whole layer is freed; a mapped file takes no memory."""
    return weight.clone() if isinstance(weight, Tensor) and weight.device.type != "cpu" else weight
