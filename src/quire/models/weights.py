"""What models are built from: tensors by name, and dense layers as a checkpoint stores them.

A `TensorSource` knows one format of checkpoint; `quire.models.checkpoint_formats` is the table of them. A model sees a
source through a `WeightScope`, which puts a prefix before every name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.interface import Packing
from quire.layers.adapters import ModelAdapters
from quire.layers.linear import LinearOrigin, LinearWeight
from quire.models.shards import Division, Part, Shards


class TensorSource(Protocol):
    """A checkpoint, or what stands in for one. Names are whole; shapes are what config.json makes them.

    What takes a tensor raises `CheckpointError` if it is missing, misshapen or of an unsupported dtype.
    """

    @property
    def activation_dtype(self) -> torch.dtype:
        """What the model computes in: float32 on a CPU."""
        ...

    def has(self, name: str) -> bool: ...

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that the source has."""
        ...

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor, which stands for packed numbers."""
        ...

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        """The layer `name` of `shape` [outputs, inputs]; see `WeightScope.take_linear`."""
        ...

    def release(self, tensor: Tensor) -> None:
        """`tensor`, or a part of one that was taken, has been packed: its pages of a mapped file are not needed now."""
        ...

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise `CheckpointError` if tensors were never taken, unless a pattern of `ignored` matches their names."""
        ...


@dataclass(frozen=True, slots=True)
class WeightScope:
    """The tensors of a source whose names begin with `prefix`, asked for without it."""

    source: TensorSource
    prefix: str = ""
    packing: Packing | None = None
    """Packs the dense layers; None: the model's kernels do."""
    adapters: ModelAdapters | None = None
    """Collects the layers that adapters may change; None: none may."""
    shards: Shards | None = None
    """This rank's parts of the layers; None: one process has all of each."""

    def scope(self, name: str) -> "WeightScope":
        """The tensors below `name` and a dot."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def without_adapters(self) -> "WeightScope":
        """The same for layers that compute no rows of a step, which adapters cannot change."""
        return replace(self, adapters=None)

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.source.activation_dtype

    def has(self, name: str) -> bool:
        return self.source.has(self.prefix + name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.source.shape_of(self.prefix + name)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.take(self.prefix + name, shape)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.take_bytes(self.prefix + name, shape)

    def release(self, tensor: Tensor) -> None:
        self.source.release(tensor)

    def take_linear(
        self,
        name: str,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        transposed: bool = False,
        split: Division | Sequence[Part] | None = None,
    ) -> LinearWeight:
        """The dense layer `name` of `shape` [outputs, inputs], as the source stores it.

        `bias`: it has one. `transposed`: the family's checkpoints store the matrix as [inputs, outputs]. `split`: how
        ranks divide it, `shape` being that of one rank's part; None: each has all of it. Several parts lie side by side
        in the outputs.
        """
        if self.shards is not None and split is not None:
            take = partial(self.source.take_linear, self.prefix + name, bias=bias, transposed=transposed)
            return self.shards.take(take, shape, ((split, shape[0]),) if isinstance(split, str) else split)
        stored = self.source.take_linear(self.prefix + name, shape, bias=bias, transposed=transposed)
        return stored if self.adapters is None else replace(stored, origin=LinearOrigin(self.prefix + name, shape[0]))

    def take_matrix(self, name: str, shape: tuple[int, int], *, split: Division) -> Tensor:
        """The numbers of the dense layer `name`, for a family that computes with them before a layer is packed."""
        if self.shards is not None:
            return self.take_linear(name, shape, split=split).floats()
        return self.take(f"{name}.weight", shape)

    def take_experts(self, name: str, shape: tuple[int, int, int], split: Sequence[Part]) -> Tensor:
        """A tensor of all experts [experts, outputs, inputs]; `split` as in `take_linear`."""
        if self.shards is None:
            return self.take(name, shape)
        return self.shards.take_experts(partial(self.take, name), shape, split)


def take_float_linear(
    source: TensorSource, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool
) -> LinearWeight:
    """`take_linear` of sources that store a layer as two tensors of floats, `name`.weight and `name`.bias."""
    num_outputs, num_inputs = shape
    weight = source.take(f"{name}.weight", (num_inputs, num_outputs) if transposed else shape)
    return LinearWeight(
        weight.t() if transposed else weight, source.take(f"{name}.bias", (num_outputs,)) if bias else None
    )
