"""Weights: the tensors of a checkpoint, taken by name and checked; every one must be asked for.

Files are mapped, not read: a tensor is a view of its file until a layer packs it.
"""

import json
import math
import mmap
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.model_config import read_json
from quire.models.safetensors_file import DTYPES, RELEASED_BYTES, Entry, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16")
_NUM_NAMED = 5
"""Tensors a message names before it says how many more there are."""


class TensorSource(Protocol):
    """What a model is built from."""

    @property
    def activations(self) -> torch.dtype:
        """What the model computes in: float32 on a CPU."""
        ...

    def has(self, name: str) -> bool: ...

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a tensor that it has."""
        ...

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def scope(self, prefix: str) -> "TensorSource": ...


class _MappedFile:
    """A file in memory. What is taken from it is packed soon and not read again, so its pages need not stay: without
    them a load takes little more than what it makes. A page that is read again is mapped again."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and writable as far as torch knows; nothing writes.
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._taken_bytes = 0

    def take(self, entry: Entry) -> Tensor:
        self._taken_bytes += entry.end - entry.begin
        if self._taken_bytes > RELEASED_BYTES:
            self.release()
        dtype = getattr(torch, DTYPES[entry.dtype])
        return torch.frombuffer(self._mapping, dtype=dtype, count=math.prod(entry.shape), offset=entry.begin).view(
            entry.shape
        )

    def release(self) -> None:
        self._taken_bytes = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class Weights:
    """The tensors under a prefix of a checkpoint. All scopes of one checkpoint share one list of what was taken."""

    activations = torch.float32

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self._folder = folder
        self._prefix = ""
        self._entries = entries
        self._taken: set[str] = set()
        self._files: dict[Path, _MappedFile] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Weights":
        """Map the safetensors files of a folder. Raises `CheckpointError` for what is missing, truncated or at odds."""
        folder = Path(folder)
        index = folder / INDEX_FILE
        if index.is_file():
            return cls(folder, _indexed_entries(folder, index))
        single = folder / SINGLE_FILE
        if single.is_file():
            return cls(folder, read_header(single)[0])
        raise CheckpointError(_nothing_to_load(folder))

    def scope(self, prefix: str) -> "Weights":
        """The tensors whose names begin with `prefix` and a dot, asked for without it."""
        scoped = Weights.__new__(Weights)
        scoped.__dict__ = {**self.__dict__, "_prefix": f"{self._prefix}{prefix}."}
        return scoped

    def has(self, name: str) -> bool:
        return self._prefix + name in self._entries

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._entries[self._prefix + name].shape

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored, a view of its file; its shape must be `shape`."""
        name = self._prefix + name
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self._folder}: tensor {name} of shape {list(shape)} is missing; {self._similar(name)}"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)} by config.json"
            )
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is of dtype {entry.dtype}; supported: {', '.join(_FLOATS)}"
            )
        self._taken.add(name)
        if entry.file not in self._files:
            self._files[entry.file] = _MappedFile(entry.file)
        return self._files[entry.file].take(entry)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise `CheckpointError` if tensors were never taken, apart from those a pattern of `ignored` finds."""
        patterns = [re.compile(pattern) for pattern in ignored]
        left = [
            name
            for name in self._entries
            if name not in self._taken and not any(pattern.search(name) for pattern in patterns)
        ]
        if left:
            raise CheckpointError(
                f"{self._folder}: {len(left)} tensors are not part of the model config.json describes: "
                f"{_some(sorted(left))}; expected only the {len(self._taken)} that were loaded"
            )
        for file in self._files.values():
            file.release()

    def _similar(self, name: str) -> str:
        """What the checkpoint has in the place of a missing tensor."""
        scope = name.rsplit(".", 2)[0] + "."
        found = sorted(other for other in self._entries if other.startswith(scope))
        if found:
            return f"under {scope} it has {_some(found)}"
        return f"its {len(self._entries)} tensors include {_some(sorted(self._entries))}"


class RandomWeights:
    """Weights of the right shapes and a sensible scale, for measuring without a checkpoint (load_format="dummy").

    A tensor depends on the seed, its name and the kind of device alone, whatever the order of taking.
    """

    activations = torch.float32

    def __init__(self, seed: int = 0, prefix: str = "", device: torch.device | None = None) -> None:
        self._seed = seed
        self._prefix = prefix
        self._device = device or torch.device("cpu")

    def scope(self, prefix: str) -> "RandomWeights":
        return RandomWeights(self._seed, f"{self._prefix}{prefix}.", self._device)

    def has(self, name: str) -> bool:
        return not name.endswith("_scale")

    def shape_of(self, name: str) -> tuple[int, ...]:
        raise KeyError(f"{name}: random weights have whatever shape they are asked for")

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, device=self._device)
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)  # the weight of a norm
        seed = zlib.crc32(f"{self._seed}/{self._prefix}{name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.empty(shape, device=self._device).normal_(0.0, 0.02, generator=generator)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Nothing is ever left over."""


def _indexed_entries(folder: Path, index: Path) -> dict[str, Entry]:
    """The tensors of a sharded checkpoint, whose index says which file holds what."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {json.dumps(weight_map)}; expected tensor names and their files")
    entries: dict[str, Entry] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {INDEX_FILE} says that it holds tensors of this checkpoint")
        entries.update(read_header(file)[0])
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file.name != name:
            found = f"found in {entries[tensor].file.name}" if tensor in entries else "found in none of the files"
            raise CheckpointError(f"{index}: tensor {tensor} should be in {name}, {found}")
    return entries


def _nothing_to_load(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds its weights in {_some(pickled)}; loading pickled files can run code, so only "
            f"safetensors are supported. Convert them once, with transformers installed:\n"
            f"  from transformers import AutoModelForCausalLM\n"
            f"  AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; found {_some(found) if found else 'nothing'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
