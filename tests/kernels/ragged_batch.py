"""Ragged batches for the attention tests: sequences of any lengths in scattered blocks, and a plan over them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import plan_attention
from quire.kernels import AttentionParams, KVLayer, reference
from quire.kernels.interface import CpuAttentionPlan


@dataclass(frozen=True)
class Shape:
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    value_dim: int = 0
    """Above 0: the layer is latent, with values of so many elements."""


@dataclass(frozen=True)
class RaggedBatch:
    q: Tensor
    kv: KVLayer
    plan: CpuAttentionPlan
    scale: float

    def inputs(self, **params: Any) -> tuple[Tensor, KVLayer, CpuAttentionPlan, AttentionParams]:
        """Arguments of `paged_attention`; `params` are fields of `AttentionParams`."""
        return self.q, self.kv, self.plan, AttentionParams(self.scale, **params)

    def in_float64(self, **params: Any) -> tuple[Tensor, KVLayer, CpuAttentionPlan, AttentionParams]:
        kv = self.kv
        if kv.values.dtype != torch.int8:
            keys = kv.keys.double()
            latent = kv.is_latent
            kv = reference.latent_layer(keys, kv.values.shape[3]) if latent else KVLayer(keys, kv.values.double())
        return self.q.double(), kv, self.plan, AttentionParams(self.scale, **params)


def ragged_batch(
    sequences: Sequence[tuple[int, int]],
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    num_threads: int = 2,
    seed: int = 0,
    shared: Mapping[int, tuple[int, int]] | None = None,
    share_prefixes: bool = True,
    batch_invariant: bool = False,
) -> RaggedBatch:
    """A batch of sequences given as (tokens, new tokens).

    `shared` maps a sequence to an earlier one and the number of blocks that it shares with it. Blocks are scattered,
    slots never written hold NaN, and block table entries past a sequence's end point nowhere, so that a wrong read
    shows.
    """
    random = torch.Generator().manual_seed(seed)
    block_size = shape.block_size
    lengths = [length for length, _ in sequences]
    blocks = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks) + 3
    free = torch.randperm(num_blocks, generator=random).to(torch.int32).numpy()
    block_tables = np.full((len(sequences), max(blocks, default=0)), -(2**24), dtype=np.int32)
    slots, new_slots = [], []
    for row, (length, new) in enumerate(sequences):
        block_tables[row, : blocks[row]], free = free[: blocks[row]], free[blocks[row] :]
        if shared and row in shared:
            other, count = shared[row]
            block_tables[row, :count] = block_tables[other, :count]
        position = np.arange(length)
        slots.append(block_tables[row, position // block_size] * block_size + position % block_size)
        new_slots.append(slots[-1][length - new :])

    scaled = dtype == torch.int8
    shapes = reference.kv_cache_shapes(num_blocks, shape.num_kv_heads, block_size, shape.head_dim, scaled=scaled)
    nan = -1 if dtype == torch.int8 else float("nan")  # four bytes of -1 are one
    kv = KVLayer(*(torch.full(each, nan, dtype=dtype) for each in shapes))
    if shape.value_dim:
        kv = reference.latent_layer(kv.keys, shape.value_dim)
    keys = torch.randn(sum(lengths), shape.num_kv_heads, shape.head_dim, generator=random)
    values = torch.randn(keys.shape, generator=random)
    if lengths:
        all_slots = torch.from_numpy(np.concatenate(slots).astype(np.int32))
        reference.write_kv(keys, values, kv, all_slots)

    num_tokens = sum(new for _, new in sequences)
    fused = torch.randn(num_tokens, shape.num_heads + 2, shape.head_dim, generator=random)
    step = StepArrays(
        np.cumsum([0, *(new for _, new in sequences)]).astype(np.int32),
        np.array(lengths, dtype=np.int32),
        block_tables,
        np.concatenate([*new_slots, []]).astype(np.int32),
    )
    of_attention = AttentionShape(
        **asdict(shape),
        num_threads=num_threads,
        window=window,
        kv_element_size=dtype.itemsize,
        batch_invariant=batch_invariant,
    )
    plan = plan_attention(step, of_attention, share_prefixes=share_prefixes)
    return RaggedBatch(fused[:, : shape.num_heads], kv, plan, shape.head_dim**-0.5)
