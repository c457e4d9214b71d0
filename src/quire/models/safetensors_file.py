"""The header of a safetensors file: where each tensor lies.

It is checked before a file is mapped, since touching a page beyond the end of a truncated file would kill the process.
No torch: files are opened while torch is still being imported.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.file_kinds import describe_content

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "U32": "uint32",
    "I32": "int32",
    "I64": "int64",
}
"""Dtypes that Quire reads: safetensors' name → torch's."""
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "U32": 4,
    "I32": 4,
    "I64": 8,
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
RELEASED_BYTES = 8 << 20
"""Pages of a mapped file are given back to the system each time tensors of so many bytes have been taken from it, and a
larger tensor is packed in pieces of so many bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: bytes `begin` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata. Raises `CheckpointError` for a truncated file, a corrupt header,
    and tensors that overlap or leave gaps."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        header_bytes = int.from_bytes(start, "little")
        # Only a file that cannot be one is looked at: its first bytes are a length, which may be any.
        is_other = file_bytes < 8 + header_bytes or header_bytes > _MAX_HEADER_BYTES
        if is_other and (reason := describe_content(file)) is not None:
            raise CheckpointError(f"{file} {reason}")
        if file_bytes < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file} ({file_bytes} bytes) is not a safetensors file: its header has no valid length"
            )
        begin = 8 + header_bytes
        if file_bytes < begin:
            raise CheckpointError(
                f"{file} is truncated: its header alone needs {begin} bytes, found {file_bytes}; fetch it again"
            )
        try:
            header = json.loads(stream.read(header_bytes))
            metadata = dict(header.pop("__metadata__", None) or {})
            entries = {name: _entry(file, begin, value) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file} has a corrupt header: {type(error).__name__}: {error}; fetch it again"
            ) from error
    _check_layout(file, entries, begin, file_bytes)
    return entries, metadata


def _entry(file: Path, begin: int, value: dict[str, Any]) -> Entry:
    """A tensor of a header; `begin` is the first byte after the header. Raises `TypeError` or `ValueError`."""
    (first, last), shape = value["data_offsets"], value["shape"]
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions; at most {_MAX_DIMENSIONS} are read")
    for number in (first, last, *shape):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"{str(number)[:40]} is not a size")
    return Entry(file, str(value["dtype"]), tuple(shape), begin + first, begin + last)


def _check_layout(file: Path, entries: dict[str, Entry], begin: int, file_bytes: int) -> None:
    """Raise `CheckpointError` unless the tensors fill the file from `begin` to its end, one after the other."""
    expected = max((entry.end for entry in entries.values()), default=begin)
    if file_bytes != expected:
        state = "is truncated" if file_bytes < expected else "is longer than its header says"
        raise CheckpointError(f"{file} {state}: expected {expected} bytes, found {file_bytes}; fetch it again")
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != begin:
            raise CheckpointError(
                f"{file} has a corrupt header: tensor {name} begins at byte {entry.begin}, the one before it ends at "
                f"{begin}; fetch it again"
            )
        begin = entry.end
        if entry.dtype in DTYPES:
            size = math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
            if entry.end - entry.begin != size:
                raise CheckpointError(
                    f"{file}: tensor {name} of shape {list(entry.shape)} and dtype {entry.dtype} should have "
                    f"{size} bytes, its header gives it {entry.end - entry.begin}"
                )
