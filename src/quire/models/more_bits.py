"""MoreBits: the dense layers of a quantisation that are stored in the format of its head, since they need more bits.

They are chosen from the weights alone: those whose weights a sample of rows shows to change most, as long as what they
add fits `Method.extra_bits`. The same checkpoint has the same layers, whatever the machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels import cpu, kernels_for
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.interface import Allocate, ExpertMatrices, ExpertWeight, LowBitWeight, Packing, QuantizedWeight
from quire.model_config import ModelConfig
from quire.model_config.folder_kinds import name_some
from quire.models.marked_source import MarkedSource
from quire.models.packed_checkpoint import packed_shapes
from quire.models.registry import load_model
from quire.models.row_marks import is_stand_in
from quire.models.shards import Shards
from quire.models.weights import TensorSource
from quire.quantization import METHODS, WeightFormat

SAMPLED_ROWS = 64
"""Rows of each stored matrix that are measured."""
SMALLEST_ERROR = 0.02
"""Layers that change by less need no more bits: their checkpoint had about as few."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A packed weight that a model asks for."""

    index: int
    """Its place among the weights that are quantised, in the order in which the model asks for them."""
    layer: str
    """The layer that its first outputs come from; "" for one that the family computes."""
    num_bytes: int
    """What the wider format adds."""
    error: float
    """The length of what the narrow format changes, as a share of the length of the weight."""


@dataclass(frozen=True, slots=True)
class MoreBits:
    """The layers of one model that need more bits."""

    quantization: str
    chosen: tuple[Measured, ...] = ()
    num_measured: int = 0

    @classmethod
    def choose(
        cls, config: ModelConfig, source: TensorSource, quantization: str, shards: Shards | None = None
    ) -> "MoreBits":
        """Read a sample of each matrix of `source`, which is used up."""
        method = METHODS.get(quantization)
        if method is None or not method.extra_bits or config.computed_by or config.spec.expert_layers:
            return cls(quantization)
        survey = _Survey(config, source, method.layers, method.head)
        load_model(config, survey, kernels_for("cpu"), quantization, packing=survey, shards=shards)
        left, chosen = method.extra_bytes(config.spec.layer_parameters), []
        for found in sorted(survey.measured, key=lambda each: (-each.error, each.index)):
            if found.error >= SMALLEST_ERROR and found.num_bytes <= left:
                chosen.append(found)
                left -= found.num_bytes
        return cls(quantization, tuple(sorted(chosen, key=lambda each: each.index)), len(survey.measured))

    def describe(self) -> str:
        """For the lines at start."""
        if not self.chosen:
            return f"{self.quantization} (no layer needs more bits)"
        names = name_some([each.layer or "a computed layer" for each in self.chosen])
        bits = METHODS[self.quantization].head.bits
        return f"{self.quantization} ({bits} bits for {len(self.chosen)} of {self.num_measured} weights: {names})"

    def around(self, packing: Packing) -> Packing:
        """`packing`, with more bits for these layers."""
        return _MixedPacking(packing, self) if self.chosen else packing


class _Survey(MarkedSource):
    """Measures what a model would pack, and packs nothing."""

    def __init__(self, config: ModelConfig, source: TensorSource, narrow: WeightFormat, wide: WeightFormat) -> None:
        super().__init__(config, source)
        self._narrow, self._wide = narrow, wide
        self._num_quantized = 0
        self.measured: list[Measured] = []

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # The head is not measured, so whether it is the embedding need not be known.
        if self._is_tied_head(name, shape):
            table = next((each for each, at in self.matrices.items() if tuple(at.weight.shape) == shape), None)
            if table is not None:
                return self.marks.of(table, (shape[0], shape[1]))
        return super().take(name, shape)

    def release(self, tensor: Tensor) -> None:
        """What is read is little."""

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        num_outputs, num_inputs = sum(map(len, weights)), weights[0].shape[1]
        if stored == self._narrow:
            rows, layer = self._sample(weights)
            added = self._wide.weight_bytes(num_outputs, num_inputs) - stored.weight_bytes(num_outputs, num_inputs)
            self.measured.append(Measured(self._num_quantized, layer, added, relative_error(rows, stored)))
        self._num_quantized += 1
        values, scales = self.weight([weights], stored, 0)
        return QuantizedWeight(values, scales, stored)

    def weight(
        self, experts: Sequence[Sequence[Tensor]], stored: str | WeightFormat, num_experts: int
    ) -> Sequence[Tensor]:
        """Tensors of the right shapes without memory."""
        shapes = packed_shapes(stored, sum(map(len, experts[0])), experts[0][0].shape[1])
        return [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for dtype, shape in shapes]

    def _sample(self, weights: Sequence[Tensor]) -> tuple[Tensor, str]:
        """Some rows of a weight, evenly spread, and the layer of its first outputs."""
        found, layer = [], ""
        for part in weights:
            few = part[:: max(1, len(part) // SAMPLED_ROWS)]
            if not is_stand_in(few):
                found.append(few.float())
                continue
            for origin in self.marks.origins_of(few):
                rows = torch.arange(origin.shape[0]) if origin.rows is None else origin.rows
                layer = layer or origin.layer
                found.append(self.matrices[origin.layer].select_rows(rows).floats().float())
        return torch.cat(found), layer


def relative_error(rows: Tensor, stored: WeightFormat) -> float:
    """rows [n, K] of a weight -> the length of what a format changes, as a share of theirs."""
    packed = cpu.quantize_linear([rows], stored)
    kept = cpu.gather_rows_quantized(packed, torch.arange(len(rows), dtype=torch.int32), rows.shape[1])
    length = float(rows.square().sum(dtype=torch.float64))
    return (float((kept - rows).square().sum(dtype=torch.float64)) / length) ** 0.5 if length else 0.0


class _MixedPacking:
    """A `Packing` that gives some layers more bits. It counts what it is asked for."""

    def __init__(self, packing: Packing, more: MoreBits) -> None:
        self._packing = packing
        self._wide = METHODS[more.quantization].head
        self._indexes = frozenset(each.index for each in more.chosen)
        self._num_quantized = 0

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        index = self._num_quantized
        self._num_quantized += 1
        return self._packing.quantize_linear(weights, self._wide if index in self._indexes else stored, allocate)

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
        return self._packing.pack_linear(weights, dtype, allocate)

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
        return self._packing.pack_coded(matrices, allocate)

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight:
        return self._packing.pack_blocks(matrices)

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros
    ) -> ExpertWeight:
        return self._packing.pack_experts(matrices, stored, allocate)
