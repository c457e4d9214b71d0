"""GgufFile: a model in GGUF, in one file or split into several, and its metadata read key by key."""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quire.errors import CheckpointError
from quire.gguf.header import MAGIC, GgufTensor, Value, read_header

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MAX_PARTS = 10_000
_NUM_SHOWN = 200
_LARGEST_INTEGER = 2**40


def is_gguf(path: Path) -> bool:
    """Whether a path is a file of this format, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def find_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder; None if there is none. Raises `CheckpointError` if there are several."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() == SUFFIX and path.is_file())
    models = [path for path in files if (part := _PART.fullmatch(path.name)) is None or int(part["number"]) == 1]
    if len(models) > 1:
        names = ", ".join(path.name for path in models[:8])
        raise CheckpointError(f"{folder} holds {len(models)} GGUF models: {names}; give the path of one file")
    return next(iter(models or files), None)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model: the metadata of its first file, and the tensors of all its files."""

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family, which is also the prefix of its keys."""
        return self.text("general.architecture")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, memoryview):  # some files give a number for each layer
            value = self._same_for_all(key, value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _LARGEST_INTEGER:
            raise self.refusal(key, f"an integer from {minimum} to {_LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty for a missing key."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self.refusal(key, "a list of texts")
        return value

    def numbers(self, key: str, count: int) -> memoryview:
        """An array of `count` numbers."""
        value = self.metadata.get(key)
        if not isinstance(value, memoryview) or len(value) != count:
            raise self.refusal(key, f"an array of {count} numbers")
        return value

    def floats_of(self, name: str, count: int) -> list[float]:
        """The values of a small tensor in float32."""
        tensor = self.tensors[name]
        if tensor.block.name != "F32" or tensor.shape != (count,):
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)} and type {tensor.block.name}; expected "
                f"{count} numbers in F32"
            )
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            return list(struct.unpack(f"<{count}f", file.read(tensor.end - tensor.begin)))

    def refusal(self, key: str, supported: str) -> CheckpointError:
        """The error for a key whose value is not supported."""
        value = self.metadata.get(key)
        shown = "missing" if value is None else repr(value)[:_NUM_SHOWN]
        return CheckpointError(f"{self.path}: {key} is {shown}; supported: {supported}")

    def _same_for_all(self, key: str, values: memoryview) -> Value:
        different = sorted(set(values.tolist()))
        if len(different) != 1:
            raise self.refusal(key, "one number, or the same number for every layer")
        value: int = different[0]
        return value


def read_gguf(path: Path) -> GgufFile:
    """The model that a file belongs to. Raises `CheckpointError` for a damaged file or a missing part."""
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, size: int, changed: int) -> GgufFile:
    """Size and time are part of the cache's key."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or not 1 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: split.count is {count}; supported: 1 to {_MAX_PARTS}")
    if count == 1:
        return GgufFile(path, (path,), header.metadata, header.tensors)
    files = _parts(path, count)
    headers = [header if file == path else read_header(file) for file in files]
    tensors: dict[str, GgufTensor] = {}
    for number, (file, part) in enumerate(zip(files, headers, strict=True)):
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (number, count):
            raise CheckpointError(
                f"{file}: split.no and split.count are {found}; expected {(number, count)} by its name"
            )
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{file}: tensor {twice[0]} is also in another part")
        tensors |= part.tensors
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{files[0]}: split.tensors.count is {expected}, but the parts hold {len(tensors)} tensors"
        )
    return GgufFile(files[0], files, headers[0].metadata, tensors)


def _parts(path: Path, count: int) -> tuple[Path, ...]:
    """The files of a split model, which are numbered by their names."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, but is not named so; expected {path.stem}-00001-of-{count:05d}.gguf and "
            "the other parts beside it"
        )
    files = tuple(path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path.parent}: {missing[0]} is missing; the model has {count} parts")
    return files
