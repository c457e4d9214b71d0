"""RMS norms of rows, of rows added to the residual stream, and of the heads of queries or keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton.configs import num_warps_for


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < SIZE
    values = tl.load(x + row * x_stride + place, mask=exists, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        sums = values + tl.load(residual + row * residual_stride + place, mask=exists, other=0.0).to(tl.float32)
        rounded = sums.to(residual.dtype.element_ty)
        tl.store(residual + row * residual_stride + place, rounded, mask=exists)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    normed = values * scale * tl.load(weight + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + place, normed.to(out.dtype.element_ty), mask=exists)


@triton.jit
def rms_norm_heads_kernel(
    x, weight, x_stride, eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, BLOCK)
    exists = (head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    place = x + tl.program_id(0).to(tl.int64) * x_stride + head[:, None] * HEAD_DIM + dim[None, :]
    values = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / HEAD_DIM + eps)
    weights = tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(place, (values * scale[:, None] * weights[None, :]).to(x.dtype.element_ty), mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, residual, weight, eps)


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(num_rows,)](
            x,
            residual,
            weight,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            SIZE=size,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=num_warps_for(block),
        )
    return out


def rms_norm_heads_(x: Tensor, weight: Tensor, eps: float) -> None:
    num_tokens, num_heads, head_dim = x.shape
    if not num_tokens:
        return
    heads = min(8, triton.next_power_of_2(num_heads))
    rms_norm_heads_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x,
        weight,
        x.stride(0),
        eps,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HEADS=heads,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
