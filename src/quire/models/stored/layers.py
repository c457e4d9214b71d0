"""StoredLayers: a checkpoint some of whose dense layers are stored in few bits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels.coded import CodedMatrix
from quire.layers.linear import LinearWeight
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.stored.layouts import LAYOUTS
from quire.models.stored.tensors import SCALES, LayerTensors
from quire.models.weights import take_float_linear
from quire.quantization.stored import StoredWeights

_CODES = tuple(dict.fromkeys(layout.codes for layout in LAYOUTS.values()))


class StoredLayers:
    """A `TensorSource` over the files. What the files hold decides whether a layer has few bits; how they are read is
    what the config says of the layer."""

    activation_dtype = torch.float32

    def __init__(self, files: SafetensorsWeights, stored: StoredWeights) -> None:
        self._files = files
        self._stored = stored

    def has(self, name: str) -> bool:
        layer, _, end = name.rpartition(".")
        return self._files.has(name) or (end == "weight" and self._holds_codes(layer))

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._files.shape_of(name)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of floats. A matrix of few bits is turned into them: MLX stores embeddings so."""
        layer, _, end = name.rpartition(".")
        if end == "weight" and len(shape) == 2 and self._holds_codes(layer):
            matrix = self._read(layer, (shape[0], shape[1]))
            return matrix.dequantize() if isinstance(matrix, CodedMatrix) else matrix
        return self._files.take(name, shape)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._files.take_bytes(name, shape)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        """Codes lie as [outputs, inputs] also where a family's floats are transposed."""
        if not self._holds_codes(name):
            return take_float_linear(self._files, name, shape, bias=bias, transposed=transposed)
        matrix = self._read(name, shape)
        if not bias and self._files.has(f"{name}.bias"):
            # GPTQ's tools write a bias of zeros beside every layer.
            stored = self._files.take(f"{name}.bias", shape[:1])
            if bool(stored.any()):
                raise CheckpointError(f"tensor {name}.bias is not zero, but the family's layer has no bias")
        return LinearWeight(matrix, self._files.take(f"{name}.bias", shape[:1]) if bias else None)

    def release(self, tensor: Tensor) -> None:
        self._files.release(tensor)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        self._files.finish(ignored)

    def _holds_codes(self, layer: str) -> bool:
        return any(
            self._files.has(f"{layer}.{end}") and self._files.dtype_of(f"{layer}.{end}") not in SCALES for end in _CODES
        )

    def _read(self, layer: str, shape: tuple[int, int]) -> CodedMatrix | Tensor:
        scheme = self._stored.scheme_of(layer)
        if scheme is None:
            raise CheckpointError(
                f"layer {layer} is stored in few bits, but the config's {self._stored.method} leaves it out"
            )
        return LAYOUTS[scheme.layout].read(LayerTensors(self._files, layer, shape), scheme)
