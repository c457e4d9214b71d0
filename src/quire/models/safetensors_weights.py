"""SafetensorsWeights: the tensors of a Hugging Face folder, in one safetensors file or several.

Files are mapped, not read: a tensor is a view of its file until a layer packs it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.layers.linear import LinearWeight
from quire.model_config import read_json
from quire.model_config.file_kinds import is_file
from quire.model_config.folder_kinds import name_some
from quire.models.mapped_file import MappedFile
from quire.models.safetensors_file import DTYPES, RELEASED_BYTES, Entry, read_header
from quire.models.weights import take_float_linear

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16", "F64")
_QUANTIZED = {"qweight": "GPTQ and AWQ", "weight_packed": "llm-compressor's formats"}
"""How other formats name a layer's matrix → which they are."""


class SafetensorsWeights:
    """The tensors of one checkpoint, taken by name and checked; every one must be asked for."""

    activation_dtype = torch.float32

    def __init__(self, folder: Path, entries: Mapping[str, Entry], *, keeps_pages: bool = False) -> None:
        """`keeps_pages`: tensors are used where they are mapped; else layers pack them soon and read them no more."""
        self._folder = folder
        self._released_bytes = None if keeps_pages else RELEASED_BYTES
        self._entries = entries
        self._taken: set[str] = set()
        self._files: dict[Path, MappedFile] = {}

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsWeights":
        """Map the safetensors files of a folder: the whole file where there is one, since an index beside it is left
        from before the shards were merged; else the files that the index names."""
        whole = folder / SINGLE_FILE
        if whole.is_file():
            return cls(folder, read_header(whole)[0])
        return cls(folder, _indexed_entries(folder, folder / INDEX_FILE))

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype_of(self, name: str) -> str:
        """The type of a tensor that the files hold, by safetensors' name."""
        return self._entries[name].dtype

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored, a view of its file; of 64 bits, a float32 copy. Its shape must be `shape`."""
        tensor = self.take_as(name, shape, _FLOATS)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def take_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.take_as(name, shape, ("U8",))

    def skip(self, names: Iterable[str]) -> None:
        """Tensors that nothing is computed from, if the files hold them."""
        self._taken.update(name for name in names if name in self._entries)

    def take_as(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        """The tensor as stored, which must have this shape and one of these types."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self._folder}: tensor {name} of shape {list(shape)} is missing; {self._similar(name)}"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)} by config.json"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is of dtype {entry.dtype}; supported: {', '.join(dtypes)}"
            )
        self._taken.add(name)
        if entry.file not in self._files:
            self._files[entry.file] = MappedFile(entry.file, released_bytes=self._released_bytes)
        return self._files[entry.file].take(getattr(torch, DTYPES[entry.dtype]), entry.shape, entry.begin)

    def take_linear(self, name: str, shape: tuple[int, int], *, bias: bool, transposed: bool) -> LinearWeight:
        return take_float_linear(self, name, shape, bias=bias, transposed=transposed)

    def release(self, tensor: Tensor) -> None:
        any(file.release_tensor(tensor) for file in self._files.values())

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise `CheckpointError` if tensors were never taken, unless they have no elements or a pattern of `ignored`
        matches their names."""
        patterns = [re.compile(pattern) for pattern in ignored]
        left = [
            name
            for name, entry in self._entries.items()
            if name not in self._taken
            and 0 not in entry.shape
            and not any(pattern.search(name) for pattern in patterns)
        ]
        if left:
            raise CheckpointError(
                f"{self._folder}: {len(left)} tensors are not part of the model config.json describes: "
                f"{name_some(sorted(left))}; expected only the {len(self._taken)} that were loaded"
            )
        if self._released_bytes is not None:
            for file in self._files.values():
                file.release()

    def _similar(self, name: str) -> str:
        """Tensors that the checkpoint has near a missing one."""
        layer = name.removesuffix(".weight")
        for suffix, formats in _QUANTIZED.items():
            if f"{layer}.{suffix}" in self._entries:
                return (
                    f"it has {layer}.{suffix}, as {formats} write it, but config.json has no quantization_config that "
                    "says how to read it; add the one that the checkpoint was published with"
                )
        scope = name.rsplit(".", 2)[0] + "."
        wrapped = next((other for other in self._entries if other.endswith(f".{name}")), None)
        if wrapped is not None and all(other.startswith(wrapped[: -len(name)]) for other in self._entries):
            return (
                f"all its names begin with {wrapped[: -len(name)]}, as a model inside another one is saved; take that "
                "off the names, or save the inner model"
            )
        found = sorted(other for other in self._entries if other.startswith(scope))
        if found:
            return f"under {scope} it has {name_some(found)}"
        return f"its {len(self._entries)} tensors include {name_some(sorted(self._entries))}"


def _indexed_entries(folder: Path, index: Path) -> dict[str, Entry]:
    """The tensors of a sharded checkpoint. Its index says in which file a tensor is; a copy in another file, which a
    merge of shards leaves behind, is not read."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not isinstance(weight_map, dict) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{index}: weight_map is {json.dumps(weight_map)[:200]}; expected tensor names and their files"
        )
    shards: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(names)):
        file = folder / name
        if str(Path(name)) != Path(name).name:  # "./" before it says nothing
            raise CheckpointError(f"{index}: {name} is not the name of a file beside it")
        if not is_file(file):
            raise CheckpointError(f"{file} is missing; {INDEX_FILE} says that it holds tensors of this checkpoint")
        shards[name] = read_header(file)[0]
    entries = {tensor: entry for name in shards for tensor, entry in shards[name].items()}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            found = f"found in {entries[tensor].file.name}" if tensor in entries else "found in none of the files"
            raise CheckpointError(f"{index}: tensor {tensor} should be in {name}, {found}")
        entries[tensor] = shards[name][tensor]
    return entries
