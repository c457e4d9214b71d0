"""write_packed: load a model once, quantised, and store what the kernels read, for `PackedCheckpoint`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quire.convert.original import Original
from quire.errors import CheckpointError
from quire.kernels import cpu, kernels_for
from quire.kernels.interface import ExpertWeight
from quire.layers.linear import LinearWeight
from quire.model_config import ModelConfig
from quire.model_config.packed_folder import PackedFolder
from quire.models.marked_source import MarkedSource
from quire.models.more_bits import MoreBits
from quire.models.packed_checkpoint import form_name, part_name
from quire.models.packed_weights import tensors_of
from quire.models.registry import load_model
from quire.models.row_marks import Origin, is_stand_in, key_of
from quire.models.safetensors_file import DTYPES
from quire.models.safetensors_writer import SafetensorsWriter
from quire.models.weights import TensorSource
from quire.quantization import WeightFormat

_NAMES = {getattr(torch, ours): theirs for theirs, ours in DTYPES.items()}


def write_packed(
    original: Original, folder: Path, quantization: str, on_bytes: Callable[[int], None]
) -> dict[str, str | list[str] | int]:
    """Write the weights of a model into `folder`; returns the content of PACKED_FILE. `on_bytes` hears how many bytes
    of tensors are made so far. Raises `CheckpointError` for a checkpoint that cannot be loaded or quantised."""
    config = original.config
    if config.stored is not None:
        raise CheckpointError(
            f"{original.path}: its layers are already stored in few bits ({config.stored.describe()}); Quire keeps "
            "them as they are, so there is nothing to gain"
        )
    if config.computed_by or config.packed_as is not None:
        kind = "is computed by transformers" if config.computed_by else f"is already packed as {config.packed_as}"
        raise CheckpointError(
            f"{original.path} {kind}; {quantization} weights are made of checkpoints that Quire computes itself"
        )
    writer = SafetensorsWriter(folder, "packed")
    recorder = PackingRecorder(config, original.open(), writer, on_bytes)
    more = MoreBits.choose(config, original.open(), quantization)
    load_model(config, recorder, kernels_for("cpu"), quantization, packing=more.around(recorder))
    recorder.write_floats()
    files = sorted(set(writer.finish().values()))
    listed = PackedFolder(quantization, cpu.PACKING, tuple(files), frozenset(recorder.packed_layers))
    return listed.to_dict()


class PackingRecorder(MarkedSource):
    """A `TensorSource` over another that hands out stand-ins of matrices, and the `Packing` that gets them back: it
    packs the matrices that they stand for, and writes the result."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        writer: SafetensorsWriter,
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__(config, source)
        self._writer, self._on_bytes = writer, on_bytes
        self._written: set[str] = set()
        self.packed_layers: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = super().take(name, shape)
        if not is_stand_in(tensor):
            self._write(name, tensor)
        return tensor

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.take_bytes(name, shape)
        self._write(name, tensor)
        return tensor

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        stored = super().take_linear(name, shape, bias=bias, transposed=transposed)
        if stored.bias is not None:
            self._write(f"{name}.bias", stored.bias)
        return stored

    def release(self, tensor: Tensor) -> None:
        """Pages go back when the system needs them."""

    def write_floats(self) -> None:
        """Write the matrices that were taken and never packed, as tables of embeddings are."""
        for name, stored in self.matrices.items():
            if name not in self.packed_layers:
                self._write(f"{name}.weight", stored.floats())

    # -- the packing ---------------------------------------------------------------------------------------------------

    def weight(
        self, experts: Sequence[Sequence[Tensor]], stored: str | WeightFormat, num_experts: int
    ) -> Sequence[Tensor]:
        """Pack the matrices and write the result; returns tensors of the same shapes without memory."""
        origins = [self.marks.origins_of(part) for expert in experts for part in expert]
        found = iter([self._matrix(each) for each in origins])
        matrices = [[next(found) for _ in expert] for expert in experts]
        packed: ExpertWeight
        if num_experts:
            packed = cpu.pack_experts(matrices, stored)
        elif isinstance(stored, str):
            packed = cpu.pack_linear(matrices[0], stored)
        else:
            packed = cpu.quantize_linear(matrices[0], stored)
        key, layer = key_of(form_name(stored, num_experts), origins), origins[0][0].layer
        tensors = tensors_of(packed)
        for index, tensor in enumerate(tensors):
            self._write(part_name(layer, key, index), tensor)
        return [torch.empty_like(tensor, device="meta") for tensor in tensors]

    def _matrix(self, origins: Sequence[Origin]) -> Tensor:
        """The rows that a stand-in stands for."""
        parts = []
        for origin in origins:
            floats = self.matrices[origin.layer].floats()
            parts.append(floats if origin.rows is None else floats[origin.rows])
            self.packed_layers.add(origin.layer)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _write(self, name: str, tensor: Tensor) -> None:
        if name in self._written:
            return
        self._written.add(name)
        tensor = tensor.contiguous()
        content = tensor.view(-1).view(torch.uint8).numpy().data
        self._writer.add(name, _NAMES[tensor.dtype], tuple(tensor.shape), content)
        self._on_bytes(self._writer.num_bytes)
