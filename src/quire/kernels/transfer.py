"""Copies arrays from the host to a device: several in one copy, through pinned memory, so that the host does not wait.

PyTorch's allocator of pinned memory reuses it only after the copy has read it, so pinned arrays need no bookkeeping.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = Mapping[str, NDArray[Any]]
_ALIGNMENT = 16
"""Bytes; vector loads and Triton's specialisation need it."""


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array on a device."""
    # A non-blocking copy to MPS may read its source after that is freed (pytorch issue 189690).
    return staged(array, device).to(device, non_blocking=device.type != "mps")


def send(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """Copies arrays to a device in one copy; on a CPU they stay in place."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    starts, end = _lay_out({name: array.nbytes for name, array in arrays.items()})
    host = np.empty(end, dtype=np.uint8)
    for name, array in arrays.items():
        _place(host, starts[name], array)
    memory = to_device(host, device)
    return {name: _view(memory, starts[name], array) for name, array in arrays.items()}


class FixedArrays:
    """Arrays of one length at fixed addresses of a device, for CUDA graphs to read; filled by one copy."""

    def __init__(self, padding: Mapping[str, np.generic], length: int, device: torch.device) -> None:
        """`padding` has the value, and so the type, of each array where nothing was sent."""
        empty = {name: np.full(length, value) for name, value in padding.items()}
        self._dtypes = {name: array.dtype for name, array in empty.items()}
        self._starts, end = _lay_out({name: array.nbytes for name, array in empty.items()})
        self._padding = np.zeros(end, dtype=np.uint8)
        for name, array in empty.items():
            _place(self._padding, self._starts[name], array)
        self._memory = torch.zeros(end, dtype=torch.uint8, device=device)
        self._views = {name: _view(self._memory, self._starts[name], array) for name, array in empty.items()}

    def send(self, arrays: Arrays) -> None:
        """Fill the beginning of each given array, and all else with padding, in the order of the stream."""
        host = self._padding.copy()
        for name, array in arrays.items():
            assert array.dtype == self._dtypes[name], f"{name}: expected {self._dtypes[name]}, found {array.dtype}"
            _place(host, self._starts[name], array)
        self._memory.copy_(staged(host, self._memory.device), non_blocking=True)

    def first(self, count: int) -> dict[str, Tensor]:
        """The first `count` values of each array."""
        return {name: view[:count] for name, view in self._views.items()}


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array that `device` can read without the host waiting: for a GPU, a copy in pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _lay_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where arrays of these sizes in bytes begin, one after the other, and where the last one ends."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _place(host: NDArray[np.uint8], start: int, array: NDArray[Any]) -> None:
    host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()


def _view(memory: Tensor, start: int, array: NDArray[Any]) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    return memory[start : start + array.nbytes].view(dtype).view(array.shape)
