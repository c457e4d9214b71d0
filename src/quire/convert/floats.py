"""write_floats: a checkpoint's weights as floats of one type, in safetensors under the names of Hugging Face's hub."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.convert.original import Original
from quire.errors import CheckpointError
from quire.kernels import kernels_for
from quire.kernels.allocation import zeros
from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.coded import CodedMatrix, CodedWeight
from quire.kernels.interface import Allocate, ExpertMatrices, ExpertWeight, LowBitWeight, QuantizedWeight
from quire.layers.linear import LinearWeight
from quire.models.registry import load_model
from quire.models.source_around import SourceAround
from quire.models.weights import TensorSource
from quire.quantization import WeightFormat

OnTensor = Callable[[str, Tensor], None]
"""Gets every tensor of a checkpoint, by its name on the hub."""


def each_tensor(original: Original, on_tensor: OnTensor, *, transposes: bool = False) -> None:
    """Hand over every tensor that the model has. `transposes`: matrices that a family's checkpoints have as [inputs,
    outputs] come so; else all come as [outputs, inputs].

    What it has is found by building it, so what the family does not know is refused as when it is served. Raises
    `CheckpointError`.
    """
    config = original.config
    if config.computed_by or config.mxfp4_experts or config.packed_as is not None:
        kind = (
            "is computed by transformers"
            if config.computed_by
            else "has experts in MXFP4"
            if config.mxfp4_experts
            else f"is packed as {config.packed_as}"
        )
        raise CheckpointError(
            f"{original.path} {kind}; only models that Quire loads as floats can be converted to floats or GGUF"
        )
    visitor = _Visitor(original.open(), on_tensor, transposes)
    load_model(config, visitor, kernels_for("cpu"), "float32", packing=_NoPacking())


class _Visitor(SourceAround):
    """Hands over everything that is taken."""

    def __init__(self, source: TensorSource, on_tensor: OnTensor, transposes: bool) -> None:
        super().__init__(source)
        self._on_tensor, self._transposes = on_tensor, transposes
        self._seen: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.take(name, shape)
        self._visit(name, tensor)
        return tensor

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        stored = self._source.take_linear(name, shape, bias=bias, transposed=transposed).in_floats()
        assert isinstance(stored.weight, Tensor)
        self._visit(f"{name}.weight", stored.weight.t() if transposed and self._transposes else stored.weight)
        if stored.bias is not None:
            self._visit(f"{name}.bias", stored.bias)
        return stored

    def _visit(self, name: str, tensor: Tensor) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._on_tensor(name, tensor)


class _NoPacking:
    """A `Packing` of a model that computes nothing."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: str, allocate: Allocate = zeros) -> Tensor:
        return torch.empty(0)

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        return QuantizedWeight(torch.empty(0), torch.empty(0), stored)

    def pack_coded(self, matrices: Sequence[CodedMatrix], allocate: Allocate = zeros) -> CodedWeight:
        raise AssertionError("all layers are floats here")

    def pack_blocks(self, matrices: Sequence[BlockMatrix]) -> LowBitWeight:
        return BlockWeight(tuple(matrices))

    def pack_experts(
        self, matrices: ExpertMatrices, stored: str | WeightFormat, allocate: Allocate = zeros
    ) -> ExpertWeight:
        return torch.empty(0)
