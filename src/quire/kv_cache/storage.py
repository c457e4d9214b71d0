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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that the system gives out as zero pages; torch.zeros would write, and so take, every one of them."""
    return torch.from_numpy(np.zeros(shape, dtype=f"i{dtype.itemsize}")).view(dtype)
