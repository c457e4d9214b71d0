"""`pack_experts` and `experts` for kernel modules: packing of one expert after the other, and a loop over
them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.block_products import keep_blocks
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.expert_forms import block_parts, coded_parts, form_of, in_floats, stack_blocks
from quire.kernels.gates import gated
from quire.kernels.interface import (
    Allocate,
    ExpertMatrices,
    ExpertWeight,
    LowBitWeight,
    Mxfp4Matrix,
    PackedExperts,
    PackedWeight,
    QuantizedWeight,
)
from quire.kernels.mxfp4 import as_blocks
from quire.quantization import WeightFormat


class PackLinear(Protocol):
    def __call__(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = ...) -> Tensor: ...


class QuantizeLinear(Protocol):
    def __call__(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = ...
    ) -> QuantizedWeight: ...


class PackCoded(Protocol):
    def __call__(self, matrices: Sequence[CodedMatrix], allocate: Allocate = ...) -> CodedWeight: ...


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
    pack_coded: PackCoded,
) -> ExpertWeight:
    """`pack_experts`, made of a module's own operations. What it computes:

    The dense layer of each expert as `stored` says: a float type, or a format of few bits. Codes, blocks and MXFP4 keep
    their bits (`quire.kernels.expert_forms`). MXFP4 becomes blocks of GGUF. Rows that meet blocks get both digits; if a
    format of few bits is given with MXFP4, only groups that stand out do. The result has what the operations make of
    each expert, in tensors with a first dimension of experts.
    """
    form = form_of(matrices, stored)
    if form == "codes":
        return _pack_codes(coded_parts(matrices), pack_coded, allocate)
    if form == "blocks":
        if isinstance(matrices[0][0], BlockMatrix):
            return keep_blocks(stack_blocks(block_parts(matrices)))
        return _pack_mxfp4(matrices, allocate, both_digits=isinstance(stored, str))
    floats = in_floats(matrices)
    if isinstance(stored, str):
        return pack_floats(floats, stored, pack_linear, allocate)
    return _quantize(floats, stored, quantize_linear, allocate)


def _pack_codes(experts: Sequence[Sequence[CodedMatrix]], pack_coded: PackCoded, allocate: Allocate) -> CodedWeight:
    packed = _Stack(len(experts), allocate)
    for parts in experts:
        weight = pack_coded(parts, packed.allocate)
        packed.put(weight.codes, weight.scales, *(() if weight.offsets is None else (weight.offsets,)))
    codes, scales, *offsets = packed.tensors
    return replace(
        weight, codes=codes, scales=scales, offsets=offsets[0] if offsets else None, order=orders_of(experts)
    )


def orders_of(experts: Sequence[Sequence[CodedMatrix]]) -> Tensor | None:
    """The order of inputs of every expert [E, K] int32; None: as they are."""
    orders = [parts[0].order for parts in experts]
    return torch.stack([order.int() for order in orders if order is not None]) if orders[0] is not None else None


def _pack_mxfp4(matrices: ExpertMatrices, allocate: Allocate, *, both_digits: bool) -> BlockWeight:
    packed = _Stack(len(matrices), allocate)
    for expert in matrices:
        rows = torch.cat([as_blocks(part).rows for part in expert if isinstance(part, Mxfp4Matrix)])
        packed.allocate(rows.shape, dtype=rows.dtype).copy_(rows)
        packed.put(rows)
    return BlockWeight((BlockMatrix(packed.tensors[0], "MXFP4"),), both_digits)


@dataclass(frozen=True, slots=True)
class ExpertLoop:
    """`experts` as a loop over the experts, made of a module's own dense layers. What it computes:

    x, out [T, H], chosen [T, A] int32, weights [T, A] float32: adds to each row of `out` the outputs of the A experts
    that its token was sent to, each times its weight, in the order of the experts. An expert's output is
    down(activation(gate(x)) * up(x)).
    """

    linear: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    linear_quantized: Callable[[Tensor, LowBitWeight, Tensor | None, int], Tensor]
    linear_coded: Callable[[Tensor, CodedWeight, Tensor | None, int], Tensor]

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
        own = weight_of_expert(weight, index)
        if isinstance(own, Tensor):
            return self.linear(x, own, own_bias, num_outputs)
        if isinstance(own, CodedWeight):
            return self.linear_coded(x, own, own_bias, num_outputs)
        return self.linear_quantized(x, own, own_bias, num_outputs)


def weight_of_expert(weight: ExpertWeight, index: int) -> PackedWeight:
    """The packed weight of one expert."""
    if isinstance(weight, Tensor):
        return weight[index]
    if isinstance(weight, QuantizedWeight):
        return replace(weight, values=weight.values[index], scales=weight.scales[index])
    if isinstance(weight, BlockWeight):
        return replace(weight, parts=tuple(BlockMatrix(part.rows[index], part.type_name) for part in weight.parts))
    return replace(
        weight,
        codes=weight.codes[index],
        scales=weight.scales[index],
        offsets=None if weight.offsets is None else weight.offsets[index],
        order=None if weight.order is None else weight.order[index],
    )
