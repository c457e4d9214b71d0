"""Copies of KV blocks: all pairs of a step, in all layers, by one launch."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.interface import KVLayer
from quire.kernels.transfer import to_device

CHUNK = 4096
"""Words of 4 bytes that a program copies."""
NUM_WARPS = 8


@triton.jit
def copy_blocks_kernel(addresses, pairs, block_words, CHUNK: tl.constexpr):
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    source = tl.load(pairs + tl.program_id(0) * 2).to(tl.int64)
    destination = tl.load(pairs + tl.program_id(0) * 2 + 1).to(tl.int64)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    words = tl.load(tl.multiple_of(cache + source * block_words, 16) + word, mask=word < block_words)
    tl.store(tl.multiple_of(cache + destination * block_words, 16) + word, words, mask=word < block_words)


def copy_blocks(layers: Sequence[KVLayer], pairs: Tensor) -> None:
    if not len(pairs) or not layers:
        return
    # Even the smallest block, of one head and 16 slots, is a multiple of 16 bytes in every type.
    block_words = layers[0].keys[0].nbytes // 4
    addresses = _addresses(
        tuple(cache.data_ptr() for layer in layers for cache in (layer.keys, layer.values)), pairs.device
    )
    copy_blocks_kernel[(len(pairs), len(addresses), triton.cdiv(block_words, CHUNK))](
        addresses, pairs, block_words, CHUNK=CHUNK, num_warps=NUM_WARPS
    )


@lru_cache(maxsize=4)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device. An engine's caches never move, so this is made once."""
    return to_device(np.array(addresses, dtype=np.int64), device)
