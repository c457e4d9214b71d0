"""Sharing prefixes never loses, calculated: the time of a layer's attention on modelled cards, with and without.

The model favours plans without sharing: every reader of a key after the first finds it in the cache, however large the
prefix, and every launch costs sharing more than on a card. `make bench-gpu` measures a card.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.attention import AttentionShape, StepArrays
from quire.attention.triton import GpuAttentionPlan, PlanBuffers, plan_attention
from quire.kernels.gpu_plan import ItemColumn, MergeColumn, WorkList

BLOCK_SIZE, HEAD_DIM = 64, 128
MAX_LOSS = 0.03


@dataclass(frozen=True)
class Card:
    num_sms: int
    bandwidth: float
    """Bytes a second, as a copy reaches them."""
    cache_rate: float
    """Of the second-level cache, in multiples of that."""
    matrix_rate: float
    """Floating-point operations a second, as a large product reaches them; attention is given half."""
    launch: float = 3e-6
    """Seconds from the end of one kernel to the work of the next."""
    program: float = 1e-6
    """Seconds until a program has its first keys."""


CARDS = {
    "A100": Card(108, 1.4e12, 2.5, 250e12),
    "H100": Card(132, 2.9e12, 2.0, 650e12),
    "H200": Card(132, 4.3e12, 1.5, 700e12),
    "H200, slow launches": Card(132, 4.3e12, 2.0, 700e12, launch=5e-6, program=2e-6),
    "B200": Card(148, 6.8e12, 2.0, 1500e12),
}


@dataclass(frozen=True)
class Batch:
    num_seqs: int
    prefix_blocks: int
    num_sharers: int
    inner_blocks: int
    """That a second level of half the sharers has in common behind the prefix."""
    tail: int
    num_kv_heads: int
    group: int
    element_size: int
    captured: bool

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and block tables."""
        rng = np.random.default_rng(self.tail)
        shared = np.zeros(self.num_seqs, dtype=np.int64)
        shared[: self.num_sharers] = self.prefix_blocks
        shared[: self.num_sharers // 2] += self.inner_blocks
        lengths = (shared * BLOCK_SIZE + rng.integers(1, self.tail + 1, self.num_seqs)).astype(np.int32)
        width = -(-int(lengths.max()) // BLOCK_SIZE)
        tables = np.arange(self.num_seqs * width, dtype=np.int32).reshape(self.num_seqs, width)
        tables[: self.num_sharers, : self.prefix_blocks] = tables[0, : self.prefix_blocks]
        inner = slice(self.prefix_blocks, self.prefix_blocks + self.inner_blocks)
        tables[: self.num_sharers // 2, inner] = tables[0, inner]
        return lengths, tables


def plan_of(batch: Batch, card: Card, *, share: bool) -> GpuAttentionPlan:
    lengths, tables = batch.tables()
    options = {} if share else {"min_shared_bytes": math.inf}
    shape = AttentionShape(
        num_heads=batch.num_kv_heads * batch.group,
        num_kv_heads=batch.num_kv_heads,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        max_num_tokens=1024,
        max_blocks=tables.shape[1],
        kv_element_size=batch.element_size,
    )
    buffers = PlanBuffers(shape, num_sms=card.num_sms, **options)
    starts, slots = np.arange(batch.num_seqs + 1, dtype=np.int32), np.zeros(batch.num_seqs, dtype=np.int32)
    size = 256 if batch.captured else 0
    return plan_attention(StepArrays(starts, lengths, tables, slots), buffers, captured_tokens=size)


def seconds_of(plan: GpuAttentionPlan, batch: Batch, card: Card) -> float:
    """Programs run one after the other on the multiprocessor that is free first, each with its share of everything."""
    sm_rate = card.bandwidth / card.num_sms
    sm_flops = 0.5 * card.matrix_rate / card.num_sms
    tables = plan.block_tables.numpy().ravel()
    key_bytes = 2 * HEAD_DIM * batch.element_size
    seen: set[int] = set()

    def of_list(work: WorkList, gathered: bool) -> float:
        if not work.num_programs:
            return 0.0
        free = [0.0] * card.num_sms
        from_memory = 0
        for item in work.items[: int(work.count)].numpy():
            begin, end = int(item[ItemColumn.KEY_BEGIN]), int(item[ItemColumn.KEY_END])
            blocks = tables[item[ItemColumn.TABLE] :][begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)].tolist()
            new = len([block for block in blocks if block not in seen])
            seen.update(blocks)
            read = new * BLOCK_SIZE + (len(blocks) - new) * BLOCK_SIZE / card.cache_rate
            written = 0.0
            if gathered or item[ItemColumn.PARTIAL] >= 0:
                written = item[ItemColumn.NUM_TOKENS] * batch.group * (HEAD_DIM + 1) * 4 / card.cache_rate
            flops = 4 * HEAD_DIM * work.num_rows * len(blocks) * BLOCK_SIZE
            seconds = card.program + max((read * key_bytes + written) / sm_rate, flops / sm_flops)
            from_memory += new * BLOCK_SIZE * key_bytes * batch.num_kv_heads
            for _ in range(batch.num_kv_heads):
                heapq.heapreplace(free, free[0] + seconds)
        surplus = (work.num_programs - int(work.count)) * batch.num_kv_heads
        idle = surplus * 0.2e-6 / card.num_sms
        return max(*free, from_memory / card.bandwidth) + card.launch + idle

    seconds = of_list(plan.narrow, False) + of_list(plan.wide, False) + of_list(plan.shared, True)
    if plan.num_merge_programs:
        num_parts = int(plan.merges[: int(plan.num_merges), MergeColumn.NUM_PARTS].sum())
        part_bytes = batch.num_kv_heads * batch.group * (HEAD_DIM + 1) * 4
        seconds += card.launch + num_parts * part_bytes / (card.cache_rate * card.bandwidth)
    return seconds


BATCHES = st.builds(
    Batch,
    num_seqs=st.integers(8, 256),
    prefix_blocks=st.integers(1, 200),
    num_sharers=st.integers(8, 256),
    inner_blocks=st.integers(0, 100),
    tail=st.integers(1, 4000),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    group=st.sampled_from([1, 4, 8]),
    element_size=st.sampled_from([1, 2]),
    captured=st.booleans(),
)


@given(BATCHES, st.sampled_from(sorted(CARDS)))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_sharing_never_loses(batch: Batch, name: str) -> None:
    card = CARDS[name]
    shared, alone = (plan_of(batch, card, share=share) for share in (True, False))
    if shared.shared.num_programs:
        assert seconds_of(shared, batch, card) <= (1 + MAX_LOSS) * seconds_of(alone, batch, card)


@pytest.mark.parametrize(("num_sharers", "prefix_blocks", "gain"), [(16, 128, 2), (64, 32, 2.5), (256, 128, 6)])
@pytest.mark.parametrize("captured", [False, True])
def test_what_sharing_gains(num_sharers: int, prefix_blocks: int, gain: float, captured: bool) -> None:
    """Of a batch that is nothing but sharers, in the shape of Llama-3.1-8B on an H200."""
    batch = Batch(num_sharers, prefix_blocks, num_sharers, 0, 64, 8, 4, 2, captured)
    card = CARDS["H200"]
    shared, alone = (seconds_of(plan_of(batch, card, share=share), batch, card) for share in (True, False))
    assert alone / shared >= gain
