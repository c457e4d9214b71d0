"""SafetensorsWriter: writes tensors into safetensors files of a limited size, as they come. No torch."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 2 << 30
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    content: memoryview


class SafetensorsWriter:
    """The files of one folder. Tensors wait in memory until a file is full; `finish` writes the last one and names the
    files."""

    def __init__(self, folder: Path, stem: str, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Files are called STEM.safetensors, or STEM-00001-of-00002.safetensors and so on."""
        self._folder, self._stem, self._max_file_bytes = folder, stem, max_file_bytes
        self._waiting: list[_Tensor] = []
        self._waiting_bytes = 0
        self._files: list[list[str]] = []
        """For each written file the names of its tensors."""
        self.num_bytes = 0
        """Bytes of all tensors."""

    def add(self, name: str, dtype: str, shape: Sequence[int], content: memoryview) -> None:
        """A tensor of the type that safetensors calls `dtype`; `content` are its bytes."""
        if self._waiting and self._waiting_bytes + len(content) > self._max_file_bytes:
            self._write()
        self._waiting.append(_Tensor(name, dtype, tuple(shape), content))
        self._waiting_bytes += len(content)
        self.num_bytes += len(content)

    def finish(self) -> dict[str, str]:
        """Tensor → the file that holds it."""
        if self._waiting or not self._files:
            self._write()
        where = {}
        for number, tensors in enumerate(self._files, 1):
            suffix = f"-{number:05d}-of-{len(self._files):05d}" if len(self._files) > 1 else ""
            name = f"{self._stem}{suffix}.safetensors"
            self._part(number).rename(self._folder / name)
            where.update(dict.fromkeys(tensors, name))
        return where

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._stem}.{number}.part"

    def _write(self) -> None:
        # Tensors of whole cache lines first, so that each of them begins on one.
        tensors = sorted(self._waiting, key=lambda tensor: len(tensor.content) % 64 != 0)
        header, end = dict[str, object](), 0
        for tensor in tensors:
            begin, end = end, end + len(tensor.content)
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-(8 + len(text)) % _PAGE)
        self._files.append([tensor.name for tensor in tensors])
        with self._part(len(self._files)).open("wb") as file:
            # Taken before anything is written, so that a full disk says so at once.
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.write(tensor.content)
            file.flush()
            os.fsync(file.fileno())
        self._waiting, self._waiting_bytes = [], 0
