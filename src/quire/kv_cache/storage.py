"""KVCache: the tensors behind the blocks, allocated once at start; the one file of this room that knows torch.

How a block lies is the kernels' affair (`Kernels.kv_cache_shapes`, see docs/decisions). What is asked here is that
blocks are the first dimension of keys and of values.
"""

from typing import NamedTuple

import numpy as np
import torch

CPU = torch.device("cpu")


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys: torch.Tensor
    values: torch.Tensor


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
        self.layers = [
            LayerCache(_zeros(keys, dtype, device), _zeros(values, dtype, device)) for _ in range(num_layers)
        ]
        self._bytes = [tensor.view(num_blocks, -1).view(torch.uint8) for layer in self.layers for tensor in layer]
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that the system gives out as zero pages; torch.zeros would write, and so take, every one of them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device=device).view(dtype)
    return torch.from_numpy(np.zeros(shape, dtype=f"i{dtype.itemsize}")).view(dtype)
