"""PackedWeights: packs a model's weights for the CPU side by side, into memory that was reserved before torch was
imported, or finds them in a file of an earlier start."""

import math
import mmap
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from quire.kernels import cpu
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.expert_products import stored_tensors
from quire.kernels.interface import (
    Allocate,
    ExpertMatrices,
    ExpertWeight,
    LowBitWeight,
    Mxfp4Matrix,
    Mxfp4Weight,
    QuantizedWeight,
)
from quire.models.safetensors_file import DTYPES
from quire.models.weights_cache import PackedTensor
from quire.quantization import WeightFormat

_ALIGNMENT = 64
_NAMES = {getattr(torch, ours): theirs for theirs, ours in DTYPES.items()}


class PackedWeights:
    """The `Packing` of the CPU kernels, into `memory` as long as there is room. A weight in `stored` is not packed
    again."""

    def __init__(self, memory: mmap.mmap | None, stored: Sequence[PackedTensor] = ()) -> None:
        """`memory` holds zeros; `stored` is the `parts` of an earlier load of the same model."""
        self._memory = torch.frombuffer(memory or bytearray(1), dtype=torch.uint8)
        self._used = 0
        self._stored = stored
        self.parts: list[PackedTensor] = []
        """Packed and found weights, in the order of requests."""
        self.num_packed = 0
        """Weights that were not found in `stored`."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
        """`allocate` provides memory when the own memory is full."""
        (packed,) = self._find_or_pack(
            f"{dtype} {cpu.PACKING}", weights, 1, lambda: (cpu.pack_linear(weights, dtype, self._or_else(allocate)),)
        )
        return packed

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        def pack() -> tuple[Tensor, Tensor]:
            packed = cpu.quantize_linear(weights, stored, self._or_else(allocate))
            return packed.values, packed.scales

        values, scales = self._find_or_pack(_form_of_bits(stored), weights, 2, pack)
        return QuantizedWeight(values, scales, stored)

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
        first = matrices[0]
        tensors = [tensor for each in matrices for tensor in (each.codes, each.scales, each.offsets)]
        sources = [tensor for tensor in tensors if tensor is not None]
        levels = blake2b(repr(first.levels).encode(), digest_size=8).hexdigest()

        def pack() -> tuple[Tensor, ...]:
            packed = cpu.pack_coded(matrices, self._or_else(allocate))
            offsets = () if packed.offsets is None else (packed.offsets,)
            return (packed.codes, packed.scales, *offsets)

        form = f"codes of {levels} in groups of {first.group_size} {cpu.PACKING}"
        codes, scales, *offsets = self._find_or_pack(form, sources, 2 if first.offsets is None else 3, pack)
        return CodedWeight(
            codes,
            scales,
            offsets[0] if offsets else None,
            first.zeros is not None,
            first.group_size,
            first.levels,
            None if first.order is None else first.order.int(),
        )

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight:
        """Blocks stay where they are: in the mapped file, or in the copy whose rows were reordered."""
        return cpu.pack_blocks(matrices)

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros
    ) -> ExpertWeight:
        sources = list(stored_tensors(matrices))

        def pack() -> tuple[Tensor, ...]:
            packed = cpu.pack_experts(matrices, stored, self._or_else(allocate))
            return (packed,) if isinstance(packed, Tensor) else (packed.values, packed.scales)

        if isinstance(matrices[0][0], Mxfp4Matrix):
            values, scales = self._find_or_pack(f"experts mxfp4 {cpu.PACKING}", sources, 2, pack)
            return Mxfp4Weight(values, scales, rounds_rows=not isinstance(stored, str))
        if isinstance(stored, str):
            return self._find_or_pack(f"experts {stored} {cpu.PACKING}", sources, 1, pack)[0]
        values, scales = self._find_or_pack(f"experts {_form_of_bits(stored)}", sources, 2, pack)
        return QuantizedWeight(values, scales, stored)

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

    def _or_else(self, allocate: Allocate) -> Allocate:
        """Allocates from the own memory; where that is full, from `allocate`."""

        def from_memory(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
            end = self._used + math.prod(shape) * dtype.itemsize
            if end > len(self._memory):  # the memory plan does not count the unused lanes of a last panel
                return allocate(shape, dtype=dtype)
            tensor = self._memory[self._used : end].view(dtype).view(*shape)
            self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
            return tensor

        return from_memory


def _form_of_bits(stored: WeightFormat) -> str:
    rotated = "rotated " if stored.rotates else ""
    return f"{stored.bits} bits in {rotated}groups of {stored.group_size} {cpu.isa()} {cpu.PACKING}"


def _source(form: str, weights: Sequence[Tensor]) -> str:
    """A digest of the packing and of three rows of each weight: enough to tell weights apart."""
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
