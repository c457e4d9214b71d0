"""KVCache: the tensors behind the blocks, allocated once at start; the one file of this room that knows torch.

How a block lies is the kernels' affair (`Kernels.kv_cache_shapes`, see docs/decisions). What is asked here is that
blocks are the first dimension of keys and of values.
"""

import itertools
import math
import mmap
from collections.abc import Sequence

import torch

from quire.kernels import KVLayer

CPU = torch.device("cpu")
_PAGE = 4096
_HUGE_PAGE = 2 << 20


class KVCache:
    """All layers' blocks, zero at first. On a CPU a block takes memory when it is first written, not before."""

    def __init__(
        self,
        *,
        num_layers: int,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """`shapes` are those of one layer's keys and values, the number of blocks first."""
        keys, values = shapes
        num_blocks = keys[0]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.element_size = dtype.itemsize
        tensors = _zeros(num_layers * [keys, values], dtype, device)
        self.layers = [KVLayer(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
        self._bytes = [tensor.view(num_blocks, -1).view(torch.uint8) for tensor in tensors]
        """All tensors as [num_blocks, bytes per block]."""
        self.block_bytes = sum(tensor.shape[1] for tensor in self._bytes)
        """A block's keys and values in all layers."""

    def copy_out(self, block: int, out: torch.Tensor) -> None:
        """Copy a block to `out`, uint8 [block_bytes]: keys, then values, layer after layer.

        To pinned memory a device copies in its own time: before its next step, and after that `copy_in` may read it.
        """
        first = 0
        for tensor in self._bytes:
            out[first : first + tensor.shape[1]].copy_(tensor[block], non_blocking=out.is_pinned())
            first += tensor.shape[1]

    def synchronize(self) -> None:
        """Wait for the copies of a device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def copy_in(self, block: int, content: torch.Tensor) -> None:
        """Overwrite a block with what `copy_out` made of one."""
        first = 0
        for tensor in self._bytes:
            tensor[block].copy_(content[first : first + tensor.shape[1]], non_blocking=content.is_pinned())
            first += tensor.shape[1]


def lazy_zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], pages of the system's own that are there when they are written; torch.zeros would write, and
    so take, all of them, and malloc might keep them when they are freed.

    Huge pages are not asked for: where a hypervisor must find them, a prompt waits longer for them than all its
    attention gains (docs/log.md).
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def _zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    if device.type != "cpu":
        stored = torch.uint8 if dtype.itemsize == 1 else dtype
        return [torch.zeros(shape, dtype=stored, device=device).view(dtype) for shape in shapes]
    # Blocks are taken from the first on, in every tensor. Where the system gives huge pages unasked, each tensor begins
    # elsewhere in one, so that a step enters a new one in few of them: some systems take milliseconds for each.
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    step = _HUGE_PAGE // len(sizes) // _PAGE * _PAGE
    strides = [-(-size // _HUGE_PAGE) * _HUGE_PAGE + step for size in sizes]
    memory = lazy_zeros(sum(strides))
    begins = [0, *itertools.accumulate(strides)]
    return [
        memory[begin : begin + size].view(dtype).view(shape)
        for begin, size, shape in zip(begins, sizes, shapes, strict=False)
    ]
