"""Linear: a dense layer whose weight is packed when it is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.kernels import Kernels
from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.blocks import dequantize
from quire.kernels.coded import CodedMatrix, CodedWeight, can_join
from quire.kernels.interface import PackedWeight, Packing, QuantizedWeight
from quire.layers.activation import FUSED_ACTIVATIONS, FUSED_GATES, activation_function
from quire.layers.norm import Normed, RMSNorm
from quire.layers.ranks import Ranks
from quire.quantization import METHODS, WeightFormat

Table = Tensor | BlockMatrix
"""A matrix whose rows can be looked up."""
Matrix = Table | CodedMatrix
"""A matrix as a checkpoint stores it."""


@dataclass(frozen=True, slots=True)
class LinearOrigin:
    """Where the outputs of a layer come from, for adapters, which know layers by their names."""

    name: str
    """The stored layer's full name."""
    num_outputs: int
    """Its outputs."""
    rows: Tensor | None = None
    """The outputs that the layer computes, in its order; None: all, as they are stored."""

    def select(self, rows: Tensor) -> "LinearOrigin":
        return replace(self, rows=rows if self.rows is None else self.rows[rows])


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A dense layer as a checkpoint stores it."""

    weight: Matrix
    """[N, K] of any float type, or of few bits; it may be a view of a mapped file."""
    bias: Tensor | None = None
    """[N]"""
    origin: LinearOrigin | None = None
    """Set where adapters may change the layer."""
    ranks: Ranks | None = None
    """Set where the layer has a part of the inputs: its outputs are summed over these ranks."""

    def select_rows(self, rows: Tensor) -> "LinearWeight":
        """The layer that computes the outputs `rows`, in their order."""
        return replace(
            self,
            weight=self.weight.select_rows(rows) if isinstance(self.weight, BlockMatrix) else self.weight[rows],
            bias=None if self.bias is None else self.bias[rows],
            origin=None if self.origin is None else self.origin.select(rows),
        )

    def floats(self) -> Tensor:
        """The matrix [N, K] in a float type."""
        if isinstance(self.weight, BlockMatrix):
            return dequantize(self.weight)
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize()

    def in_floats(self) -> "LinearWeight":
        """The same layer without codes."""
        return replace(self, weight=self.floats())


class Linear:
    """x [M, K] -> x weight^T + bias [M, N], the weight packed as `dtype`: a float type, or a quantisation of METHODS.
    A float type leaves blocks of few bits as they are stored.

    Several weights [N_i, K] make one layer that puts their outputs side by side. They are copied; a bias is float32
    whatever the dtype. What comes before a layer is one kernel with it where it works row by row: a norm (`Normed`) and
    the activation or gate of an MLP (`after_activation`, `after_gate`).
    """

    __slots__ = ("bias", "kernels", "num_inputs", "num_outputs", "packed")

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[LinearWeight],
        dtype: str | WeightFormat,
        packing: Packing | None = None,
    ) -> None:
        """`packing` packs the weights; by default `kernels` does."""
        self.kernels = kernels
        packing = packing or kernels
        self.num_outputs = sum(part.weight.shape[0] for part in weights)
        self.num_inputs = weights[0].weight.shape[1]
        self.packed = _pack(packing, weights, stored_as(dtype))
        self.bias = join_biases(weights)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        if isinstance(x, Normed):
            norm = x.norm
            if isinstance(norm, RMSNorm):
                return self.kernels.rms_norm_linear(
                    x.residual, x.update, norm.weight, norm.eps, self.packed, self.bias, self.num_outputs
                )
            x = x.compute()
        if isinstance(self.packed, Tensor):
            return self.kernels.linear(x, self.packed, self.bias, self.num_outputs)
        if isinstance(self.packed, CodedWeight):
            return self.kernels.linear_coded(x, self.packed, self.bias, self.num_outputs)
        return self.kernels.linear_quantized(x, self.packed, self.bias, self.num_outputs)

    def unpacked(self) -> Tensor:
        """The weight [N, K] in float32."""
        if isinstance(self.packed, BlockWeight):
            return torch.cat([dequantize(part) for part in self.packed.matrices()])
        if isinstance(self.packed, CodedWeight):
            inputs = torch.eye(self.num_inputs)
            return self.kernels.linear_coded(inputs, self.packed, None, self.num_outputs).t().contiguous()
        device = (self.packed.values if isinstance(self.packed, QuantizedWeight) else self.packed).device
        rows = torch.arange(self.num_outputs, dtype=torch.int32, device=device)
        return gather(self.kernels, self.packed, rows, self.num_inputs)

    def after_activation(self, x: Tensor, activation: str) -> Tensor:
        """x [M, K] -> [M, N]: the layer of the activation of x."""
        if activation in FUSED_ACTIVATIONS:
            return self.kernels.activation_linear(x, activation, self.packed, self.bias, self.num_outputs)
        return self(activation_function(activation)(x))

    def after_gate(self, x: Tensor, activation: str) -> Tensor:
        """x [M, 2 K] -> [M, N]: the layer of the activation of the first half times the second half."""
        if activation in FUSED_GATES:
            return self.kernels.glu_linear(x, activation, self.packed, self.bias, self.num_outputs)
        gate, up = x.chunk(2, dim=1)
        return self(activation_function(activation)(gate) * up)


class SideBySide(Linear):
    """Layers that are stored in several ways, their outputs side by side, as one layer."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.kernels, self.num_inputs = parts[0].kernels, parts[0].num_inputs
        self.num_outputs = sum(part.num_outputs for part in parts)

    def __call__(self, x: Tensor | Normed) -> Tensor:
        if isinstance(x, Normed):
            x = x.compute()
        return torch.cat([part(x) for part in self.parts], dim=1)

    def unpacked(self) -> Tensor:
        return torch.cat([part.unpacked() for part in self.parts])

    def after_activation(self, x: Tensor, activation: str) -> Tensor:
        return self(activation_function(activation)(x))

    def after_gate(self, x: Tensor, activation: str) -> Tensor:
        gate, up = x.chunk(2, dim=1)
        return self(activation_function(activation)(gate) * up)


def dense_layer(
    kernels: Kernels, weights: Sequence[LinearWeight], dtype: str | WeightFormat, packing: Packing | None = None
) -> Linear:
    """One layer of several stored ones, outputs side by side, however each is stored."""
    runs: list[list[LinearWeight]] = []
    for part in weights:
        if runs and can_join_layers([runs[-1][0], part]):
            runs[-1].append(part)
        else:
            runs.append([part])
    layers = [Linear(kernels, run, dtype, packing) for run in runs]
    layer = layers[0] if len(layers) == 1 else SideBySide(layers)
    ranks = weights[0].ranks
    return layer if ranks is None else SummedLinear(layer, ranks)


def can_join_layers(weights: Sequence[LinearWeight]) -> bool:
    """Whether one weight can hold these layers side by side."""
    coded = [part.weight for part in weights if isinstance(part.weight, CodedMatrix)]
    return not coded or (len(coded) == len(weights) and can_join(coded))


def gather(kernels: Kernels, packed: PackedWeight, ids: Tensor, num_inputs: int) -> Tensor:
    """ids int32 [T] of a packed weight's outputs -> their rows [T, num_inputs], a fresh tensor."""
    if isinstance(packed, Tensor):
        return kernels.gather_rows(packed, ids, num_inputs)
    assert not isinstance(packed, CodedWeight), "tables are packed in floats, in blocks, or quantised here"
    return kernels.gather_rows_quantized(packed, ids, num_inputs)


def _pack(packing: Packing, weights: Sequence[LinearWeight], stored: str | WeightFormat) -> PackedWeight:
    coded = [part.weight for part in weights if isinstance(part.weight, CodedMatrix)]
    if coded:
        assert len(coded) == len(weights), "SideBySide joins layers that are stored in several ways"
        return packing.pack_coded(coded)
    blocks = [part.weight for part in weights if isinstance(part.weight, BlockMatrix)]
    if isinstance(stored, str) and len(blocks) == len(weights):
        return packing.pack_blocks(blocks)
    matrices = [part.floats() for part in weights]
    if isinstance(stored, str):
        return packing.pack_linear(matrices, stored)
    return packing.quantize_linear(matrices, stored)


def stored_as(dtype: str | WeightFormat) -> str | WeightFormat:
    """How a dense layer is stored: a float type, or the format of a quantisation of METHODS."""
    return METHODS[dtype].layers if isinstance(dtype, str) and dtype in METHODS else dtype


def join_biases(weights: Sequence[LinearWeight]) -> Tensor | None:
    """One float32 bias for all parts; zeros for a part without one."""
    if all(part.bias is None for part in weights):
        return None
    biases = [
        torch.zeros(part.weight.shape[0], device=part.weight.device) if part.bias is None else part.bias
        for part in weights
    ]
    return torch.cat([bias.float() for bias in biases])


def head_format(dtype: str) -> str | WeightFormat:
    """How an output head is stored: a quantisation has a format of its own for it."""
    return METHODS[dtype].head if dtype in METHODS else dtype


def output_head(kernels: Kernels, table: LinearWeight, dtype: str, packing: Packing | None = None) -> Linear:
    """The layer that makes logits: a table [vocab_size, H], which may be the embedding's."""
    return Linear(kernels, [table], head_format(dtype), packing)


class SummedLinear(Linear):
    """A layer with a part of the inputs on every rank: its outputs are the sum over the ranks."""

    __slots__ = ("own", "ranks")

    def __init__(self, own: Linear, ranks: Ranks) -> None:
        """`own` has this rank's inputs."""
        self.own = own
        self.ranks = ranks
        self.num_inputs, self.num_outputs = own.num_inputs, own.num_outputs

    def __call__(self, x: Tensor | Normed) -> Tensor:
        return self.ranks.sum(self.own(x))

    def unpacked(self) -> Tensor:
        """This rank's columns."""
        return self.own.unpacked()

    def after_activation(self, x: Tensor, activation: str) -> Tensor:
        return self.ranks.sum(self.own.after_activation(x, activation))

    def after_gate(self, x: Tensor, activation: str) -> Tensor:
        return self.ranks.sum(self.own.after_gate(x, activation))


class DividedHead(Linear):
    """An output head whose rows are divided among ranks by tokens."""

    __slots__ = ("num_padded", "ranks", "vocab_size")

    def __init__(self, own: Linear, ranks: Ranks, num_padded: int, vocab_size: int) -> None:
        """`own` has `num_padded` outputs on every rank but the last."""
        self.kernels, self.packed, self.bias = own.kernels, own.packed, own.bias
        self.num_inputs, self.num_outputs = own.num_inputs, own.num_outputs
        self.ranks = ranks
        self.num_padded = num_padded
        self.vocab_size = vocab_size

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [R, H] -> [R, vocab_size], on every rank."""
        own = super().__call__(x)
        missing = self.num_padded - self.num_outputs
        if missing:
            own = torch.nn.functional.pad(own, (0, missing))
        return self.ranks.gather(own)[:, : self.vocab_size].contiguous()
