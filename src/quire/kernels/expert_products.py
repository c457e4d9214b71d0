"""`pack_experts` and `experts` for kernel modules: packing of one expert after the other, and a loop over
them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.gates import gated
from quire.kernels.interface import (
    MXFP4_BLOCK,
    Allocate,
    ExpertMatrices,
    ExpertWeight,
    Mxfp4Matrix,
    Mxfp4Weight,
    PackedExperts,
    QuantizedWeight,
)
from quire.kernels.mxfp4 import dequantize, doubled, powers_of_two
from quire.quantization import WeightFormat


class PackLinear(Protocol):
    def __call__(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = ...) -> Tensor: ...


class QuantizeLinear(Protocol):
    def __call__(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = ...
    ) -> QuantizedWeight: ...


PackMxfp4 = Callable[[Sequence[Sequence[Mxfp4Matrix]], str | WeightFormat, Allocate], ExpertWeight]


def pack_floats(
    matrices: Sequence[Sequence[Tensor]], dtype: str, pack_linear: PackLinear, allocate: Allocate
) -> Tensor:
    """The packed weights of all experts, packed one by one into memory for all."""
    packed = _Stack(len(matrices), allocate)
    for expert in matrices:
        packed.put(pack_linear(expert, dtype, packed.allocate))
    return packed.tensors[0]


def _quantize(
    matrices: Sequence[Sequence[Tensor]], stored: WeightFormat, quantize_linear: QuantizeLinear, allocate: Allocate
) -> QuantizedWeight:
    """The same with few bits."""
    packed = _Stack(len(matrices), allocate)
    for expert in matrices:
        weight = quantize_linear(expert, stored, packed.allocate)
        packed.put(weight.values, weight.scales)
    values, scales = packed.tensors
    return QuantizedWeight(values, scales, stored)


class _Stack:
    """Tensors of one shape for every expert, side by side. A packed weight is one tensor or several."""

    def __init__(self, count: int, allocate: Allocate) -> None:
        self._count = count
        self._allocate = allocate
        self._given: list[Tensor] = []
        self._num_packed = 0
        self.tensors: list[Tensor] = []

    def allocate(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """Memory of the next tensor of the expert that is being packed."""
        index = len(self._given)
        if index == len(self.tensors):
            self.tensors.append(self._allocate((self._count, *shape), dtype=dtype))
        place = self.tensors[index][self._num_packed]
        self._given.append(place)
        return place

    def put(self, *packed: Tensor) -> None:
        """The expert's tensors are packed: in the memory that they were given, or elsewhere."""
        for index, tensor in enumerate(packed):
            if index == len(self.tensors):
                self.tensors.append(tensor.new_zeros((self._count, *tensor.shape)))
            place = self.tensors[index][self._num_packed]
            if tensor.data_ptr() != place.data_ptr():
                place.copy_(tensor)
        self._given.clear()
        self._num_packed += 1


def pack_each(
    matrices: ExpertMatrices,
    stored: str | WeightFormat,
    allocate: Allocate,
    pack_linear: PackLinear,
    quantize_linear: QuantizeLinear,
    pack_mxfp4: PackMxfp4,
) -> ExpertWeight:
    """`pack_experts`, made of a module's own operations. What it computes:

    The dense layer of each expert as `stored` says: a float type, or a format of few bits. Matrices in MXFP4 keep their
    bits; a format of few bits then only says that rows are brought to 8 bits. The result has what `pack_linear` or
    `quantize_linear` make of each expert, in tensors with a first dimension of experts.
    """
    mxfp4 = [parts for parts in map(_mxfp4_parts, matrices) if parts]
    if mxfp4:
        assert len(mxfp4) == len(matrices), "all experts of a layer are stored in one way"
        return pack_mxfp4(mxfp4, stored, allocate)
    floats = [[part for part in parts if isinstance(part, Tensor)] for parts in matrices]
    if isinstance(stored, str):
        return pack_floats(floats, stored, pack_linear, allocate)
    return _quantize(floats, stored, quantize_linear, allocate)


def _mxfp4_parts(parts: Sequence[Tensor] | Sequence[Mxfp4Matrix]) -> list[Mxfp4Matrix]:
    return [part for part in parts if isinstance(part, Mxfp4Matrix)]


def keep_mxfp4(
    matrices: Sequence[Sequence[Mxfp4Matrix]], stored: str | WeightFormat, allocate: Allocate
) -> Mxfp4Weight:
    """The stored bits: values [E, N, K / 32, 16], scales [E, N, K / 32]."""
    return Mxfp4Weight(
        torch.stack([torch.cat([part.blocks for part in parts]) for parts in matrices]),
        torch.stack([torch.cat([part.scales for part in parts]) for parts in matrices]),
        rounds_rows=not isinstance(stored, str),
    )


@dataclass(frozen=True, slots=True)
class ExpertLoop:
    """`experts` as a loop over the experts, made of a module's own dense layers. What it computes:

    x, out [T, H], chosen [T, A] int32, weights [T, A] float32: adds to each row of `out` the outputs of the A experts
    that its token was sent to, each times its weight, in the order of the experts. An expert's output is
    down(activation(gate(x)) * up(x)).
    """

    linear: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    linear_quantized: Callable[[Tensor, QuantizedWeight, Tensor | None, int], Tensor]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, experts: PackedExperts, out: Tensor) -> None:
        for index in range(experts.num_experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            if not len(token):
                continue
            gate_up = self._product(x[token], experts.gate_up, experts.gate_up_bias, index, 2 * experts.num_inner)
            inner = gated(gate_up, experts.activation)
            rows = self._product(inner, experts.down, experts.down_bias, index, x.shape[1])
            out.index_add_(0, token, rows * weights[token, slot].to(x.dtype).unsqueeze(1))

    def _product(self, x: Tensor, weight: ExpertWeight, bias: Tensor | None, index: int, num_outputs: int) -> Tensor:
        """x [M, K] -> [M, N]: the dense layer of expert `index`."""
        own_bias = None if bias is None else bias[index].to(x.dtype)
        if isinstance(weight, QuantizedWeight):
            own = replace(weight, values=weight.values[index], scales=weight.scales[index])
            return self.linear_quantized(x, own, own_bias, num_outputs)
        if isinstance(weight, Tensor):
            return self.linear(x, weight[index], own_bias, num_outputs)
        matrix = Mxfp4Matrix(weight.values[index], weight.scales[index])
        if not weight.rounds_rows:
            return self.linear(x, dequantize(matrix).to(x.dtype), own_bias, num_outputs)
        integers = QuantizedWeight(
            doubled(matrix.blocks), powers_of_two(matrix.scales) * 0.5, WeightFormat(8, MXFP4_BLOCK)
        )
        return self.linear_quantized(x, integers, own_bias, num_outputs)


def stored_tensors(matrices: ExpertMatrices) -> Iterator[Tensor]:
    """Every tensor that the matrices are stored in."""
    for parts in matrices:
        for part in parts:
            yield from part if isinstance(part, Mxfp4Matrix) else (part,)
