"""MergedSource: a checkpoint with an adapter added to its weights, for a model that serves this adapter alone."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.layers.linear import LinearWeight
from quire.lora.adapter_folder import AdapterFolder, ModuleTensors
from quire.lora.adapter_tensors import AdapterTensors
from quire.models.source_around import SourceAround
from quire.models.weights import TensorSource


class MergedSource(SourceAround):
    """The tensors of `source`, in float32 where the adapter changes them."""

    def __init__(self, source: TensorSource, adapter: AdapterFolder, *, tied: bool) -> None:
        """`tied`: the model's head is its embedding. Raises `CheckpointError` for a damaged adapter."""
        super().__init__(source)
        self._adapter = adapter
        self._tensors = AdapterTensors(adapter)
        self._tied = tied
        self._merged: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = super().take(name, shape)
        layer = name.removesuffix(".weight")
        module = self._adapter.modules.get(layer)
        return tensor if module is None or layer == name else self._change(layer, module, tensor)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        stored = super().take_linear(name, shape, bias=bias, transposed=transposed)
        module = self._adapter.modules.get(name)
        return stored if module is None else replace(stored, weight=self._change(name, module, stored.floats()))

    def finish(self, ignored: Iterable[str] = ()) -> None:
        super().finish(ignored)
        left = sorted(self._adapter.modules.keys() - self._merged)
        if left:
            raise self._refusal(
                f"changes {left[0][:200]}, which is no weight of its own in this model; serve it with --lora-modules"
            )

    def _change(self, name: str, module: ModuleTensors, weight: Tensor) -> Tensor:
        """weight [outputs, inputs] -> what the adapter makes of it; a table is [vocabulary, width]."""
        if self._tied and (module.is_embedding or module.weight is not None):
            raise self._refusal(f"changes {name}, which is also the model's head; serve it with --lora-modules")
        self._merged.add(name)
        if module.weight is not None:
            return self._fitting(name, self._tensors.take(module.weight), weight)
        assert module.a is not None
        assert module.b is not None
        a, b = self._tensors.take(module.a).float(), self._tensors.take(module.b).float()
        update = b @ a * self._adapter.config.factor_of(name)
        changed = weight.float() + self._fitting(name, update.t() if module.is_embedding else update, weight)
        if module.magnitude is not None:
            lengths = torch.linalg.vector_norm(changed, dim=1)
            changed *= (self._tensors.take(module.magnitude).float() / lengths)[:, None]
        return changed

    def _fitting(self, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
        if tensor.shape != weight.shape:
            raise self._refusal(
                f"has {list(tensor.shape)} for {name}, in this model it is {list(weight.shape)}; it was trained for "
                "another base model"
            )
        return tensor

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(f"adapter {str(self._adapter.path)!r} {reason}")
