"""Rotates queries and keys by their positions and writes new keys and values to their slots: each alone, or both in
one pass over the fused projection."""

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.interface import KVLayer

HEADS = 4
"""Heads of a program."""
NUM_WARPS = 4


@triton.jit
def _rotated(x, exists, cos, sin, head, pair, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the rotated dimensions of some heads of one token."""
    first = tl.load(x + head[:, None] * HEAD_DIM + pair[None, :], mask=exists, other=0.0).to(tl.float32)
    second = tl.load(x + head[:, None] * HEAD_DIM + pair[None, :] + HALF, mask=exists, other=0.0).to(tl.float32)
    return first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :]


@triton.jit
def _stored(values, scales, dtype: tl.constexpr):
    """Values as the cache stores them; those beyond its range become its largest number."""
    values = tl.div_rn(values, scales)
    if dtype == tl.float8e4nv:
        values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    elif dtype == tl.float16:
        values = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
    return values.to(dtype)


@triton.jit
def rotary_kv_kernel(
    q,
    k,
    v,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    slots,
    q_stride,
    k_stride,
    v_stride,
    k_scale,
    v_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATES: tl.constexpr,
    WRITES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Some heads of one token: the first programs take query heads, the others key and value heads.

    With WRITES, keys go to the cache; else they are rotated in place.
    """
    token = tl.program_id(0).to(tl.int64)
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS if ROTATES else 0
    pair = tl.arange(0, BLOCK_HALF)
    dim = tl.arange(0, BLOCK_D)
    if ROTATES:
        position = tl.load(positions + token).to(tl.int64)
        cos = tl.load(cos_sin + position * (2 * HALF) + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        sin = tl.load(cos_sin + position * (2 * HALF) + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        if tl.program_id(1) < QUERY_PROGRAMS:
            head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
            exists = (head < NUM_HEADS)[:, None] & (pair < HALF)[None, :]
            x = q + token * q_stride
            first, second = _rotated(x, exists, cos, sin, head, pair, HEAD_DIM, HALF)
            place = head[:, None] * HEAD_DIM + pair[None, :]
            tl.store(x + place, first.to(q.dtype.element_ty), mask=exists)
            tl.store(x + place + HALF, second.to(q.dtype.element_ty), mask=exists)
            return
    head = (tl.program_id(1) - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)
    x = k + token * k_stride
    to = x
    row = head * HEAD_DIM
    k_scales = tl.full([HEADS, 1], 1.0, tl.float32)
    v_scales = k_scales
    if SCALED:
        k_scales = tl.load(k_scale + head, mask=head < NUM_KV_HEADS, other=1.0)[:, None]
        v_scales = tl.load(v_scale + head, mask=head < NUM_KV_HEADS, other=1.0)[:, None]
    if WRITES:
        slot = tl.load(slots + token)
        if slot < 0:
            return
        row = head * (BLOCK_SIZE * HEAD_DIM)
        start = (slot // BLOCK_SIZE).to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
        start += (slot % BLOCK_SIZE) * HEAD_DIM
        to = k_cache + start
        exists = (head < NUM_KV_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(v + token * v_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=exists, other=0.0)
        values = _stored(values.to(tl.float32), v_scales, v_cache.dtype.element_ty)
        tl.store(v_cache + start + row[:, None] + dim[None, :], values, mask=exists)
        # The dimensions of keys that are not rotated.
        exists &= (dim >= (2 * HALF if ROTATES else 0))[None, :]
        keys = tl.load(x + head[:, None] * HEAD_DIM + dim[None, :], mask=exists, other=0.0)
        keys = _stored(keys.to(tl.float32), k_scales, k_cache.dtype.element_ty)
        tl.store(to + row[:, None] + dim[None, :], keys, mask=exists)
    if ROTATES:
        exists = (head < NUM_KV_HEADS)[:, None] & (pair < HALF)[None, :]
        first, second = _rotated(x, exists, cos, sin, head, pair, HEAD_DIM, HALF)
        tl.store(to + row[:, None] + pair[None, :], _stored(first, k_scales, to.dtype.element_ty), mask=exists)
        tl.store(to + row[:, None] + pair[None, :] + HALF, _stored(second, k_scales, to.dtype.element_ty), mask=exists)


def rotary_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    _launch(q, k, None, positions, cos_sin, None, None)


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    _launch(None, k, v, None, None, kv, slots)


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, kv: KVLayer, slots: Tensor
) -> None:
    _launch(q, k, v, positions, cos_sin, kv, slots)


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    kv: KVLayer | None,
    slots: Tensor | None,
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return
    num_heads = 0 if q is None else q.shape[1]
    half = 0 if cos_sin is None else cos_sin.shape[1] // 2
    rotary_kv_kernel[(num_tokens, triton.cdiv(num_heads, HEADS) + triton.cdiv(num_kv_heads, HEADS))](
        q,
        k,
        v,
        positions,
        cos_sin,
        None if kv is None else kv.keys,
        None if kv is None else kv.values,
        slots,
        0 if q is None else q.stride(0),
        k.stride(0),
        0 if v is None else v.stride(0),
        None if kv is None else kv.k_scale,
        None if kv is None else kv.v_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
        BLOCK_SIZE=1 if kv is None else kv.keys.shape[2],
        HEADS=HEADS,
        ROTATES=cos_sin is not None,
        WRITES=kv is not None,
        SCALED=kv is not None and kv.k_scale is not None,
        num_warps=NUM_WARPS,
    )
