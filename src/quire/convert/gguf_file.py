"""Writing GGUF: the header of a file, and where its tensors lie. No torch."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from quire.errors import CheckpointError
from quire.gguf.block_types import BLOCK_TYPES, BLOCK_TYPES_BY_NAME
from quire.gguf.header import MAGIC, Value

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_ARRAYS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
_NUMBERS = {each.name: number for number, each in BLOCK_TYPES.items()}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file that is being written."""

    block: str
    shape: tuple[int, ...]
    """The last dimension is contiguous."""
    begin: int = 0
    """Its first byte behind the header."""

    @property
    def num_bytes(self) -> int:
        block = BLOCK_TYPES_BY_NAME[self.block]
        return math.prod(self.shape) // block.num_values * block.num_bytes


def place(tensors: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    """The tensors one after the other, each on a multiple of the alignment."""
    placed, end = {}, 0
    for name, tensor in tensors.items():
        placed[name] = PlannedTensor(tensor.block, tensor.shape, end)
        end += -(-tensor.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return placed


def header_bytes(metadata: Mapping[str, Value], tensors: Mapping[str, PlannedTensor]) -> bytes:
    """Everything before the tensors. Raises `CheckpointError` for a value that GGUF cannot hold."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", _NUMBERS[tensor.block], tensor.begin))
    content = b"".join(parts)
    return content + b"\x00" * (-len(content) % _ALIGNMENT)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Value) -> bytes:
    """The type and the bytes of a value. Integers are of 32 bits where they fit: readers expect that."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return struct.pack("<II", _UINT32, value)
        if -(1 << 31) <= value < 0:
            return struct.pack("<Ii", _INT32, value)
        if -(1 << 63) <= value < 1 << 64:
            return struct.pack("<IQ", _UINT64, value) if value > 0 else struct.pack("<Iq", _INT64, value)
        raise CheckpointError(f"{key} is {value}; GGUF holds integers of 64 bits")
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", _ARRAY, _ARRAYS[value.format[-1]], len(value)) + value.tobytes()
