"""PackedWeights: packs a model's weights for the CPU side by side, into memory that was reserved before torch was
imported, or finds them in a file of an earlier start."""

import math
import mmap
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from quire.kernels import cpu
from quire.kernels.allocation import ignore, zeros
from quire.kernels.block_matrix import INTERLEAVED_ROWS, BlockMatrix, BlockWeight
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.expert_forms import coded_parts, form_of, stored_tensors
from quire.kernels.expert_products import orders_of
from quire.kernels.interface import (
    Allocate,
    ExpertMatrices,
    ExpertWeight,
    LowBitWeight,
    PackedWeight,
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

    def __init__(
        self,
        memory: mmap.mmap | None,
        stored: Sequence[PackedTensor] = (),
        release: Callable[[Tensor], None] = ignore,
    ) -> None:
        """`memory` holds zeros; `stored` is the `parts` of an earlier load of the same model. `release` gets rows that
        were packed."""
        self._release = release
        self._memory = torch.frombuffer(memory or bytearray(1), dtype=torch.uint8)
        self._used = 0
        self._stored = stored
        self.parts: list[PackedTensor] = []
        """Packed and found weights, in the order of requests."""
        self.num_packed = 0
        """Weights that were not found in `stored`."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
        """`allocate` provides memory when the own memory is full."""

        def pack() -> tuple[Tensor]:
            return (cpu.pack_linear(weights, dtype, self._or_else(allocate), self._release),)

        (packed,) = self._find_or_pack(f"{dtype} {cpu.PACKING}", weights, 1, pack)
        return packed

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        def pack() -> tuple[Tensor, Tensor]:
            packed = cpu.quantize_linear(weights, stored, self._or_else(allocate), self._release)
            return packed.values, packed.scales

        values, scales = self._find_or_pack(_form_of_bits(stored), weights, 2, pack)
        return QuantizedWeight(values, scales, stored)

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
        first = matrices[0]

        def pack() -> tuple[Tensor, ...]:
            return tensors_of(cpu.pack_coded(matrices, self._or_else(allocate)))

        found = self._find_or_pack(_form_of_codes(first), list(stored_tensors([matrices])), _num_tensors(first), pack)
        return _coded(first, found, None if first.order is None else first.order.int())

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight:
        return self._interleaved(cpu.pack_blocks(matrices))

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros
    ) -> ExpertWeight:
        form = form_of(matrices, stored)
        if form == "blocks" and isinstance(matrices[0][0], BlockMatrix):
            return self._interleaved(cpu.pack_experts(matrices, stored))
        sources = list(stored_tensors(matrices))

        def pack() -> tuple[Tensor, ...]:
            return tensors_of(cpu.pack_experts(matrices, stored, self._or_else(allocate), self._release))

        def pack_interleaved() -> tuple[Tensor, ...]:
            packed = cpu.pack_experts(matrices, stored)
            assert isinstance(packed, BlockWeight)
            return tensors_of(cpu.interleave_blocks(packed, self._or_else(allocate)))

        if form == "blocks":
            (rows,) = self._find_or_pack(f"experts mxfp4 interleaved {cpu.PACKING}", sources, 1, pack_interleaved)
            interleaved = rows.shape[1] % INTERLEAVED_ROWS == 0
            return BlockWeight((BlockMatrix(rows, "MXFP4"),), isinstance(stored, str), interleaved)
        if form == "codes":
            parts = coded_parts(matrices)
            found = self._find_or_pack(
                f"experts {_form_of_codes(parts[0][0])}", sources, _num_tensors(parts[0][0]), pack
            )
            return _coded(parts[0][0], found, orders_of(parts))
        if isinstance(stored, str):
            return self._find_or_pack(f"experts {stored} {cpu.PACKING}", sources, 1, pack)[0]
        values, scales = self._find_or_pack(f"experts {_form_of_bits(stored)}", sources, 2, pack)
        return QuantizedWeight(values, scales, stored)

    def _interleaved(self, weight: ExpertWeight) -> BlockWeight:
        """Copies of the file's bytes, which are made as fast as a stored copy would be read: none is stored."""
        assert isinstance(weight, BlockWeight)
        return cpu.interleave_blocks(weight, self._or_else(zeros), self._release)

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


def _form_of_codes(matrix: CodedMatrix) -> str:
    levels = blake2b(repr(matrix.levels).encode(), digest_size=8).hexdigest()
    return f"codes of {levels} in groups of {matrix.group_size} {cpu.PACKING}"


def _num_tensors(matrix: CodedMatrix) -> int:
    return 2 if matrix.offsets is None else 3


def tensors_of(packed: PackedWeight) -> tuple[Tensor, ...]:
    """The tensors that a packed weight consists of; the order of inputs is not one."""
    if isinstance(packed, Tensor):
        return (packed,)
    if isinstance(packed, BlockWeight):
        return tuple(part.rows for part in packed.parts)
    if isinstance(packed, QuantizedWeight):
        return packed.values, packed.scales
    return (packed.codes, packed.scales, *(() if packed.offsets is None else (packed.offsets,)))


def _coded(matrix: CodedMatrix, tensors: Sequence[Tensor], order: Tensor | None) -> CodedWeight:
    """The weight of matrices like `matrix` that `tensors` are."""
    codes, scales, *offsets = tensors
    return CodedWeight(
        codes,
        scales,
        offsets[0] if offsets else None,
        matrix.zeros is not None,
        matrix.group_size,
        matrix.levels,
        order,
    )


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
