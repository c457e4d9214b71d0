"""The header of one GGUF file: its metadata, and where each tensor lies.

Every number is checked before it is used: a count against the bytes that are left, a tensor against the size of the
file and against its neighbours. So a damaged or hostile file is refused in one line, in time and memory proportional
to its own size. Numbers of an array stay in the file until they are read.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.gguf.block_types import BLOCK_TYPES, UNREAD_TYPES, BlockType

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_NAME_BYTES = 1 << 10
_MAX_TEXT_BYTES = 64 << 20
MAX_ARRAY = 1 << 23
"""Elements of a metadata array: sixteen times the largest vocabulary."""
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 44
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 13, 32

Value = bool | int | float | str | list[str] | memoryview
"""A value of the metadata; an array of numbers or flags is a view of the file."""

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of value → its code in `struct`."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: bytes `begin` to `end` of the file."""

    file: Path
    block: BlockType
    shape: tuple[int, ...]
    """The last dimension is contiguous, as in torch; the file has them the other way round."""
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> Header:
    """Raises `CheckpointError` for a file that is truncated, damaged or of an unknown version."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
    return _HeaderReader(path, content).read()


class _HeaderReader:
    """Reads one value after the other from the start of a file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._at = 0

    def read(self) -> Header:
        if self._content[:4] != MAGIC:
            raise self._refusal(f"begins with {self._content[:4]!r}, expected {MAGIC!r}")
        self._at = 4
        version = int(self._number(4, "the version"))
        if version not in _VERSIONS:
            advice = "; it is big-endian, convert it with gguf-py" if version >= 1 << 16 else ""
            supported = " and ".join(map(str, _VERSIONS))
            raise self._refusal(f"has version {version}; supported: {supported}{advice}")
        num_tensors = self._count("tensors", _LEAST_TENSOR_BYTES)
        num_keys = self._count("metadata keys", _LEAST_KEY_BYTES)
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._text("a metadata key", _MAX_NAME_BYTES)
            if key in metadata:
                raise self._refusal(f"holds {key} twice")
            metadata[key] = self._value(int(self._number(4, f"the type of {key}")), key)
        return Header(metadata, self._tensors(num_tensors, self._alignment(metadata)))

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _value(self, kind: int, key: str) -> Value:
        if kind == _STRING:
            return self._text(key, _MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        return self._number(kind, key)

    def _array(self, key: str) -> Value:
        kind = int(self._number(4, f"the type of {key}"))
        count = int(self._number(10, f"the length of {key}"))
        if kind not in _NUMBERS and kind != _STRING:
            raise self._refusal(f"{key} is an array of values of type {kind}; supported: numbers, flags and texts")
        item_bytes = 8 if kind == _STRING else struct.calcsize(f"<{_NUMBERS[kind]}")
        if count > min(MAX_ARRAY, (self._size - self._at) // item_bytes):
            raise self._refusal(
                f"{key} has {count} elements; at most {MAX_ARRAY} are read, and the file has {self._size - self._at} "
                "bytes left"
            )
        if kind == _STRING:
            return self._texts(key, count)
        begin, self._at = self._at, self._at + count * item_bytes
        code: Any = "B" if kind == _BOOL else _NUMBERS[kind]
        numbers: memoryview = memoryview(self._content)[begin : self._at].cast(code)
        return numbers

    def _texts(self, key: str, count: int) -> list[str]:
        """Texts one after the other, each with its length before it; a vocabulary has hundreds of thousands."""
        content, size, at = self._content, self._size, self._at
        found = []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(content[at:begin], "little")
            if at > size:
                raise self._refusal(f"ends inside {key}: it has {size} bytes, {at} are needed")
            found.append(content[begin:at])
        self._at = at
        return [text.decode("utf-8", errors="replace") for text in found]

    def _number(self, kind: int, what: str) -> int | float | bool:
        if kind not in _NUMBERS:
            raise self._refusal(f"{what} has a value of type {kind}; supported: 0 to 12")
        code = f"<{_NUMBERS[kind]}"
        value: int | float | bool = struct.unpack(code, self._take(struct.calcsize(code), what))[0]
        return value

    def _text(self, what: str, limit: int) -> str:
        size = int(self._number(10, what))
        if size > limit:
            raise self._refusal(f"{what} has a text of {size} bytes; at most {limit} are read")
        # Some vocabularies have tokens that are part of a character.
        return self._take(size, what).decode("utf-8", errors="replace")

    def _take(self, size: int, what: str) -> bytes:
        begin, end = self._at, self._at + size
        if end > self._size:
            raise self._refusal(f"ends inside {what}: it has {self._size} bytes, {end} are needed")
        self._at = end
        return self._content[begin:end]

    def _count(self, what: str, least_bytes: int) -> int:
        """A number of things; each takes at least `least_bytes`."""
        count = int(self._number(10, f"the number of {what}"))
        if count > (self._size - self._at) // least_bytes:
            raise self._refusal(f"says that it holds {count} {what}; its {self._size} bytes have no room for them")
        return count

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            raise self._refusal(f"general.alignment is {value}; supported: a power of two up to {_MAX_ALIGNMENT}")
        return value

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        found: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self._text("the name of a tensor", _MAX_NAME_BYTES)
            if name in found:
                raise self._refusal(f"holds the tensor {name} twice")
            found[name] = self._tensor(name, alignment)
        data = -(-self._at // alignment) * alignment
        tensors = {}
        for name, (block, shape, offset) in found.items():
            begin = data + offset
            end = begin + math.prod(shape) // block.num_values * block.num_bytes
            if end > self._size:
                raise self._refusal(
                    f"tensor {name} is in bytes {begin} to {end}, but the file has {self._size}; it is truncated"
                )
            tensors[name] = GgufTensor(self._path, block, shape, begin, end)
        by_place = sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].end))
        for (name, tensor), (after, next_tensor) in pairwise(by_place):
            if next_tensor.begin < tensor.end:
                raise self._refusal(f"tensors {name} and {after} overlap at byte {next_tensor.begin}")
        return tensors

    def _tensor(self, name: str, alignment: int) -> tuple[BlockType, tuple[int, ...], int]:
        num_dimensions = int(self._number(4, f"the dimensions of {name}"))
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._refusal(f"tensor {name} has {num_dimensions} dimensions; supported: 1 to {_MAX_DIMENSIONS}")
        shape = tuple(int(self._number(10, f"the dimensions of {name}")) for _ in range(num_dimensions))[::-1]
        if not 0 < math.prod(shape) <= _MAX_ELEMENTS:
            raise self._refusal(f"tensor {name} has shape {list(shape)}; supported: 1 to {_MAX_ELEMENTS} elements")
        kind = int(self._number(4, f"the type of {name}"))
        block = BLOCK_TYPES.get(kind)
        if block is None:
            known = ", ".join(each.name for each in BLOCK_TYPES.values())
            raise self._refusal(f"tensor {name} is of type {UNREAD_TYPES.get(kind, kind)}; supported: {known}")
        if shape[-1] % block.num_values:
            raise self._refusal(
                f"tensor {name} has rows of {shape[-1]} numbers in {block.name}, whose blocks hold {block.num_values}"
            )
        offset = int(self._number(10, f"the place of {name}"))
        if offset % alignment:
            raise self._refusal(f"tensor {name} begins at {offset}, expected a multiple of {alignment}")
        return block, shape, offset

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {reason}" if reason[:4] in _VERBS else f"{self._path}: {reason}")


_VERBS = ("begi", "has ", "hold", "says", "ends")
