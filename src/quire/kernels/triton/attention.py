"""Paged attention: one kernel for decode, prefill and mixed batches, and one that merges split results.

A program takes one item of a work list for one KV head: a run of new tokens, whose query heads are packed as rows of
one matrix, so that each key is read once for all of them. It reads the item's keys tile by tile. A tile lies in one
block, so its address is one block number, which is loaded a tile ahead to keep the copies of keys and values in flight.
Only tiles at the edges of the visible keys are masked.

Softmax runs in base 2 with the running maximum of Milakov and Gimelshein (arXiv 1805.02867); parts of the keys are
merged by the logarithms of their sums, as in Flash-Decoding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.gpu_plan import GpuAttentionPlan, WorkList
from quire.kernels.interface import AttentionParams, AttentionPlan, KVLayer
from quire.kernels.triton.configs import INTERPRETED, architecture_of, attention_config, compute_dtype

_LOG2_E = tl.constexpr(1.4426950408889634)
MERGE_PARTS = 8
"""Parts of one token that are merged at a time."""
MERGE_WARPS = 4
_MIN_DOT = 16
"""Least length of the sums that matrix units compute."""


@triton.jit
def _attend_tiles(
    queries,
    acc,
    peak,
    total,
    k_head,
    v_head,
    table,
    key_begin,
    key_end,
    visible_end,
    position,
    slope,
    scale,
    window,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend to the keys from `key_begin` to `key_end`; with MASKED, each row sees only the keys visible to it."""
    BLOCK_D: tl.constexpr = queries.shape[1]
    offset_in_tile = tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_D)
    inside = offset_in_tile[:, None] * HEAD_DIM + dim[None, :]
    precision: tl.constexpr = "ieee" if queries.dtype == tl.float32 else "tf32"
    block = tl.load(table + key_begin // BLOCK_SIZE, mask=key_begin < key_end, other=0)
    for start in tl.range(key_begin, key_end, TILE, num_stages=STAGES):
        following = tl.load(table + (start + TILE) // BLOCK_SIZE, mask=start + TILE < key_end, other=0)
        place = block.to(tl.int64) * BLOCK_STRIDE + (start % BLOCK_SIZE) * HEAD_DIM
        key = start + offset_in_tile
        if MASKED:
            # Slots past the sequence may hold anything, even NaN, and 0 x NaN is NaN.
            stored = (key < visible_end)[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(k_head + place + inside, mask=stored, other=0.0)
            values = tl.load(v_head + place + inside, mask=stored, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            keys = tl.load(k_head + place + inside, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            values = tl.load(v_head + place + inside, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            keys = tl.load(k_head + place + inside)
            values = tl.load(v_head + place + inside)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)

        scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        if SOFTCAP > 0:
            # tanh by an exponential, which is right even where it overflows to infinity.
            scores = SOFTCAP * _LOG2_E * (1 - 2 / (tl.exp2(scores * (2 * _LOG2_E / SOFTCAP)) + 1))
        if HAS_SLOPES:
            scores += (slope[:, None] * _LOG2_E) * (key[None, :] - position[:, None])
        if MASKED:
            visible = (key[None, :] <= position[:, None]) & (key < visible_end)[None, :]
            if HAS_WINDOW:
                visible &= key[None, :] > position[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet has no peak to subtract.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores - shift[:, None])
        faded = tl.exp2(peak - shift)
        total = total * faded + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * faded[:, None], input_precision=precision)
        peak = new_peak
        block = following
    return acc, peak, total


@triton.jit(do_not_specialize=["window"])
def attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partials,
    partial_lse,
    slopes,
    items,
    count,
    gathered,
    block_tables,
    k_scale,
    v_scale,
    q_stride,
    scale,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    SCALED: tl.constexpr,
    GATHERED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One item for one KV head. Without a soft cap, `scale` includes the factor to base 2."""
    item = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    if item >= tl.load(count):
        return
    work = items + item * 8
    first_token = tl.load(work)
    num_tokens = tl.load(work + 1)
    first_position = tl.load(work + 2)
    key_begin = tl.load(work + 3)
    key_end = tl.load(work + 4)
    table = block_tables + tl.load(work + 5)
    first_place = tl.load(work + 6)

    row = tl.arange(0, ROWS)
    index = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = index < num_tokens
    dim = tl.arange(0, BLOCK_D)
    if GATHERED:
        entry = gathered + (first_token + index) * 4
        token = tl.load(entry, mask=live, other=0).to(tl.int64)
        place = tl.load(entry + 1, mask=live, other=0).to(tl.int64)
        position = tl.load(entry + 2, mask=live, other=0)
        last_position = tl.max(position, 0)
    else:
        token = (first_token + index).to(tl.int64)
        place = (first_place + index).to(tl.int64)
        position = first_position + index
        last_position = first_position + num_tokens - 1
    exists = live[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + token[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=exists, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    queries = queries.to(COMPUTE)
    value_scale = 1.0
    if SCALED:
        scale *= tl.load(k_scale + kv_head)
        value_scale = tl.load(v_scale + kv_head)
    slope = tl.zeros([ROWS], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head, mask=live, other=0.0).to(tl.float32)

    # The window hides keys before `full_begin` from some rows; keys from `full_end` on are in some rows' future.
    full_begin = key_begin
    if HAS_WINDOW:
        key_begin = tl.maximum(key_begin, (first_position - window + 1) // TILE * TILE)
        full_begin = tl.maximum(key_begin, tl.cdiv(last_position - window + 1, TILE) * TILE)
        full_begin = tl.minimum(full_begin, tl.cdiv(key_end, TILE) * TILE)
    full_end = tl.maximum(full_begin, tl.minimum(key_end, first_position + 1) // TILE * TILE)

    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    k_head = k_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    v_head = v_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_WINDOW:
        acc, peak, total = _attend_tiles(
            queries, acc, peak, total, k_head, v_head, table, key_begin, full_begin, key_end, position, slope, scale,
            window, BLOCK_STRIDE, HEAD_DIM, BLOCK_SIZE, TILE, 1, True, HAS_WINDOW, SOFTCAP, HAS_SLOPES, UPCAST,
        )  # fmt: skip
    acc, peak, total = _attend_tiles(
        queries, acc, peak, total, k_head, v_head, table, full_begin, full_end, key_end, position, slope, scale,
        window, BLOCK_STRIDE, HEAD_DIM, BLOCK_SIZE, TILE, STAGES, False, HAS_WINDOW, SOFTCAP, HAS_SLOPES, UPCAST,
    )  # fmt: skip
    acc, peak, total = _attend_tiles(
        queries, acc, peak, total, k_head, v_head, table, full_end, key_end, key_end, position, slope, scale,
        window, BLOCK_STRIDE, HEAD_DIM, BLOCK_SIZE, TILE, 1, True, HAS_WINDOW, SOFTCAP, HAS_SLOPES, UPCAST,
    )  # fmt: skip

    result = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    if GATHERED or first_place >= 0:
        at = place * (NUM_KV_HEADS * GROUP) + head
        tl.store(partials + at[:, None] * HEAD_DIM + dim[None, :], result, mask=exists)
        lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(partial_lse + at, lse, mask=live)
    else:
        at = token * (NUM_KV_HEADS * GROUP) + head
        tl.store(out + at[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=exists)


@triton.jit
def merge_kernel(
    out,
    partials,
    partial_lse,
    merges,
    count,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head of one token: the mean of its parts, weighted by the sums that their softmaxes divided by."""
    merge = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    if merge >= tl.load(count):
        return
    token = tl.load(merges + merge * 4)
    first_place = tl.load(merges + merge * 4 + 1)
    num_parts = tl.load(merges + merge * 4 + 2)
    stride = tl.load(merges + merge * 4 + 3)
    dim = tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (first_place + part * stride).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(partial_lse + at, mask=part < num_parts, other=float("-inf"))
        exists = (part < num_parts)[:, None] & (dim < HEAD_DIM)[None, :]
        results = tl.load(partials + at[:, None] * HEAD_DIM + dim[None, :], mask=exists, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse - shift)
        faded = tl.exp2(peak - shift)
        total = total * faded + tl.sum(weights, 0)
        acc = acc * faded + tl.sum(results * weights[:, None], 0)
        peak = new_peak
    result = acc / tl.where(total > 0, total, 1.0)
    at = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + at + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def paged_attention(q: Tensor, kv: KVLayer, plan: AttentionPlan, params: AttentionParams) -> Tensor:
    """q [T, num_heads, D], whose first dimension may have any stride -> [T, num_heads, D]."""
    assert isinstance(plan, GpuAttentionPlan)
    if plan.window and not 0 < params.window <= plan.window:
        raise ValueError(f"window: expected 1 to {plan.window}, what the plan was made for, found {params.window}")
    if kv.is_latent or params.sinks is not None:
        raise ValueError("kv, sinks: these kernels have neither latent layers nor sinks; quire.kernels.sdpa has both")
    _, num_kv_heads, block_size, head_dim = kv.keys.shape
    num_heads = q.shape[1]
    if q.shape[2] != head_dim or num_heads % num_kv_heads or q.stride(1) != head_dim or q.stride(2) != 1:
        raise ValueError(
            f"q: expected [T, {num_kv_heads} x n, {head_dim}] with heads next to each other, "
            f"found {list(q.shape)} with strides {list(q.stride())}"
        )
    if kv.keys.element_size() == 1 and architecture_of(q.device) < 89:
        raise ValueError("k_cache: float8 needs a GPU of compute capability 8.9 or higher; use bfloat16")
    if block_size % plan.tile:
        raise ValueError(f"k_cache: the plan was made for blocks of a multiple of {plan.tile}, found {block_size}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def attend(work: WorkList, gathered: bool) -> None:
        if not work.num_programs:
            return
        config = attention_config(work.num_rows, head_dim, plan.tile, architecture_of(q.device))
        attention_kernel[(work.num_programs * num_kv_heads,)](
            q,
            kv.keys,
            kv.values,
            out,
            plan.partials,
            plan.partial_lse,
            params.alibi_slopes,
            work.items,
            work.count,
            plan.gathered,
            plan.block_tables,
            kv.k_scale,
            kv.v_scale,
            q.stride(0),
            params.scale if params.softcap > 0 else params.scale * _LOG2_E.value,
            params.window,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=max(_MIN_DOT, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=block_size,
            ROWS=work.num_rows,
            TILE=config.tile,
            STAGES=config.num_stages,
            COMPUTE=compute_dtype(q.dtype, kv.keys.dtype),
            HAS_WINDOW=params.window > 0,
            SOFTCAP=params.softcap,
            HAS_SLOPES=params.alibi_slopes is not None,
            SCALED=kv.k_scale is not None,
            GATHERED=gathered,
            UPCAST=INTERPRETED,
            num_warps=config.num_warps,
        )

    attend(plan.narrow, gathered=False)
    attend(plan.wide, gathered=False)
    attend(plan.shared, gathered=True)
    if plan.num_merge_programs:
        merge_kernel[(plan.num_merge_programs * num_heads,)](
            out,
            plan.partials,
            plan.partial_lse,
            plan.merges,
            plan.num_merges,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            PARTS=MERGE_PARTS,
            num_warps=MERGE_WARPS,
        )
    return out
