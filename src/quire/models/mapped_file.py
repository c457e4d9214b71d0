"""MappedFile: a file of weights in memory, and tensors that are views of it."""

import math
import mmap
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file that is mapped, not read: its pages come when a tensor is used."""

    def __init__(self, path: Path, *, released_bytes: int | None = None) -> None:
        """`released_bytes`: the pages are given back to the system each time tensors of so many bytes have been taken.
        For tensors that are packed soon and not read again: a load then takes little more memory than the packed
        weights. A page that is read again is mapped again."""
        with path.open("rb") as file:
            # Private and writable as far as torch knows; nothing writes.
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._released_bytes = released_bytes
        self._taken_bytes = 0

    def take(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Tensor:
        """The tensor whose first byte is `begin`."""
        count = math.prod(shape)
        self._taken_bytes += count * dtype.itemsize
        if self._released_bytes is not None and self._taken_bytes > self._released_bytes:
            self.release()
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=begin).view(shape)

    def release(self) -> None:
        """Give the pages back to the system."""
        self._taken_bytes = 0
        self._give_back(0, len(self._mapping))

    def release_tensor(self, tensor: Tensor) -> bool:
        """Give the pages of a tensor back, if it is a view of this file."""
        begin = tensor.data_ptr() - self._address
        if not 0 <= begin < len(self._mapping):
            return False
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._give_back(first, begin + tensor.nbytes - first)
        return True

    def _give_back(self, begin: int, num_bytes: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, num_bytes)
