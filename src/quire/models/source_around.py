"""SourceAround: a `TensorSource` that asks another for everything. Subclasses change some of the answers."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quire.layers.linear import LinearWeight
from quire.models.weights import TensorSource


class SourceAround:
    """Implements `TensorSource` by `source`."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    @property
    def activation_dtype(self) -> torch.dtype:
        return self._source.activation_dtype

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._source.shape_of(name)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.take(name, shape)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.take_bytes(name, shape)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        return self._source.take_linear(name, shape, bias=bias, transposed=transposed)

    def release(self, tensor: Tensor) -> None:
        self._source.release(tensor)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        self._source.finish(ignored)
