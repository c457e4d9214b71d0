"""StoredNames: a source seen through the names that models ask for, whatever prefix its checkpoint gave them.

transformers saves `model.layers.0…` from a model with an output head and `layers.0…` from the bare model, and loads
either into both; some checkpoints mix them. Here a name that is not stored is looked up without its first part.
"""

import torch
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.source_around import SourceAround

MATRICES = ("weight", "qweight", "weight_packed", "_weight_qdata")
"""What formats of checkpoints call the matrix of a dense layer."""


class StoredNames(SourceAround):
    """A `TensorSource` over another."""

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        device: torch.device = getattr(self._source, "device", torch.device("cpu"))
        return device

    def has(self, name: str) -> bool:
        return self._source.has(self._stored(name))

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._source.shape_of(self._stored(name))

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.take(self._stored(name), shape)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.take_bytes(self._stored(name), shape)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        _, dot, rest = name.partition(".")
        if dot and not self._has_layer(name) and self._has_layer(rest):
            name = rest
        return self._source.take_linear(name, shape, bias=bias, transposed=transposed)

    def _has_layer(self, name: str) -> bool:
        return any(self._source.has(f"{name}.{matrix}") for matrix in MATRICES)

    def _stored(self, name: str) -> str:
        """The name of a tensor in the checkpoint; the name itself where no spelling of it is stored."""
        _, _, rest = name.partition(".")
        return rest if "." in rest and not self._source.has(name) and self._source.has(rest) else name
