"""KVCache: the tensors behind the blocks, allocated once at start; the one file of this room that knows torch.

Layout per layer (see docs/decisions): keys [num_blocks, num_kv_heads, head_dim, block_size], transposed inside a block
so that scores need no packing and no horizontal sums; values [num_blocks, num_kv_heads, block_size, head_dim].
"""

from typing import NamedTuple

import numpy as np
import torch


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys: torch.Tensor
    values: torch.Tensor


class KVCache:
    """All layers' blocks, zero at first. A block takes memory when it is first written, not before."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [
            LayerCache(
                _zeros((num_blocks, num_kv_heads, head_dim, block_size), dtype),
                _zeros((num_blocks, num_kv_heads, block_size, head_dim), dtype),
            )
            for _ in range(num_layers)
        ]
        self._bytes = [tensor.view(num_blocks, -1).view(torch.uint8) for layer in self.layers for tensor in layer]
        """All tensors as [num_blocks, bytes per block]."""
        self.block_bytes = sum(tensor.shape[1] for tensor in self._bytes)
        """A block's keys and values in all layers."""

    def copy_out(self, block: int, out: torch.Tensor) -> None:
        """Copy a block to `out`, uint8 [block_bytes]: keys, then values, layer after layer."""
        first = 0
        for tensor in self._bytes:
            out[first : first + tensor.shape[1]].copy_(tensor[block])
            first += tensor.shape[1]

    def copy_in(self, block: int, content: torch.Tensor) -> None:
        """Overwrite a block with what `copy_out` made of one."""
        first = 0
        for tensor in self._bytes:
            tensor[block].copy_(content[first : first + tensor.shape[1]])
            first += tensor.shape[1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that the system gives out as zero pages; torch.zeros would write, and so take, every one of them."""
    return torch.from_numpy(np.zeros(shape, dtype=f"i{dtype.itemsize}")).view(dtype)
