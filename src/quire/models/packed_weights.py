"""PackedWeights: where the packed weights of a model on the CPU lie: side by side, in memory that was taken before
torch was there."""

import math
import mmap
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from quire.kernels import Kernels, cpu
from quire.kernels.interface import QuantizedWeight

_ALIGNMENT = 64


class PackedWeights:
    """`kernels` are the CPU's, but what they pack lies in `memory` for as long as there is room."""

    def __init__(self, memory: mmap.mmap | None) -> None:
        """`memory` holds zeros."""
        self._memory = torch.frombuffer(memory or bytearray(1), dtype=torch.uint8)
        self._used = 0
        packing = {"pack_linear": self._pack_linear, "quantize_linear": self._quantize_linear}
        self.kernels = cast(Kernels, SimpleNamespace(**vars(cpu) | packing))

    def _pack_linear(self, weights: Sequence[Tensor], dtype: str) -> Tensor:
        return cpu.pack_linear(weights, dtype, self._allocate)

    def _quantize_linear(self, weights: Sequence[Tensor], bits: int, group_size: int) -> QuantizedWeight:
        return cpu.quantize_linear(weights, bits, group_size, self._allocate)

    def _allocate(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        end = self._used + math.prod(shape) * dtype.itemsize
        if end > len(self._memory):  # a last panel may have lanes that no plan counted
            return torch.zeros(shape, dtype=dtype)
        tensor = self._memory[self._used : end].view(dtype).view(*shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return tensor
