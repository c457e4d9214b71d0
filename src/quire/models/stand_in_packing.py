"""StandInPacking: the `Packing` of a source that hands out stand-ins of matrices (`row_marks`)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from quire.kernels import cpu
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockMatrix
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.interface import Allocate, ExpertMatrices, ExpertWeight, LowBitWeight, QuantizedWeight
from quire.models.row_marks import is_stand_in
from quire.quantization import WeightFormat


class StandInPacking(ABC):
    """Packs matrices for the CPU. A subclass knows the weight that is made of stand-ins."""

    @abstractmethod
    def weight(
        self, experts: Sequence[Sequence[Tensor]], stored: str | WeightFormat, num_experts: int
    ) -> Sequence[Tensor]:
        """The tensors of the weight that is made of these stand-ins, one list for each expert. `num_experts` is 0 for
        a dense layer, which has one list."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
        if not is_stand_in(weights[0]):
            return cpu.pack_linear(weights, dtype, allocate)
        return self.weight([weights], dtype, 0)[0]

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        if not is_stand_in(weights[0]):
            return cpu.quantize_linear(weights, stored, allocate)
        values, scales = self.weight([weights], stored, 0)
        return QuantizedWeight(values, scales, stored)

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
        return cpu.pack_coded(matrices, allocate)

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight:
        return cpu.pack_blocks(matrices)

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros
    ) -> ExpertWeight:
        if not is_stand_in(matrices[0][0]):
            return cpu.pack_experts(matrices, stored, allocate)
        experts = [[part for part in expert if isinstance(part, Tensor)] for expert in matrices]
        found = self.weight(experts, stored, len(experts))
        return found[0] if isinstance(stored, str) else QuantizedWeight(found[0], found[1], stored)
