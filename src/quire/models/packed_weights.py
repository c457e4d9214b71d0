"""PackedWeights: the memory of a CPU model's packed weights. They lie side by side, in memory that was allocated before
torch was imported, or in a file that an earlier start wrote."""

import math
import mmap
from collections.abc import Callable, Sequence
from hashlib import blake2b
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from quire.kernels import Kernels, cpu
from quire.kernels.interface import QuantizedWeight
from quire.models.safetensors_file import DTYPES
from quire.models.weights_cache import PackedTensor

_ALIGNMENT = 64
_NAMES = {getattr(torch, ours): theirs for theirs, ours in DTYPES.items()}


class PackedWeights:
    """`kernels` are the CPU's kernels, which pack into `memory` while there is room, and take a weight from `stored`
    instead of packing it again."""

    def __init__(self, memory: mmap.mmap | None, stored: Sequence[PackedTensor] = ()) -> None:
        """`memory` holds zeros; `stored` is `parts` of an earlier load of the same model."""
        self._memory = torch.frombuffer(memory or bytearray(1), dtype=torch.uint8)
        self._used = 0
        self._stored = stored
        self.parts: list[PackedTensor] = []
        """The weights packed or found so far, in the order in which layers asked for them."""
        self.num_packed = 0
        """Weights that were not found in `stored`."""
        packing = {"pack_linear": self._pack_linear, "quantize_linear": self._quantize_linear}
        self.kernels = cast(Kernels, SimpleNamespace(**vars(cpu) | packing))

    def _pack_linear(self, weights: Sequence[Tensor], dtype: str) -> Tensor:
        (packed,) = self._find_or_pack(
            f"{dtype} {cpu.PACKING}", weights, 1, lambda: (cpu.pack_linear(weights, dtype, self._allocate),)
        )
        return packed

    def _quantize_linear(self, weights: Sequence[Tensor], bits: int, group_size: int) -> QuantizedWeight:
        def pack() -> tuple[Tensor, Tensor]:
            packed = cpu.quantize_linear(weights, bits, group_size, self._allocate)
            return packed.values, packed.scales

        form = f"{bits} bits in groups of {group_size} {cpu.isa()} {cpu.PACKING}"
        values, scales = self._find_or_pack(form, weights, 2, pack)
        return QuantizedWeight(values, scales, bits, group_size)

    def _find_or_pack(
        self, form: str, weights: Sequence[Tensor], num_parts: int, pack: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        source = _source(form, weights)
        found = self._stored[len(self.parts) : len(self.parts) + num_parts]
        if len(found) == num_parts and all(part.source == source for part in found):
            self.parts += found
            return tuple(_tensor(part) for part in found)
        self.num_packed += 1
        tensors = pack()
        self.parts += [_part(source, tensor) for tensor in tensors]
        return tensors

    def _allocate(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        end = self._used + math.prod(shape) * dtype.itemsize
        if end > len(self._memory):  # the memory plan does not count the unused lanes of a last panel
            return torch.zeros(shape, dtype=dtype)
        tensor = self._memory[self._used : end].view(dtype).view(*shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return tensor


def _source(form: str, weights: Sequence[Tensor]) -> str:
    """A digest of the packing and of three rows of each weight: enough to tell one model's weights from another's."""
    digest = blake2b(form.encode(), digest_size=16)
    for weight in weights:
        digest.update(f"{weight.dtype} {list(weight.shape)}".encode())
        rows = weight[[0, len(weight) // 2, -1]].contiguous()
        digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _part(source: str, tensor: Tensor) -> PackedTensor:
    content = tensor.view(-1).view(torch.uint8).numpy().data
    return PackedTensor(source, _NAMES[tensor.dtype], tuple(tensor.shape), content)


def _tensor(part: PackedTensor) -> Tensor:
    return torch.frombuffer(part.content, dtype=getattr(torch, DTYPES[part.dtype])).view(part.shape)
