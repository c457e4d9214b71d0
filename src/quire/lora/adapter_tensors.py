"""AdapterTensors: the tensors of one adapter, read into memory."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.lora.adapter_folder import AdapterFolder, ModuleTensors
from quire.models.safetensors_file import DTYPES, Entry


class AdapterTensors:
    """Reads all tensors of a folder at once. Raises `CheckpointError` for a truncated file."""

    def __init__(self, folder: AdapterFolder) -> None:
        self._modules: Mapping[str, ModuleTensors] = folder.modules
        self._content: dict[int, bytearray] = {}
        for entry in self._entries():
            with entry.file.open("rb") as stream:
                stream.seek(entry.begin)
                content = bytearray(entry.end - entry.begin)
                if stream.readinto(content) != len(content):
                    raise CheckpointError(f"{entry.file} is truncated; fetch it again")
            self._content[entry.begin] = content

    def take(self, entry: Entry) -> Tensor:
        """Raises `CheckpointError` for numbers that are not finite."""
        dtype = getattr(torch, DTYPES[entry.dtype])
        tensor = torch.frombuffer(self._content[entry.begin], dtype=dtype, count=math.prod(entry.shape))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{Path(entry.file)} holds numbers that are not finite; the adapter is damaged")
        return tensor.view(entry.shape)

    def _entries(self) -> Iterator[Entry]:
        for module in self._modules.values():
            for entry in (module.a, module.b, module.magnitude, module.weight):
                if entry is not None:
                    yield entry
