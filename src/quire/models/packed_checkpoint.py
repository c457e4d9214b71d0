"""PackedCheckpoint: a folder of packed weights, as `quire convert` writes it, opened by mapping its files.

PACKED_FILE lists the layers whose matrices are packed. A family takes stand-ins of them (`row_marks`), and the packed
weight that it then asks for is found by what it is made of: a view of the mapped file. So the order in which a family
asks, and which layers it joins, need not be written down; a family that came to join others finds nothing and says so.
All other tensors are stored as floats under their own names.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.kernels import cpu
from quire.kernels.allocation import zeros
from quire.kernels.interface import Allocate, Packing, QuantizedWeight
from quire.layers.linear import LinearWeight
from quire.model_config.packed_folder import PACKED_FILE, PackedFolder
from quire.models.row_marks import RowMarks, is_stand_in, key_of
from quire.models.safetensors_file import DTYPES, Entry, read_header
from quire.models.safetensors_weights import SafetensorsWeights
from quire.models.stand_in_packing import StandInPacking
from quire.models.weights import take_float_linear
from quire.quantization import METHODS, WeightFormat

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


class PackedCheckpoint(StandInPacking):
    """A `TensorSource` and the `Packing` that belongs to it."""

    activation_dtype = torch.float32

    def __init__(self, folder: Path, listed: PackedFolder, files: SafetensorsWeights) -> None:
        self._folder = folder
        self._layers = listed.layers
        self._files = files
        self._marks = RowMarks()
        self._quantization = listed.quantization

    @classmethod
    def open(cls, folder: Path) -> "PackedCheckpoint":
        """Raises `CheckpointError` for files that are missing, damaged or of another version."""
        listed = PackedFolder.read(folder / PACKED_FILE)
        if listed.packing != cpu.PACKING:
            raise CheckpointError(
                f"{folder / PACKED_FILE}: packing is {listed.packing}, and this version of Quire reads {cpu.PACKING}; "
                "run quire convert again on the original"
            )
        entries: dict[str, Entry] = {}
        for name in listed.files:
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; {PACKED_FILE} says that it holds tensors of this model")
            found = read_header(file)[0]
            if twice := sorted(entries.keys() & found.keys()):
                raise CheckpointError(f"{file}: tensor {twice[0]} is also in another file")
            entries |= found
        return cls(folder, listed, SafetensorsWeights(folder, entries, keeps_pages=True))

    # -- the source ----------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        layer, _, end = name.rpartition(".")
        return self._files.has(name) or (end == "weight" and layer in self._layers)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._files.shape_of(name)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        layer, _, end = name.rpartition(".")
        if end == "weight" and layer in self._layers and len(shape) == 2:
            return self._marks.of(layer, (shape[0], shape[1]))
        return self._files.take(name, shape)

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._files.take_bytes(name, shape)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        """Matrices lie as [outputs, inputs] also where a family's checkpoints have them transposed."""
        if name not in self._layers:
            return take_float_linear(self._files, name, shape, bias=bias, transposed=False)
        stored_bias = self._files.take(f"{name}.bias", shape[:1]) if bias else None
        return LinearWeight(self._marks.of(name, shape), stored_bias)

    def release(self, tensor: Tensor) -> None:
        """Packed weights are read where they lie, so their pages stay."""

    def finish(self, ignored: Iterable[str] = ()) -> None:
        self._files.finish(ignored)

    def packing_for(self, stored: str) -> Packing:
        """What finds the packed weights of a model that is to be stored so. Raises `CheckpointError` for another
        form."""
        if stored != self._quantization:
            raise CheckpointError(
                f"{self._folder} holds weights packed as {self._quantization}, and {stored} is asked for; leave "
                "quantization out, or serve the original"
            )
        return self

    # -- the packing ---------------------------------------------------------------------------------------------------

    def weight(
        self, experts: Sequence[Sequence[Tensor]], stored: str | WeightFormat, num_experts: int
    ) -> Sequence[Tensor]:
        """Views of the mapped files."""
        layer, key = self._stored_as(experts, stored, num_experts) or self._refuse(experts)
        num_outputs, num_inputs = sum(len(part) for part in experts[0]), experts[0][0].shape[1]
        stack = (num_experts,) if num_experts else ()
        return [
            self._files.take_as(part_name(layer, key, index), (*stack, *shape), (_NAMES[dtype],))
            for index, (dtype, shape) in enumerate(packed_shapes(stored, num_outputs, num_inputs))
        ]

    def quantize_linear(
        self, weights: Sequence[Tensor], stored: WeightFormat, allocate: Allocate = zeros
    ) -> QuantizedWeight:
        """`stored`, or the format of layers that need more bits (`MoreBits`), whichever the folder holds."""
        wide = METHODS[self._quantization].head
        is_wide = is_stand_in(weights[0]) and not self._stored_as([weights], stored, 0)
        return super().quantize_linear(weights, wide if is_wide else stored, allocate)

    def _stored_as(
        self, experts: Sequence[Sequence[Tensor]], stored: str | WeightFormat, num_experts: int
    ) -> tuple[str, str] | None:
        """The first layer and the key of a weight that the folder holds in this form."""
        origins = [self._marks.origins_of(part) for expert in experts for part in expert]
        key, layer = key_of(form_name(stored, num_experts), origins), origins[0][0].layer
        return (layer, key) if self._files.has(part_name(layer, key, 0)) else None

    def _refuse(self, experts: Sequence[Sequence[Tensor]]) -> NoReturn:
        layer = self._marks.origins_of(experts[0][0])[0].layer
        raise CheckpointError(
            f"{self._folder}: there is no packed weight of {layer} and what is now packed with it; the folder "
            f"fits another version of Quire or another config.json: run quire convert again on the original"
        )


def form_name(stored: str | WeightFormat, num_experts: int = 0) -> str:
    """How a weight is packed, as a part of its key."""
    if isinstance(stored, str):
        name = stored
    else:
        name = f"{stored.bits} bits in {'rotated ' if stored.rotates else ''}groups of {stored.group_size}"
    return f"{num_experts} experts, {name}" if num_experts else name


def part_name(layer: str, key: str, index: int) -> str:
    """The name of a tensor of the packed weight `key`, whose first outputs are those of `layer`."""
    return f"{layer}.packed.{key}.{index}"


def packed_shapes(stored: str | WeightFormat, num_outputs: int, num_inputs: int) -> list[tuple[str, tuple[int, ...]]]:
    """The types and shapes of the tensors that the CPU's kernels pack a weight into."""
    from quire.kernels import _cpu  # not built everywhere

    panel = _cpu.panel
    num_panels = -(-num_outputs // panel)
    if isinstance(stored, str):
        depth = num_inputs + num_inputs % 2 if stored == "bfloat16" else num_inputs
        return [(stored, (num_panels, depth, panel))]
    num_pairs, num_groups = -(-num_inputs // _cpu.pair_of_steps), -(-num_inputs // stored.group_size)
    values = ("uint8", (num_panels, num_pairs, stored.bits // 4, panel, 4))
    if stored.bits == 8:
        return [values, ("bfloat16", (num_panels, num_groups, panel))]
    return [values, ("uint8", (num_panels, num_groups + 2, panel, 2))]
